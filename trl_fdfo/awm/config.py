"""Options of Advantage Weighted Matching."""

from dataclasses import dataclass

from ..training.config import option, with_help
from ..training.forward_process_config import ForwardProcessConfig


@dataclass
@with_help
class AWMConfig(ForwardProcessConfig):
    r"""
    Configuration of [`AWMTrainer`] (Advantage Weighted Matching, arXiv 2509.25050): the options of [`ForwardProcessConfig`], of
    which one has another default.

    Parameters:
        epsilon (`float`, defaults to `0.01`):
            Half the width of the clip of the ratio, whose logarithm is a mean over the latent elements.
    """

    epsilon: float = option(0.01)
