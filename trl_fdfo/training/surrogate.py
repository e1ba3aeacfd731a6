"""The differences of rewards that an algorithm's loss takes, and its return value."""

from typing import NamedTuple

import torch
from torch import Tensor

from .watchdogs import WatchdogError


class SurrogateLoss(NamedTuple):
    """
    Attributes:
        loss (`Tensor`): L of each sample, the shape of the rewards.
        ratio (`Tensor`): rho of each sample, the shape of the rewards.
    """

    loss: Tensor
    ratio: Tensor


def in_float32(difference: Tensor) -> Tensor:
    """
    Differences of rewards, which are float64, as float32 for the loss.

    Raises:
        WatchdogError: A difference is beyond float32.
    """
    if difference.abs().max() > torch.finfo(torch.float32).max:
        raise WatchdogError(
            f"The rewards of a prompt differ by up to {difference.abs().max().item():.3g}, beyond float32: divide the reward "
            "by a constant, which changes nothing but its scale."
        )
    return difference.float()
