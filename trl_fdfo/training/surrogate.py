"""The differences of rewards that an algorithm's loss takes, and its return value. Dimensions: P prompts, G images of each."""

from typing import NamedTuple

import torch
from torch import Tensor

from .watchdogs import WatchdogError


# Keeps the advantages finite (and zero) where all images of a prompt have one reward.
STD_EPS = 1e-4


class SurrogateLoss(NamedTuple):
    """
    Attributes:
        loss (`Tensor`): L of each sample, the shape of the rewards.
        ratio (`Tensor`, *optional*): rho of each sample, the shape of the rewards; None if the algorithm has no ratio.
    """

    loss: Tensor
    ratio: Tensor | None


def in_float32(difference: Tensor) -> Tensor:
    """
    Differences of rewards, which are float64, as float32 for the loss.

    Raises:
        WatchdogError: A difference is beyond float32.
    """
    if difference.abs().max() > torch.finfo(torch.float32).max:
        raise WatchdogError(
            f"The rewards of a prompt differ by up to {difference.abs().max().item():.3g}, beyond float32: divide the reward "
            "by a constant, which changes nothing but its scale (if `beta` is set, divide that too)."
        )
    return difference.float()


def tied(rewards: Tensor) -> Tensor:
    """
    True for each prompt whose images all have one reward, or to which no reward applies: it teaches nothing.

    Args:
        rewards (`Tensor`): Total rewards, shape [P, G], NaN where none applies.

    Returns:
        `Tensor`: Shape [P].
    """
    # Not by the standard deviation, in which equal values may leave a rounding.
    return ~(rewards.amax(dim=1) > rewards.amin(dim=1))


def centered(rewards: Tensor) -> Tensor:
    """
    Rewards minus the mean of their prompt.

    Args:
        rewards (`Tensor`): Shape [P, G]; NaN for a prompt to which none applies.

    Returns:
        `Tensor`: Shape [P, G]; exactly 0 for a prompt that is [`tied`], which the rounding of its mean would not be.
    """
    return _without_ties(rewards - rewards.mean(dim=1, keepdim=True), rewards)


def group_advantages(rewards: Tensor) -> Tensor:
    """
    Rewards of the images of each prompt, normalised to mean 0 and standard deviation 1 (the sample's own, over G).

    Args:
        rewards (`Tensor`): Shape [P, G], G >= 2.

    Returns:
        `Tensor`: A, shape [P, G]; exactly 0 where all rewards of a prompt are the same or NaN.
    """
    deviation, std = rewards - rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, correction=0, keepdim=True)
    return _without_ties(deviation / (std + STD_EPS), rewards)


def _without_ties(values: Tensor, rewards: Tensor) -> Tensor:
    return values.masked_fill(tied(rewards).unsqueeze(1), 0)
