"""Step 1 of FDFO in a diffusers pipeline: the scheduler that samples the branches of a prompt with churn."""

from torch import Tensor

from ..pipeline.schedulers import RolloutScheduler
from .churn import churn_start, churn_step


class ChurnScheduler(RolloutScheduler):
    """FDFO's sampler: the noise of a level is its churn gamma."""

    def initial_noise(self, noise: Tensor) -> Tensor:
        if self.first_step > 0:
            # Churn is defined at the levels that the sampler arrives at, and at pure noise.
            if (self.noise_amounts[:, 0] > 0).any() and not (self.noise_amounts[:, 1:] > 0).any():
                raise ValueError(
                    f"All churn is at the first noise level, and the pipeline starts late, at step {self.first_step} of its "
                    "schedule, where no churn can be added: the images of a prompt would be identical. Set "
                    "churn_schedule='constant' or 'interval', or strength=1.0 in `pipeline_kwargs`."
                )
            return noise
        return churn_start(noise, self.noise_amounts[:, 0], self._draw(noise, 0))

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        t, s = self.noise_levels[step], self.noise_levels[step + 1]
        return churn_step(x_t, velocity, t, s, self.noise_amounts[:, step + 1], self._draw(x_t, step + 1))
