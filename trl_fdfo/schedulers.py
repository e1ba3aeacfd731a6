"""
The schedulers that a pipeline runs with in a rollout and in a replay, in the place of its own.

All are subclasses of diffusers' `FlowMatchEulerDiscreteScheduler`: noise level sigma in [0, 1], 1 = pure noise, and the
velocity v = eps - x_0 is what reaches `step`.

Dimensions: N samples (prompts x branches), T steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from transformers.utils import logging

from .algorithm import churn_start, churn_step, sde_step


logger = logging.get_logger(__name__)


class StopPipeline(Exception):
    """Ends a pipeline's call once what it was called for has arrived."""

    def __init__(self, value: Tensor):
        self.value = value


def euler_scheduler(scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
    """
    `scheduler` itself where it is flow matching's Euler one; for another sampler of the same flow, the Euler one with
    its shift.

    Raises:
        ValueError: `scheduler` is not one of flow matching.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    config = scheduler.config
    flow = type(scheduler).__name__.startswith("FlowMatch") or (
        config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas", False)
    )
    if not flow:
        raise ValueError(
            f"{type(scheduler).__name__} is not a flow-matching scheduler, but FDFO moves the velocity of a flow-matching "
            "model. Take a pipeline whose scheduler is a `FlowMatchEulerDiscreteScheduler` or another sampler of a flow."
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    logger.warning_once(
        f"FDFO's churn is written for the Euler sampler: {type(scheduler).__name__} is replaced, in training and "
        f"evaluation, by FlowMatchEulerDiscreteScheduler with the same shift of {shift}."
    )
    names = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    return FlowMatchEulerDiscreteScheduler(shift=shift, **{name: config[name] for name in names if name in config})


class RehearsalScheduler(FlowMatchEulerDiscreteScheduler):
    """Takes the pipeline through its loop, the latents unchanged, and keeps what it was given."""

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
    What images are sampled with in a rollout: the tuples (x_t, v) of some levels are recorded. A subclass says how a step
    adds noise.
    """

    # Whether what a step has arrived at is recorded too, for a loss that asks how likely that was.
    records_arrivals = False

    def record(self, noise: Tensor, generators: list[torch.Generator], levels: Sequence[int]) -> None:
        """Prepare for one call: noise that comes in at each level [N, T + 1], a generator per sample, recorded steps."""
        self.noise = noise
        self.generators = generators
        self.levels = frozenset(levels)
        self.x_t: dict[int, Tensor] = {}
        self.velocities: dict[int, Tensor] = {}
        self.x_s: dict[int, Tensor] = {}
        self.endpoints: Tensor | None = None  # latents after the latest step, [N, ...]
        self.steps_done = 0

    def start(self, x: Tensor) -> Tensor:
        """The initial noise of each sample, from that of its generator."""
        return x

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Samples at level `step + 1`, from those at level `step` in fp32."""
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
        """Fresh fp32 noise of the shape of `x`; a sample to which none is added draws none."""
        noise = torch.zeros(x.shape)
        for sample, generator, amount in zip(noise, self.generators, self.noise[:, level].tolist(), strict=True):
            if amount > 0:
                sample.normal_(generator=generator)
        return noise.to(x.device)


class ChurnScheduler(RolloutScheduler):
    """FDFO's sampler: the noise of a level is its churn gamma."""

    def start(self, x: Tensor) -> Tensor:
        return churn_start(x.float(), self.noise[:, 0], self._draw(x, 0)).to(x.dtype)

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        t, s = self.sigmas[step], self.sigmas[step + 1]
        return churn_step(x_t, velocity, t, s, self.noise[:, step + 1], self._draw(x_t, step + 1))


class SDEScheduler(RolloutScheduler):
    """Flow-GRPO's sampler: the noise of a level is the scale a of the SDE's diffusion in the step that arrives there."""

    records_arrivals = True

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        t, s = self.sigmas[step], self.sigmas[step + 1]
        return sde_step(x_t, velocity, t, s, self.noise[:, step + 1], self._draw(x_t, step + 1))


class ReplayScheduler(FlowMatchEulerDiscreteScheduler):
    """
    Takes the pipeline through its own loop to one step, the latents unchanged by the steps before, and stops it there
    when the velocity arrives. So the pipeline knows which step it is at, and guidance may depend on it.
    """

    steps_left: int  # before the step that is replayed

    def replay(self, level: int) -> None:
        """Prepare for one call."""
        self.steps_left = level

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        if self.steps_left == 0:
            raise StopPipeline(model_output)
        self.steps_left -= 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample) if return_dict else (sample,)


class DecodeScheduler(FlowMatchEulerDiscreteScheduler):
    """Takes the pipeline through its loop with nothing computed, and gives it final latents to decode at the end."""

    def decode(self, endpoints: Tensor) -> None:
        """Prepare for one call."""
        self.endpoints = endpoints
        self.steps_done = 0

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        self.steps_done += 1
        x_s = self.endpoints if self.steps_done == len(self.timesteps) else sample
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)


def _refuse_noise_levels_per_token(kwargs: dict[str, Any]) -> None:
    if kwargs.get("per_token_timesteps") is not None:
        raise ValueError("A pipeline that gives each token a noise level of its own cannot be trained with FDFO.")
