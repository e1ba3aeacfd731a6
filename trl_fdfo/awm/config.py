"""Options of Advantage Weighted Matching."""

from dataclasses import dataclass

from ..training.config import option, with_help
from ..training.forward_process_config import ForwardProcessConfig


@dataclass
@with_help
class AWMConfig(ForwardProcessConfig):
    r"""
    Configuration of [`AWMTrainer`] (Advantage Weighted Matching, arXiv 2509.25050): the options of [`ForwardProcessConfig`], of
    which one has another default, and the ones below.

    Parameters:
        epsilon (`float`, defaults to `0.01`):
            Half the width of the clip of the ratio, whose logarithm is a mean over the latent elements.
        level_power (`float`, defaults to `0.0`):
            Power k >= 0 of the noise level t in the weight t^k of a level: 0 weighs all alike, 1 the noisy ones more.
        error_power (`float`, defaults to `1.0`):
            Power q in (0, 1] of the squared error of the velocity in the likelihood: 1 is flow matching, and smaller ones
            weigh samples less whose error is large.
        old_policy_beta (`float`, defaults to `0.0`):
            Weight >= 0 of the mean squared distance of the velocity from the old policy's, which is averaged with
            `old_policy_decay`.
    """

    epsilon: float = option(0.01)
    level_power: float = option(0.0)
    error_power: float = option(1.0)
    old_policy_beta: float = option(0.0)

    def _check(self) -> None:
        super()._check()
        if not self.level_power >= 0:
            raise ValueError(f"level_power={self.level_power} must be >= 0: below, levels without noise weigh most.")
        if not 0 < self.error_power <= 1:
            raise ValueError(
                f"error_power={self.error_power} must be in (0, 1]: above 1, samples with a large error would rule the loss."
            )
        if not self.old_policy_beta >= 0:
            raise ValueError(
                f"old_policy_beta={self.old_policy_beta} must be >= 0: below 0 the loss pushes away from the old policy."
            )
