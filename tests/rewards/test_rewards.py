import asyncio
import functools
import math
import threading
import time

import pytest
import torch
from conftest import EACH_DEVICE
from transformers import TrainerState

from trl_fdfo.media import Media, Outputs
from trl_fdfo.rewards import JPEGCompressibility, PairwiseJudge, RewardFunctions
from trl_fdfo.rewards.reward_functions import RewardError


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "a", "b", "b"]


def call(functions, weights=None, columns=None):
    return RewardFunctions(functions, weights)(IMAGES, PROMPTS, TrainerState(), columns or {"prompt": PROMPTS})


def test_one_value_per_image_and_function():
    def brightness(images, prompts):
        return images.mean(dim=(1, 2, 3))

    rewards = call([brightness, lambda images, prompts: [len(prompt) for prompt in prompts]])
    assert rewards.shape == (4, 2)
    torch.testing.assert_close(rewards[:, 0], IMAGES.mean(dim=(1, 2, 3)).double())
    assert (rewards[:, 1] == 1).all()


def test_names_are_told_apart():
    class Judge:
        def __call__(self, images, prompts):
            return [0.0] * 4

    names = RewardFunctions([Judge(), JPEGCompressibility(), lambda images: 0, lambda images: 1]).names
    assert names == ["Judge", "JPEGCompressibility", "<lambda>", "<lambda>_2"]


def test_scores_are_the_functions_of_single_images():
    def compare(first, second, prompts):
        return [0.0] * len(prompts)

    def score(images):
        return [0.0] * len(images)

    judge = PairwiseJudge(compare)
    assert RewardFunctions([judge, score]).scores == ["score"]
    assert RewardFunctions([functools.partial(judge), JPEGCompressibility()]).scores == ["JPEGCompressibility"]


def test_a_reward_gets_what_its_signature_names():
    seen = {}

    def narrow(images, label):
        seen["narrow"] = label
        return [0.0] * 4

    def wide(images, prompts, **kwargs):
        seen["wide"] = kwargs
        return [0.0] * 4

    call([narrow, wide], columns={"prompt": PROMPTS, "label": [1, 1, 2, 2]})
    assert seen["narrow"] == [1, 1, 2, 2]
    assert set(seen["wide"]) == {"prompt", "label", "trainer_state", "num_generations"}
    assert isinstance(seen["wide"]["trainer_state"], TrainerState)


def test_background_rewards_do_not_hold_up_the_caller():
    threads, order = [], []

    async def remote(images):
        order.append("remote starts")
        await asyncio.sleep(0.2)
        order.append("remote ends")
        return [1.0] * len(images)

    class Local:
        background = True

        def __call__(self, images, label):
            threads.append(threading.current_thread())
            time.sleep(0.1)
            order.append(f"local {label[0]}")
            return torch.full((len(images),), 2.0)

    functions = RewardFunctions([remote, Local(), lambda images: [3.0] * len(images)])
    start = time.perf_counter()
    pending = [
        functions.submit(IMAGES, PROMPTS, TrainerState(), {"prompt": PROMPTS, "label": [i] * 4}) for i in range(3)
    ]
    submitted = time.perf_counter() - start
    for batch in pending:
        batch.raise_errors()
        assert batch.result().tolist() == [[1.0, 2.0, 3.0]] * 4
    assert submitted < 0.1 and time.perf_counter() - start < 0.5
    # All remote calls at once; the local ones after each other, in a thread of their own.
    assert order.index("remote ends") > 2 and [name for name in order if "local" in name] == [
        f"local {i}" for i in range(3)
    ]
    assert len(set(threads)) == 1 and threads[0] is not threading.main_thread()


@pytest.mark.parametrize("background", [True, False])
def test_error_in_the_background_comes_at_the_next_batch(background):
    class Sync:
        def __call__(self, images, prompts):
            raise RuntimeError("no more memory")

    class Async:
        async def __call__(self, images, prompts):
            raise RuntimeError("no more memory")

    Sync.background = background
    functions = RewardFunctions(Sync() if background else Async())
    pending = functions.submit(IMAGES, PROMPTS, TrainerState(), {})
    with pytest.raises(RuntimeError, match="no more memory") as raised:
        for _ in range(100):
            pending.raise_errors()
            time.sleep(0.02)
    assert f"the reward '{functions.names[0]}' on a batch of 4 images, the first for 'a'" in raised.value.__notes__[0]


