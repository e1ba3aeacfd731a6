"""More images of a prompt than are trained on: those that differ most in reward are."""

import itertools
import math

import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights
from datasets import Dataset
from tiny_runs import PROMPTS, redness

from trl_fdfo import AWMConfig, AWMTrainer, FDFOTrainer, FlowGRPOConfig, FlowGRPOTrainer
from trl_fdfo.training.candidates import most_different


# The choice -----------------------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_a_prompt_are_chosen():
    rewards = torch.tensor([[2.0, 5.0, 1.0, 3.0], [0.0, 0.0, 1.0, 0.0]])
    assert most_different(rewards, 2).tolist() == [[1, 2], [0, 2]]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_other_set_differs_more(count):
    rewards = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sets = torch.tensor(list(itertools.combinations(range(6), count)))
    largest = rewards[:, sets].var(dim=2, correction=0).amax(dim=1)
    chosen = most_different(rewards, count)
    torch.testing.assert_close(rewards.gather(1, chosen).var(dim=1, correction=0), largest)
    assert (chosen.diff(dim=1) > 0).all()


def test_the_first_candidates_are_chosen_where_nothing_differs():
    assert most_different(torch.tensor([[1.0] * 4, [math.nan] * 4]), 2).tolist() == [[0, 1], [0, 1]]
    assert most_different(torch.tensor([[3.0, 1.0, 2.0]]), 3).tolist() == [[0, 1, 2]]


# In training ----------------------------------------------------------------------------------------------------------


def rollout_of(trainer):
    """The batches of a rollout by number."""
    trainer._buffer = trainer._roll_out(0)
    return {batch.number: batch for step in trainer._buffer.steps for batch, _ in step}


def test_as_many_candidates_as_are_trained_on_change_no_bit(make_trainer):
    trainers = [make_trainer(num_generations=3, num_rollouts=1, **options) for options in ({}, {"num_candidates": 3})]
    for trainer in trainers:
        trainer.train()
    first, second = map(trained_weights, trainers)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert logged(trainers[1], "reward_std_trained") == []


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 4.0, "per_device_sampling_batch_size": 4}, {"scale_rewards": "batch"}],
    ids=["plain", "guided, sampled at once", "scaled over the rollout"],
)
def test_the_chosen_are_those_of_a_rollout_that_keeps_all(make_trainer, options):
    whole = rollout_of(make_trainer(num_generations=4, **options))
    trainer = make_trainer(num_candidates=4, **options)
    for number, batch in rollout_of(trainer).items():
        kept, all_of_it = batch.sampled, whole[number].sampled
        # Their differences from the mean reward of the four, in the unit of the reward or scaled.
        rewards = whole[number].targets[1].double().unflatten(0, (2, 4))
        chosen = most_different(rewards, 2)
        places = (4 * torch.arange(2)[:, None] + chosen).flatten()
        for level in batch.levels:
            assert torch.equal(kept.x_t[level], all_of_it.x_t[level][places])
            assert torch.equal(kept.velocities[level], all_of_it.velocities[level][places])
        difference = rewards.gather(1, chosen).diff(dim=1).flatten()
        found = batch.targets[1].unflatten(0, (2, 2)).diff(dim=1).flatten().double()
        torch.testing.assert_close(found, difference, rtol=1e-4, atol=1e-9)
        # The images are on both sides of their mean.
        pairs = batch.targets[0].unflatten(0, (2, 2))
        torch.testing.assert_close(pairs[:, 0], -pairs[:, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"offload_trajectories": True, "churn_schedule": "interval", "shared_prefix": True}],
    ids=["plain", "offloaded"],
)
def test_candidates_train_with_an_exact_replay(make_trainer, options):
    trainer = make_trainer(num_candidates=5, **options)
    before = trained_weights(trainer)
    trainer.train()
    # Another batch size is computed in another order.
    assert max(logged(trainer, "replay_error")) < 1e-5
    assert any(not torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())
    for all_of_them, trained in zip(logged(trainer, "reward_std"), logged(trainer, "reward_std_trained"), strict=True):
        assert trained > all_of_them


@pytest.mark.parametrize(("options", "per_call"), [({}, 0), ({"num_candidates": 3}, 1)], ids=["all", "some"])
def test_the_rewards_of_a_call_are_summed_once_for_the_choice(make_trainer, options, per_call):
    def sums(prompts):
        trainer = make_trainer(per_device_prompt_batch_size=1, prompts_per_rollout=prompts, **options)
        calls, total = [], trainer.reward_functions.total
        trainer.reward_functions.total = lambda *arguments: calls.append(arguments) or total(*arguments)
        rollout_of(trainer)
        return len(calls)

    # Not those of all earlier calls after each: a rollout has hundreds.
    assert sums(5) - sums(2) == 3 * per_call


async def later(images, prompts):
    return redness(images, prompts).tolist()


def test_rewards_that_come_later_choose_the_same(make_trainer):
    trainers = [make_trainer(num_candidates=3, num_rollouts=1, reward_fn=reward) for reward in (redness, later)]
    for trainer in trainers:
        trainer.train()
    first, second = map(trained_weights, trainers)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(FlowGRPOTrainer, FlowGRPOConfig), (AWMTrainer, AWMConfig)]
)
def test_other_algorithms_choose_too(make_config, trainer_class, config_class):
    names = ("output_dir", "prompts_per_rollout", "height", "width", "num_inference_steps", "pipeline_kwargs")
    names += ("optimizer_steps_per_rollout", "lora_r", "save_strategy", "report_to", "use_cpu", "disable_tqdm")
    shared = {name: getattr(make_config(num_inference_steps=3), name) for name in names}
    config = config_class(**shared, num_rollouts=1, num_generations=3, num_candidates=5)
    trainer = trainer_class(config, tiny_pipelines.sd3(), redness, Dataset.from_dict({"prompt": PROMPTS}))
    trainer.train()
    assert {len(batch.targets[0]) for step in trainer._buffer.steps for batch, _ in step} == {3}
    assert logged(trainer, "reward_std_trained")[0] > logged(trainer, "reward_std")[0]


def test_fewer_candidates_than_are_trained_on_are_refused(make_config):
    with pytest.raises(
        ValueError, match="num_candidates=2 images of a prompt are sampled, and num_generations=3 of them"
    ):
        make_config(num_generations=3, num_candidates=2)


# The plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_counts_the_sampling_of_all(make_trainer):
    plain = make_trainer(trainer_class=FDFOTrainer).run_plan()
    trainer = make_trainer(trainer_class=FDFOTrainer, num_candidates=5)
    plan = trainer.run_plan()
    assert plan.sampling.flops == plain.sampling.flops and plan.sampling.peak == int(2.5 * plain.sampling.peak)
    assert "4 prompts x 5 images x 4 steps = 80 transformer samples" in str(plan)
    assert "optimizer steps on 32 samples" in str(plan)
    assert plan.decoding.flops == pytest.approx(plain.decoding.flops, rel=0.01)
    candidates = next(part for part in plan.parts() if part.name == "candidates")
    # Of two batches the two prompts of one, five of each in the place of two.
    assert candidates.sampling == pytest.approx(2.5 * plan.trajectory_bytes / 2, rel=1e-9) and candidates.training == 0
    assert "5 per prompt, until their call is scored" in str(plan)
