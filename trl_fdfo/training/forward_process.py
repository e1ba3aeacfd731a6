"""
Algorithms of the forward process: their loss is of endpoints x_0 that are noised afresh,

    x_t = (1 - t) x_0 + t eps,    target velocity eps - x_0,

in the place of the steps that the sampler took. So a rollout keeps x_0 alone, and any sampler will do.

- t is one of the noise levels of the rollout: there the pipeline's replay gives the velocity at any x_t.
- eps follows from (seed, rollout, sample, level, pass), on whatever process and in whatever micro-batch.
- v_old is of the policy that sampled the rollout, at the same x_t: its weights are kept, and take the place of the trained
  ones while it samples and gives v_old. An algorithm may ask for the velocity of another model instead.
- The self-check of the replay: when a rollout batch has been sampled, one of its steps, which differs from batch to batch, is
  replayed and compared with what was recorded. The record is dropped then.

Dimensions: P prompts, G branches, N = P x G samples, T steps.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..pipeline.schedulers import RolloutScheduler
from ..saving.weight_averaging import OldPolicy
from ..seeds import FORWARD_NOISE, INITIAL_NOISE, derive_seed
from .buffer import MicroBatch, ScoredBatch, trained_levels
from .trainer import RolloutTrainer


class ODEScheduler(RolloutScheduler):
    """Euler's steps along the ODE. Endpoints that are noised are samples of the flow, so nothing else may change them."""

    insists_on_whole_steps = True


class ForwardProcessTrainer(RolloutTrainer):
    """
    What algorithms of the forward process share. A subclass writes `targets`, `loss` and, for `beta`, `base_distance`.

    Raises:
        ValueError: As [`RolloutTrainer`]; or the pipeline takes its latents apart before its first step.
    """

    scheduler_class = ODEScheduler
    noises_endpoints = True
    has_old_policy = True  # False where neither `sampling_weights` nor `compared_weights` needs one

    def _try_replay(self) -> float:
        if not self.flow.takes_any_samples:
            raise ValueError(
                f"{type(self.pipeline).__name__} takes its latents apart before its first step, so that noised endpoints cannot "
                "be put in their place. Train it with an algorithm that learns from the steps that the sampler took."
            )
        return super()._try_replay()

    def old_policy_decay(self, rollouts: int) -> float:
        """eta in [0, 1): after this many rollouts, the policy that samples becomes eta old + (1 - eta) trained weights."""
        return min(self.args.old_policy_decay_rate * rollouts, self.args.old_policy_decay)

    def _add_collaborators(self) -> None:
        super()._add_collaborators()
        if self.has_old_policy:
            self.old_policy = self._add_average(OldPolicy(self.model, self.old_policy_decay))

    def sampling_weights(self) -> contextlib.AbstractContextManager:
        return self.old_policy.applied() if self.has_old_policy else super().sampling_weights()

    def samples_with_trained_weights(self, rollout: int) -> bool:
        return not self.has_old_policy or self.old_policy_decay(rollout) == 0

    def compared_weights(self) -> contextlib.AbstractContextManager:
        """In this context the transformer gives the `old_velocity` of `loss`: by default with the weights that sampled."""
        return self.old_policy.applied()

    def initial_seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        samples = self._samples(numbers, self.args.num_candidates)
        return [derive_seed(self.args.seed, rollout, sample, INITIAL_NOISE) for sample in samples]

    def noise_amounts(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        return torch.zeros(self.args.num_inference_steps + 1)

    def trained_levels(self, rollout: int, batch: int) -> list[int]:
        args, steps = self.args, self.trainable_levels
        counts = (len(steps), args.num_trained_levels, args.optimizer_steps_per_rollout)
        return [steps[level] for level in trained_levels(*counts, args.seed, rollout, batch)]

    def _samples(self, numbers: Sequence[int], branches: int) -> list[int]:
        """Places of the samples of these prompts, of which each has as many, in the rollout over all processes."""
        return [number * branches + branch for number in numbers for branch in range(branches)]

    def with_tuple(self, inputs: MicroBatch) -> ScoredBatch:
        batch, level, sampled = inputs.batch, inputs.level, inputs.batch.sampled
        x_0 = sampled.endpoints.flatten(0, 1).to(sampled.device, non_blocking=True)
        t = sampled.sigmas[level]
        x_t = (1 - t) * x_0 + t * self._noise(x_0, inputs)
        if sampled.is_kept is not None:
            x_t = x_0.where(sampled.is_kept.to(sampled.device), x_t)
        sampled = replace(sampled, endpoints=x_0.view_as(sampled.endpoints), x_t={level: x_t})
        with torch.no_grad(), self.compared_weights():
            velocity = self.flow.velocity(sampled, level)
        return replace(batch, sampled=replace(sampled, velocities={level: velocity}))

    def _noise(self, x: Tensor, inputs: MicroBatch) -> Tensor:
        args = self.args
        first = inputs.batch.number * args.per_device_prompt_batch_size
        samples = self._samples(range(first, first + args.per_device_prompt_batch_size), args.num_generations)
        number_of_pass = inputs.step // args.optimizer_steps_per_rollout
        # Pinned, so that the host draws while the device computes.
        noise = torch.empty(x.shape, pin_memory=x.is_cuda)
        for row, sample in zip(noise, samples, strict=True):
            seed = derive_seed(args.seed, self._buffer.rollout, sample, inputs.level, number_of_pass, FORWARD_NOISE)
            row.normal_(generator=torch.Generator().manual_seed(seed))
        return noise.to(x.device, non_blocking=True)

    def base_distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        return (velocity - base_velocity).square().flatten(1).mean(dim=-1)


def target_velocity(batch: ScoredBatch, level: int) -> Tensor:
    """The velocity eps - x_0 of each noised sample, shape [N, ...]; 0 for what the sampler keeps."""
    sampled = batch.sampled
    return (sampled.x_t[level] - sampled.endpoints.flatten(0, 1)) / sampled.sigmas[level]
