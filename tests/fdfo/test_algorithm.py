import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_fdfo.algorithm import (
    churn_start,
    churn_step,
    constant_churn,
    finite_difference,
    interval_churn,
    known_gradient,
    prior_churn,
    reward_gradient,
    surrogate_loss,
)


def noise_levels(steps: int) -> torch.Tensor:
    """An uneven schedule from 1 to 0, float64."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 3 * t / (1 + 2 * t)


def schedules(sigmas: torch.Tensor) -> dict[str, torch.Tensor]:
    """Churn [P, T + 1] of each schedule for two prompts."""
    draws = torch.tensor([-1.0, 0.5], dtype=sigmas.dtype)
    return {
        "constant": constant_churn(sigmas, 0.3).expand(2, -1),
        "interval": interval_churn(sigmas, 0.8, draws, 0.5),
        "prior": prior_churn(sigmas, 0.3 * draws.exp()),
    }


# Step 1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "interval", "prior"])
@pytest.mark.parametrize("data_std", [1.0, 0.3])
def test_variance_is_kept_at_every_level(schedule, data_std):
    # Exact, without sampling: a random variable is its vector of coefficients on independent noises, its variance the
    # squared norm, and each fresh noise a basis vector of its own.
    sigmas = noise_levels(12)
    gammas = schedules(sigmas)[schedule]
    basis = torch.eye(2 * len(sigmas), dtype=torch.float64)
    noise = lambda i: basis[i].expand(2, -1)
    variance = lambda t: (1 - t) ** 2 * data_std**2 + t**2

    x = churn_start(noise(0), gammas[:, 0], noise(1))
    torch.testing.assert_close(x.square().sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    for i, (t, s) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        gamma = gammas[:, i + 1, None]
        r = s / (1 + gamma - gamma * s)
        # The exact flow of Gaussian data scales x by the ratio of standard deviations; as a mean velocity from t to r.
        velocity = ((variance(r) / variance(t)).sqrt() - 1) * x / (r - t)
        x = churn_step(x, velocity, t, s, gammas[:, i + 1], noise(i + 2))
        torch.testing.assert_close(x.square().sum(dim=1), variance(s).expand(2), rtol=0, atol=1e-10)


def test_churn_step_equals_its_equation():
    generator = torch.Generator().manual_seed(0)
    x, velocity, noise = torch.randn(3, 5, 4, 2, 2, generator=generator, dtype=torch.float64).unbind(0)
    t, s, gamma = 0.7, 0.4, torch.tensor([0.0, 0.0025, 0.3, 1.0, 20.0], dtype=torch.float64)
    x_s = churn_step(x, velocity, t, s, gamma, noise)
    for sample in range(5):
        g = gamma[sample].item()
        # In terms of the noise-to-signal ratio: the overshoot level has the ratio of s divided by 1 + gamma.
        ratio = s / (1 - s) / (1 + g)
        r = ratio / (1 + ratio)
        x_r = x[sample] + (r - t) * velocity[sample]
        expected = (x_r + r * ((1 + g) ** 2 - 1) ** 0.5 * noise[sample]) / (1 + g * r)
        torch.testing.assert_close(x_s[sample], expected, rtol=0, atol=1e-10)


def test_scalar_gamma_is_the_same_as_one_per_sample():
    x, velocity, noise = torch.randn(3, 4, 3, 2, dtype=torch.float64).unbind(0)
    per_sample = torch.full((4,), 0.2, dtype=torch.float64)
    assert torch.equal(
        churn_step(x, velocity, 0.5, 0.25, 0.2, noise), churn_step(x, velocity, 0.5, 0.25, per_sample, noise)
    )
    assert torch.equal(churn_start(x, 0.2, noise), churn_start(x, per_sample, noise))


def test_zero_churn_is_the_euler_step_of_diffusers_to_the_bit():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    expected = x = torch.randn(4, 3, 8, 8)
    x = churn_start(x, 0.0, torch.randn_like(x))
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.randn_like(x)
        expected = scheduler.step(velocity, t, expected, return_dict=False)[0]
        x = churn_step(x, velocity, scheduler.sigmas[i], scheduler.sigmas[i + 1], 0.0, torch.randn_like(x))
        assert torch.equal(x, expected)


def test_last_step_adds_no_noise():
    x, velocity = torch.randn(2, 4, 3, dtype=torch.float64).unbind(0)
    noise = torch.full_like(x, 1e6)
    assert torch.equal(churn_step(x, velocity, 0.1, 0.0, 0.0, noise), x - 0.1 * velocity)


def test_churn_schedules():
    sigmas = noise_levels(10)
    for name, gammas in schedules(sigmas).items():
        assert gammas.shape == (2, 11), name
        assert (gammas >= 0).all(), name
        assert (gammas[:, -1] == 0).all(), name
    constant, interval, prior = schedules(sigmas).values()
    assert (constant[:, :-1] == 0.3).all()
    torch.testing.assert_close(interval.log1p().sum(dim=1), torch.full((2,), 0.8, dtype=torch.float64))
    assert (interval[:, 0] == 0).all()
    # The bump of the prompt whose location is lower in logit(t) stands at less noise, later in the schedule.
    assert interval[0].argmax() > interval[1].argmax()
    assert (prior[:, 1:] == 0).all() and (prior[:, 0] > 0).all()


def published_density(sigmas, location, width):
    """The logit-normal density at the levels but the first and the last, in float64, normalised, shape [P, T - 1]."""
    t = sigmas[1:-1].double()
    deviation = (t.logit() - location[:, None].double()) / width
    density = (-0.5 * deviation**2).exp() / (width * (2 * torch.pi) ** 0.5 * t * (1 - t))
    return density / density.sum(dim=1, keepdim=True)


def test_interval_is_the_density_without_a_cut_off():
    sigmas, location = noise_levels(40).float(), torch.tensor([-2.0, 0.0, 1.0, 4.0])
    gammas = interval_churn(sigmas, 1.0, location, 0.25)
    expected = torch.expm1(published_density(sigmas, location, 0.25))
    torch.testing.assert_close(gammas[:, 1:-1].double(), expected, rtol=1e-4, atol=1e-37)
    assert not gammas[:, [0, -1]].any()
    # As far as float32 reaches: 14.4 widths.
    distance = (sigmas[1:-1].logit() - location[:, None]).abs() / 0.25
    assert (gammas[:, 1:-1][distance < 14.3] > 0).all() and not gammas[:, 1:-1][distance > 14.5].any()
    assert (distance > 14.5).any() and ((distance > 13) & (distance < 14.3)).any()


def test_a_bump_that_reaches_one_level_alone_is_all_there():
    sigmas = noise_levels(10)
    gammas = interval_churn(sigmas, 0.8, sigmas[4:5].logit() + 0.01, 0.01)
    assert gammas[0, 4].log1p().item() == pytest.approx(0.8) and gammas.count_nonzero() == 1


@pytest.mark.parametrize("location", [0.0, 3.0, 50.0])
def test_a_bump_gives_nothing_to_the_level_at_which_a_pipeline_starts_late(location):
    """With `strength` below 1: no churn can be added there, and what the bump has above it would be lost."""
    sigmas = torch.linspace(0.6, 0, 11)
    gammas = interval_churn(sigmas, 0.8, torch.tensor([location]), 0.5)
    assert gammas[0, 0] == 0 and gammas.log1p().sum().item() == pytest.approx(0.8)


@pytest.mark.parametrize("location", [50.0, -50.0])
def test_a_bump_that_reaches_no_level_is_spread_evenly_over_all_of_them(location):
    # Not on the nearest: the branches of the last level are too close for a direction.
    sigmas = noise_levels(10).float()
    gammas = interval_churn(sigmas, 0.8, torch.tensor([location, 0.0]), 0.25)
    torch.testing.assert_close(gammas[0, :-1].log1p(), torch.full((10,), 0.08))
    assert gammas[0, -1] == 0 and gammas[1, 0] == 0


def test_interval_takes_a_weight_for_each_prompt():
    sigmas, location = noise_levels(40), torch.tensor([0.0, 1.0, 50.0], dtype=torch.float64)
    weights = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    gammas = interval_churn(sigmas, weights, location, 0.25)
    torch.testing.assert_close(gammas.log1p().sum(dim=1), weights)
    assert torch.equal(gammas[1], interval_churn(sigmas, 1.0, location[1:2], 0.25)[0])


# Step 3 ---------------------------------------------------------------------------------------------------------------


def test_two_branches_give_the_half_differences():
    endpoints, rewards = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    direction, reward_difference = finite_difference(endpoints, rewards)
    half = (endpoints[:, 0] - endpoints[:, 1]) / 2
    whitened = half / (half.square().mean(dim=(1, 2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(direction, torch.stack([whitened, -whitened], dim=1), rtol=0, atol=1e-10)
    half = (rewards[:, 0] - rewards[:, 1]) / 2
    torch.testing.assert_close(reward_difference, torch.stack([half, -half], dim=1), rtol=0, atol=1e-10)


def test_more_branches_give_the_differences_from_the_group_mean():
    endpoints, rewards = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    direction, reward_difference = finite_difference(endpoints, rewards)
    for prompt in range(2):
        for branch in range(4):
            delta = endpoints[prompt, branch] - sum(endpoints[prompt]) / 4
            expected = delta / (delta.square().mean() + 1e-6)
            torch.testing.assert_close(direction[prompt, branch], expected, rtol=0, atol=1e-10)
            expected = rewards[prompt, branch] - sum(rewards[prompt]) / 4
            torch.testing.assert_close(reward_difference[prompt, branch], expected, rtol=0, atol=1e-10)


def test_identical_branches_give_no_direction():
    endpoints = torch.randn(2, 1, 3, 2, 2).expand(-1, 2, -1, -1, -1)
    direction, _ = finite_difference(endpoints, torch.randn(2, 2))
    assert (direction == 0).all()


def test_swapping_the_branches_swaps_the_updates():
    endpoints, rewards = torch.randn(3, 2, 4, 2, 2), torch.randn(3, 2)
    difference = finite_difference(endpoints, rewards)
    swapped = finite_difference(endpoints.flip(1), rewards.flip(1))
    assert torch.equal(swapped.direction, difference.direction.flip(1))
    assert torch.equal(swapped.reward_difference, difference.reward_difference.flip(1))


def test_direction_without_whitening_is_the_difference_itself():
    endpoints, rewards = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), torch.rand(3, 2)
    plain, whitened = finite_difference(endpoints, rewards, whiten=False), finite_difference(endpoints, rewards)
    delta = (endpoints[:, 0] - endpoints[:, 1]) / 2
    torch.testing.assert_close(plain.direction, torch.stack([delta, -delta], dim=1))
    cosine = torch.nn.functional.cosine_similarity(plain.direction.flatten(2), whitened.direction.flatten(2), dim=-1)
    torch.testing.assert_close(cosine, torch.ones(3, 2))
    assert torch.equal(plain.reward_difference, whitened.reward_difference)


def test_finite_differences_average_to_the_reward_gradient():
    # Of a linear reward, over directions that are drawn at random: both move the image along the gradient, and by one
    # reward difference per unit of distance.
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(16, generator=generator, dtype=torch.float64)
    endpoints = torch.randn(20_000, 2, 16, generator=generator, dtype=torch.float64)
    difference = finite_difference(endpoints, endpoints @ gradient)
    estimate = (difference.direction * difference.reward_difference[..., None]).mean(dim=(0, 1))
    torch.testing.assert_close(estimate, gradient, rtol=0, atol=0.1)
    true = reward_gradient(endpoints, gradient.expand_as(endpoints))
    update = true.direction * true.reward_difference[..., None]
    torch.testing.assert_close(update, 16 * gradient.expand_as(update), rtol=1e-4, atol=0)
    # As far as the branches are apart, and what a step of that length gains.
    distance = (endpoints[:, 0] - endpoints[:, 1]).square().mean(dim=-1).sqrt() / 2
    torch.testing.assert_close(
        true.direction.square().mean(dim=-1).rsqrt(), distance[:, None].expand(-1, 2), rtol=1e-3, atol=0
    )
    gained = distance * 16**0.5 * gradient.norm()
    torch.testing.assert_close(true.reward_difference, gained[:, None].expand(-1, 2), rtol=1e-6, atol=0)


def test_a_finite_difference_knows_the_gradient_along_it():
    # Of a linear reward: the part of its gradient that lies along the difference of the branches, and nothing besides.
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    endpoints = torch.randn(3, 2, 4, 6, generator=generator, dtype=torch.float64)
    known = known_gradient(finite_difference(endpoints, (endpoints * gradient).flatten(2).sum(dim=-1)))
    delta = endpoints - endpoints.mean(dim=1, keepdim=True)
    inner = lambda a, b: (a * b).flatten(2).sum(dim=-1)[..., None, None]
    torch.testing.assert_close(known, delta * inner(delta, gradient) / inner(delta, delta), rtol=1e-4, atol=0)
    torch.testing.assert_close(inner(known, delta), inner(gradient.expand_as(delta), delta), rtol=1e-4, atol=0)


@pytest.mark.parametrize("branches", [2, 3])
def test_gradients_and_finite_differences_add_up(branches):
    # The first move of the velocity, -dR d, is the sum of those that each kind of reward makes alone.
    generator = torch.Generator().manual_seed(0)
    endpoints = torch.randn(3, branches, 4, 6, generator=generator, dtype=torch.float64)
    gradient = torch.randn(3, branches, 4, 6, generator=generator, dtype=torch.float64)
    difference = finite_difference(endpoints, torch.randn(3, branches, generator=generator, dtype=torch.float64))
    update = lambda pair: pair.direction * pair.reward_difference[..., None, None]
    both = reward_gradient(endpoints, gradient + known_gradient(difference))
    expected = update(reward_gradient(endpoints, gradient)) + update(difference)
    torch.testing.assert_close(update(both), expected, rtol=1e-4, atol=1e-6)
    alone = reward_gradient(endpoints, known_gradient(difference))
    torch.testing.assert_close(update(alone), update(difference), rtol=1e-4, atol=1e-6)
    # The branches are as far from their mean as before, so the trust region is as wide.
    size = lambda pair: pair.direction.square().mean(dim=(2, 3))
    torch.testing.assert_close(size(both), size(difference), rtol=1e-4, atol=0)


def test_no_gradient_of_the_reward_gives_no_update():
    endpoints = torch.randn(2, 2, 3)
    direction, reward_difference = reward_gradient(endpoints, torch.zeros_like(endpoints))
    assert not direction.any() and not reward_difference.any()


# Step 4 ---------------------------------------------------------------------------------------------------------------


def samples(count: int = 5):
    generator = torch.Generator().manual_seed(1)
    velocity, old, direction = 0.3 * torch.randn(3, count, 4, 2, 2, generator=generator, dtype=torch.float64)
    return velocity, old, direction, torch.randn(count, generator=generator, dtype=torch.float64)


def test_surrogate_loss_equals_its_equation():
    velocity, old, direction, reward_difference = samples()
    loss, ratio = surrogate_loss(velocity, old, direction, reward_difference, 0.03)
    target = old - direction
    ell = -(velocity - target).square().mean(dim=(1, 2, 3))
    ell_old = -direction.square().mean(dim=(1, 2, 3))
    rho = (ell - ell_old).exp()
    expected = -reward_difference * rho + reward_difference.abs() / (2 * 0.03) * (rho - 1) ** 2
    torch.testing.assert_close(ratio, rho, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)


def test_branch_axis_is_a_batch_axis():
    velocity, old, direction, reward_difference = samples(6)
    flat = surrogate_loss(velocity, old, direction, reward_difference, 0.03)
    pair = surrogate_loss(
        *(x.unflatten(0, (3, 2)) for x in (velocity, old, direction)), reward_difference.unflatten(0, (3, 2)), 0.03
    )
    torch.testing.assert_close(pair.loss.flatten(), flat.loss, rtol=0, atol=1e-14)


def test_ratio_is_one_before_the_first_step_and_the_gradient_is_the_finite_difference():
    _, old, direction, reward_difference = samples()
    velocity = old.clone().requires_grad_()
    loss, ratio = surrogate_loss(velocity, old, direction, reward_difference, 0.03)
    assert (ratio == 1).all()
    loss.sum().backward()
    # dL/dv = dR d(2/D): descending it moves v by -dR d.
    expected = 2 * reward_difference[:, None, None, None] * direction / velocity[0].numel()
    torch.testing.assert_close(velocity.grad, expected, rtol=0, atol=1e-10)


def test_equal_rewards_give_a_zero_gradient():
    endpoints = torch.randn(3, 2, 4, 2, 2)
    direction, reward_difference = finite_difference(endpoints, torch.full((3, 2), 0.7))
    velocity = torch.randn(3, 2, 4, 2, 2, requires_grad=True)
    surrogate_loss(velocity, torch.randn_like(velocity), direction, reward_difference, 0.03).loss.sum().backward()
    assert (velocity.grad == 0).all()


def test_loss_is_smallest_where_the_ratio_has_moved_by_epsilon():
    epsilon, direction = 0.03, torch.ones(1, 8, dtype=torch.float64)
    for sign in (1.0, -1.0):
        # v - v_old = -c d has log ratio -c (c - 2) for d = 1.
        change = torch.linspace(-0.1, 0.1, 20001, dtype=torch.float64)[:, None].expand(-1, 8)
        difference = torch.full((len(change),), sign, dtype=torch.float64)
        loss, ratio = surrogate_loss(-change, torch.zeros_like(change), direction, difference, epsilon)
        assert ratio[loss.argmin()].item() == pytest.approx(1 + sign * epsilon, abs=1e-4)


def test_one_gradient_step_on_a_toy_raises_the_reward():
    # A flow in one dimension whose velocity is x_t independent: v = theta. The reward is the endpoint itself.
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sigmas = noise_levels(5)
    generator = torch.Generator().manual_seed(0)

    def sample(start, gammas):
        x, tuples = start, []
        for i in range(5):
            velocity = theta.expand(len(x), 1)
            tuples.append(velocity)
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = churn_step(x, velocity, sigmas[i], sigmas[i + 1], gammas[i + 1], noise)
        return x, tuples

    start = torch.randn(32, 1, generator=generator, dtype=torch.float64)
    zero = torch.zeros(6)
    before = sample(start, zero)[0].mean().item()
    endpoints, tuples = sample(start.repeat_interleave(2, dim=0), constant_churn(sigmas, 0.1))
    endpoints = endpoints.detach().unflatten(0, (32, 2))
    direction, reward_difference = finite_difference(endpoints, endpoints.squeeze(-1))
    loss = sum(
        surrogate_loss(
            v.unflatten(0, (32, 2)), v.detach().unflatten(0, (32, 2)), direction, reward_difference, 0.03
        ).loss
        for v in tuples
    )
    loss.mean().backward()
    with torch.no_grad():
        theta -= 0.01 * theta.grad
    assert sample(start, zero)[0].mean().item() > before
