"""The return value of an algorithm's loss."""

from typing import NamedTuple

from torch import Tensor


class SurrogateLoss(NamedTuple):
    """
    Attributes:
        loss (`Tensor`): L of each sample, the shape of the rewards.
        ratio (`Tensor`): rho of each sample, the shape of the rewards.
    """

    loss: Tensor
    ratio: Tensor
