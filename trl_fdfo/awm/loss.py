"""
Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050): the loss of pretraining, flow matching, on the policy's own
samples, weighed by their advantages.

With x_t = (1 - t) x_0 + t eps, v = eps - x_0, and A the rewards of the images of a prompt, normalised to mean 0 and standard
deviation 1,

    l = |v_theta(x_t, t) - v|^2                              the loss of pretraining
    log p_theta(x_0) ~ -t^k l^q / q                          k = 0, q = 1: minus that loss
    rho = p_theta(x_0) / p_old(x_0)                          at the same t and eps
    L   = -min(A rho, A clip(rho, 1 - epsilon, 1 + epsilon))

At rho = 1 its gradient is that of A t^k l^q / q: good samples are pulled nearer, bad ones are pushed away. k > 0 weighs the
noisy levels more; q < 1 weighs samples less whose loss is large (q = 1/2: Huber's loss far from 0).

Departures from the paper: |.|^2 is the mean over the latent elements, by which rho does not depend on their number. The
policy of the ratio is the one that samples: the trained one as it was when the rollout began, or with `old_policy_decay` an
average of the policy. The equations are those of the method's published descriptions, without their numbers in the paper.

Dimensions: N samples.
"""

import torch
from torch import Tensor

from ..training.surrogate import SurrogateLoss


def awm_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    t: float | Tensor,
    advantage: Tensor,
    epsilon: float,
    level_power: float = 0.0,
    error_power: float = 1.0,
) -> SurrogateLoss:
    """
    Clipped loss of each sample; its gradient at ratio 1 is that of A t^k mean((v_theta - v)^2)^q / q.

    Args:
        velocity (`Tensor`): v_theta(x_t, t) of the model in training, shape [N, ...].
        old_velocity (`Tensor`): v_old(x_t, t) of the model that sampled x_0, the shape of `velocity`.
        target (`Tensor`): v = eps - x_0, the shape of `velocity`.
        t (`float` or `Tensor`): Noise level, in (0, 1], a scalar.
        advantage (`Tensor`): A, shape [N].
        epsilon (`float`): Half the width of the trust region of the ratio, > 0.
        level_power (`float`, defaults to `0.0`): k >= 0.
        error_power (`float`, defaults to `1.0`): q in (0, 1].

    Returns:
        [`SurrogateLoss`]: `loss` and `ratio`, shape [N].
    """
    change = velocity - old_velocity
    # |v_old - v|^2 - |v_theta - v|^2, expanded so that it is exactly 0 where nothing has changed.
    gain = -(change * (change + 2 * (old_velocity - target))).flatten(1).mean(dim=-1)
    if error_power != 1:
        error = (old_velocity - target).square().flatten(1).mean(dim=-1)
        # (l_old^q - l^q) / q, which their difference would round away.
        gain = -(error**error_power) / error_power * (error_power * (-gain / error).log1p()).expm1()
    ratio = (t**level_power * gain).exp()
    loss = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - epsilon, 1 + epsilon))
    return SurrogateLoss(loss, ratio)
