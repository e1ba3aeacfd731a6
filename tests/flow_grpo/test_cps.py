"""Coefficients-Preserving Sampling: its step, and which marginals it keeps, in closed form."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_fdfo.algorithm import cps_distribution, log_prob, sde_distribution, sde_step, without_variance


def number(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def test_step_equals_its_equation():
    x, v, noise = torch.randn(3, 3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = 0.7, 0.6
    scales = torch.tensor([0.8, 0.0, 1.0], dtype=torch.float64)
    step = sde_step(x, v, t, s, scales, noise, cps_distribution)
    for n, a in enumerate(scales.tolist()):
        sigma = s * math.sin(a * math.pi / 2)
        image, old_noise = x[n] - t * v[n], x[n] + (1 - t) * v[n]
        expected = (1 - s) * image + math.sqrt(s**2 - sigma**2) * old_noise + sigma * noise[n]
        torch.testing.assert_close(step[n], expected, rtol=0, atol=1e-12)


def test_first_step_needs_no_other_level():
    # At t = 1 all is noise, and the predicted image is x - v.
    mean, std = cps_distribution(torch.ones(1, 3), torch.full((1, 3), 0.5), torch.tensor(1.0), torch.tensor(0.9), 1 / 3)
    torch.testing.assert_close(std.squeeze(), torch.tensor(0.9 * 0.5))
    torch.testing.assert_close(mean, torch.full((1, 3), 0.1 * 0.5 + 0.9 * math.sqrt(3) / 2))


def test_likelihood_is_the_squared_error():
    x, v, w, x_s = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = (without_variance(cps_distribution(x, velocity, 0.5, 0.4, 0.8)) for velocity in (v, w))
    found = log_prob(x_s, new) - log_prob(x_s, old)
    for n in range(3):
        change = 0.0
        for velocity, sign in ((w, 1), (v, -1)):
            for x_i, v_i, arrived in zip(x[n].tolist(), velocity[n].tolist(), x_s[n].tolist()):
                kept = math.cos(0.4 * math.pi)
                mean = 0.6 * (x_i - 0.5 * v_i) + 0.4 * kept * (x_i + 0.5 * v_i)
                change -= sign * (arrived - mean) ** 2 / 5
        assert found[n].item() == pytest.approx(change, rel=0, abs=1e-10)


def test_squared_error_weighs_the_steps_evenly_and_the_gaussian_does_not():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    levels = scheduler.sigmas.double()[:-1]  # the last step has no noise
    x, velocity = (
        torch.zeros(9, 1, 1, dtype=torch.float64),
        torch.zeros(9, 1, 1, dtype=torch.float64, requires_grad=True),
    )
    steps = [cps_distribution(x[n], velocity[n], *levels[n : n + 2], 0.8) for n in range(9)]
    (slopes,) = torch.autograd.grad(sum(step.mean.sum() for step in steps), velocity)
    counts = lambda of: [(slope / of(step).std).square().item() for slope, step in zip(slopes.flatten(), steps)]
    gaussian, squared_error = counts(lambda step: step), counts(without_variance)
    assert gaussian[-1] == pytest.approx(14_000, rel=0.02) and max(gaussian[:-1]) == pytest.approx(2.6, rel=0.02)
    assert max(squared_error) < 6 * min(squared_error)


def marginals(distribution, levels, velocity, scale=0.8) -> list[tuple[float, float]]:
    """
    Mean and variance after each step, from those of pure noise, without sampling: of a Gaussian flow the velocity, and so a
    step, is affine in x.
    """
    mean, variance, found = 0.0, 1.0, []
    for t, s in zip(levels[:-1], levels[1:]):
        offset, std = (each.item() for each in distribution(number(0.0), number(velocity(0.0, t)), t, s, scale))
        slope = distribution(number(1.0), number(velocity(1.0, t)), t, s, scale).mean.item() - offset
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
        found.append((mean, variance))
    return found


@pytest.mark.parametrize("levels", [[1.0, 0.5, 0.0], [1.0, 0.95, 0.9, 0.6, 0.5, 0.2, 0.1, 0.0]])
@pytest.mark.parametrize("scale", [0.3, 0.8, 1.0])
def test_marginals_of_a_known_image_are_kept_exactly(levels, scale):
    image = 3.0
    velocity = lambda x, t: (x - image) / t  # eps - x_0
    for s, (mean, variance) in zip(levels[1:], marginals(cps_distribution, levels, velocity, scale)):
        assert mean == pytest.approx((1 - s) * image, abs=1e-12)
        assert variance == pytest.approx(s**2, abs=1e-12)
    # The SDE leaves more noise than there should be at the level, which the image keeps if the last step has noise too.
    for s, (_, variance) in zip(levels[1:-1], marginals(sde_distribution, levels, velocity, scale)):
        assert variance > 1.001 * s**2


@pytest.mark.parametrize("data_std", [1.0, 0.3])
def test_marginals_of_a_gaussian_flow_are_kept_as_the_noise_of_a_step_goes_to_0(data_std):
    variance_at = lambda t: (1 - t) ** 2 * data_std**2 + t**2
    velocity = lambda x, t: x * (t - (1 - t) * data_std**2) / variance_at(t)  # E[eps - x_0 | x_t]

    def error(steps: int, scale: float) -> float:
        levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        found = marginals(cps_distribution, levels, velocity, scale)
        return max(abs(variance / variance_at(s) - 1) for s, (_, variance) in zip(levels[1:], found))

    # Noise as a diffusion adds it, its variance in proportion to the step: the error halves with the step.
    coarse, fine = error(1000, 0.03), error(2000, 0.03 / math.sqrt(2))
    assert fine < 0.01 and fine < 0.55 * coarse
    # With a fixed share in each step it does not: a step replaces noise that it predicts, and no prediction has all of it.
    assert error(2000, 0.8) > 0.2


@pytest.mark.parametrize(("steps", "ode", "sde", "cps"), [(10, 0.773, 0.928, 0.524), (1000, 0.997, 1.006, 0.651)])
def test_variance_of_the_images_that_docs_tell(steps, ode, sde, cps):
    velocity = lambda x, t: x * (2 * t - 1) / ((1 - t) ** 2 + t**2)  # of images with mean 0 and variance 1
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()

    def variance(distribution, scale):
        last_but_one = marginals(distribution, levels[:-1], velocity, scale)[-1][1]
        t = levels[-2]
        return (1 - t * velocity(1.0, t)) ** 2 * last_but_one  # the last step has no noise

    found = variance(sde_distribution, 0.0), variance(sde_distribution, 0.7), variance(cps_distribution, 0.8)
    assert found == pytest.approx((ode, sde, cps), abs=5e-4)


def test_what_a_step_loses_of_a_gaussian_flow():
    # As s goes to t a step at a fixed angle loses u w (1 - cos)^2 / (u + w), of u = (1 - t)^2 variance of images and w = t^2.
    t, scale, cosine = 0.6, 0.8, math.cos(0.4 * math.pi)
    images, noise = (1 - t) ** 2, t**2
    velocity = (t - (1 - t)) / (images + noise)
    slope, std = cps_distribution(number(1.0), number(velocity), t, t, scale)
    after = slope.item() ** 2 * (images + noise) + std.item() ** 2
    lost = images * noise * (1 - cosine) ** 2 / (images + noise)
    assert after == pytest.approx(images + noise - lost, abs=1e-12)
