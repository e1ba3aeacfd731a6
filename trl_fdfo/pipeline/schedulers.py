"""
Schedulers that take the place of a pipeline's own in a rehearsal, a rollout, a replay and a decoding.

All are subclasses of diffusers' `FlowMatchEulerDiscreteScheduler`: the noise level sigma is in [0, 1], 1 = pure noise,
and `step` gets the velocity v = eps - x_0.

Dimensions: N samples (prompts x branches), T steps.
"""

from collections.abc import Collection
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


class StopPipeline(Exception):
    """Ends a pipeline's call as soon as the value that it was called for has arrived."""

    def __init__(self, value: Tensor):
        self.value = value


def euler_scheduler(scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
    """
    Return `scheduler` itself if it is flow matching's Euler scheduler. Replace another sampler of a flow by the Euler
    scheduler with the same shift.

    Raises:
        ValueError: `scheduler` does not belong to flow matching.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    config = scheduler.config
    flow = type(scheduler).__name__.startswith("FlowMatch") or (
        config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas", False)
    )
    if not flow:
        raise ValueError(
            f"{type(scheduler).__name__} is not a flow-matching scheduler, and only a flow-matching model can be trained. "
            "Take a pipeline whose scheduler is a `FlowMatchEulerDiscreteScheduler` or another sampler of a flow."
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    logger.warning_once(
        f"Rollouts add noise to the steps of the Euler sampler: {type(scheduler).__name__} is replaced, in training and "
        f"evaluation, by FlowMatchEulerDiscreteScheduler with the same shift of {shift}."
    )
    names = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    return FlowMatchEulerDiscreteScheduler(shift=shift, **{name: config[name] for name in names if name in config})


class RehearsalScheduler(FlowMatchEulerDiscreteScheduler):
    """Takes the pipeline through its loop with unchanged latents, and keeps the latents and the latest velocity."""

    latents: Tensor | None = None
    velocity: Tensor | None = None
    steps_done = 0

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        _refuse_noise_levels_per_token(kwargs)
        self.latents, self.velocity = sample, model_output
        self.steps_done += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample) if return_dict else (sample,)


class RolloutScheduler(FlowMatchEulerDiscreteScheduler):
    """
    Samples the images of a rollout and records the tuples (x_t, v) of some levels. An algorithm's subclass says how a
    step adds noise.
    """

    # Also record x_s, for losses that need its likelihood.
    records_arrivals = False

    def record(self, noise_amounts: Tensor, generators: list[torch.Generator], levels: Collection[int]) -> None:
        """
        Prepare for one call of the pipeline.

        Args:
            noise_amounts (`Tensor`): Amount of noise added at each level, in the subclass's unit, shape [N, T + 1].
            generators (`list[torch.Generator]`): A generator for each sample.
            levels (`Collection[int]`): Recorded steps, in [0, T).
        """
        self.noise_amounts = noise_amounts
        self.generators = generators
        self.levels = frozenset(levels)
        self.x_t: dict[int, Tensor] = {}
        self.velocities: dict[int, Tensor] = {}
        self.x_s: dict[int, Tensor] = {}
        self.endpoints: Tensor | None = None  # latents after the latest step, [N, ...]
        self.steps_done = 0

    def start(self, x: Tensor) -> Tensor:
        """Initial latents of each sample, from the latents that `prepare_latents` drew with its seed, shape [N, ...]."""
        return x

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Take the samples at level `step`, in fp32, to level `step + 1`."""
        raise NotImplementedError

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        _refuse_noise_levels_per_token(kwargs)
        if self.step_index is None:
            self._init_step_index(timestep)
        step = self.step_index
        # As in the parent's step: computed in fp32, returned in the dtype of the model.
        x_s = self.advance(sample.float(), model_output, step).to(model_output.dtype)
        if step in self.levels:
            self.x_t[step] = sample
            self.velocities[step] = model_output
            if self.records_arrivals:
                self.x_s[step] = x_s
        self._step_index += 1
        self.steps_done += 1
        self.endpoints = x_s
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    def _draw(self, x: Tensor, level: int) -> Tensor:
        """Draw fp32 noise of the shape of `x` for a level; a sample whose amount is 0 draws none."""
        noise = torch.zeros(x.shape)
        for sample, generator, amount in zip(
            noise, self.generators, self.noise_amounts[:, level].tolist(), strict=True
        ):
            if amount > 0:
                sample.normal_(generator=generator)
        return noise.to(x.device)


class ReplayScheduler(FlowMatchEulerDiscreteScheduler):
    """
    Takes the pipeline through its own loop to one step, with unchanged latents, and stops it there when the velocity
    arrives. So the pipeline knows the number of the step, on which guidance may depend.
    """

    steps_left: int  # before the step that is replayed

    def replay(self, level: int) -> None:
        """Prepare for one call, which stops at step `level`."""
        self.steps_left = level

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        if self.steps_left == 0:
            raise StopPipeline(model_output)
        self.steps_left -= 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample) if return_dict else (sample,)


class DecodeScheduler(FlowMatchEulerDiscreteScheduler):
    """Takes the pipeline through its loop without computing, and gives it final latents to decode at the end."""

    def decode(self, endpoints: Tensor) -> None:
        """Prepare for one call, which decodes `endpoints`."""
        self.endpoints = endpoints
        self.steps_done = 0

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        self.steps_done += 1
        x_s = self.endpoints if self.steps_done == len(self.timesteps) else sample
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)


def _refuse_noise_levels_per_token(kwargs: dict[str, Any]) -> None:
    if kwargs.get("per_token_timesteps") is not None:
        raise ValueError("A pipeline that gives each token a noise level of its own cannot be trained.")
