"""
Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050): the loss of pretraining, flow matching, on the policy's own
samples, weighed by their advantages.

With x_t = (1 - t) x_0 + t eps, v = eps - x_0, and A the rewards of the images of a prompt, normalised to mean 0 and standard
deviation 1,

    log p_theta(x_0) ~ -w(t) |v_theta(x_t, t) - v|^2         the lower bound that pretraining maximises
    rho = p_theta(x_0) / p_old(x_0)                          at the same t and eps
    L   = -min(A rho, A clip(rho, 1 - epsilon, 1 + epsilon))

At rho = 1 its gradient is that of A |v_theta - v|^2: good samples are pulled nearer, bad ones are pushed away.

Departures from the paper: w(t) = 1 on the mean over the latent elements, by which rho does not depend on their number; the
old policy is the trained one as it was when the rollout began, and `beta` penalises the distance from the base model
alone, not that from an average of the policy. The equations are those of the method's published descriptions, without
their numbers in the paper.

Dimensions: N samples.
"""

import torch
from torch import Tensor

from ..training.surrogate import SurrogateLoss


def awm_loss(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, advantage: Tensor, epsilon: float
) -> SurrogateLoss:
    """
    Clipped loss of each sample; its gradient at ratio 1 is that of A mean((v_theta - v)^2).

    Args:
        velocity (`Tensor`): v_theta(x_t, t) of the model in training, shape [N, ...].
        old_velocity (`Tensor`): v_old(x_t, t) of the model that sampled x_0, the shape of `velocity`.
        target (`Tensor`): v = eps - x_0, the shape of `velocity`.
        advantage (`Tensor`): A, shape [N].
        epsilon (`float`): Half the width of the trust region of the ratio, > 0.

    Returns:
        [`SurrogateLoss`]: `loss` and `ratio`, shape [N].
    """
    change = velocity - old_velocity
    # |v_old - v|^2 - |v_theta - v|^2, expanded so that it is exactly 0 where nothing has changed.
    ratio = (-(change * (change + 2 * (old_velocity - target))).flatten(1).mean(dim=-1)).exp()
    loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - epsilon, 1 + epsilon))
    return SurrogateLoss(loss, ratio)
