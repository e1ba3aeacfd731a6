"""
Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), the baseline, on the rollouts, replay, rewards and checkpoints of FDFO: what
differs is the noise of the sampler and the loss.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .algorithm import SurrogateLoss, clipped_loss, gaussian_kl, group_advantages, sde_distribution
from .algorithm.flow_grpo import Gaussian
from .flow_grpo_config import FlowGRPOConfig
from .pipeline_flow import RolloutBatch
from .rollout_buffer import ScoredBatch, trained_levels
from .rollout_trainer import RolloutTrainer
from .schedulers import SDEScheduler
from .seeds import INITIAL_NOISE, NOISY_STEPS, derive_seed


class FlowGRPOTrainer(RolloutTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Flow-GRPO, to compare FDFO with.

    ```python
    FlowGRPOTrainer(FlowGRPOConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and what is raised: [`~trl_fdfo.rollout_trainer.RolloutTrainer`].
    """

    config_class = FlowGRPOConfig
    sampler = SDEScheduler

    def _seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        seed, branches = self.args.seed, self.args.num_generations
        return [derive_seed(seed, rollout, n * branches + a, INITIAL_NOISE) for n in numbers for a in range(branches)]

    def _noise(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        scales = torch.zeros(len(numbers), self.args.num_inference_steps + 1)
        for scale, number in zip(scales, numbers):
            window = self._noisy_steps(rollout, number // self.args.per_device_prompt_batch_size)
            scale[window.start + 1 : window.stop + 1] = self.args.noise_level
        return scales

    def _noisy_steps(self, rollout: int, batch: int) -> range:
        """All but the last, which makes no noise that could be trained away, or a few in a row, drawn for each batch."""
        args = self.args
        steps = args.num_inference_steps - 1
        if args.num_noisy_steps is None:
            return range(steps)
        rng = np.random.default_rng([args.seed, rollout, batch, NOISY_STEPS])
        first = int(rng.integers(steps - args.num_noisy_steps + 1))
        return range(first, first + args.num_noisy_steps)

    def _shared_noise(self, rollout: int) -> None:
        return None

    def _trained_levels(self, rollout: int, batch: int) -> list[int]:
        args = self.args
        steps = self._noisy_steps(rollout, batch)
        levels = trained_levels(
            len(steps), args.num_trained_levels, args.optimizer_steps_per_rollout, args.seed, rollout, batch
        )
        return [steps[level] for level in levels]

    def _signal(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor]:
        return (group_advantages(rewards).flatten().nan_to_num(nan=0.0),)

    def _arrival(self, velocity: Tensor, batch: ScoredBatch, level: int) -> Gaussian:
        """Where the step from a level arrives with this velocity."""
        t, s = self._sigmas[level], self._sigmas[level + 1]
        return sde_distribution(batch.sampled.x_t[level].float(), velocity, t, s, self.args.noise_level)

    def _loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        new, old = self._arrival(velocity, batch, level), self._arrival(old_velocity, batch, level)
        return clipped_loss(batch.sampled.x_s[level].float(), new, old, *batch.signal, self.args.epsilon)

    def _distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        return gaussian_kl(self._arrival(velocity, batch, level), self._arrival(base_velocity, batch, level))
