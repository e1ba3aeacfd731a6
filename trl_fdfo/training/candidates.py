"""
Chooses the images of a prompt that are trained on among more of them, its candidates.

Dimensions: P prompts, N candidates of each, G of them trained on.
"""

import torch
from torch import Tensor


def most_different(rewards: Tensor, count: int) -> Tensor:
    """
    The candidates of each prompt whose rewards have the largest variance: for two of them the best and the worst. Such a set
    is always made of the lowest and the highest, so that G + 1 sets are tried (Xu et al. 2025, arXiv 2504.13818).

    Args:
        rewards (`Tensor`): Total rewards, shape [P, N], NaN where none applies.
        count (`int`): G, in [2, N].

    Returns:
        `Tensor`: Their places among the candidates, rising, shape [P, G]. The first ones of a prompt whose candidates tie.
    """
    order = rewards.argsort(dim=1, stable=True)
    lowest_first = range(count, -1, -1)  # how many are of the lowest: all of them where nothing differs
    sets = torch.stack(
        [torch.cat([order[:, :low], order[:, order.shape[1] - count + low :]], 1) for low in lowest_first]
    )
    variances = rewards.expand(len(sets), -1, -1).gather(2, sets).var(dim=2, correction=0)
    best = variances.argmax(dim=0)
    return sets[best, torch.arange(len(rewards))].sort(dim=1).values
