"""
Stand-ins for a pipeline's scheduler in a rehearsal, a rollout, a replay and a decoding.

A stand-in is a copy of the scheduler that was given: noise levels, timesteps, shift and config are its own, whatever its
class. Only `step` is another. Noise levels are in [0, 1], 1 = pure noise, and `take_step` gets the velocity v = eps - x_0.

Latents are float32 from `prepare_latents` to the VAE, whatever the pipeline computes in: a stand-in keeps them, and hands
the pipeline a copy in the pipeline's own dtype. The small difference between two branches would not survive if they were
rounded after each step.

Dimensions: N samples (prompts x branches), T steps that the pipeline takes.
"""

import copy
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


class UnreplayableError(ValueError):
    """A pipeline samples in a way of which a single step cannot be replayed."""


class StopPipeline(Exception):
    """Ends a pipeline's call as soon as the value that it was called for has arrived."""

    def __init__(self, value: Any):
        self.value = value


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """
    Warn if the sampler is not Euler's: its steps are replaced, its noise levels are kept.

    Raises:
        ValueError: `scheduler` does not belong to flow matching.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    flow = (
        isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        or name.startswith("FlowMatch")
        or (config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas", False))
    )
    if not flow:
        raise ValueError(
            f"{name} is not a flow-matching scheduler, and only a flow-matching model can be trained. "
            "Take a pipeline whose scheduler is a `FlowMatchEulerDiscreteScheduler` or another sampler of a flow."
        )
    if type(scheduler).step is not FlowMatchEulerDiscreteScheduler.step:
        logger.warning_once(
            f"Rollouts add noise to the steps of the Euler sampler: in training and evaluation Euler's steps replace "
            f"those of {name}, between the noise levels of {name}."
        )


@functools.cache
def _stand_in_class(stand_in: type, given: type) -> type:
    # Pipelines look at the parameters of `set_timesteps`, which `wraps` passes on.
    @functools.wraps(given.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        # A pipeline may have called `set_shift` before, by the size of its images.
        key = _schedule_key((vars(self).get("_shift"), *args), kwargs)
        if key is not None and key == self._scheduled_key and self.step_index is None:
            return  # for the copy of the scheduler that the pipeline made for a second stream
        self._scheduled_key = key
        if key in self.schedules and not self.is_scheduled:
            for name, value in self.schedules[key].items():
                vars(self)[name] = value.copy() if isinstance(value, (list, dict)) else value
            return
        before = dict(vars(self))
        given.set_timesteps(self, *args, **kwargs)
        if given.order > 1:  # a sampler of second order visits levels twice
            self.timesteps, self.sigmas = map(torch.unique_consecutive, (self.timesteps, self.sigmas))
        if self.sigmas.max() > 1 + 1e-3:
            raise UnreplayableError(
                f"The noise levels of the {given.__name__} reach {self.sigmas.max().item():.4g}: those of a flow, "
                "x_t = (1 - t) x_0 + t eps, are in [0, 1], and no other model can be trained."
            )
        # Some samplers start a millionth below 1, where their own formulas are finite.
        self.sigmas = self.sigmas.masked_fill(self.sigmas > 1 - 1e-5, 1.0)
        if key is not None and not self.is_scheduled:
            self.is_scheduled = True
            self.schedules[key] = {name: value for name, value in vars(self).items() if before.get(name) is not value}

    return type(stand_in.__name__, (stand_in, given), {"set_timesteps": set_timesteps})


def _schedule_key(args: tuple, kwargs: dict) -> str | None:
    """Names a call of `set_timesteps`; None if it has tensors, whose values may have to come from the device."""
    values = [(name, value) for name, value in (*enumerate(args), *kwargs.items()) if value is not None]
    if any(isinstance(value, Tensor) for _, value in values):
        return None
    return repr([(name, value.tolist() if isinstance(value, np.ndarray) else value) for name, value in values])


class StandIn:
    """
    Base of the stand-ins. A subclass says in `take_step` what a step does.

    Attributes:
        first_step (`int`): The first step that the pipeline takes, as its schedule counts them: greater than 0 if a
            `strength` starts it late.
        steps_done (`int`): Steps taken. Step k of the others is step `first_step + k` of the schedule.
        known_first_step (`int`, *optional*): The first step, if it is known before the pipeline takes it. To find it by its
            timestep, the host would wait for the device.
        on_last_step (`Callable`): Called before the last step returns.
        schedules (`dict`): What `set_timesteps` made, by its arguments. Copies of a scheduler share it: a replay neither
            computes its schedule nor copies it to the device, for which the host would wait too.
        is_scheduled (`bool`): `set_timesteps` has been called.
        idle_streams (`frozenset[int]`): Places of streams whose velocity is zero in all steps, such as the sound of a model that
            throws it away. They take no steps, and are no part of the latents that are recorded.
        streams (`list[Stream]`): What is denoised, in the order in which the pipeline prepares it. A step of the sampler
            takes one call of `step` for each.
        calls_per_step (`int`, *optional*): Calls of `step` in a step of the sampler, if the pipeline copies its scheduler for
            parts of what it prepared, such as the frames of a video. Each part that it denoises is then a stream. If it is
            not known, the calls of the first step are counted, and [`StopPipeline`] says how many they were.
        counted_calls (`int`): Calls that were counted.
        insists_on_float32 (`bool`): The pipeline takes no other latents, whatever dtype those of `prepare_latents` have.
    """

    first_step = 0
    steps_done = 0
    known_first_step: int | None = None
    is_scheduled = False
    calls_per_step: int | None = None
    counted_calls = 0
    _timestep: Tensor | None = None  # of the counted calls
    insists_on_float32 = False
    idle_streams: frozenset[int] = frozenset()
    on_last_step: Callable[[], Any] = staticmethod(lambda: None)

    @classmethod
    def of(cls, scheduler: SchedulerMixin) -> "StandIn":
        """A stand-in for `scheduler`, which stays as it is but for its `schedules`."""
        vars(scheduler).setdefault("schedules", {})
        stand_in = copy.copy(scheduler)
        stand_in.__class__ = _stand_in_class(cls, type(scheduler))
        stand_in.streams = []
        stand_in._next_stream = 0
        stand_in._copies = 0
        stand_in._noise_dtype = None
        stand_in._scheduled_key = None
        return stand_in

    def __deepcopy__(self, memo: dict) -> "StandIn":
        # For its second stream a pipeline copies its scheduler: one object takes the steps of both.
        self._copies += 1
        return self

    @property
    def noise_levels(self) -> Tensor:
        """Noise levels t_0 > ... > t_T of the steps that the pipeline takes, shape [T + 1]."""
        levels = self.sigmas[self.first_step :]
        return 1 - levels if self._time_is_inverted else levels

    @property
    def _time_is_inverted(self) -> bool:
        """If so, time runs from noise, 0, to the image, 1, and the model gives x_0 - eps."""
        return bool(self.config.get("invert_sigmas", False))

    @property
    def moving_streams(self) -> list["Stream"]:
        """The streams that take steps: all but the idle ones."""
        return [stream for place, stream in enumerate(self.streams) if place not in self.idle_streams]

    def draw(self, noise: Tensor, of_one_sample: bool = False) -> Tensor:
        """The initial noise that the pipeline gets, in float32, in the place of what it drew with each sample's seed."""
        self.first_step = self.begin_index or 0
        self._noise_dtype = noise.dtype
        return self.initial_noise(noise.float())

    def begin(self, latents: Tensor) -> Tensor:
        """The latents that a stream starts from, of those that were prepared for it, shape [N, ...]."""
        self.first_step = self.begin_index or 0
        if self._noise_dtype is None:
            # The pipeline drew its noise in a way of its own.
            self._noise_dtype = latents.dtype
            latents = self.initial_noise(latents.float())
        # The pipeline computes in the dtype that it casts its latents to, or that it wanted its noise in.
        dtype = self._noise_dtype if latents.dtype == torch.float32 else latents.dtype
        self._noise_dtype = None
        is_idle = len(self.streams) in self.idle_streams
        self.streams.append(Stream(torch.float32 if self.insists_on_float32 else dtype))
        return self.streams[-1].hand_out(latents.float() if is_idle else self.start(latents.float()))

    def initial_noise(self, noise: Tensor) -> Tensor:
        """Initial noise of each sample, from that in float32 which was drawn with its seed, shape [N, ...]."""
        return noise

    def start(self, x: Tensor) -> Tensor:
        """Initial latents in float32 of a stream, from those that were prepared for it, shape [N, ...]."""
        return x

    def take_step(self, velocity: Tensor, sample: Tensor, step: int, stream: "Stream") -> Tensor:
        """A stream's latents at noise level `step + 1`, from those that the pipeline has at noise level `step`."""
        raise NotImplementedError

    @property
    def _level_tolerance(self) -> float:
        """Of timesteps: that of noise levels which diffusers' scheduler has for those of tokens."""
        return 1e-6 * self.config.num_train_timesteps

    def _check_levels(self, levels: Tensor, timestep: Tensor) -> None:
        """
        Refuse the timesteps of tokens, shape [N, tokens], if they are not all those of one flow, and of what is kept.

        Raises:
            UnreplayableError: A token is neither at the noise level of the step nor free of noise.
        """
        is_between = (levels > self._level_tolerance) & ((levels - timestep).abs() > self._level_tolerance)
        if is_between.any():
            raise UnreplayableError(
                f"The pipeline gives a token the timestep {levels[is_between][0].item():.4g} in a step at {float(timestep):.4g}: "
                "tokens with a noise level of their own, such as those of a condition whose strength is below 1, are not "
                "replayed. Set the strength of each condition to 1, so that it stays as it is."
            )

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """A flow takes its latents as they are. Pipelines call this for all schedulers but `FlowMatchEulerDiscreteScheduler`."""
        return sample

    def _count_call(self, timestep: Tensor) -> None:
        """Count a call of `step` if it is of the first step; a later one ends the pipeline's call with the count."""
        if self.counted_calls > 0 and timestep != self._timestep:
            raise StopPipeline(self.counted_calls)
        self.counted_calls, self._timestep = self.counted_calls + 1, timestep

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        if self.calls_per_step is None and self._copies > len(self.streams):
            self._count_call(timestep)
            return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=sample) if return_dict else (sample,)
        levels = kwargs.get("per_token_timesteps")
        if self.step_index is None:
            if self.known_first_step is None:
                self._init_step_index(timestep)
                if levels is not None:
                    self._check_levels(levels, timestep)
            else:
                self._step_index = self.known_first_step
            self.first_step = self.step_index
        if self.steps_done >= len(self.timesteps) - self.first_step:
            raise UnreplayableError(
                f"The pipeline takes more steps than the {len(self.timesteps)} of its schedule, such as for a video in several "
                "chunks, each of which depends on those before it: only one schedule can be replayed. Ask for a single chunk."
            )
        if self.calls_per_step is not None and self.steps_done == 0:
            if self._next_stream == 0:
                self.streams = [Stream(self.streams[0].dtype) for _ in range(self.calls_per_step)]
            self.streams[self._next_stream].hand_out(sample.float())
        stream = self.streams[self._next_stream]
        if sample.dtype != torch.float32:  # also where the pipeline rounds what it prepared in float32
            stream.dtype = sample.dtype
        # With a level for each token, diffusers' scheduler takes -v.
        velocity = -model_output if self._time_is_inverted or levels is not None else model_output
        if levels is not None:
            stream.is_denoised = (levels > timestep - self._level_tolerance)[..., None]
            velocity = velocity.where(stream.is_denoised, 0)
        is_idle = self._next_stream in self.idle_streams
        x_s = sample.float() if is_idle else self.take_step(velocity, sample, self.steps_done, stream)
        is_last_step = self.step_index + 1 == len(self.timesteps)
        if is_last_step:
            stream.dtype = torch.float32
        self._next_stream = (self._next_stream + 1) % len(self.streams)
        if self._next_stream == 0:
            self._step_index += 1
            self.steps_done += 1
            if is_last_step:
                self.on_last_step()
        x_s = stream.hand_out(x_s)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)


