"""Reinforce Adjoint Matching: its loss against loops over elements, its optimum, and the model that it compares with."""

import numpy as np
import pytest
import torch
from conftest import logged, trained_weights, warnings_of_the_package
from forward_runs import Gaussian, make_forward  # noqa: F401

from trl_fdfo import RAMConfig, RAMTrainer
from trl_fdfo.algorithm import ram_loss


EXACT = {"rtol": 0, "atol": 1e-10}


def tensors(count: int, *shape: int) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def loop(velocity, base, target, reward):
    """The loss element by element, with its gradient for a target that has none."""
    losses, gradients = [], torch.zeros_like(velocity)
    for n, r in enumerate(reward.tolist()):
        v, v_base, v_data = (x[n].flatten().tolist() for x in (velocity, base, target))
        errors = [x - (b + r * (y - x)) for x, b, y in zip(v, v_base, v_data)]
        losses.append(sum(error**2 for error in errors) / len(errors))
        gradients[n] = torch.tensor([2 * e / len(errors) for e in errors], dtype=torch.float64).view_as(base[n])
    return torch.tensor(losses, dtype=velocity.dtype), gradients


def test_loss_and_gradient_are_those_of_the_equation():
    velocity, base, target = tensors(3, 5, 2, 3)
    velocity.requires_grad_()
    reward = torch.tensor([1.0, -1.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    loss = ram_loss(velocity, base, target, reward)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    expected = loop(velocity.detach(), base, target, reward)
    for found, value in zip((loss, gradient), expected):
        torch.testing.assert_close(found, value, **EXACT)
    # The same gradient, without a target that is held fast: flow matching by the reward, and a pull to the base model.
    mean_square = lambda x: x.square().flatten(1).mean(dim=1)
    whole = mean_square(velocity - base) + reward * mean_square(velocity - target)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.sum(), velocity)[0], **EXACT)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_its_optimum_is_that_of_the_kl_penalised_reward(t):
    # Of N(0, std^2) and a reward a x it is N(a std^2, std^2), in units of lambda.
    flow, slope = Gaussian(), 0.7
    best = slope * flow.std**2
    # Quadrature over the samples x_0 and the noise, exact for the polynomials of the gradient.
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(6))
    x, noise = (each.reshape(-1, 1) for each in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).flatten() / (2 * np.pi)

    def gradient(at: float) -> float:
        mean = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        x_0 = at + flow.std * x
        x_t = (1 - t) * x_0 + t * noise
        rewards = slope * (x_0 - at).flatten()  # minus their mean
        velocity, base = flow.velocity(mean, x_t, t), flow.velocity(torch.zeros(()).double(), x_t, t)
        loss = ram_loss(velocity, base, noise - x_0, rewards)
        return torch.autograd.grad((weight * loss).sum(), mean)[0].item()

    assert gradient(best) == pytest.approx(0, abs=1e-12)
    assert gradient(0.5 * best) < -1e-4 and gradient(1.5 * best) > 1e-4


def test_it_compares_with_the_base_model(make_forward):  # noqa: F811
    trainer = make_forward(RAMTrainer, learning_rate=1e-2)
    trainer.train()
    distances = logged(trainer, "base_distance")
    assert min(distances) > 0
    trainer._buffer = buffer = trainer._roll_out(2)
    inputs = buffer[0]
    batch = trainer.with_tuple(inputs)
    compared = batch.sampled.velocities[inputs.level]
    with torch.no_grad():
        trained = trainer.flow.velocity(batch.sampled, inputs.level)
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.flow.velocity(batch.sampled, inputs.level), compared)
    assert not torch.equal(trained, compared)


def test_equal_rewards_leave_the_base_model_as_it_is(make_forward):  # noqa: F811
    constant = lambda images, prompts: [0.1] * len(images)
    trainer = make_forward(RAMTrainer, reward_fn=constant, num_rollouts=1, weight_decay=0.0)
    before = trained_weights(trainer)
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())


def test_a_reward_is_compared_with_those_of_the_other_images(make_forward):  # noqa: F811
    trainer = make_forward(RAMTrainer, reward_multiplier=5.0)
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.1, 0.1, 0.1], [torch.nan] * 3], dtype=torch.float64)
    (found,) = trainer.targets(None, rewards, [0, 1, 2])
    assert found.tolist() == [5 * (1.0 - 4.0), 5 * (2.0 - 3.5), 5 * (6.0 - 1.5), *[0.0] * 6]


def test_only_the_product_of_multiplier_and_reward_counts(make_forward):  # noqa: F811
    runs = []
    for multiplier, weight in ((8.0, 1.0), (2.0, 4.0)):
        trainer = make_forward(RAMTrainer, num_rollouts=1, reward_multiplier=multiplier, reward_weights=[weight])
        trainer.train()
        runs.append(trained_weights(trainer))
    assert all(torch.equal(weight, runs[1][name]) for name, weight in runs[0].items())


@pytest.mark.parametrize(("multiplier", "advised"), [(50.0, "reward_multiplier=2.5"), (5.0, None)])
def test_a_multiplier_for_rewards_of_another_scale_is_told(make_forward, caplog, multiplier, advised):  # noqa: F811
    """PickScore's logits differ by 0.5 and more between the images of a prompt; the default is for rewards in [0, 1]."""

    def two_apart(images, prompts):
        return [2.0 * (n % 3) for n in range(len(images))]  # of three images of a prompt: a standard deviation of 2

    make_forward(RAMTrainer, reward_fn=two_apart, num_rollouts=2, reward_multiplier=multiplier).train()
    told = [
        message for message in warnings_of_the_package(caplog) if "the base model, which holds updates back" in message
    ]
    assert [advised in message for message in told] == ([True] if advised else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_multiplier": 0.0}, "reward_multiplier=0.0 must be > 0: with 0 the reward moves nothing"),
        ({"use_peft": False}, "use_peft=False leaves no base model, which RAM compares with"),
        ({"beta": 0.1}, "beta=0.1 weighs the distance from the base model, which RAM's loss has anyway: leave it out"),
        ({"epsilon": 0.1}, "epsilon=0.1 has nothing to clip, as RAM has no ratio: leave it out"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RAMConfig(output_dir="out", use_cpu=True, report_to=[], **options)
