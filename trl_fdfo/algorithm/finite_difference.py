"""
Step 3 of FDFO (arXiv 2603.12893): the finite difference between the branches of a prompt.

With images x_0^a and rewards R_a of the branches a of one prompt, all grown from the same initial noise,

    delta_a = x_0^a - mean_b x_0^b,    dR_a = R_a - mean_b R_b,    d_a = delta_a / (mean(delta_a^2) + 1e-6),

dR_a d_a estimates the gradient of the reward at the image. For two branches these are the half differences.

Dimensions: P prompts, G branches.
"""

from typing import NamedTuple

from torch import Tensor


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


def finite_difference(endpoints: Tensor, rewards: Tensor) -> FiniteDifference:
    """
    Difference of each branch from the mean of its prompt, in latents and in reward.

    Args:
        endpoints (`Tensor`): Final latents x_0, shape [P, G, ...], G >= 2.
        rewards (`Tensor`): Reward of each image, shape [P, G].

    Returns:
        [`FiniteDifference`]: `direction`, shape [P, G, ...], and `reward_difference`, shape [P, G].
    """
    delta = endpoints - endpoints.mean(dim=1, keepdim=True)
    mean_square = delta.square().flatten(2).mean(dim=-1)
    direction = delta / (mean_square.view(*mean_square.shape, *[1] * (delta.ndim - 2)) + WHITENING_EPS)
    return FiniteDifference(direction, rewards - rewards.mean(dim=1, keepdim=True))