class Stream:
    """
    Latents that a pipeline denoises: nearly always all that it denoises, or its video, or its audio.

    Args:
        dtype (`torch.dtype`): The dtype that the pipeline computes in.

    Attributes:
        exact (`Tensor`): The latents in float32.
        handed_out (`Tensor`): The copy that the pipeline got.
        is_denoised (`Tensor`, *optional*): True for each token that the latest step denoises, shape [N, tokens, 1]. The
            others are conditions, which the pipeline keeps. None if it denoises all.
        is_idle (`bool`): Its velocity was zero in each step of a rehearsal.
    """

    is_denoised: Tensor | None = None
    is_idle = True

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def hand_out(self, x: Tensor) -> Tensor:
        # A replay hands out copies, which are contiguous: kernels may round by the order in memory.
        self.exact = x.contiguous()
        self.handed_out = self.exact.to(self.dtype)
        # A copy: some pipelines write the next latents into it.
        return self.handed_out.clone()

    def unrounded(self, sample: Tensor) -> Tensor:
        """The latents in float32 that the pipeline has in its own dtype, where it has not changed them."""
        if sample.dtype == torch.float32 or sample.shape != self.exact.shape:
            return sample.float()
        return torch.where(sample == self.handed_out, self.exact, sample.float())


def join(streams: Sequence[Tensor]) -> Tensor:
    """The latents of all streams as one tensor: as they are if there is one stream, [N, elements of all] otherwise."""
    return streams[0] if len(streams) == 1 else torch.cat([x.flatten(1) for x in streams], dim=1)


