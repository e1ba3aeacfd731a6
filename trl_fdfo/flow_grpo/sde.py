"""
Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), the baseline: the flow's ODE as an SDE of the same marginals, and PPO's loss.

In the convention of [`churn`] (t = 1 pure noise, v = eps - x_0), a step from t to s < t is

    x_s     = mu + sigma_t sqrt(t - s) n,    mu = x_t + (v + sigma_t^2 / (2 t) (x_t + (1 - t) v)) (s - t),    n ~ N(0, I)
    sigma_t = a sqrt(t / (1 - t))

so that p(x_s | x_t) is a Gaussian and has a likelihood. Coefficients-Preserving Sampling (Wang and Yu 2025, arXiv
2509.05952) takes another step, as stochastic DDIM does, from the image and the noise that the velocity predicts:

    x_s   = (1 - s) x^_0 + sqrt(s^2 - sigma^2) x^_1 + sigma n
    x^_0  = x_t - t v,    x^_1 = x_t + (1 - t) v,    sigma = s sin(a pi / 2)

so that the squared coefficients of the noises add up to s^2. With A_i the advantage of image i in its group,

    A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-4)
    rho = p(x_s | x_t) / p_old(x_s | x_t)
    L   = -min(A rho, A clip(rho, 1 - epsilon, 1 + epsilon))

The authors' code can also divide A_i by the standard deviation of all rewards of a rollout (`global_std`), and so can this
package ([`batch_advantages`]).

Two conventions of the field, which epsilon is to be read with: log p is the mean over the latent elements, not their sum
(so that rho does not depend on the size of the image, and clips of 1e-5 to 1e-3 are usual), and sigma_t at t = 1, where it
diverges, takes the value of the next level.

For log p of Coefficients-Preserving Sampling its authors' code takes -(x_s - mu)^2, and so does this package. That is the
Gaussian's times 2 sigma^2, and weighs the steps by their noise. The Gaussian's own is of no use where s is nearly 0: many
schedules come to s = 0.001 before the last step, by a step that is a hundred times sigma long.

Dimensions: N samples, P prompts, G images per prompt.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..training.surrogate import STD_EPS, SurrogateLoss, centered


class Gaussian(NamedTuple):
    """
    Attributes:
        mean (`Tensor`): mu, shape [N, ...].
        std (`Tensor`): Standard deviation of every element, a scalar or [N, 1, ..., 1].
    """

    mean: Tensor
    std: Tensor


def sde_distribution(x_t: Tensor, velocity: Tensor, t: Tensor, s: Tensor, scale: float | Tensor) -> Gaussian:
    """
    The distribution of the arrivals of a step of the SDE.

    Args:
        x_t (`Tensor`): Noisy samples at level t, shape [N, ...].
        velocity (`Tensor`): v(x_t, t), the shape of `x_t`.
        t (`Tensor`): Noise level before the step, in (0, 1], a scalar.
        s (`Tensor`): Noise level after the step, in [0, t), a scalar.
        scale (`float` or `Tensor`): a >= 0, a scalar or one per sample, shape [N]. 0 is the Euler step.

    Returns:
        [`Gaussian`]
    """
    t, s = (torch.as_tensor(level, dtype=x_t.dtype, device=x_t.device) for level in (t, s))
    finite = torch.where(t < 1, t, s)
    sigma = _per_sample(scale, x_t) * (finite / (1 - finite)).sqrt()
    # In this order: sigma = 0 is the Euler step to the bit.
    mean = x_t + (s - t) * velocity + (s - t) * sigma.square() / (2 * t) * (x_t + (1 - t) * velocity)
    return Gaussian(mean, sigma * (t - s).sqrt())


def cps_distribution(x_t: Tensor, velocity: Tensor, t: Tensor, s: Tensor, scale: float | Tensor) -> Gaussian:
    """
    The distribution of the arrivals of a step of Coefficients-Preserving Sampling.

    Args:
        x_t, velocity, t, s: As in [`sde_distribution`].
        scale (`float` or `Tensor`): a in [0, 1], a scalar or one per sample, shape [N]. 0 is the Euler step, 1 replaces all
            noise.

    Returns:
        [`Gaussian`]
    """
    t, s = (torch.as_tensor(level, dtype=x_t.dtype, device=x_t.device) for level in (t, s))
    angle = _per_sample(scale, x_t) * (math.pi / 2)
    # (1 - s) x^_0 + s cos(angle) x^_1, so that angle = 0 is the Euler step to the bit. 1 - cos(angle) = 2 sin^2(angle / 2).
    lost = 2 * s * (angle / 2).sin().square()
    mean = x_t + (s - t) * velocity - lost * (x_t + (1 - t) * velocity)
    return Gaussian(mean, s * angle.sin())


def sde_step(
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    s: Tensor,
    scale: float | Tensor,
    noise: Tensor,
    distribution: Callable[..., Gaussian] = sde_distribution,
) -> Tensor:
    """
    One step of the sampler, with `noise` of unit variance of the shape of `x_t`; otherwise as [`sde_distribution`], or as
    another `distribution`.

    Returns:
        `Tensor`: Noisy samples at level s, the shape of `x_t`.
    """
    mean, std = distribution(x_t, velocity, t, s, scale)
    return mean + std * noise


def log_prob(x_s: Tensor, distribution: Gaussian) -> Tensor:
    """Logarithm of the density at `x_s`, shape [N, ...], the mean over its elements: shape [N]."""
    mean, std = distribution
    log_density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x_s)
    return log_density.flatten(1).mean(dim=-1)


def gaussian_kl(distribution: Gaussian, other: Gaussian) -> Tensor:
    """KL divergence of two Gaussians of one standard deviation, the mean over the elements: shape [N]."""
    return ((distribution.mean - other.mean) / distribution.std).square().flatten(1).mean(dim=-1) / 2


def without_variance(distribution: Gaussian) -> Gaussian:
    """The Gaussian of the same mean whose log p(x) is -(x - mean)^2, up to a constant: its variance is 1/2."""
    return Gaussian(distribution.mean, torch.full_like(distribution.std, math.sqrt(0.5)))


def batch_advantages(rewards: Tensor, std: float) -> Tensor:
    """
    Rewards minus the mean of their prompt, over one standard deviation for all prompts.

    Args:
        rewards (`Tensor`): Shape [P, G], G >= 2.
        std (`float`): Standard deviation of all rewards of the rollout, >= 0.

    Returns:
        `Tensor`: A, shape [P, G]; exactly 0 where all rewards of a prompt are the same or NaN.
    """
    return centered(rewards) / (std + STD_EPS)


def clipped_loss(x_s: Tensor, new: Gaussian, old: Gaussian, advantage: Tensor, epsilon: float) -> SurrogateLoss:
    """
    PPO's clipped loss of each sample; its gradient at ratio 1 is that of -A log p.

    Args:
        x_s (`Tensor`): Arrival of the rollout's step, shape [N, ...].
        new ([`Gaussian`]): Arrivals of a step of the model in training.
        old ([`Gaussian`]): Arrivals of a step of the model that sampled.
        advantage (`Tensor`): A, shape [N].
        epsilon (`float`): Half the width of the trust region of the ratio, > 0.

    Returns:
        [`SurrogateLoss`]: `loss` and `ratio`, shape [N].
    """
    # log p - log p_old, expanded so that it is exactly 0 where nothing has changed.
    change = (new.mean - old.mean) / old.std
    deviation = (x_s - old.mean) / old.std
    ratio = (change * (deviation - change / 2)).flatten(1).mean(dim=-1).exp()
    loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - epsilon, 1 + epsilon))
    return SurrogateLoss(loss, ratio)


def _per_sample(scale: float | Tensor, x: Tensor) -> Tensor:
    """`scale` as a tensor that broadcasts over the samples of `x`: [] or [N, 1, ..., 1]."""
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    return scale.view(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale
