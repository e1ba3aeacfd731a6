"""
Step 1 of FDFO (arXiv 2603.12893): stochastic sampling by churn, written in flow time.

The convention is that of `diffusers.FlowMatchEulerDiscreteScheduler`: noise level t in [0, 1] with t = 1 pure noise,

    x_t = (1 - t) x_0 + t eps,    velocity v = dx/dt = eps - x_0,

and a schedule of T steps t_0 = 1 > t_1 > ... > t_T = 0. Every level t_i has a churn gamma_i >= 0, and gamma_T = 0. A
step from t to s = t_{i+1} with gamma = gamma_{i+1} overshoots to r < s with an Euler step, then adds noise back:

    r   = s / (1 + gamma - gamma s)
    x_r = x_t + (r - t) v(x_t, t)
    x_s = (x_r + r sqrt((1 + gamma)^2 - 1) n) / (1 + gamma r),    n ~ N(0, I)

This is the churn of EDM (Karras et al. 2022, algorithm 2): in terms of the noise-to-signal ratio sigma = t / (1 - t), r
is the level of ratio sigma_s / (1 + gamma). The marginal distribution at every level is kept; gamma = 0 is the plain
Euler step, to the bit; the last step (s = 0) adds no noise.

Dimensions: N samples (prompts x branches), P prompts, T steps.
"""

import torch
from torch import Tensor


def churn_start(x: Tensor, gamma: float | Tensor, noise: Tensor) -> Tensor:
    """
    Mix fresh noise into the initial noise of each branch, at t = 1.

    Args:
        x (`Tensor`): Initial noise of unit variance, shape [N, ...].
        gamma (`float` or `Tensor`): Churn gamma_0 >= 0, a scalar or one per sample, shape [N].
        noise (`Tensor`): Fresh noise of unit variance, the shape of `x`.

    Returns:
        `Tensor`: Noise of unit variance, the shape of `x`. Its correlation with `x` is 1 / (1 + gamma).
    """
    gamma = _per_sample(gamma, x)
    return (x + (gamma * (2 + gamma)).sqrt() * noise) / (1 + gamma)


def churn_step(
    x_t: Tensor, velocity: Tensor, t: float | Tensor, s: float | Tensor, gamma: float | Tensor, noise: Tensor
) -> Tensor:
    """
    One step of the sampler from noise level t to noise level s, with churn at the arrival.

    Args:
        x_t (`Tensor`): Noisy samples at level t, shape [N, ...].
        velocity (`Tensor`): v(x_t, t) = eps - x_0, the shape of `x_t`.
        t (`float` or `Tensor`): Noise level before the step, in (0, 1].
        s (`float` or `Tensor`): Noise level after the step, in [0, t).
        gamma (`float` or `Tensor`): Churn of level s, >= 0, a scalar or one per sample, shape [N].
        noise (`Tensor`): Fresh noise of unit variance, the shape of `x_t`.

    Returns:
        `Tensor`: Noisy samples at level s, the shape of `x_t`.
    """
    gamma = _per_sample(gamma, x_t)
    r = s / (1 + gamma - gamma * s)
    x_r = x_t + (r - t) * velocity
    # gamma (2 + gamma) is (1 + gamma)^2 - 1 without the cancellation that a small gamma would suffer.
    return (x_r + r * (gamma * (2 + gamma)).sqrt() * noise) / (1 + gamma * r)


def constant_churn(sigmas: Tensor, gamma: float) -> Tensor:
    """
    The same churn at every level but the last: the schedule of the paper's main experiments.

    Args:
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T = 0 in [0, 1], shape [T + 1].
        gamma (`float`): Churn of each level, >= 0.

    Returns:
        `Tensor`: Churn of each level, shape [T + 1].
    """
    gammas = torch.full_like(sigmas, gamma)
    gammas[-1] = 0
    return gammas


def interval_churn(sigmas: Tensor, weight: float | Tensor, location: Tensor, width: float) -> Tensor:
    """
    All churn around one noise level: gamma_i = exp(weight p_i) - 1, where p is a logit-normal density at the levels,
    normalised over the schedule. The branches of a prompt are identical until the first level whose gamma is not 0.

    Args:
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T = 0 in [0, 1], shape [T + 1], in a run float32.
        weight (`float` or `Tensor`): Total churn, the sum over the levels of log(1 + gamma_i), >= 0: for all prompts, or
            one per prompt, shape [P].
        location (`Tensor`): Centre of the bump in logit(t) = log(t / (1 - t)), one per prompt, shape [P].
        width (`float`): Standard deviation of the bump in logit(t), > 0.

    Returns:
        `Tensor`: Churn of each level for each prompt, shape [P, T + 1], and 0 at t = 0. It is 0 at t = 1, at t_0 below 1, and at
        levels whose density underflows, which in float32 are those more than 14.4 widths from the centre. If the densities of
        all levels underflow, the churn is spread evenly over all levels but t = 0, and but t_0 below 1.
    """
    deviation = (sigmas.logit() - location[:, None]) / width
    # At t = 1 and t = 0 it is 0 / 0: the density vanishes there.
    density = ((-0.5 * deviation.square()).exp() / (sigmas * (1 - sigmas))).nan_to_num(nan=0.0)
    # The nearest level in the place of all would often be the last, where the branches come out so close to each other
    # that the whitened direction explodes.
    first = int(sigmas[0] < 1)  # the level of a pipeline that starts late, where no churn can be added
    density[:, :first] = 0
    density[:, first:-1] += (density.sum(dim=1, keepdim=True) == 0).to(density.dtype)
    share = (density / density.sum(dim=1, keepdim=True)).nan_to_num(nan=0.0)
    return torch.expm1(torch.as_tensor(weight, dtype=sigmas.dtype).view(-1, 1) * share)


def prior_churn(sigmas: Tensor, weight: Tensor) -> Tensor:
    """
    Churn at the first level alone: the branches differ in their initial noise and then follow the ODE.

    Args:
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T = 0 in [0, 1], shape [T + 1].
        weight (`Tensor`): log(1 + gamma_0) >= 0, one per prompt, shape [P].

    Returns:
        `Tensor`: Churn of each level for each prompt, shape [P, T + 1].
    """
    gammas = sigmas.new_zeros(len(weight), len(sigmas))
    gammas[:, 0] = torch.expm1(weight)
    return gammas


def _per_sample(gamma: float | Tensor, x: Tensor) -> Tensor:
    """`gamma` as a tensor that broadcasts over the samples of `x`: [] or [N, 1, ..., 1]."""
    gamma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device)
    return gamma.view(-1, *[1] * (x.ndim - 1)) if gamma.ndim else gamma
