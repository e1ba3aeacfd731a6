"""The SDEs of Flow-GRPO in a diffusers pipeline: the schedulers that sample a rollout."""

from torch import Tensor

from ..pipeline.schedulers import RolloutScheduler
from .sde import cps_distribution, sde_distribution, sde_step


class SDEScheduler(RolloutScheduler):
    """
    Flow-GRPO's sampler: the noise of a level is the scale a of the SDE in the step that arrives there.

    Attributes:
        distribution (`Callable`): The distribution of a step's arrivals, such as [`sde_distribution`].
    """

    records_arrivals = True
    distribution = staticmethod(sde_distribution)

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        t, s = self.noise_levels[step], self.noise_levels[step + 1]
        scale, noise = self.noise_amounts[:, step + 1], self._draw(x_t, step + 1)
        return sde_step(x_t, velocity, t, s, scale, noise, self.distribution)


class CPSScheduler(SDEScheduler):
    """Coefficients-Preserving Sampling."""

    distribution = staticmethod(cps_distribution)
