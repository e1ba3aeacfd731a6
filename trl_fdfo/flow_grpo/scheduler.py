"""The SDE of Flow-GRPO in a diffusers pipeline: the scheduler that samples a rollout."""

from torch import Tensor

from ..pipeline.schedulers import RolloutScheduler
from .sde import sde_step


class SDEScheduler(RolloutScheduler):
    """Flow-GRPO's sampler: the noise of a level is the scale a of the SDE's diffusion in the step that arrives there."""

    records_arrivals = True

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        t, s = self.noise_levels[step], self.noise_levels[step + 1]
        return sde_step(x_t, velocity, t, s, self.noise_amounts[:, step + 1], self._draw(x_t, step + 1))
