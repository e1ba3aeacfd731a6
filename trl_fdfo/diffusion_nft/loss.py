"""
DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): flow matching on the policy's own samples, toward good ones and away
from bad ones.

With x_t = (1 - t) x_0 + t eps, v = eps - x_0 and a raw reward R of each of the images of a prompt,

    r   = 1/2 + 1/2 clip((R - mean R) / Z, -1, 1)            optimality probability, Section 3.3
    v+  = (1 - beta) v_old + beta v_theta                    implicit positive policy, Theorem 3.2
    v-  = (1 + beta) v_old - beta v_theta                    implicit negative policy
    L   = r w+ |v+ - v|^2 + (1 - r) w- |v- - v|^2            Equation (5)
    w|v± - v|^2 = |x± - x_0|^2 / sg(mean |x± - x_0|),    x± = x_t - t v±        adaptive weighting, Section 3.3

Its optimum is v_old + 2 / beta Delta, where Delta points from the old policy to the better half of it (Equation (6)).

Departures from the paper: |.|^2 is the mean over the latent elements, not their sum, which AdamW does not see; rollouts are
sampled by Euler's steps, not by a solver of second order. As in the paper, Z is the standard deviation of the rewards of a
whole rollout, and t are the levels that the rollout was sampled at (Appendix C).

Dimensions: N samples, P prompts, G images per prompt.
"""

from torch import Tensor

from ..training.surrogate import centered


# Keep a weight finite where a velocity is that of the data, and a probability 1/2 where all rewards are one.
WEIGHT_EPS, SPREAD_EPS = 1e-6, 1e-4


def optimality(rewards: Tensor, spread: float | Tensor) -> Tensor:
    """
    Probability that an image is a good one of its prompt.

    Args:
        rewards (`Tensor`): R, shape [P, G].
        spread (`float` or `Tensor`): Z >= 0, in units of the reward.

    Returns:
        `Tensor`: r in [0, 1], shape [P, G]; exactly 1/2 where all rewards of a prompt are the same or NaN.
    """
    return (1 + (centered(rewards) / (spread + SPREAD_EPS)).clamp(-1, 1)) / 2


def nft_loss(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, t: float | Tensor, optimality: Tensor, beta: float
) -> Tensor:
    """
    Loss of each sample. Its gradient at v_theta = v_old is along (2 r - 1) (v_old - v): 0 where r = 1/2.

    Args:
        velocity (`Tensor`): v_theta(x_t, t) of the model in training, shape [N, ...].
        old_velocity (`Tensor`): v_old(x_t, t) of the policy that sampled x_0, the shape of `velocity`.
        target (`Tensor`): v = eps - x_0, the shape of `velocity`.
        t (`float` or `Tensor`): Noise level, in (0, 1], a scalar.
        optimality (`Tensor`): r in [0, 1], shape [N].
        beta (`float`): Strength of the mixing, > 0: 1 / beta is how far the policy is moved.

    Returns:
        `Tensor`: L, shape [N].
    """
    change = beta * (velocity - old_velocity)
    positive, negative = (_weighted_square(t * (old_velocity + part - target)) for part in (change, -change))
    return optimality * positive + (1 - optimality) * negative


def _weighted_square(error: Tensor) -> Tensor:
    """|x - x_0|^2 / sg(mean |x - x_0|) of each sample, [N]; the error's sign does not matter."""
    error = error.flatten(1)
    weight = 1 / (error.detach().abs().mean(dim=-1) + WEIGHT_EPS)
    return weight * error.square().mean(dim=-1)
