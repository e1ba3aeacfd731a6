"""
Rollout and replay through a user's diffusers pipeline: the only file that calls one.

FDFO needs the velocity v(x_t, t, prompt) and nothing else of a model, and in every diffusers flow-matching pipeline that
is what reaches `scheduler.step`: after guidance, sign flips, packing and slicing. So the pipeline is its own adapter.

- Rollout: the pipeline is called as a user would, with a scheduler whose `step` does the churned step and records
  (x_t, v). The generators of a prompt's branches start from one seed, so that the branches share their noise.
- Replay of one step, with gradients: the undecorated `__call__` runs on the same batch with the remembered return values
  of `encode_prompt` and `prepare_latents` (the latents being the recorded x_t). In the steps before, neither the
  transformer nor the scheduler does anything; at the step itself the scheduler stops the pipeline with the velocity.

Dimensions: P prompts, G branches (images per prompt), N = P x G samples in prompt-major order, T steps.
"""

import contextlib
import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .pipeline_checks import check_call_kwargs, check_pipeline, check_resolution
from .sample_axes import concatenate, sample_axes, take
from .schedulers import (
    ChurnScheduler,
    DecodeScheduler,
    RehearsalScheduler,
    ReplayScheduler,
    RolloutScheduler,
    StopPipeline,
    euler_scheduler,
)


