"""
The mathematics as pure tensor functions: the four steps of Finite Difference Flow Optimization, and of its baseline.

Public names alone; they are defined in `fdfo` and `flow_grpo`.
"""

from .fdfo.churn import churn_start, churn_step, constant_churn, interval_churn, prior_churn
from .fdfo.finite_difference import FiniteDifference, finite_difference, reward_gradient
from .fdfo.loss import surrogate_loss
from .flow_grpo.sde import clipped_loss, gaussian_kl, group_advantages, log_prob, sde_distribution, sde_step
from .training.surrogate import SurrogateLoss


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