def test_hook_at_the_end_of_a_rollout():
    class Reward:
        ended = 0

        def __call__(self, images):
            return [0.0] * len(images)

        def on_rollout_end(self):
            self.ended += 1

    reward = Reward()
    RewardFunctions([lambda images: [0.0] * len(images), functools.partial(reward)]).on_rollout_end()
    assert reward.ended == 1


def test_async_rewards_run_at_the_same_time():
    def slow(value):
        async def reward(images, prompts):
            await asyncio.sleep(0.3)
            return [value] * 4

        return reward

    start = time.perf_counter()
    rewards = call([slow(1.0), slow(2.0), lambda images: [3.0] * 4])
    assert time.perf_counter() - start < 0.55
    assert rewards[0].tolist() == [1.0, 2.0, 3.0]


def test_rewards_in_a_notebook_whose_event_loop_runs():
    async def reward(images):
        return [1.0] * len(images)

    async def cell():
        return call([reward, lambda images: [2.0] * len(images)])

    assert asyncio.run(cell())[0].tolist() == [1.0, 2.0]


def test_image_type_is_seen_through_partial():
    def sizes(images, scale):
        return [scale * image.width for image in images]

    sizes.image_type = "pil"
    functions = RewardFunctions(functools.partial(sizes, scale=2))
    assert functions.names == ["sizes"]
    assert functions(IMAGES, PROMPTS, TrainerState(), {})[:, 0].tolist() == [32.0] * 4
    sizes.image_type = "PIL"
    with pytest.raises(ValueError, match="Reward 'sizes' has image_type='PIL'; it must be 'pt' or 'pil'"):
        RewardFunctions(sizes)


def test_videos_are_lists_of_frames_for_a_pil_reward():
    def frames(images):
        return [len(video) for video in images]

    frames.image_type = "pil"
    videos = torch.rand(2, 5, 3, 8, 8)
    assert RewardFunctions(frames)(videos, ["a", "b"], TrainerState(), {})[:, 0].tolist() == [5.0, 5.0]


def test_columns_are_checked_before_any_call():
    def needs(images, caption, style="oil"):
        return [0.0] * len(images)

    functions = RewardFunctions(needs)
    functions.check_columns(["caption"])
    with pytest.raises(
        ValueError, match="'needs' needs the argument 'caption', and train_dataset has no such.*prompts"
    ):
        functions.check_columns(["prompt"])
    with pytest.raises(ValueError, match="eval_dataset has a column 'images'"):
        functions.check_columns(["images", "caption"], "eval_dataset")
    with pytest.raises(ValueError, match="Reward 'max' does not say which arguments it takes"):
        RewardFunctions(max)
    with pytest.raises(ValueError, match="reward_fn has the class dict: construct it, dict"):
        RewardFunctions(dict)
    with pytest.raises(ValueError, match="eval_reward_fn='vlm' is a str.*load_reward\\('vlm'\\)"):
        RewardFunctions("vlm", argument="eval_reward_fn")


def test_error_of_a_reward_says_whose_it_is():
    def broken(images):
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory") as raised:
        call(broken)
    assert raised.value.__notes__ == ["Raised by the reward 'broken' on a batch of 4 images, the first for 'a'."]


