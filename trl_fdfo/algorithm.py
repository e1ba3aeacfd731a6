"""
The mathematics as pure tensor functions: the four steps of Finite Difference Flow Optimization, and the other algorithms.

Public names alone; they are defined in the folders of the algorithms.
"""

from .awm.loss import awm_loss
from .diffusion_nft.loss import nft_loss, optimality
from .fdfo.churn import churn_start, churn_step, constant_churn, interval_churn, prior_churn
from .fdfo.finite_difference import FiniteDifference, finite_difference, known_gradient, reward_gradient
from .fdfo.loss import surrogate_loss
from .flow_grpo.sde import (
    batch_advantages,
    clipped_loss,
    cps_distribution,
    gaussian_kl,
    log_prob,
    sde_distribution,
    sde_step,
    without_variance,
)
from .ram.loss import ram_loss
from .training.surrogate import SurrogateLoss, group_advantages


__all__ = [
    "FiniteDifference",
    "SurrogateLoss",
    "awm_loss",
    "batch_advantages",
    "churn_start",
    "churn_step",
    "clipped_loss",
    "constant_churn",
    "cps_distribution",
    "finite_difference",
    "gaussian_kl",
    "group_advantages",
    "interval_churn",
    "known_gradient",
    "log_prob",
    "nft_loss",
    "optimality",
    "prior_churn",
    "ram_loss",
    "reward_gradient",
    "sde_distribution",
    "sde_step",
    "surrogate_loss",
    "without_variance",
]
