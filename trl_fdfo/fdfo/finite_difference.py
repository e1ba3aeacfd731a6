"""
Step 3 of FDFO (arXiv 2603.12893): the finite difference between the branches of a prompt.

With images x_0^a and rewards R_a of the branches a of one prompt, all grown from the same initial noise,

    delta_a = x_0^a - mean_b x_0^b,    dR_a = R_a - mean_b R_b,    d_a = delta_a / (mean(delta_a^2) + 1e-6),

dR_a d_a estimates the gradient of the reward at the image. For two branches these are the half differences.

Dimensions: P prompts, G branches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..training.surrogate import centered


# Keeps the direction finite (and zero) where the branches are identical.
WHITENING_EPS = 1e-6


class FiniteDifference(NamedTuple):
    """
    Attributes:
        direction (`Tensor`): Whitened direction d_a from the mean image of the prompt to that of branch a, in latent
            space, shape [P, G, ...].
        reward_difference (`Tensor`): dR_a, in units of the reward, shape [P, G]. Sums to zero over the branches.
    """

    direction: Tensor
    reward_difference: Tensor


def finite_difference(endpoints: Tensor, rewards: Tensor, whiten: bool = True) -> FiniteDifference:
    """
    Difference of each branch from the mean of its prompt, in latents and in reward.

    Args:
        endpoints (`Tensor`): Final latents x_0, shape [P, G, ...], G >= 2.
        rewards (`Tensor`): Reward of each image, shape [P, G].
        whiten (`bool`): Divide by the mean square; otherwise the direction is delta_a itself.

    Returns:
        [`FiniteDifference`]: `direction`, shape [P, G, ...], and `reward_difference`, shape [P, G], exactly 0 where all
        rewards of a prompt are the same or NaN.
    """
    delta = endpoints - endpoints.mean(dim=1, keepdim=True)
    direction = delta / (_mean_square(delta) + WHITENING_EPS) if whiten else delta
    return FiniteDifference(direction, centered(rewards))


def known_gradient(difference: FiniteDifference) -> Tensor:
    """
    What a finite difference says of the gradient of the reward at the image: its component along the difference of the
    branches, dR_a d_a / n for n latent elements, which has the slope dR_a along delta_a. The others are unknown, and 0 here.

    Args:
        difference ([`FiniteDifference`]): `direction`, whitened, shape [P, G, ...]; `reward_difference`, shape [P, G].

    Returns:
        `Tensor`: The shape of `direction`.
    """
    direction, reward_difference = difference
    slopes = reward_difference.unflatten(1, (-1, *[1] * (direction.ndim - 2)))
    return slopes.to(direction) * direction / direction[0, 0].numel()


def reward_gradient(endpoints: Tensor, gradient: Tensor) -> FiniteDifference:
    """
    The exact counterpart of the finite difference, for a reward that has a gradient: each branch is compared with one that
    is moved along the gradient by as much as it differs from the mean of its prompt.

    Args:
        endpoints (`Tensor`): Final latents x_0, shape [P, G, ...], G >= 2.
        gradient (`Tensor`): dR/dx_0 of each image, the shape of `endpoints`.

    Returns:
        [`FiniteDifference`]: `direction`, whitened, and the `reward_difference` to first order, which is >= 0.
    """
    distance = _mean_square(endpoints - endpoints.mean(dim=1, keepdim=True)).sqrt()
    length = _mean_square(gradient).sqrt()
    delta = gradient * (distance / length.clamp(min=torch.finfo(length.dtype).tiny))
    return FiniteDifference(delta / (_mean_square(delta) + WHITENING_EPS), (gradient * delta).flatten(2).sum(dim=-1))


def _mean_square(delta: Tensor) -> Tensor:
    """Mean over the elements of each branch, [P, G, 1, ..., 1]."""
    return delta.square().mean(dim=tuple(range(2, delta.ndim)), keepdim=True)
