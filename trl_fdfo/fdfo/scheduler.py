"""Step 1 of FDFO in a diffusers pipeline: the scheduler that samples the branches of a prompt with churn."""

from torch import Tensor

from ..pipeline.schedulers import RolloutScheduler
from .churn import churn_start, churn_step


class ChurnScheduler(RolloutScheduler):
    """FDFO's sampler: the noise of a level is its churn gamma."""

    def start(self, x: Tensor) -> Tensor:
        return churn_start(x.float(), self.noise_amounts[:, 0], self._draw(x, 0)).to(x.dtype)

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        t, s = self.sigmas[step], self.sigmas[step + 1]
        return churn_step(x_t, velocity, t, s, self.noise_amounts[:, step + 1], self._draw(x_t, step + 1))