class _Joint:
    """Gives the streams their parts of what [`join`] made, in the same order."""

    def __init__(self, joint: Tensor):
        self._joint = joint
        self._taken = 0

    def take(self, like: Tensor) -> Tensor:
        """The part of the next stream, which has the shape of `like`."""
        if self._joint.shape == like.shape:
            return self._joint
        count = like[0].numel()
        part = self._joint[:, self._taken : self._taken + count].view(like.shape)
        self._taken += count
        return part


class RehearsalScheduler(StandIn):
    """Takes the pipeline through its loop with unchanged latents, and keeps the latents and the latest velocity."""

    latents: Tensor | None = None
    velocity: Tensor | None = None
    noise_scale = 1.0
    _drawn: Tensor | None = None

    def draw(self, noise: Tensor, of_one_sample: bool = False) -> Tensor:
        self._drawn = super().draw(noise)
        return self._drawn

    def _measure_noise(self, x: Tensor) -> None:
        """Find the factor by which a pipeline multiplies the noise that it draws, if it begins with that alone."""
        if self._drawn is None or x.numel() != self._drawn.numel():
            return
        # A pipeline may pack its latents: in the order of their values they are the same.
        x, drawn = x.float().flatten().sort().values, self._drawn.flatten().sort().values
        scale = x.norm() / drawn.norm()
        if (scale - 1).abs() > 0.05 and torch.allclose(x, scale * drawn, rtol=0.02, atol=0.02 * float(scale)):
            self.noise_scale = float(scale)

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        if self.calls_per_step is not None and self.step_index is not None and self.step_index < len(self.timesteps):
            together = self.timesteps[self.step_index]
            if abs(timestep - together) >= 1:  # some pipelines round them
                raise UnreplayableError(
                    f"The pipeline denoises a part of its latents at timestep {float(timestep):.4g} while others are at "
                    f"{float(together):.4g}, and only what is at one noise level can be replayed. Let it denoise all "
                    "frames together, such as by ar_step=0."
                )
        return super().step(model_output, timestep, sample, return_dict, **kwargs)

    def take_step(self, velocity, sample, step, stream):
        if stream is self.moving_streams[0]:
            self._parts = []
            if step == 0 and self.first_step == 0:
                self._measure_noise(sample)
        self._parts.append((sample, velocity))
        stream.is_idle = stream.is_idle and not velocity.any()
        if stream is self.moving_streams[-1]:
            self.latents, self.velocity = map(join, zip(*self._parts))
        return sample


