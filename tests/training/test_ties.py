"""Rewards that tie on most prompts, and rewards of several scales."""

import math

import pytest
import torch
from conftest import logged, trained_weights
from tiny_runs import PROMPTS, UnplannedTrainer, redness

from trl_fdfo.algorithm import batch_advantages, finite_difference, group_advantages, optimality
from trl_fdfo.training.surrogate import centered


INFORMATIVE = PROMPTS[1::3]  # two of six
SPARSE = {"prompts_per_rollout": 6, "per_device_prompt_batch_size": 1}


@pytest.mark.parametrize("images", [2, 3, 5, 6, 7, 24])
def test_what_a_tie_teaches_is_exactly_nothing(images):
    values = torch.tensor([0.1, 0.7, -1e-3, 12345.678, torch.nan], dtype=torch.float64)
    rewards = values.unsqueeze(1).repeat(1, images)
    rounded = rewards - rewards.mean(dim=1, keepdim=True)
    assert rounded[:-1].any() or images != 3  # of three a mean rounds
    nothing = torch.zeros(5, images, dtype=torch.float64)
    for differences in (
        centered(rewards),
        group_advantages(rewards),
        batch_advantages(rewards, std=0.0),
        finite_difference(torch.randn(5, images, 4), rewards).reward_difference,
        optimality(rewards, spread=0.0) - 0.5,
    ):
        assert torch.equal(differences, nothing)


def sparse(images, prompts):
    values = redness(images, prompts).tolist()
    return [value if prompt in INFORMATIVE else 0.1 for prompt, value in zip(prompts, values)]


class Counting(UnplannedTrainer):
    """Counts its forward passes with gradients."""

    passes = 0

    def loss(self, *args):
        self.passes += 1
        return super().loss(*args)


class Whole(Counting):
    """Computes the loss of ties too."""

    def ties_have_no_loss(self):
        return False


def run(make_trainer, trainer_class, **options):
    trainer = make_trainer(trainer_class=trainer_class, **{"reward_fn": sparse, **SPARSE, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"num_generations": 3, "num_iterations": 2}], ids=["pairs", "triples"])
def test_ties_are_left_out_and_the_weights_are_the_same(make_trainer, options):
    skipping, whole = (run(make_trainer, each, **options) for each in (Counting, Whole))
    for trainer in (skipping, whole):
        assert logged(trainer, "frac_reward_zero_std") == pytest.approx([4 / 6, 4 / 6])
    assert logged(skipping, "frac_updates_left_out") == pytest.approx([4 / 6, 4 / 6])
    assert logged(whole, "frac_updates_left_out") == []
    assert 3 * skipping.passes == whole.passes
    assert logged(skipping, "replay_error") == [0.0, 0.0]
    assert logged(skipping, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-6)
    assert logged(skipping, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    expected = trained_weights(whole)
    for name, weight in trained_weights(skipping).items():
        assert torch.equal(weight, expected[name])


def test_the_distance_from_the_base_model_keeps_ties(make_trainer):
    trainer = run(make_trainer, Counting, beta=0.1, num_rollouts=1)
    assert logged(trainer, "frac_updates_left_out") == []
    assert trainer.passes == 6 * 4


def test_rollouts_of_ties_alone_still_make_their_steps(make_trainer):
    constant = lambda images, prompts: [0.1] * len(images)  # of three of which the mean is another number
    trainer = run(make_trainer, Counting, reward_fn=constant, num_generations=3)
    assert trainer.state.global_step == 4 and trainer.passes == 4
    assert logged(trainer, "grad_norm") == [0.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_scaled_reward_is_trained_on_alike_in_any_unit(make_trainer, scale):
    def in_large_units(images, prompts):
        return 2**20 * redness(images, prompts)

    runs = [
        run(make_trainer, UnplannedTrainer, reward_fn=reward, scale_rewards=scale, num_rollouts=1)
        for reward in (redness, in_large_units)
    ]
    first, second = map(trained_weights, runs)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=1e-9)
    # The metrics show the rewards as they are.
    assert logged(runs[1], "reward_std")[0] == pytest.approx(2**20 * logged(runs[0], "reward_std")[0])


def test_scaled_by_group_the_sign_of_a_difference_counts(make_trainer):
    trainer = make_trainer(scale_rewards="group", num_rollouts=1)
    buffer = trainer._roll_out(0)
    differences = {abs(value) for step in buffer.steps for batch, _ in step for value in batch.targets[1].tolist()}
    assert list(differences) == pytest.approx([math.sqrt(0.5)] * len(differences))


def test_an_unknown_scale_is_refused(make_config):
    with pytest.raises(ValueError, match="scale_rewards='batches' is not one of none, group, batch"):
        make_config(scale_rewards="batches")
    with pytest.raises(ValueError, match="scale_rewards='group' scales the differences of rewards, and direction="):
        make_config(scale_rewards="group", direction="reward_gradient")
