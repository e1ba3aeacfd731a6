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

from .algorithm import churn_start, churn_step


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


class ChurnScheduler(FlowMatchEulerDiscreteScheduler):
    """The sampler of step 1: churned Euler steps, with the tuples (x_t, v) of some levels recorded."""

    def record(self, gammas: Tensor, generators: list[torch.Generator], levels: Sequence[int]) -> None:
        """Prepare for one call: churn [N, T + 1], one generator per sample and the steps to be recorded."""
        self.gammas = gammas
        self.generators = generators
        self.levels = frozenset(levels)
        self.x_t: dict[int, Tensor] = {}
        self.velocities: dict[int, Tensor] = {}
        self.endpoints: Tensor | None = None  # latents after the latest step, [N, ...]
        self.steps_done = 0

    def start(self, x: Tensor) -> Tensor:
        """Fresh noise for each branch at t = 1."""
        gamma = self.gammas[:, 0]
        return churn_start(x.float(), gamma, self._noise(x, gamma)).to(x.dtype)

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        _refuse_noise_levels_per_token(kwargs)
        if self.step_index is None:
            self._init_step_index(timestep)
        step = self.step_index
        if step in self.levels:
            self.x_t[step] = sample
            self.velocities[step] = model_output
        gamma = self.gammas[:, step + 1]
        # As in the parent's step: computed in fp32, returned in the dtype of the model.
        x_s = churn_step(
            sample.float(), model_output, self.sigmas[step], self.sigmas[step + 1], gamma, self._noise(sample, gamma)
        ).to(model_output.dtype)
        self._step_index += 1
        self.steps_done += 1
        self.endpoints = x_s
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    def _noise(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Fresh fp32 noise of the shape of `x`; a sample without churn draws none."""
        noise = torch.zeros(x.shape)
        for sample, generator, sample_gamma in zip(noise, self.generators, gamma.tolist(), strict=True):
            if sample_gamma > 0:
                sample.normal_(generator=generator)
        return noise.to(x.device)


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


def _refuse_noise_levels_per_token(kwargs: dict[str, Any]) -> None:
    if kwargs.get("per_token_timesteps") is not None:
        raise ValueError("A pipeline that gives each token a noise level of its own cannot be trained with FDFO.")
