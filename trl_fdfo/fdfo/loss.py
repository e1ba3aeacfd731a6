"""
Step 4 of FDFO (arXiv 2603.12893): the surrogate loss of one training tuple (x_t, v_old, d_a, dR_a).

    v*      = v_old - d_a                       target velocity: x_0 = x_t - t v moves by +d where v moves by -d
    ell     = -mean((v - v*)^2)                 pseudo log-likelihood, the mean over all latent elements
    ell_old = -mean(d_a^2)                      the same at v = v_old
    rho     = exp(ell - ell_old)                ratio, 1 before the first optimizer step
    L       = -dR_a rho + |dR_a| / (2 epsilon) (rho - 1)^2        simple policy optimization (SPO, arXiv 2401.16025)

L is smallest at rho = 1 + sign(dR_a) epsilon: epsilon is how far one rollout may move the ratio.

Dimensions: N samples, or P prompts x G branches.
"""

from torch import Tensor

from ..training.surrogate import SurrogateLoss


def surrogate_loss(
    velocity: Tensor, old_velocity: Tensor, direction: Tensor, reward_difference: Tensor, epsilon: float
) -> SurrogateLoss:
    """
    Surrogate loss of each sample; its gradient at ratio 1 moves the velocity by -dR_a d_a.

    Args:
        velocity (`Tensor`): v(x_t, t) of the model in training, shape [N, ...] or [P, G, ...].
        old_velocity (`Tensor`): v(x_t, t) recorded in the rollout, the shape of `velocity`.
        direction (`Tensor`): Whitened direction d_a, the shape of `velocity`.
        reward_difference (`Tensor`): dR_a, shape [N] or [P, G].
        epsilon (`float`): Half the width of the trust region of the ratio, > 0.

    Returns:
        [`SurrogateLoss`]: `loss` and `ratio`, each of the shape of `reward_difference`.
    """
    change = velocity - old_velocity
    # ell - ell_old = mean(d^2) - mean((change + d)^2), expanded so that it is exactly 0 where nothing has changed.
    log_ratio = -(change * (change + 2 * direction)).flatten(reward_difference.ndim).mean(dim=-1)
    ratio = log_ratio.exp()
    penalty = reward_difference.abs() / (2 * epsilon) * (ratio - 1).square()
    return SurrogateLoss(penalty - reward_difference * ratio, ratio)