# Relative rms difference between a replayed and a recorded velocity that kernels which do not repeat to the bit may
# cause (atomics, compiled graphs). The wrong prompt, step or guidance is 10 to 1000 times as far off.
REPLAY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class ReplayError(RuntimeError):
    """A replayed velocity is not the recorded one: what would be trained is not what was sampled."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """
    What passes between a pipeline and its parts in a call with N samples of one prompt, of which one step was real.

    Attributes:
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T = 0 in [0, 1], shape [T + 1], on the CPU.
        latents (`Tensor`): Noisy latents as the scheduler gets them, shape [N, ...].
        velocity (`Tensor`): Their velocity as the scheduler gets it, of the same shape.
        encoded (`list`): Return value of each call of `encode_prompt`.
        prepared (`list`): Return value of each call of `prepare_latents`.
        model_calls (`list[tuple[tuple, dict]]`): Arguments of each call of the transformer in the first step.
        outputs (`list`): What it returned.
        decode_calls (`list[tuple[tuple, dict]]`): Arguments of each call of the VAE's `decode`.
        images (`Tensor`): Floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W]. Of no use as pictures.
    """

    sigmas: Tensor
    latents: Tensor
    velocity: Tensor
    encoded: list
    prepared: list
    model_calls: list[tuple[tuple, dict]]
    outputs: list
    decode_calls: list[tuple[tuple, dict]]
    images: Tensor


@dataclass(frozen=True)
class BatchAxes:
    """Where the samples are, as [`sample_axes`] has it, in the fields of a [`Rehearsal`] of these names."""

    encoded: Any
    prepared: Any
    model_calls: Any
    outputs: Any


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """
    What a rollout of one batch of prompts leaves behind for the replay.

    Attributes:
        images (`Tensor`): Decoded images, floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W].
        endpoints (`Tensor`): Final latents x_0 as the pipeline lays them out, shape [P, G, ...].
        x_t (`dict[int, Tensor]`): Noisy latents before step k, for each recorded k in [0, T), shape [N, ...].
        velocities (`dict[int, Tensor]`): Velocity of step k, for each recorded k, the shape of `x_t[k]`.
        x_s (`dict[int, Tensor]`): Noisy latents after step k, where the sampler records them, the shape of `x_t[k]`.
        call_kwargs (`dict`): Arguments of the pipeline's call.
        remembered (`dict[str, list]`): Return values of the pipeline's methods that the replay does not repeat.
        outputs (`list`): What the transformer returned at each of its calls, as shapes alone.
    """

    images: Tensor
    endpoints: Tensor
    x_t: dict[int, Tensor]
    velocities: dict[int, Tensor]
    x_s: dict[int, Tensor]
    call_kwargs: dict[str, Any]
    remembered: dict[str, list]
    outputs: list

    def on_host(self) -> "RolloutBatch":
        """The batch with what the replay needs in host memory, from which `velocity` takes one step at a time."""
        return replace(
            self,
            x_t=host_copy(self.x_t),
            velocities=host_copy(self.velocities),
            x_s=host_copy(self.x_s),
            remembered=host_copy(self.remembered),
        )


class PipelineFlow:
    """
    The flow of a diffusers pipeline: samples from it, and gives its velocity at a recorded sample, with gradients.

    Args:
        pipeline (`DiffusionPipeline`): A flow-matching pipeline with a `transformer`; what else it must have is in
            [`check_pipeline`].
        num_generations (`int`): Branches G per prompt, >= 2.
        num_inference_steps (`int`): Steps T of the sampler.
        sampler (`type`): The [`RolloutScheduler`] that rollouts are sampled with.
        share_prefix (`bool`): In a rollout, run the transformer once for the branches of a prompt as long as the churn
            leaves them identical.
        **call_kwargs: Other arguments of the pipeline's call, such as `guidance_scale`, `height`, `width` (pixels).

    Attributes:
        model (`Callable`): What is called in the place of `pipeline.transformer`: the module itself, or what wraps it
            (DDP, DeepSpeed, FSDP, a compiled module), so that the wrapper's hooks fire.
        prompt_embeddings (`Mapping[str, list]`): What `encode` returned for some prompts, which are not encoded again.

    Raises:
        ValueError: The pipeline is no flow-matching one, or its call does not take one of the arguments.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_generations: int,
        num_inference_steps: int,
        sampler: type[RolloutScheduler] = ChurnScheduler,
        share_prefix: bool = False,
        **call_kwargs: Any,
    ):
        self.pipeline = pipeline
        self.num_generations = num_generations
        self.sampler = sampler
        self.share_prefix = share_prefix
        self.call_kwargs = {"num_inference_steps": num_inference_steps, **call_kwargs}
        check_pipeline(pipeline)
        check_call_kwargs(pipeline, self.call_kwargs)
        check_resolution(pipeline, call_kwargs.get("height"), call_kwargs.get("width"))
        self.model: Callable = pipeline.transformer
        self.prompt_embeddings: Mapping[str, list] = {}
        self._axes: BatchAxes | None = None
        self._scheduler = euler_scheduler(pipeline.scheduler)
        self._replay_scheduler = ReplayScheduler.from_config(self._scheduler.config)
        self._dtype = pipeline.transformer.dtype
        # `num_images_per_prompt`, or that of videos.
        options = inspect.signature(type(pipeline).__call__).parameters
        self._per_prompt_option = next((name for name in options if re.fullmatch(r"num_\w+_per_prompt", name)), None)
        # `inspect.unwrap` strips the decorator `torch.no_grad()` from the call.
        self._call_with_grad = inspect.unwrap(type(pipeline).__call__)

    @torch.no_grad()
    def rehearse(
        self, prompts: Sequence[str], columns: dict[str, Sequence] | None = None, samples_per_prompt: int = 1
    ) -> Rehearsal:
        """
        One call of the pipeline from the prompts to the decoded images, with all steps of the transformer but the first
        left out: what the pipeline refuses, it refuses here, and what it passes around has the shapes of a rollout.

        Args:
            prompts (`Sequence[str]`): P prompts.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`.
            samples_per_prompt (`int`): N = P x samples_per_prompt.

        Raises:
            ValueError: The pipeline cannot be called with these arguments.
        """
        scheduler = RehearsalScheduler.from_config(self._scheduler.config)
        remembered: dict[str, list] = {"encode_prompt": [], "prepare_latents": []}
        calls, outputs, decode_calls = [], [], []
        known: dict[str, Any] = {}  # by the shapes of the arguments

        def model(*args, **kwargs):
            shapes = repr(recursively_apply(lambda tensor: tensor.shape, (args, kwargs)))
            if scheduler.steps_done > 0 and shapes in known:
                return recursively_apply(torch.zeros_like, known[shapes])
            known[shapes] = self.model(*args, **kwargs)
            if scheduler.steps_done == 0:
                calls.append((args, kwargs))
                outputs.append(known[shapes])
            return known[shapes]

        generators = _generators([0] * len(prompts) * samples_per_prompt)
        call_kwargs = self._arguments(prompts, generators, columns)
        with self._patched(scheduler, model, **_remember(remembered)), _recorded_decoding(self.pipeline, decode_calls):
            try:
                images = self.pipeline(**call_kwargs)[0].float()
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                options = {name: value for name, value in self.call_kwargs.items() if value is not None}
                raise ValueError(
                    f"{type(self.pipeline).__name__} cannot be called with {options}: {type(error).__name__}: {error}"
                ) from error
        if scheduler.latents is None:
            raise ValueError(f"{type(self.pipeline).__name__} took no step: it is not a pipeline to train.")
        return Rehearsal(
            sigmas=scheduler.sigmas.cpu(),
            latents=scheduler.latents,
            velocity=scheduler.velocity,
            encoded=remembered["encode_prompt"],
            prepared=remembered["prepare_latents"],
            model_calls=calls,
            outputs=outputs,
            decode_calls=decode_calls,
            images=images,
        )

    def axes(self, columns: dict[str, Sequence] | None = None) -> BatchAxes:
        """
        Where the samples are in what the pipeline passes around: rehearsed once with some samples and with twice as many.

        Args:
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`, where the pipeline needs them, for one prompt.

        Raises:
            ValueError: What a sample's part of it is cannot be told.
        """
        if self._axes is None:
            # Of different length: some pipelines have a mask only then.
            prompts = ["a cat"] if columns else ["a cat", "a red cat and a blue dog"]
            some, twice = (self.rehearse(prompts, columns, samples) for samples in (1, 2))
            names = [field.name for field in fields(BatchAxes)]
            try:
                self._axes = BatchAxes(*(sample_axes(getattr(some, name), getattr(twice, name)) for name in names))
            except ValueError as error:
                raise ValueError(
                    f"The batches of {type(self.pipeline).__name__} cannot be taken apart, which shared_prefix, "
                    "cache_prompt_embeds and a per_device_sampling_batch_size of its own need. Leave these options "
                    f"out. It passes {error}"
                ) from None
        return self._axes

    @torch.no_grad()
    def encode(self, prompt: str) -> list:
        """What `encode_prompt` returns at each of its calls for one sample of the prompt, for `prompt_embeddings`."""
        remembered: dict[str, list] = {"encode_prompt": [], "prepare_latents": []}

        def model(*args, **kwargs):
            raise StopPipeline(None)

        scheduler = RehearsalScheduler.from_config(self._scheduler.config)
        with self._patched(scheduler, model, **_remember(remembered)), contextlib.suppress(StopPipeline):
            self.pipeline(**self._arguments([prompt], [torch.Generator()]))
        return remembered["encode_prompt"]

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        seeds: Sequence[int],
        noise_seeds: Sequence[int],
        levels: Collection[int],
        columns: dict[str, Sequence] | None = None,
    ) -> RolloutBatch:
        """
        Sample G images of each prompt, with noise: step 1 of FDFO.

        Args:
            prompts (`Sequence[str]`): P prompts.
            noise (`Tensor`): How much noise the sampler adds at each level, such as the churn gamma, for all prompts, shape
                [T + 1], or for each, shape [P, T + 1].
            seeds (`Sequence[int]`): Seed of the initial noise of each prompt, which its branches share, P of them, or of
                each branch, N = P x G of them.
            noise_seeds (`Sequence[int]`): Seed of the noise of each branch that the sampler adds, N of them.
            levels (`Collection[int]`): Steps in [0, T) whose tuples are recorded.
            columns (`dict[str, Sequence]`, *optional*): Further arguments of the call that differ between prompts, such
                as the image to be edited, P values each. With them, P must be 1.

        Returns:
            [`RolloutBatch`]: images, endpoints and recorded tuples.
        """
        branches = self.num_generations
        scheduler = self.sampler.from_config(self._scheduler.config)
        scheduler.record(
            noise.expand(len(prompts), -1).repeat_interleave(branches, dim=0), _generators(noise_seeds), levels
        )
        remembered: dict[str, list] = {"encode_prompt": [], "prepare_latents": []}
        remember = _remember(remembered)
        outputs = []
        call_model = self.model
        if self.share_prefix:
            call_model = self._share_prefix(scheduler, len(prompts), noise, self.axes(columns))

        def prepare_latents(original, *args, **kwargs):
            prepared = remember["prepare_latents"](original, *args, **kwargs)
            return _with_latents(prepared, scheduler.start(_latents(prepared)))

        def model(*args, **kwargs):
            output = call_model(*args, **kwargs)
            outputs.append(recursively_apply(lambda tensor: tensor.to("meta"), output))
            return output

        encode_prompt = self._encode_from_cache(remember["encode_prompt"], prompts, branches)
        # Branches have generators of their own from the seed that they share: their initial noise is the same.
        generators = _generators(repeat_each(seeds, len(prompts) * branches // len(seeds)))
        call_kwargs = self._arguments(prompts, generators, columns)
        with self._patched(scheduler, model, encode_prompt=encode_prompt, prepare_latents=prepare_latents):
            images = self.pipeline(**call_kwargs)[0]
        return RolloutBatch(
            images=images.float(),
            endpoints=scheduler.endpoints.unflatten(0, (len(prompts), branches)),
            x_t=scheduler.x_t,
            velocities=scheduler.velocities,
            x_s=scheduler.x_s,
            call_kwargs=call_kwargs,
            remembered=remembered,
            outputs=outputs,
        )

    def split(self, batch: RolloutBatch, levels: Sequence[Sequence[int]]) -> list[RolloutBatch]:
        """
        The batches that a larger one was sampled for, each with equally many of its prompts.

        Args:
            batch ([`RolloutBatch`]): What `rollout` returned for several prompts, without its images.
            levels (`Sequence[Sequence[int]]`): For each part, the recorded steps that it is to keep.
        """
        if len(levels) == 1:
            return [batch]
        axes = self.axes()
        prompts, branches = batch.endpoints.shape[:2]
        count, total = prompts // len(levels), prompts * branches
        parts = []
        for number, kept in enumerate(levels):
            first = number * count
            samples = range(first * branches, (first + count) * branches)
            part = functools.partial(take, samples=samples, total=total)
            parts.append(
                RolloutBatch(
                    images=None,
                    endpoints=batch.endpoints[first : first + count].clone(),
                    # Copies: a view would keep the whole in memory.
                    x_t={level: part(batch.x_t[level], 0) for level in kept},
                    velocities={level: part(batch.velocities[level], 0) for level in kept},
                    x_s={level: part(batch.x_s[level], 0) for level in kept if level in batch.x_s},
                    call_kwargs={
                        name: [value[n] for n in samples] if is_per_sample(name) and isinstance(value, list) else value
                        for name, value in batch.call_kwargs.items()
                    },
                    remembered={
                        "encode_prompt": part(batch.remembered["encode_prompt"], axes.encoded),
                        "prepare_latents": part(batch.remembered["prepare_latents"], axes.prepared),
                    },
                    outputs=[part(output, axes.outputs[0]) for output in batch.outputs],
                )
            )
        return parts

    def velocity(self, batch: RolloutBatch, level: int) -> Tensor:
        """
        Velocity of the model as it is now at the samples recorded before step `level`, with gradients where enabled.

        Args:
            batch ([`RolloutBatch`]): A batch that `rollout` returned.
            level (`int`): A step that was recorded there.

        Returns:
            `Tensor`: Velocity v(x_t, t), guidance included, the shape of `batch.x_t[level]`.
        """
        scheduler = self._replay_scheduler
        scheduler.replay(level)
        # No copy where it is on the device.
        x_t = batch.x_t[level].to(self.pipeline._execution_device, non_blocking=True)
        with self._replayed(batch, scheduler, lambda: scheduler.steps_left == 0, x_t):
            try:
                self._call_with_grad(self.pipeline, **batch.call_kwargs)
            except StopPipeline as stop:
                return stop.value
        raise ReplayError(
            f"{type(self.pipeline).__name__} did not call `scheduler.step` in the replay of step {level}."
        )

    def decode(self, batch: RolloutBatch, endpoints: Tensor) -> Tensor:
        """
        Images of final latents as the pipeline decodes them, with gradients where enabled.

        Args:
            batch ([`RolloutBatch`]): The batch that the latents are of.
            endpoints (`Tensor`): Final latents, shape [N, ...].

        Returns:
            `Tensor`: Images, floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W].
        """
        scheduler = DecodeScheduler.from_config(self._scheduler.config)
        scheduler.decode(endpoints)
        with self._replayed(batch, scheduler, lambda: False, endpoints.detach()):
            return self._call_with_grad(self.pipeline, **batch.call_kwargs)[0].float()

    @contextlib.contextmanager
    def _replayed(
        self,
        batch: RolloutBatch,
        scheduler: FlowMatchEulerDiscreteScheduler,
        is_computed: Callable[[], bool],
        latents: Tensor,
    ) -> Iterator[None]:
        """The pipeline, to be called on a batch again: from these latents, and with few of the transformer's calls."""
        device = self.pipeline._execution_device
        remembered = send_to_device(batch.remembered, device, non_blocking=True)
        remembered = {name: iter(values) for name, values in remembered.items()}
        outputs = iter(batch.outputs)

        def encode_prompt(original, *args, **kwargs):
            return next(remembered["encode_prompt"])

        def prepare_latents(original, *args, **kwargs):
            return _with_latents(next(remembered["prepare_latents"]), latents)

        def model(*args, **kwargs):
            output = next(outputs)
            if is_computed():
                return self.model(*args, **kwargs)
            # What it computes is thrown away, and only its shape matters.
            return recursively_apply(lambda shape: _zeros(shape, device), output)

        with self._patched(scheduler, model, encode_prompt=encode_prompt, prepare_latents=prepare_latents):
            yield

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        columns: dict[str, Sequence] | None = None,
        **call_kwargs: Any,
    ) -> Tensor:
        """
        One image of each prompt by the pipeline's own sampler (no churn), for evaluation.

        Args:
            prompts (`Sequence[str]`): N prompts.
            seeds (`Sequence[int]`): Seed of the initial noise of each image, N of them.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`, N values each. With them, N must be 1.
            **call_kwargs: Arguments of the pipeline's call in the place of those given at construction.

        Returns:
            `Tensor`: Images, floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W].
        """
        # Other arguments may encode other things.
        encode_prompt = self._encode_from_cache(_call, prompts if not call_kwargs else ())
        with self._patched(self._scheduler, self.model, encode_prompt=encode_prompt):
            return self.pipeline(**{**self._arguments(prompts, _generators(seeds), columns), **call_kwargs})[0].float()

    def _encode_from_cache(self, encode: Callable, prompts: Sequence[str], branches: int = 1) -> Callable:
        """`encode`, what wraps `encode_prompt`, with the embeddings of the prompts where all of them are known."""
        if not prompts or not all(prompt in self.prompt_embeddings for prompt in prompts):
            return encode
        axes = self.axes().encoded
        samples = repeat_each(range(len(prompts)), branches)
        known = concatenate([self.prompt_embeddings[prompt] for prompt in prompts], axes)
        known = send_to_device(take(known, axes, samples, len(prompts)), self.pipeline._execution_device)
        values = iter(known)
        return lambda original, *args, **kwargs: encode(lambda *args, **kwargs: next(values))

    def _share_prefix(self, scheduler: RolloutScheduler, prompts: int, noise: Tensor, axes: BatchAxes) -> Callable:
        """The model, called with one branch of each prompt while those of none have had noise of their own."""
        branches = self.num_generations
        total = prompts * branches
        noisy = (torch.atleast_2d(noise) > 0).any(dim=0).nonzero()
        shared_steps = int(noisy[0]) if len(noisy) else noise.shape[-1]
        calls: dict[int, int] = defaultdict(int)  # of each step

        def model(*args, **kwargs):
            number = calls[scheduler.steps_done]
            calls[scheduler.steps_done] += 1
            # Guidance may need more calls in later steps than in the first, whose axes are known.
            if scheduler.steps_done >= shared_steps or number >= len(axes.model_calls):
                return self.model(*args, **kwargs)
            args, kwargs = take((args, kwargs), axes.model_calls[number], range(0, total, branches), total)
            output = self.model(*args, **kwargs)
            return take(output, axes.outputs[number], repeat_each(range(prompts), branches), prompts)

        return model

    def _arguments(
        self, prompts: Sequence[str], generators: list[torch.Generator], columns: dict[str, Sequence] | None = None
    ) -> dict[str, Any]:
        """Arguments of a call that makes one sample for each generator, the prompts having equally many."""
        branches = len(generators) // len(prompts)
        if columns and self._per_prompt_option is not None:
            # One pipeline takes a list of images as one per prompt, another as all for one: with one prompt they agree.
            if len(prompts) > 1:
                raise ValueError(f"{len(prompts)} prompts with {', '.join(columns)}: such a call takes one prompt.")
            varying = {"prompt": list(prompts), self._per_prompt_option: branches}
            varying |= {name: values[0] for name, values in columns.items()}
        else:
            # Not by `num_images_per_prompt`: pipelines differ in how they order what they repeat, and some give the
            # images of one prompt the attention mask of another.
            varying = {"prompt": repeat_each(prompts, branches)}
            varying |= {name: repeat_each(values, branches) for name, values in (columns or {}).items()}
        arguments = {**self.call_kwargs, "generator": generators, "output_type": "pt", "return_dict": False, **varying}
        for name, value in arguments.items():
            if is_per_sample(name) and isinstance(value, str):
                # One for all: not every pipeline repeats it itself.
                arguments[name] = [value] * len(varying["prompt"])
            elif isinstance(value, list):
                # Some pipelines write into the lists that they are given.
                arguments[name] = list(value)
        return arguments

    @contextlib.contextmanager
    def _patched(
        self, scheduler: FlowMatchEulerDiscreteScheduler, model: Callable, **methods: Callable
    ) -> Iterator[None]:
        """
        The pipeline with another scheduler, a callable in place of its transformer, wrapped methods and no progress bar.

        They shadow the pipeline's own through its `__dict__`: plain `setattr` would rewrite its config.
        """
        pipeline = self.pipeline
        transformer = pipeline.transformer
        attributes: dict[str, Any] = {
            "scheduler": scheduler,
            "transformer": _ModelProxy(model, transformer, self._dtype),
            "_progress_bar_config": {**getattr(pipeline, "_progress_bar_config", {}), "disable": True},
        }
        for name, method in methods.items():
            attributes[name] = functools.partial(method, getattr(pipeline, name))
        originals = {name: pipeline.__dict__[name] for name in attributes if name in pipeline.__dict__}
        pipeline.__dict__.update(attributes)
        # A transformer may return another layout in training mode, which a pipeline does not expect; its layers keep
        # theirs, some of which have no gradients in evaluation mode.
        training, transformer.training = transformer.training, False
        try:
            yield
        finally:
            transformer.training = training
            for name in attributes:
                del pipeline.__dict__[name]
            pipeline.__dict__.update(originals)


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """
    `DiffusionPipeline.from_pretrained`, also for a pipeline that was saved without some of its text encoders.

    Args:
        name_or_path (`str` or `Path`): Hub id, or folder in diffusers' layout.
        **kwargs: Passed on.
    """
    # diffusers takes a component as absent only where it is passed as None.
    index = DiffusionPipeline.load_config(name_or_path)
    absent = {name: None for name, value in index.items() if value == [None, None]}
    return DiffusionPipeline.from_pretrained(name_or_path, **{**absent, **kwargs})


def check_replay(
    velocity: Tensor,
    recorded: Tensor,
    pipeline: DiffusionPipeline,
    level: int,
    autocast_dtype: torch.dtype | None = None,
) -> float:
    """
    Compare a replayed velocity, taken before any optimizer step, with the one that the rollout recorded.

    Args:
        velocity (`Tensor`): The replayed velocity.
        recorded (`Tensor`): The recorded one, of the same shape.
        pipeline (`DiffusionPipeline`): Named in the message.
        level (`int`): Step of the sampler, named in the message.
        autocast_dtype (`torch.dtype`, *optional*): What the model computes in, where that is not its own dtype.

    Returns:
        `float`: Their rms difference relative to the rms of the recorded one: 0.0 where kernels repeat to the bit.

    Raises:
        ReplayError: They differ by more than kernels may; names the pipeline, the difference and the likely cause.
    """
    difference = (velocity.detach().float() - recorded.float()).square().mean().sqrt()
    error = (difference / recorded.float().square().mean().sqrt().clamp_min(1e-12)).item()
    dtypes = (recorded.dtype, pipeline.transformer.dtype, autocast_dtype)
    tolerance = max(REPLAY_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    # Written so that a NaN fails.
    if not error <= tolerance:
        raise ReplayError(
            f"The replay of {type(pipeline).__name__} is not exact: before any optimizer step, the velocity of step "
            f"{level} differs from the one recorded in the rollout by {error:.3g} of its rms (at most {tolerance:g} is "
            "allowed). Training would follow another function than the one that was sampled. Likely causes: dropout or "
            "another random layer in the transformer (set it to 0); a feature cache (`transformer.disable_cache()`); "
            "guidance that changes from call to call (turn it off in `pipeline_kwargs`); a pipeline that keeps state "
            "between its steps."
        )
    return error


def host_copy(data: Any) -> Any:
    """The tensors of nested lists, tuples and dicts in host memory, pinned where a GPU will copy them back."""
    pin = torch.cuda.is_available()

    def copy(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin).copy_(tensor)

    return recursively_apply(copy, data)


def repeat_each(values: Sequence, times: int) -> list:
    """Each value `times` times in a row: [P] to [P x G]."""
    return [value for value in values for _ in range(times)]


@contextlib.contextmanager
def _recorded_decoding(pipeline: DiffusionPipeline, calls: list[tuple[tuple, dict]]) -> Iterator[None]:
    """Appends the arguments of each call of the VAE's `decode`."""
    decode = pipeline.vae.decode

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return decode(*args, **kwargs)

    own = pipeline.vae.__dict__.get("decode")  # a method, unless somebody else has put something there
    pipeline.vae.__dict__["decode"] = record
    try:
        yield
    finally:
        del pipeline.vae.__dict__["decode"]
        if own is not None:
            pipeline.vae.__dict__["decode"] = own


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per seed, on the CPU so that the noise does not depend on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _zeros(shape: Tensor, device: torch.device) -> Tensor:
    """Zeros of the shape and dtype of a meta tensor, without memory of their own."""
    return torch.zeros((), dtype=shape.dtype, device=device).expand(shape.shape)


def is_per_sample(name: str) -> bool:
    """Whether an argument of a pipeline's call, where it is a list, has one item for each sample."""
    return name in ("prompt", "generator") or name.startswith(("prompt_", "negative_prompt"))


def _call(original: Callable, *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _remember(remembered: dict[str, list]) -> dict[str, Callable]:
    """Wrappers of the methods that it names, which keep there what each of their calls returns."""

    def wrapper(name: str) -> Callable:
        def method(original, *args, **kwargs):
            remembered[name].append(original(*args, **kwargs))
            return remembered[name][-1]

        return method

    return {name: wrapper(name) for name in remembered}


# What `prepare_latents` returns is the latents, or a tuple that starts with them.
def _latents(prepared: Any) -> Tensor:
    return prepared if isinstance(prepared, Tensor) else prepared[0]


def _with_latents(prepared: Any, latents: Tensor) -> Any:
    return latents if isinstance(prepared, Tensor) else (latents, *prepared[1:])


class _ModelProxy:
    """
    Stands in for `pipeline.transformer`: calls go to the wrapped model, attributes to the module itself.

    Accelerate's mixed precision returns fp32 whatever the module's own dtype, which a VAE in bf16 then cannot decode:
    outputs are cast back.
    """

    def __init__(self, model: Callable, module: torch.nn.Module, dtype: torch.dtype):
        self._model = model
        self._module = module
        self._dtype = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return recursively_apply(
            lambda output: output.to(self._dtype), self._model(*args, **kwargs), test_type=torch.is_floating_point
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
