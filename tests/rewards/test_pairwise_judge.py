import asyncio

import pytest
import torch
from transformers import TrainerState

from trl_fdfo.media import Outputs
from trl_fdfo.rewards import PairwiseJudge, RewardFunctions


def brightness(image):
    return image.mean().item()


def images(*values):
    return torch.stack([torch.full((3, 4, 4), value) for value in values])


def score(judge, batch, prompts, branches, **columns):
    functions = RewardFunctions(judge)
    return functions(batch, prompts, TrainerState(), {"prompt": prompts, **columns}, branches)[:, 0]


def biased(first, second, prompts):
    """Prefers the brighter image, and the first one."""
    return [brightness(a) - brightness(b) + 5.0 for a, b in zip(first, second)]


def test_difference_of_the_rewards_is_the_preference():
    rewards = score(PairwiseJudge(biased), images(0.25, 0.75, 1.0, 0.5), ["x", "x", "y", "y"], 2)
    assert rewards.tolist() == [-0.25, 0.25, 0.25, -0.25]


def test_swapping_the_images_flips_the_sign_to_the_bit():
    a, b = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def odd(first, second, prompts):
        return (first * torch.linspace(0, 1, 8)).mean(dim=(1, 2, 3)).exp() / (second.square().mean(dim=(1, 2, 3)) + 0.1)

    prompts = [prompt for prompt in "pqrst" for _ in range(2)]
    judge = PairwiseJudge(odd)
    one = score(judge, torch.stack([a, b], dim=1).flatten(0, 1), prompts, 2)
    other = score(judge, torch.stack([b, a], dim=1).flatten(0, 1), prompts, 2)
    assert torch.equal(one.unflatten(0, (5, 2)).flip(1).flatten(), other)
    assert torch.equal(one[0::2], -one[1::2]) and torch.equal(one[0::2], -other[0::2])
    assert one.abs().min() > 1e-3


def test_judge_that_always_prefers_the_first_sees_no_difference():
    assert score(PairwiseJudge(lambda a, b, prompts: [7.0] * len(a)), images(0.1, 0.9), ["x"] * 2, 2).tolist() == [0, 0]


def test_a_judge_may_take_all_columns():
    taken = []

    def judge(first, second, prompts, **columns):
        taken.append(columns)
        return [brightness(a) - brightness(b) for a, b in zip(first, second)]

    rewards = score(PairwiseJudge(judge), images(0.25, 0.75, 1.0, 0.5), ["x", "x", "y", "y"], 2, label=[1, 1, 2, 2])
    assert rewards.tolist() == [-0.25, 0.25, 0.25, -0.25]
    assert [(each["label"], each["prompt"]) for each in taken] == 2 * [([1, 2], ["x", "y"])]
    assert taken[0].keys() == {"label", "prompt", "trainer_state"}


def test_a_judge_of_sounds():
    def louder(first, second, prompts, sampling_rate, label):
        assert sampling_rate == 100 and label == ["l"]
        return (first - second).mean(dim=(1, 2))

    functions = RewardFunctions(PairwiseJudge(louder, of="audio"))
    functions.expect(Outputs(("audio",), sampling_rate=100))
    audio = torch.tensor([0.25, 0.75])[:, None, None].expand(2, 1, 9)
    rewards = functions(audio, ["x", "x"], TrainerState(), {"label": ["l", "l"]}, 2)
    assert rewards[:, 0].tolist() == [-0.25, 0.25]
    with pytest.raises(ValueError, match="'louder' scores audio, and the pipeline makes images"):
        functions.expect(Outputs(("images",)))
    with pytest.raises(ValueError, match="of='sound' of PairwiseJudge is nothing that a pipeline makes"):
        PairwiseJudge(louder, of="sound")


def test_three_branches_get_the_least_squares_rewards():
    batch = images(0.0, 0.25, 1.0)
    rewards = score(PairwiseJudge(biased), batch, ["x"] * 3, 3)
    # Consistent preferences are matched exactly.
    torch.testing.assert_close(rewards, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64) - 1.25 / 3)
    # A judge who runs in circles: a over b, b over c, c over a.
    circle = {(0.0, 0.25): 1.0, (0.25, 1.0): 1.0, (1.0, 0.0): 1.0}

    def circular(first, second, prompts):
        pairs = [(brightness(a), brightness(b)) for a, b in zip(first, second)]
        return [circle.get(pair, -1.0) for pair in pairs]

    torch.testing.assert_close(score(PairwiseJudge(circular), batch, ["x"] * 3, 3), torch.zeros(3, dtype=torch.float64))


def test_async_judge_is_asked_both_ways_at_once():
    running, most = 0, 0

    async def compare(first, second, prompts):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return biased(first, second, prompts)

    assert score(PairwiseJudge(compare), images(0.25, 0.75), ["x"] * 2, 2).tolist() == [-0.25, 0.25]
    assert most == 2


def test_judge_gets_columns_and_pil_images_and_the_end_of_rollouts():
    class Judge:
        image_type = "pil"
        ended = False

        def __call__(self, first, second, prompts, label, trainer_state=None):
            assert isinstance(trainer_state, TrainerState)
            assert [image.size for image in (*first, *second)] == [(4, 4)] * 4
            return [float(n) for n in label]

        def on_rollout_end(self):
            self.ended = True

    judge = Judge()
    functions = RewardFunctions(PairwiseJudge(judge))
    functions.check_columns(["prompt", "label"])
    with pytest.raises(ValueError, match="Reward 'Judge' needs the argument 'label'"):
        functions.check_columns(["prompt"])
    rewards = score(PairwiseJudge(judge), images(0, 1, 0, 1), ["x", "x", "y", "y"], 2, label=[1, 1, 3, 3])
    assert rewards.tolist() == [0, 0, 0, 0]
    functions.on_rollout_end()
    assert judge.ended


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (
            lambda first, second: [],
            r"compares by a callable \(first, second, prompts, \*\*columns\), and <lambda> takes",
        ),
        (lambda *images: [], r"and <lambda> takes \(\*images\)"),
        (lambda *, first, second, prompts: [], r"<lambda> takes \(\*, first, second, prompts\)"),
        (lambda a, b, prompts, num_generations: [], r"<lambda> has an argument 'num_generations', which a judge gets"),
    ],
)
def test_other_arguments_are_refused_at_once(compare, message):
    with pytest.raises(ValueError, match=message):
        PairwiseJudge(compare)


def test_no_opinion_and_nothing_to_compare():
    def unsure(first, second, prompts):
        return [None if prompt == "x" else 1.0 for prompt in prompts]

    rewards = score(PairwiseJudge(unsure), images(0, 1, 0, 1), ["x", "x", "y", "y"], 2)
    assert rewards.isnan().tolist() == [True, True, False, False]
    assert score(PairwiseJudge(biased), images(0, 1), ["x", "y"], 1).isnan().all()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], r"Reward 'compare' returned 1 values for 2 pairs: it must return one float per pair"),
        ([1.0, float("nan")], r"Reward 'compare' returned nan for the prompt 'y'"),
    ],
)
def test_bad_answers_name_the_judge_and_the_prompt(result, message):
    def compare(first, second, prompts):
        return result

    with pytest.raises(ValueError, match=message):
        score(PairwiseJudge(compare), images(0, 1, 0, 1), ["x", "x", "y", "y"], 2)