def test_none_does_not_apply():
    functions = RewardFunctions(
        [lambda images: [1.0, None, 2.0, 4.0], lambda images: [10.0, 30.0, None, None]], [1.0, 0.5]
    )
    rewards = functions(IMAGES, PROMPTS, TrainerState(), {})
    assert rewards.isnan().tolist() == [[False, False], [True, False], [False, True], [False, True]]
    # The first reward misses a branch of prompt a, the second both of prompt b.
    total = functions.total(rewards.unflatten(0, (2, 2)))
    assert total.tolist() == [[5.0, 15.0], [2.0, 4.0]]
    nothing = functions.total(torch.full((1, 2, 2), math.nan))
    assert nothing.isnan().all()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], r"Reward 'bad' returned 2 values for 4 images"),
        (torch.zeros(4, 2), r"Reward 'bad' returned a tensor of shape \[4, 2\] for 4 images: .*, shape \[4\]"),
        (0.5, r"Reward 'bad' returned 0.5, a float: it must return one float per image"),
        (torch.tensor(0.5), r"Reward 'bad' returned 0.5, a Tensor"),
        (None, r"Reward 'bad' returned None, a NoneType"),
        ([1.0, 1.0, math.nan, 1.0], r"Reward 'bad' returned nan for the prompt 'b': a reward must be finite"),
        ([1.0, math.inf, 1.0, 1.0], r"Reward 'bad' returned inf for the prompt 'a'"),
        (torch.tensor([0.0, 0.0, 0.0, math.nan]), r"Reward 'bad' returned nan for the prompt 'b'"),
        ({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, r"Reward 'bad' returned a dict: it must return one float per image"),
        ("1234", r"Reward 'bad' returned a str"),
        (["1.5", 1.0, 1.0, 1.0], r"Reward 'bad' returned '1.5', which is not a number, for the prompt 'a'"),
        (["good", 1.0, 1.0, 1.0], r"Reward 'bad' returned 'good', which is not a number, for the prompt 'a'"),
    ],
)
def test_bad_values_name_the_reward_and_the_prompt(result, message):
    def bad(images, prompts):
        return result

    with pytest.raises(ValueError, match=message):
        call(bad)


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ([], None, "reward_fn is empty"),
        ("pickscore", None, "reward_fn='pickscore' is a str, not a callable"),
        ([print], [1.0, 2.0], r"reward_weights has 2 values for 1 reward function\(s\)"),
    ],
)
def test_bad_functions_are_refused(functions, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(functions, weights)


@EACH_DEVICE
def test_rewards_on_another_device_and_of_another_type(device):
    rewards = call([lambda images: torch.arange(4, device=device), lambda images: torch.zeros(4, dtype=torch.bool)])
    assert rewards.device.type == "cpu" and rewards[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_integers_and_bfloat16_are_numbers():
    rewards = call([lambda images: torch.arange(4), lambda images: torch.full((4,), 0.5, dtype=torch.bfloat16)])
    assert rewards.dtype == torch.float64 and rewards.tolist() == [[i, 0.5] for i in range(4)]


# What a pipeline makes ------------------------------------------------------------------------------------------------

VIDEO, AUDIO = IMAGES[:, None].expand(4, 3, 3, 16, 16), torch.rand(4, 1, 20) - 0.5
BOTH = Outputs(("images", "videos", "audio"), frame_rate=24.0, sampling_rate=8000)


def loudness(audio):
    return audio.square().mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (IMAGES, {"images"}),
        (VIDEO, {"images", "videos"}),
        (AUDIO, {"audio"}),
        (Media(VIDEO, AUDIO), {"images", "videos", "audio"}),
    ],
)
def test_a_reward_gets_what_there_is_by_its_name(made, names):
    seen = {}

    def wide(**kwargs):
        seen.update(kwargs)
        return [0.0] * 4

    def narrow(prompts, images=None, audio=None):
        assert (images is not None) is ("images" in names) and (audio is not None) is ("audio" in names)
        return [0.0] * 4

    RewardFunctions([wide, narrow])(made, PROMPTS, TrainerState(), {})
    assert seen.keys() - {"prompts", "trainer_state", "num_generations"} == names
    expected = {"images": made, "videos": VIDEO, "audio": AUDIO} | (made._asdict() if isinstance(made, Media) else {})
    assert all(torch.equal(seen[name], expected[name]) for name in names)


def test_rates_are_given_where_they_are_known():
    def reward(audio, sampling_rate, frame_rate=1.0):
        return [sampling_rate * frame_rate] * 4

    functions = RewardFunctions(reward)
    functions.expect(BOTH)
    assert functions(Media(VIDEO, AUDIO), PROMPTS, TrainerState(), {})[0].tolist() == [8000 * 24.0]
    functions.expect(Outputs(("audio",), sampling_rate=100))
    assert functions(AUDIO, PROMPTS, TrainerState(), {})[0].tolist() == [100.0]


def test_pil_frames_stand_beside_audio():
    def reward(videos, audio):
        return [len(video) * sound.shape[-1] for video, sound in zip(videos, audio)]

    reward.image_type = "pil"
    assert RewardFunctions(reward)(Media(VIDEO, AUDIO), PROMPTS, TrainerState(), {})[:, 0].tolist() == [60.0] * 4


