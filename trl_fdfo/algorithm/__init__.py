"""The mathematics of Finite Difference Flow Optimization, and of its baseline, as pure tensor functions."""

from .churn import churn_start, churn_step, constant_churn, interval_churn, prior_churn
from .finite_difference import FiniteDifference, finite_difference, reward_gradient
from .flow_grpo import clipped_loss, gaussian_kl, group_advantages, log_prob, sde_distribution, sde_step
from .loss import SurrogateLoss, surrogate_loss


__all__ = [
    "FiniteDifference",
    "SurrogateLoss",
    "churn_start",
    "churn_step",
    "clipped_loss",
    "constant_churn",
    "finite_difference",
    "gaussian_kl",
    "group_advantages",
    "interval_churn",
    "log_prob",
    "prior_churn",
    "reward_gradient",
    "sde_distribution",
    "sde_step",
    "surrogate_loss",
]
