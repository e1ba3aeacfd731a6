"""Prompts whose images tied are drawn less often, if the run asks for that."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from checkpoint_contents import assert_equal, contents
from conftest import logged, trained_weights, warnings_of_the_package
from datasets import Dataset
from PIL import Image
from safetensors.numpy import save_file
from tiny_runs import PROMPTS, redness

from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.planning.without_weights import planned
from trl_fdfo.training.prompt_sampling import InformativePrompts, row_keys
from trl_fdfo.training.prompts import load_prompts, rollout_rows


TIED = PROMPTS[:3]  # half of them


def sparse(images, prompts):
    return redness(images, prompts).where(torch.tensor([prompt not in TIED for prompt in prompts]), 0.25)


# The draw -------------------------------------------------------------------------------------------------------------


def drawn_with(ties: list[int], passes: int) -> np.ndarray:
    """How often each row came in some passes, if it had this many ties in all of them."""
    stream = InformativePrompts(range(len(ties)), seed=0)
    stream.ties = np.array(ties)
    counts = np.zeros(len(ties), dtype=int)
    while stream.position < passes * len(ties):
        counts[stream.draw(1)] += 1
        stream.position = stream._end
    return counts


@pytest.mark.parametrize(("num_rows", "count"), [(10, 4), (3, 8), (7, 7)])
def test_as_long_as_none_has_tied_the_order_is_that_of_a_uniform_run(num_rows, count):
    stream = InformativePrompts(range(num_rows), seed=5)
    for rollout in range(9):
        assert stream.draw(count) == rollout_rows(num_rows, count, rollout, seed=5)
        stream.see([False] * count)


def test_a_row_comes_in_a_pass_with_a_chance_of_one_in_its_ties_and_one():
    counts = drawn_with([0, 1, 3, 9], passes=2000)
    assert counts[0] in (2000, 2001)  # the pass after them has begun
    # Within three standard deviations of a binomial variable.
    for count, chance in zip(counts[1:], (1 / 2, 1 / 4, 1 / 10)):
        assert abs(count - 2000 * chance) < 3 * (2000 * chance * (1 - chance)) ** 0.5


def test_a_row_comes_at_most_once_in_a_pass_and_in_another_order_in_each():
    stream = InformativePrompts(range(50), seed=0)
    stream.ties[::2] = 1
    passes = [[], []]
    while stream.position < 100:
        passes[stream.position // 50] += stream.draw(1)
        stream.position = stream._end
    for rows in passes:
        assert len(rows) == len(set(rows)) and set(range(1, 50, 2)) <= {*passes[0], *passes[1]}
    odd = [[row for row in rows if row % 2] for rows in passes]
    assert odd[0] != odd[1]


def test_in_the_long_run_a_row_comes_as_often_as_its_images_differ():
    differs = np.repeat([1.0, 0.5, 0.2, 0.1], 50)
    luck, stream = np.random.default_rng(0), InformativePrompts(range(200), seed=0)
    counts = np.zeros(200)
    while stream.position < 200 * 800:
        is_begin = stream.position < 200 * 200
        rows = stream.draw(50)
        stream.see((luck.random(50) >= differs[rows]).tolist())
        if not is_begin:
            np.add.at(counts, rows, 1)
    assert (counts / 600).reshape(4, 50).mean(axis=1) == pytest.approx([1.0, 0.5, 0.2, 0.1], rel=0.04)


def test_a_row_that_always_ties_still_comes_and_counts_again_once_it_differs():
    stream = InformativePrompts(range(4), seed=0)
    came = 0
    for _ in range(200):
        rows = stream.draw(3)
        came += rows.count(0)
        stream.see([row == 0 for row in rows])
    # About one pass per rollout: the n-th draw waits for n passes, so that 200 passes have about sqrt(2 x 200) = 20.
    assert came == stream.ties[0] and 15 <= came <= 25
    assert stream.ties.tolist()[1:] == [0, 0, 0]
    while 0 not in stream.draw(3):
        stream.see([False] * 3)
    stream.see([False] * 3)
    assert stream.ties.tolist() == [0, 0, 0, 0]


def test_several_draws_of_a_row_in_a_rollout_count_in_their_order():
    stream = InformativePrompts(range(2), seed=0)
    rows = stream.draw(6)
    assert sorted(rows) == [0, 0, 0, 1, 1, 1]
    tied = {0: iter([False, True, True]), 1: iter([True, True, False])}
    stream.see([next(tied[row]) for row in rows])
    assert stream.ties.tolist() == [2, 0]
    assert stream.chances.tolist() == [1 / 3, 1]


def test_nothing_counts_until_the_rewards_are_seen():
    stream = InformativePrompts(range(20), seed=0)
    first = stream.draw(7)
    assert stream.draw(7) == first and stream.position == 0 and not stream.ties.any()
    stream.see([True] * 7)
    assert stream.draw(7) != first and stream.position == 7 and stream.ties.sum() == 7


def test_a_saved_stream_goes_on(tmp_path):
    stream = InformativePrompts(range(20), seed=0)
    for _ in range(5):
        stream.see([row < 12 for row in stream.draw(9)])
    stream.save(tmp_path)
    again = InformativePrompts(range(20), seed=0)
    again.load(tmp_path, position=0)
    assert again.draw(30) == stream.draw(30)


def test_a_checkpoint_without_counts_goes_on_as_if_none_had_tied(tmp_path, caplog):
    stream = InformativePrompts(range(20), seed=0)
    stream.ties[3] = 2
    stream.load(tmp_path, position=12)
    assert stream.draw(4) == rollout_rows(20, 4, 3, seed=0)
    assert "does not say how often 20 of the 20 prompts have tied: they are drawn as if they never had" in caplog.text


def test_the_file_of_an_older_version_counts_for_nothing(tmp_path, caplog):
    save_file(
        {"ties": np.ones(20, dtype=np.int64), "position": np.array([12])}, tmp_path / InformativePrompts.FILE_NAME
    )
    stream = InformativePrompts(range(20), seed=0)
    stream.load(tmp_path, position=12)
    assert stream.position == 12 and not stream.ties.any() and "20 of the 20 prompts" in caplog.text


def test_counts_follow_their_prompts_into_another_dataset(tmp_path, caplog):
    stream = InformativePrompts([10, 11, 12, 13], seed=0)
    stream.ties[:] = [3, 0, 5, 1]
    stream.position = 77
    stream.save(tmp_path)
    other = InformativePrompts([13, 14, 12, 10], seed=0)
    other.load(tmp_path, position=12)
    assert other.ties.tolist() == [1, 0, 5, 3] and other.position == 12
    assert "does not say how often 1 of the 4 prompts have tied" in caplog.text
    fewer = InformativePrompts([12], seed=0)
    fewer.load(tmp_path, position=5)
    assert fewer.ties.tolist() == [5] and fewer.position == 5


def test_rows_that_are_the_same_count_as_one_prompt(tmp_path):
    stream = InformativePrompts([7, 8, 7], seed=0)
    assert stream.num_prompts == 2 and sorted(stream.draw(6)) == [0, 0, 1, 1, 2, 2]
    stream.see([row != 1 for row in stream._rows])
    assert stream.ties.tolist() == [4, 0] and stream.chances.tolist() == [1 / 5, 1, 1 / 5]
    stream.save(tmp_path)
    again = InformativePrompts([7, 8, 7], seed=0)
    again.load(tmp_path, position=0)
    assert again.ties.tolist() == [4, 0] and again.draw(20) == stream.draw(20)


def test_where_all_prompts_tie_alike_all_are_drawn_alike():
    stream = InformativePrompts(range(6), seed=3)
    for rollout in range(5):  # each is a pass
        assert stream.draw(6) == rollout_rows(6, 6, rollout, seed=3)
        stream.see([True] * 6)
    one = InformativePrompts([0], seed=0)
    for _ in range(5):
        assert one.draw(432) == [0] * 432
        one.see([True] * 432)
    assert one.position == 5 * 432  # no pass is empty


def test_rows_are_told_apart_by_all_that_they_hold(tmp_path):
    columns = {"prompt": ["a", "b", "a", "a"], "count": [1, 1, 1, 2], "tags": [["x"], ["x"], ["x"], ["x"]]}
    keys = row_keys(Dataset.from_dict(columns))
    assert keys[0] == keys[2] and len({*keys}) == 3 and all(0 <= key < 2**63 for key in keys)
    assert row_keys(Dataset.from_dict(dict(reversed(columns.items())))) == keys
    assert (
        row_keys(Dataset.from_dict(columns).with_transform(lambda rows: {"prompt": ["c"] * len(rows["prompt"])}))
        == keys
    )
    mixed = {"prompt": ["a", "a", "b"], "include": [{"n": 1, "c": "x"}, {"n": "1"}, {"n": 1, "c": "x"}]}
    path = tmp_path / "mixed.jsonl"  # which datasets loads as JSON
    path.write_text("".join(json.dumps({name: mixed[name][row] for name in mixed}) + "\n" for row in (0, 1, 2, 0)))
    keys = row_keys(load_prompts(str(path)))
    assert keys[0] == keys[3] and len({*keys}) == 3
    image = Image.new("RGB", (2, 2))
    assert len({*row_keys(Dataset.from_dict({"prompt": ["a", "a"], "image": [image, image]}))}) == 2


# In training ----------------------------------------------------------------------------------------------------------


def place_by_place(rollouts: int, count: int, seed: int) -> list[list[str]]:
    """The prompts of each rollout if those in `TIED` always tie, worked out in the plainest way."""
    rollout_of, ties, position = [], dict.fromkeys(PROMPTS, 0), 0
    for _ in range(rollouts):
        prompts = []
        while len(prompts) < count:
            number, place = divmod(position, len(PROMPTS))
            rng = np.random.default_rng([seed, number])
            prompt = PROMPTS[rng.permutation(len(PROMPTS))[place]]
            if rng.random(len(PROMPTS))[place] < 1 / (1 + ties[prompt]):
                prompts.append(prompt)
            position += 1
        for prompt in prompts:
            ties[prompt] += prompt in TIED
        rollout_of.append(prompts)
    return rollout_of


class Seen:
    """A reward that keeps the prompts of each call: here a rollout."""

    __name__ = "sparse"

    def __init__(self, reward=sparse):
        self.prompts, self.reward = [], reward

    def __call__(self, images, prompts):
        self.prompts.append(prompts[::2])
        return self.reward(images, prompts)


INFORMATIVE = {"prompt_sampling": "informative", "per_device_sampling_batch_size": 4, "timestep_fraction": 0.25}
INFORMATIVE |= {"per_device_prompt_batch_size": 1}


def test_prompts_that_always_tie_are_drawn_less_often(make_trainer):
    seen = Seen()
    trainer = make_trainer(reward_fn=seen, num_rollouts=9, **INFORMATIVE)
    trainer.train()
    assert seen.prompts == place_by_place(9, 4, trainer.args.seed)
    tied = [sum(prompt in TIED for prompt in prompts) for prompts in seen.prompts]
    assert sum(tied) == 11  # of 36, half of which would be drawn from a uniform stream
    assert logged(trainer, "frac_reward_zero_std") == pytest.approx([number / 4 for number in tied])
    counts = [sum(prompts.count(prompt) for prompts in seen.prompts) for prompt in TIED]
    assert trainer.informative_prompts.ties.tolist() == [*counts, 0, 0, 0]
    assert logged(trainer, "frac_prompts_drawn")[-1] == pytest.approx((3 + sum(1 / (1 + n) for n in counts)) / 6)
    again = len(seen.prompts)
    trainer.train()  # anew
    assert seen.prompts[again:] == seen.prompts[:again]


def test_prompts_that_never_tie_are_trained_on_as_in_a_uniform_run(make_trainer):
    trainers = [make_trainer(num_rollouts=2, **options) for options in ({}, {"prompt_sampling": "informative"})]
    for trainer in trainers:
        trainer.train()
    first, second = map(trained_weights, trainers)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert logged(trainers[0], "frac_prompts_drawn") == [] and logged(trainers[1], "frac_prompts_drawn") == [1.0] * 2


async def later(images, prompts):
    return [None if prompt in TIED else value for prompt, value in zip(prompts, redness(images, prompts).tolist())]


def test_rewards_that_come_later_and_those_that_do_not_apply_count_too(make_trainer):
    trainer = make_trainer(reward_fn=later, num_rollouts=3, **INFORMATIVE)
    trainer.train()
    expected = place_by_place(3, 4, trainer.args.seed)
    drawn = [sum(prompts.count(prompt) for prompts in expected) for prompt in TIED]
    assert trainer.informative_prompts.ties.tolist() == [*drawn, 0, 0, 0]


def test_a_resumed_run_ends_in_the_checkpoint_of_the_whole_run(make_trainer):
    options = {**INFORMATIVE, "save_strategy": "epoch", "num_rollouts": 4, "reward_fn": sparse}
    whole = make_trainer(**options)
    whole.train()
    out = Path(whole.args.output_dir)
    expected = contents(out / "checkpoint-8")
    assert expected["prompt_ties.safetensors ties"].sum() > 3
    for step in (6, 8):
        shutil.rmtree(out / f"checkpoint-{step}")
    make_trainer(**options).train(resume_from_checkpoint=True)
    assert_equal(contents(out / "checkpoint-8"), expected)


def test_a_run_that_is_ended_in_a_rollout_draws_it_again(make_trainer):
    options = {**INFORMATIVE, "num_rollouts": 4, "save_strategy": "steps", "save_steps": 8}
    seen = Seen()
    make_trainer(reward_fn=seen, **options).train()

    def killing(images, prompts):
        if len(killed.prompts) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sparse(images, prompts)

    killed, resumed = Seen(killing), Seen()
    trainer = make_trainer(reward_fn=killed, **options, resume_with_changed_options=True)
    shutil.rmtree(trainer.args.output_dir)
    with pytest.raises(SystemExit):
        trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-4"]
    make_trainer(reward_fn=resumed, **options, resume_with_changed_options=True).train(resume_from_checkpoint=True)
    assert killed.prompts == seen.prompts[:3] and resumed.prompts == seen.prompts[2:]


def test_a_uniform_run_can_go_on_as_an_informative_one(make_trainer, caplog):
    uniform, seen = Seen(), Seen()
    options = {**INFORMATIVE, "save_strategy": "epoch"}
    make_trainer(reward_fn=Seen(), **{**options, "prompt_sampling": "uniform"}, num_rollouts=1).train()
    with pytest.raises(ValueError, match="prompt_sampling: 'uniform' -> 'informative'"):
        make_trainer(reward_fn=seen, num_rollouts=2, **options).train(resume_from_checkpoint=True)
    trainer = make_trainer(reward_fn=seen, num_rollouts=2, resume_with_changed_options=True, **options)
    trainer.train(resume_from_checkpoint=True)
    make_trainer(reward_fn=uniform, **{**options, "prompt_sampling": "uniform"}, num_rollouts=2).train()
    assert seen.prompts == uniform.prompts[1:]


# The options ----------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(make_config):
    with pytest.raises(ValueError, match="prompt_sampling='random' is not one of uniform, informative"):
        make_config(prompt_sampling="random")
    with pytest.raises(ValueError, match="direction='reward_gradient' learns from these too: set prompt_sampling="):
        make_config(prompt_sampling="informative", direction="reward_gradient")


@pytest.mark.parametrize(("rollouts", "warns"), [(1, True), (2, False)])
def test_a_run_that_draws_no_prompt_twice_is_warned_of(make_trainer, rollouts, warns, caplog):
    make_trainer(
        prompt_sampling="informative", num_rollouts=rollouts, prompts_per_rollout=6, optimizer_steps_per_rollout=1
    )
    found = [
        each for each in warnings_of_the_package(caplog) if "changes nothing here: the run draws 1 x 6 = 6 of 6" in each
    ]
    assert bool(found) == warns


def test_a_plan_warns_of_it_too(make_config, tmp_path, caplog):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    given = make_config(prompts_per_rollout=6, optimizer_steps_per_rollout=1)
    names = ("output_dir", "height", "width", "num_inference_steps", "pipeline_kwargs", "report_to", "use_cpu")
    names += ("prompts_per_rollout", "optimizer_steps_per_rollout")
    options = {name: getattr(given, name) for name in names} | {"prompt_sampling": "informative", "num_rollouts": 1}

    def warnings(prompts, **changed) -> list[str]:
        caplog.clear()
        config = planned(FDFOConfig)(**options | changed)
        FDFOTrainer.plan(config, tmp_path / "pipeline", [], Dataset.from_dict({"prompt": prompts}))
        return [each for each in warnings_of_the_package(caplog) if "changes nothing here" in each]

    assert len(warnings(PROMPTS)) == 1
    assert warnings([*PROMPTS, PROMPTS[0]]) == []  # which may be drawn twice
    assert warnings(PROMPTS, num_eval_prompts=1) == []  # five of them are trained on


def test_a_plan_refuses_prompts_that_the_run_would_refuse(make_config, tmp_path):
    given = make_config()
    config = planned(FDFOConfig)(output_dir=given.output_dir, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt' but text"):
        FDFOTrainer.plan(config, tmp_path, [], Dataset.from_dict({"text": PROMPTS}))
