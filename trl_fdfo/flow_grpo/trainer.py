"""
Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), the baseline. It shares rollouts, replay, rewards and checkpoints with the
other algorithms: only the noise of the sampler and the loss are its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..pipeline.records import RolloutBatch
from ..saving.model_card import Paper
from ..seeds import INITIAL_NOISE, NOISY_STEPS, derive_seed
from ..training.buffer import ScoredBatch, trained_levels
from ..training.surrogate import SurrogateLoss, group_advantages, in_float32
from ..training.trainer import RolloutTrainer
from .config import FlowGRPOConfig
from .scheduler import CPSScheduler, SDEScheduler
from .sde import Gaussian, batch_advantages, clipped_loss, gaussian_kl, without_variance


class FlowGRPOTrainer(RolloutTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Flow-GRPO, to compare other algorithms with.

    ```python
    FlowGRPOTrainer(FlowGRPOConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and errors: [`~trl_fdfo.training.trainer.RolloutTrainer`].
    """

    algorithm = "Flow-GRPO"
    paper = Paper(
        title="Flow-GRPO: Training Flow Matching Models via Online RL",
        authors=(
            *("Liu, Jie", "Liu, Gongye", "Liang, Jiajun", "Li, Yangguang", "Liu, Jiaheng", "Wang, Xintao"),
            *("Wan, Pengfei", "Zhang, Di", "Ouyang, Wanli"),
        ),
        arxiv_id="2505.05470",
        year=2025,
        key="liu2025flowgrpo",
    )
    config_class = FlowGRPOConfig
    scheduler_class = SDEScheduler
    hyperparameters = ("sde_type", "noise_level", "num_noisy_steps", "window_interval", "same_latent", "advantage_std")
    base_distance_name = "kl"
    _std_of_rewards: float  # of all rewards of the latest rollout

    @classmethod
    def scheduler_for(cls, config: FlowGRPOConfig) -> type[SDEScheduler]:
        return CPSScheduler if config.sde_type == "cps" else cls.scheduler_class

    def initial_seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        seed, branches = self.args.seed, self.args.num_candidates
        starts = 1 if self.args.same_latent else branches
        return [derive_seed(seed, rollout, n * branches + a, INITIAL_NOISE) for n in numbers for a in range(starts)]

    def noise_amounts(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        scales = torch.zeros(len(numbers), self.args.num_inference_steps + 1)
        for scale, number in zip(scales, numbers):
            window = self._noisy_steps(rollout, number // self.args.per_device_prompt_batch_size)
            scale[window.start + 1 : window.stop + 1] = self.args.noise_level
        return scales

    def _noisy_steps(self, rollout: int, batch: int) -> range:
        """
        All steps but the last, which makes no noise that could be trained away; or a few in a row, drawn per batch or moved
        on with the rollouts.
        """
        args = self.args
        steps = args.num_inference_steps - 1
        if args.num_noisy_steps is None:
            return range(steps)
        windows = [range(first, first + args.num_noisy_steps) for first in range(steps - args.num_noisy_steps + 1)]
        windows = [window for window in windows if set(window) <= set(self.trainable_levels)]
        if not windows:
            raise ValueError(
                f"num_noisy_steps={args.num_noisy_steps} in a row do not fit into the steps of the trained transformer, "
                f"{self.trainable_levels}: lower it, or train all transformers."
            )
        if args.window_interval is not None:
            return windows[rollout // args.window_interval % len(windows)]
        rng = np.random.default_rng([args.seed, rollout, batch, NOISY_STEPS])
        return windows[int(rng.integers(len(windows)))]

    def trained_levels(self, rollout: int, batch: int) -> list[int]:
        args = self.args
        steps = [step for step in self._noisy_steps(rollout, batch) if step in self.trainable_levels]
        if len(steps) < args.num_trained_levels:
            raise ValueError(
                f"timestep_fraction={args.timestep_fraction} trains {args.num_trained_levels} noisy steps, and the trained "
                f"transformer is called in {len(steps)} of them: lower it, or train all transformers."
            )
        levels = trained_levels(
            len(steps), args.num_trained_levels, args.optimizer_steps_per_rollout, args.seed, rollout, batch
        )
        return [steps[level] for level in levels]

    def see_rewards(self, rewards: Tensor) -> None:
        if self.args.advantage_std == "batch":
            rewards = self.accelerator.gather(rewards.to(self.args.device))
            known = rewards[rewards.isfinite()]
            self._std_of_rewards = known.std(correction=0).item() if len(known) else 0.0

    def ties_have_no_loss(self) -> bool:
        return True

    def targets(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor]:
        if self.args.advantage_std == "batch":
            advantages = batch_advantages(rewards, self._std_of_rewards)
        else:
            advantages = group_advantages(rewards)
        return (in_float32(advantages.flatten()),)

    def _arrival(self, velocity: Tensor, batch: ScoredBatch, level: int) -> Gaussian:
        """The distribution of a step's arrivals from this level with this velocity, as the likelihood takes it."""
        t, s = batch.sampled.sigmas[level], batch.sampled.sigmas[level + 1]
        distribution = self.scheduler_for(self.args).distribution
        arrival = distribution(batch.sampled.x_t[level].float(), velocity, t, s, self.args.noise_level)
        return without_variance(arrival) if self.args.sde_type == "cps" else arrival

    def loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        new, old = self._arrival(velocity, batch, level), self._arrival(old_velocity, batch, level)
        return clipped_loss(batch.sampled.x_s[level].float(), new, old, *batch.targets, self.args.epsilon)

    def base_distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        return gaussian_kl(self._arrival(velocity, batch, level), self._arrival(base_velocity, batch, level))