class RolloutScheduler(StandIn):
    """
    Samples the images of a rollout and records the tuples (x_t, v) of some levels. An algorithm's subclass says how a
    step adds noise; this class adds none.
    """

    # Also record x_s, for losses that need its likelihood. Both x_t and x_s are then recorded in float32.
    records_arrivals = False
    # Refuse a pipeline that changes its latents between two steps.
    insists_on_whole_steps = False

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
        self._drawn_samples = 0  # one by one
        self.squared_velocity: Tensor | float = 0.0  # mean over the latent elements, summed over the steps, [N]
        self.is_kept: Tensor | None = None  # what the latest step has left as it was, [N, ...]; None if nothing
        self._parts: list[tuple[Tensor, ...]] = []  # of the streams that have taken the step that is being taken

    def draw(self, noise: Tensor, of_one_sample: bool = False) -> Tensor:
        if not of_one_sample or len(self.generators) < 2:
            return super().draw(noise) if len(noise) == len(self.generators) else noise
        # A pipeline that draws for one sample at a time puts something beside it, or them together, before its loop.
        together = self.generators, self.noise_amounts
        n = self._drawn_samples % len(self.generators)
        self._drawn_samples += 1
        self.generators, self.noise_amounts = self.generators[n : n + 1], self.noise_amounts[n : n + 1]
        try:
            return super().draw(noise[None])[0]
        finally:
            self.generators, self.noise_amounts = together

    def advance(self, x_t: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Take the samples at level `step`, in fp32, to level `step + 1`. Levels are those of `noise_levels`."""
        t, s = self.noise_levels[step], self.noise_levels[step + 1]
        return x_t + (s - t) * velocity

    def take_step(self, velocity, sample, step, stream):
        handed_out, exact, x_t = stream.handed_out, stream.exact, stream.unrounded(sample)
        x_s = self.advance(x_t, velocity, step)
        if stream.is_denoised is not None:
            x_s = x_s.where(stream.is_denoised, x_t)
        if (self.records_arrivals or self.insists_on_whole_steps) and step in self.levels:
            if exact.shape != x_t.shape or not torch.equal(exact, x_t):
                raise ValueError(
                    "The pipeline changes its latents between two steps of the scheduler (such as inpainting, which "
                    "puts the known pixels back), and this algorithm needs whole steps. Train this pipeline with an "
                    "algorithm that does not, such as the finite difference."
                )
        if self.records_arrivals:
            handed_out = exact
        # The replay hands out the same once more, and the pipeline then does with it what it did.
        self._parts.append((handed_out, velocity, x_s))
        if stream is self.moving_streams[-1]:
            handed_out, velocities, self.endpoints = map(join, zip(*self._parts))
            self.is_kept = self._kept([x_s for *_, x_s in self._parts])
            self._parts = []
            self.squared_velocity = self.squared_velocity + velocities.float().flatten(1).square().mean(dim=1)
            if step in self.levels:
                self.x_t[step], self.velocities[step] = handed_out, velocities
                if self.records_arrivals:
                    self.x_s[step] = self.endpoints
        return x_s

    def _kept(self, latents: Sequence[Tensor]) -> Tensor | None:
        """What the streams keep, of the latents of each."""
        masks = [stream.is_denoised for stream in self.moving_streams]
        if all(mask is None for mask in masks):
            return None
        everything = torch.ones((), dtype=torch.bool, device=latents[0].device)
        return join(
            [~(everything if mask is None else mask).expand_as(x) for mask, x in zip(masks, latents, strict=True)]
        )

    def _draw(self, x: Tensor, level: int) -> Tensor:
        """Draw fp32 noise of the shape of `x` for a level; a sample whose amount is 0 draws none."""
        # Pinned, so that the host draws the next noise while the device computes.
        noise = torch.zeros(x.shape, pin_memory=x.is_cuda)
        for sample, generator, amount in zip(
            noise, self.generators, self.noise_amounts[:, level].tolist(), strict=True
        ):
            if amount > 0:
                sample.normal_(generator=generator)
        return noise.to(x.device, non_blocking=True)


class ReplayScheduler(StandIn):
    """
    Takes the pipeline through its own loop to one step, and stops it there when the velocity arrives. So the pipeline
    knows the number of the step, on which guidance may depend.
    """

    def replay(self, level: int, x_t: Tensor) -> None:
        """Prepare for one call, which stops at step `level` and hands out `x_t` for it."""
        self.level = level
        self._x_t = _Joint(x_t)
        self._velocities: list[Tensor] = []

    @property
    def is_there(self) -> bool:
        """True if the transformer's next call belongs to the step that is replayed."""
        return self.steps_done == self.level

    def start(self, x):
        # Latents of which each part is a stream are those of the rollout already.
        return self._x_t.take(x) if self.level == 0 and self.calls_per_step is None else x

    def take_step(self, velocity, sample, step, stream):
        if step == self.level:
            self._velocities.append(velocity)
            if stream is self.moving_streams[-1]:
                raise StopPipeline(join(self._velocities))
        # A pipeline that changes its latents after a step changes these once, as in the rollout.
        return self._x_t.take(sample) if step + 1 == self.level else sample


class DecodeScheduler(StandIn):
    """Takes the pipeline through its loop without computing, and gives it final latents to decode at the end."""

    def decode(self, endpoints: Tensor) -> None:
        """Prepare for one call, which decodes `endpoints`."""
        self._endpoints = _Joint(endpoints)

    def take_step(self, velocity, sample, step, stream):
        return self._endpoints.take(sample) if self.step_index + 1 == len(self.timesteps) else sample
