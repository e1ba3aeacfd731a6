"""Advantage Weighted Matching: its loss against loops over elements, its limits and its clip."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import logged
from forward_runs import Gaussian, make_forward  # noqa: F401

from trl_fdfo import AWMConfig, AWMTrainer
from trl_fdfo.algorithm import awm_loss, group_advantages


EXACT = {"rtol": 0, "atol": 1e-10}


def tensors(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def loop(velocity, old, target, t, advantage, epsilon, level_power, error_power):
    """The clipped loss element by element, with its gradient."""
    losses, ratios, gradients = [], [], torch.zeros_like(velocity)
    for n, a in enumerate(advantage.tolist()):
        v, v_old, v_data = (x[n].flatten().tolist() for x in (velocity, old, target))
        count = len(v)
        error, old_error = (sum((x - y) ** 2 for x, y in zip(values, v_data)) / count for values in (v, v_old))
        weight = t**level_power
        ratio = math.exp(weight * (old_error**error_power - error**error_power) / error_power)
        clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
        losses.append(-min(a * ratio, a * clipped))
        ratios.append(ratio)
        if a * ratio <= a * clipped:
            weight *= error ** (error_power - 1)
            slope = [a * ratio * weight * 2 * (x - y) / count for x, y in zip(v, v_data)]
            gradients[n] = torch.tensor(slope, dtype=velocity.dtype).view_as(velocity[n])
    return torch.tensor(losses, dtype=velocity.dtype), torch.tensor(ratios, dtype=velocity.dtype), gradients


@pytest.mark.parametrize("powers", [(0.0, 1.0), (1.0, 1.0), (2.0, 0.5), (1.0, 0.25)])
@pytest.mark.parametrize("epsilon", [0.01, 1.0])
def test_loss_and_gradient_are_those_of_the_equation(epsilon, powers):
    old, target, change = tensors(3, 6, 2, 3)
    velocity = (old + 0.05 * change).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 3.0], dtype=torch.float64)
    loss, ratio = awm_loss(velocity, old, target, 0.7, advantage, epsilon, *powers)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    expected = loop(velocity.detach(), old, target, 0.7, advantage, epsilon, *powers)
    for found, value in zip((loss, ratio, gradient), expected):
        torch.testing.assert_close(found, value, **EXACT)
    is_clipped = ~gradient.flatten(1).any(dim=1)
    assert is_clipped[4] and is_clipped.sum() == (1 if epsilon == 1 else is_clipped.sum())
    assert epsilon == 1 or 1 < is_clipped.sum() < 6, "some ratios are to reach the clip"


@pytest.mark.parametrize("error_power", [1.0, 0.25])
def test_before_the_first_step_it_is_weighted_flow_matching(error_power):
    old, target = tensors(2, 3, 5)
    velocity = old.clone().requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    loss, ratio = awm_loss(velocity, old, target, 0.5, advantage, 0.01, level_power=2.0, error_power=error_power)
    assert torch.equal(ratio, torch.ones(3, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    error = (old - target).square().mean(dim=1, keepdim=True)
    expected = 0.25 * advantage[:, None] * error ** (error_power - 1) * 2 * (old - target) / 5
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_a_flow_moves_to_where_the_reward_is():
    def loss(velocity, old, target, t, rewards):
        return awm_loss(velocity, old, target, t, group_advantages(rewards).flatten(), epsilon=0.1).loss

    # With the clip it comes to 0.82.
    assert Gaussian().train(loss) == pytest.approx(1, abs=0.25)


def test_equal_rewards_give_no_update(make_forward):  # noqa: F811
    one_reward = lambda images, prompts: torch.ones(len(images))
    trainer = make_forward(AWMTrainer, reward_fn=one_reward, num_rollouts=1, weight_decay=0.0)
    before = [weight.detach().clone() for weight in trainer.old_policy.parameters]
    trainer.train()
    assert all(torch.equal(weight, old) for weight, old in zip(trainer.old_policy.parameters, before))


def test_the_ratio_is_one_before_the_first_step_of_each_rollout(make_forward):  # noqa: F811
    trainer = make_forward(AWMTrainer, num_rollouts=3, learning_rate=1e-2)
    trainer.train()
    # The policy that samples is the trained one as the rollout began.
    assert logged(trainer, "first_ratio_error") == [0.0] * 3
    assert min(logged(trainer, "ratio_error")) > 0


def test_the_average_of_the_policy_holds_updates_back(make_forward):  # noqa: F811
    distances = []
    for weight in (0.01, 100.0):
        options = {"old_policy_decay": 0.9, "old_policy_decay_rate": 0.5, "learning_rate": 1e-2, "epsilon": 10.0}
        trainer = make_forward(AWMTrainer, num_rollouts=3, old_policy_beta=weight, **options)
        trainer.train()
        distances.append(logged(trainer, "old_policy_distance")[-1])
        # The average lags, so that the ratio is not 1 when the updates on a later rollout begin.
        assert logged(trainer, "first_ratio_error") == [0.0]
        # Images of one reward have a distance too, and no update is left out.
        assert "frac_updates_left_out" not in trainer.state.log_history[-1]
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_distance_from_the_old_policy_is_added_to_the_loss(make_forward, weight):  # noqa: F811
    trainer = make_forward(AWMTrainer, level_power=1.0, error_power=0.5, old_policy_beta=weight)
    assert trainer.ties_have_no_loss() == (weight == 0)
    batch, level = trainer._roll_out(0).steps[0][0]
    x, t = batch.sampled.endpoints.flatten(0, 1), batch.sampled.sigmas[level]
    batch = replace(batch, sampled=replace(batch.sampled, x_t={level: x + 1}))
    old, velocity = torch.zeros_like(x), torch.full_like(x, 0.1)
    loss, ratio = trainer.loss(velocity, old, batch, level)
    expected = awm_loss(velocity, old, torch.ones_like(x) / t, t, *batch.targets, 0.01, 1.0, 0.5)
    torch.testing.assert_close(loss, expected.loss + weight * 0.01)
    torch.testing.assert_close(ratio, expected.ratio)


@pytest.mark.parametrize(
    ("option", "value"), [("level_power", -1.0), ("error_power", 0.0), ("error_power", 2.0), ("old_policy_beta", -0.1)]
)
def test_powers_and_weights_without_a_meaning_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value} must be"):
        AWMConfig(**{option: value})
