"""
Reinforce Adjoint Matching (Bergmeister et al. 2026, arXiv 2605.10759): flow matching on the policy's own samples, whose
target is that of pretraining, corrected by the reward.

The policy p that maximises E_p[R] - lambda KL(p || p_base) has, to first order in R / lambda, the velocity

    v*(x_t, t) = v_base(x_t, t) + E[R (v - v*(x_t, t)) | x_t] / lambda        with x_t = (1 - t) x_0 + t eps, v = eps - x_0

and exactly this one for Gaussians and a linear reward. The loss regresses on it, with samples x_0 of the policy in training:

    L = |v_theta - sg(v_base + R / lambda (v - v_theta))|^2

R is the reward of an image minus the mean reward of its prompt's other images. This baseline does not depend on x_0, and
E[v - v_theta | x_t] is 0 on the policy's own samples. So it changes no gradient on average, and the loss varies less.

Departures from the paper: |.|^2 is the mean over the latent elements, not their sum, which AdamW does not see; x_0 are of the
policy as it was when the rollout began; the baseline; and the paper's variant that corrects for the cost of the path is left
out. The equation is that of published descriptions of the method, derived again; the paper's numbers were not at hand.

Dimensions: N samples.
"""

from torch import Tensor


def ram_loss(velocity: Tensor, base_velocity: Tensor, target: Tensor, reward: Tensor) -> Tensor:
    """
    Loss of each sample. Its gradient is that of mean((v_theta - v_base)^2) + R / lambda mean((v_theta - v)^2).

    Args:
        velocity (`Tensor`): v_theta(x_t, t) of the model in training, shape [N, ...].
        base_velocity (`Tensor`): v_base(x_t, t) of the base model, the shape of `velocity`.
        target (`Tensor`): v = eps - x_0, the shape of `velocity`.
        reward (`Tensor`): R / lambda, shape [N].

    Returns:
        `Tensor`: L, shape [N].
    """
    correction = reward.view(-1, *[1] * (velocity.ndim - 1)) * (target - velocity.detach())
    return (velocity - (base_velocity + correction)).square().flatten(1).mean(dim=-1)
