"""DiffusionNFT: its loss against loops over elements, its limits, its options, and the policy that samples."""

import math

import pytest
import torch
from conftest import logged
from forward_runs import Gaussian, make_forward  # noqa: F401
from transformers import TrainerCallback

from trl_fdfo import DiffusionNFTTrainer
from trl_fdfo.algorithm import nft_loss, optimality


EXACT = {"rtol": 0, "atol": 1e-10}


def tensors(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def loop(velocity, old, target, t, r, beta):
    """Equation (5) with adaptive weighting, element by element; its gradient with weights that are constants."""
    losses, gradients = [], torch.zeros_like(velocity)
    for n in range(len(velocity)):
        v, v_old, v_data = (x[n].flatten().tolist() for x in (velocity, old, target))
        count, total = len(v), 0.0
        for probability, sign in ((r[n].item(), 1), (1 - r[n].item(), -1)):
            mixed = [(1 - sign * beta) * b + sign * beta * a for a, b in zip(v, v_old)]
            # x_theta - x_0 = (x_t - t v) - x_0 and x_t = x_0 + t target
            errors = [t * c - t * m for m, c in zip(mixed, v_data)]
            weight = 1 / (sum(map(abs, errors)) / count + 1e-6)
            total += probability * weight * sum(e * e for e in errors) / count
            slope = [probability * weight * 2 * e / count * -t * sign * beta for e in errors]
            gradients[n] += torch.tensor(slope, dtype=velocity.dtype).view_as(velocity[n])
        losses.append(total)
    return torch.tensor(losses, dtype=velocity.dtype), gradients


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_loss_and_gradient_are_those_of_the_equation(beta):
    velocity, old, target = tensors(3, 4, 2, 3)
    r = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    loss = nft_loss(velocity.requires_grad_(), old, target, 0.7, r, beta)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    expected, slope = loop(velocity.detach(), old, target, 0.7, r, beta)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradient, slope, **EXACT)


def test_at_the_old_policy_a_good_sample_pulls_and_a_bad_one_pushes():
    old, target = tensors(2, 3, 8)
    velocity = old.clone().requires_grad_()
    r = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(nft_loss(velocity, old, target, 0.6, r, 0.5).sum(), velocity)
    assert not gradient[1].any(), "r = 1/2 teaches nothing"
    error = old - target
    expected = 2 * 0.5 * 0.6**2 * error / (0.6 * error.abs().mean(dim=1, keepdim=True) + 1e-6) / 8
    torch.testing.assert_close(gradient[0], expected[0], **EXACT)
    torch.testing.assert_close(gradient[2], -expected[2], **EXACT)


def test_the_optimum_is_the_reinforcement_guidance():
    # Theorem 3.2 on two data points that x_t may come from, with constant weights: v* = v_old + 2 / beta Delta, where
    # alpha = E[r], v+ = E[r v] / alpha and Delta = alpha (v+ - v_old).
    r, v = (torch.tensor(values, dtype=torch.float64) for values in ([0.9, 0.2], [1.5, -0.5]))
    old, beta = v.mean(), 0.8
    improvement = (r * v).mean() - r.mean() * old
    at = old + 2 / beta * improvement
    gradient = (r * beta * (old + beta * (at - old) - v) - (1 - r) * beta * (old - beta * (at - old) - v)).mean()
    assert abs(gradient) < 1e-12
    # Its direction is what the loss gives at v_old, where both weights are one.
    velocity = old.expand(2, 1).clone().requires_grad_()
    weight = (old - v).abs()[:, None]  # undoes the adaptive weighting, at t = 1
    loss = nft_loss(velocity, old.expand(2, 1), v[:, None], 1.0, r, beta) * (weight[:, 0] + 1e-6)
    (gradient,) = torch.autograd.grad(loss.mean(), velocity)
    torch.testing.assert_close(-gradient.sum(), 4 * beta * improvement, **EXACT)


def test_optimality_is_the_clipped_deviation():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    r = optimality(rewards, 2.0 - 1e-4)
    torch.testing.assert_close(r, torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.5] * 4], dtype=torch.float64), **EXACT)
    assert torch.equal(optimality(rewards[1:], 0.0), torch.full((1, 4), 0.5, dtype=torch.float64))


def test_a_flow_moves_to_where_the_reward_is():
    def loss(velocity, old, target, t, rewards):
        return nft_loss(velocity, old, target, t, optimality(rewards, rewards.std()).flatten(), beta=1.0)

    assert Gaussian().train(loss) == pytest.approx(1, abs=0.15)


def test_rewards_are_compared_on_the_scale_of_the_rollout(make_forward):  # noqa: F811
    trainer = make_forward(DiffusionNFTTrainer, num_rollouts=1, prompts_per_rollout=4)
    buffer = trainer._roll_out(0)
    batches = {batch.number: batch for step in buffer.steps for batch, _ in step}
    scored = []
    original = trainer.see_rewards
    trainer.see_rewards = lambda rewards: (scored.append(rewards), original(rewards))
    trainer._roll_out(0)
    (rewards,) = scored
    spread = math.sqrt(((rewards - rewards.mean()) ** 2).mean())
    for number, batch in batches.items():
        own = rewards[2 * number : 2 * number + 2]
        expected = 0.5 + 0.5 * ((own - own.mean(dim=1, keepdim=True)) / (spread + 1e-4)).clamp(-1, 1)
        torch.testing.assert_close(batch.targets[0], expected.flatten().float())


def test_the_policy_that_samples_follows_by_its_schedule(make_forward):  # noqa: F811
    trainer = make_forward(
        DiffusionNFTTrainer, num_rollouts=3, learning_rate=1e-2, old_policy_decay=0.5, old_policy_decay_rate=0.3
    )
    assert [trainer.old_policy_decay(i) for i in range(4)] == pytest.approx([0, 0.3, 0.5, 0.5])
    seen = []

    class See(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            weights = [weight.detach().clone() for weight in trainer.old_policy.parameters]
            seen.append((weights, [old.clone() for old in trainer.old_policy.average.shadow_params]))

    old = [weight.detach().clone() for weight in trainer.old_policy.parameters]
    trainer.add_callback(See())
    trainer.train()
    for decay, (weights, found) in zip((0.3, 0.5, 0.5), seen, strict=True):
        old = [decay * before + (1 - decay) * weight for before, weight in zip(old, weights)]
        torch.testing.assert_close(found, old, rtol=0, atol=1e-6)
        assert all(values.dtype == torch.float32 for values in found)
    distances = logged(trainer, "old_policy_distance")
    assert len(distances) == 3 and min(distances) > 0 and "ratio" not in trainer.state.log_history[0]
    assert logged(trainer, "step_time")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nft_beta": 0.0}, "nft_beta=0.0 must be > 0"),
        ({"old_policy_decay": 1.0}, r"old_policy_decay=1.0 must be in \[0, 1\)"),
        ({"old_policy_decay_rate": -0.1}, "old_policy_decay_rate=-0.1 must be >= 0"),
        ({"epsilon": 0.1}, "epsilon=0.1 has nothing to clip"),
    ],
)
def test_wrong_options_are_refused(make_forward, options, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        make_forward(DiffusionNFTTrainer, **options)
