"""The mathematics of Finite Difference Flow Optimization as pure tensor functions (no pipeline, no trainer)."""

from .churn import churn_start, churn_step, constant_churn, interval_churn, prior_churn
from .finite_difference import FiniteDifference, finite_difference
from .loss import SurrogateLoss, surrogate_loss


__all__ = [
    "FiniteDifference",
    "SurrogateLoss",
    "churn_start",
    "churn_step",
    "constant_churn",
    "finite_difference",
    "interval_churn",
    "prior_churn",
    "surrogate_loss",
]