@pytest.mark.parametrize(
    ("reward", "outputs", "message"),
    [
        (loudness, Outputs(("images",)), "Reward 'loudness' scores audio, and the pipeline makes images: take"),
        (
            JPEGCompressibility(),
            Outputs(("audio",)),
            "'JPEGCompressibility' scores images, and the pipeline makes audio",
        ),
        (lambda videos: 0, Outputs(("images",)), "scores videos, and the pipeline makes images"),
        (lambda prompts, audio=None: 0, Outputs(("images",)), "takes prompts, audio, and so sees nothing of.*, images"),
        (lambda images, **columns: 0, Outputs(("audio",)), "scores images, and the pipeline makes audio"),
        (
            lambda audio, sampling_rate: 0,
            Outputs(("audio",)),
            "needs 'sampling_rate', and the pipeline.*give the argument a default, sampling_rate=None",
        ),
    ],
)
def test_a_reward_of_what_is_not_made_is_refused(reward, outputs, message):
    functions = RewardFunctions(reward)
    with pytest.raises(ValueError, match=message):
        functions.expect(outputs)
    if outputs.kinds == ("images",):
        functions.expect(BOTH)


def test_errors_of_rewards_of_audio_speak_of_sounds():
    functions = RewardFunctions(lambda audio: [1.0])
    with pytest.raises(ValueError, match="returned 1 values for 4 sounds: it must return one float per sound"):
        functions(AUDIO, PROMPTS, TrainerState(), {})


def test_audio_is_left_as_it_is():
    def louder(images, audio):
        audio *= 2
        return [0.0] * 4

    with pytest.raises(RewardError, match=r"The audio was changed in place: a reward works on `audio.clone\(\)`"):
        RewardFunctions(louder)(Media(VIDEO, AUDIO.clone()), PROMPTS, TrainerState(), {})


def test_gradients_of_images_and_audio():
    functions = RewardFunctions([loudness, lambda images: images.mean(dim=(1, 2, 3))], [2.0, 3.0])
    gradient = functions.gradient(Media(IMAGES, AUDIO), PROMPTS, TrainerState(), {}, 2)
    torch.testing.assert_close(gradient.audio, 2 * 2 * AUDIO / 20)
    torch.testing.assert_close(gradient.images, torch.full_like(IMAGES, 3 / IMAGES[0].numel()))
    with pytest.raises(ValueError, match=r"returned a list without a gradient to its audio: .* \[4\]") as raised:
        RewardFunctions(lambda audio: [0.0] * 4).gradient(AUDIO, PROMPTS, TrainerState(), {}, 2)
    assert (
        "set differentiable = False on it" in str(raised.value) and "the reward '<lambda>'" in raised.value.__notes__[0]
    )


def test_gradients_leave_out_the_rewards_that_have_none():
    def mean(images):
        return images.mean(dim=(1, 2, 3))

    def declared(images):
        raise AssertionError("not to be called")

    declared.differentiable = False

    async def asynchronous(images):
        raise AssertionError("not to be called")

    class Asynchronous:
        async def __call__(self, images):
            raise AssertionError("not to be called")

    def in_background(images):
        raise AssertionError("not to be called")

    in_background.background = True

    class PIL:
        """Like the packaged ones: of PIL images, or of tensors if a gradient is asked for."""

        image_type, differentiable = "pil", True

        def __call__(self, images):
            return 2 * images.sum(dim=(1, 2, 3))

    without = [JPEGCompressibility(), declared, asynchronous, Asynchronous(), functools.partial(Asynchronous())]
    without += [in_background, PairwiseJudge(lambda first, second, prompts: [0.0] * len(prompts))]
    functions = RewardFunctions([mean, PIL(), functools.partial(mean), torch.nn.Flatten(0), *without])
    assert functions.differentiable == ["mean", "PIL", "mean_2", "Flatten"]
    functions = RewardFunctions([mean, PIL(), *without], [3.0, 0.5, *[1.0] * len(without)])
    gradient = functions.gradient(IMAGES, PROMPTS, TrainerState(), {}, 2)
    torch.testing.assert_close(gradient, torch.full_like(IMAGES, 3 / IMAGES[0].numel() + 1))
    assert not IMAGES.requires_grad


def test_the_total_of_some_rewards():
    functions = RewardFunctions([lambda images: 0, JPEGCompressibility()], [2.0, 3.0])
    rewards = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[1.0, math.nan], [2.0, 2.0]]], dtype=torch.float64)
    assert functions.total(rewards, ["JPEGCompressibility"])[0].tolist() == [3.0, 6.0]
    assert functions.total(rewards, ["JPEGCompressibility"])[1].isnan().all()
    assert (
        functions.total(rewards, functions.names).tolist()
        == functions.total(rewards).tolist()
        == [[5.0, 10.0], [2.0, 4.0]]
    )
    assert functions.total(rewards, []).isnan().all()
