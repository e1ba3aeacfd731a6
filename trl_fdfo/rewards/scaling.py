"""
Puts rewards on one scale before they are weighed, so that a weight is a wish and not a unit. The scales have the names and
the meaning of `scale_rewards` in TRL's GRPO, applied to each reward by itself.

Dimensions: P prompts, G images of each, R rewards.
"""

import torch
from torch import Tensor


SCALES = ("none", "group", "batch")


def scaled(rewards: Tensor, scale: str) -> Tensor:
    """
    Args:
        rewards (`Tensor`): Rewards of a whole rollout, over all processes, float64, shape [P, G, R]; NaN where one does not
            apply. As in the total, a reward counts for a prompt only if it applies to all its images.
        scale (`str`): `"none"`; `"group"`: each reward's deviation from its mean over the images of the prompt, in units of its
            standard deviation there, and 0 where the images tie; `"batch"`: each reward in units of its standard deviation
            over all images, and as it is where all of these are the same.

    Returns:
        `Tensor`: The scaled rewards, [P, G, R], NaN where `rewards` do not count. Standard deviations are the sample's (n - 1).
    """
    if scale == "none":
        return rewards
    rewards = rewards.where(rewards.isfinite().all(dim=1, keepdim=True), torch.nan)
    if scale == "group":
        deviation, std = rewards - rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
        # The rounding of a mean must not become a difference.
        is_tie = (rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)) | (std == 0)
        # Nor that of a quotient: the rewards of a pair are -a and a to the bit, so that two which disagree cancel.
        return (deviation / std).round(decimals=8).masked_fill(is_tie, 0)
    return rewards / torch.stack([_spread(values[values.isfinite()]) for values in rewards.unbind(dim=-1)])


def _spread(values: Tensor) -> Tensor:
    differ = len(values) > 1 and values.amax() > values.amin()
    return values.std() if differ else values.new_ones(())
