"""
Rollout and replay through a user's diffusers pipeline: the only file that calls one.

An algorithm needs the velocity v(x_t, t, prompt) of a model and nothing else. In every diffusers flow-matching pipeline
it reaches `scheduler.step`, after guidance, sign flips, packing and slicing. So the pipeline is its own adapter.

- Rollout: the pipeline is called as a user would, with a scheduler whose `step` adds noise and records (x_t, v). The
  generators of a prompt's branches start from one seed, so that the branches share their initial noise.
- Replay of one step, with gradients: the undecorated `__call__` runs on the same batch. `encode_prompt` and
  `prepare_latents` return what they returned then, with the recorded x_t as the latents. In earlier steps neither the
  transformer nor the scheduler computes anything; at the step itself the scheduler stops the pipeline with the velocity.
  A call of the transformer that makes a cache for later ones, such as the keys and values of an image, is repeated.

Dimensions: P prompts, G branches (images per prompt), N = P x G samples in prompt-major order, T steps.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import math
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import accelerate
import torch
from accelerate.utils import recursively_apply, send_to_device
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..media import Media, names_image
from ..noise import say_once_what_is_cut, unheard
from .calling import Calling, OtherWayError
from .checks import (
    check_call_kwargs,
    check_pipeline,
    check_resolution,
    check_steps,
    warn_of_embedded_guidance,
    warn_of_other_frames,
    warn_of_other_size,
)
from .encoder_offload import EncoderOffload
from .patch import (
    REMEMBERED,
    Encoding,
    ModelProxy,
    PartNames,
    call,
    carries_state,
    drawn_noise,
    latents_of,
    outline,
    patched,
    recorded_decoding,
    remember,
    with_latents,
)
from .records import (
    BatchAxes,
    Rehearsal,
    RolloutBatch,
    host_copy,
    once_per_prompt,
    repeat_each,
    repeated,
)
from .replay_check import ReplayError, check_replay
from .sample_axes import concatenate, sample_axes, take
from .schedulers import (
    DecodeScheduler,
    RehearsalScheduler,
    ReplayScheduler,
    RolloutScheduler,
    StandIn,
    StopPipeline,
    UnreplayableError,
)
from .trained import TRAINED, Transformers, trained_module, trained_modules


# Arguments of a call that embeddings of its prompts do not depend on.
AFTER_ENCODING = {"num_inference_steps", "sigmas", "timesteps"}


def _knowing_calls_per_step(method: Callable) -> Callable:
    """A method that calls the pipeline calls it again where its scheduler had to count the calls of a step first."""

    @functools.wraps(method)
    def call_again(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except StopPipeline as stop:
            self._scheduler.calls_per_step = stop.value
            return method(self, *args, **kwargs)

    return call_again


class PipelineFlow:
    """
    The flow of a diffusers pipeline: samples from it, and gives its velocity at a recorded sample, with gradients.

    Args:
        pipeline (`DiffusionPipeline`): A flow-matching pipeline that passes [`check_pipeline`].
        num_generations (`int`): Branches G per prompt that a rollout samples, >= 2.
        scheduler_class (`type`): The [`RolloutScheduler`] of the algorithm, which samples the rollouts.
        shared_prefix (`bool`): In a rollout, run the transformer once for the branches of a prompt as long as the noise
            leaves them identical.
        **call_kwargs: Arguments of the pipeline's call, such as `num_inference_steps`, `guidance_scale`, `height` (pixels).

    Attributes:
        model (`Callable`): Called in the place of the trained module: the module itself, or its wrapper (DDP, DeepSpeed,
            FSDP, a compiled module), so that the wrapper's hooks fire.
        has_several_transformers (`bool`): Calls of `model` take the name of a component first.
        prompt_embeddings (`Mapping[str, list]`): Return value of `encode` for some prompts, which are not encoded again.
        encoders ([`EncoderOffload`], *optional*): Takes the text encoders off the device before the transformer is called.
            None where they stay.
        keeps_outputs (`bool`): A rollout keeps what the transformer returned, and a replay gives it to the pipeline in the
            steps before the one that is replayed: the guidance has momentum, which comes from them.

    Raises:
        ValueError: The pipeline is no flow-matching one, or its call does not take one of the arguments.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        num_generations: int,
        scheduler_class: type[RolloutScheduler],
        shared_prefix: bool = False,
        **call_kwargs: Any,
    ):
        self.pipeline = pipeline
        self.num_generations = num_generations
        self.scheduler_class = scheduler_class
        self.shared_prefix = shared_prefix
        self.call_kwargs = call_kwargs
        check_pipeline(pipeline)
        say_once_what_is_cut(type(pipeline))
        options = inspect.signature(type(pipeline).__call__).parameters
        if "num_inference_steps" not in options and "sigmas" in call_kwargs:
            # The noise levels say how many steps there are.
            self.call_kwargs = {name: value for name, value in call_kwargs.items() if name != "num_inference_steps"}
        if "use_kv_cache" in options:
            # The replay of a step has no keys and values of the steps before it.
            self.call_kwargs = {"use_kv_cache": False, **self.call_kwargs}
        check_call_kwargs(pipeline, self.call_kwargs)
        warn_of_embedded_guidance(pipeline, call_kwargs.get("guidance_scale"))
        check_resolution(pipeline, call_kwargs.get("height"), call_kwargs.get("width"))
        self.model: Callable = trained_module(pipeline)
        self.has_several_transformers = isinstance(self.model, Transformers)
        self.prompt_embeddings: Mapping[str, list] = {}
        self.encoders: EncoderOffload | None = None
        self._axes: BatchAxes | None = None
        self._has_state = False  # known with the axes
        self._calling = Calling(pipeline)
        self._rehearsed_prompts: list[str] = []  # the first that the pipeline took
        # A copy: the noise levels of a run do not change if the pipeline's shift is set later.
        self._scheduler = copy.copy(pipeline.scheduler)
        self._scheduler.insists_on_float32 = False
        self._transformers = list(trained_modules(pipeline))
        self._part_names = PartNames.of(pipeline)
        self._scheduler.calls_per_step = None
        self._attention = [part for part in self.model.modules() if hasattr(part, "set_processor")]
        # `inspect.unwrap` strips the decorator `torch.no_grad()` from the call.
        self._call_with_grad = inspect.unwrap(type(pipeline).__call__)
        # By diffusers' class for momentum: in the call itself, or in a guidance object, if it is on there.
        guidances = [part for part in pipeline.components.values() if hasattr(part, "momentum_buffer")]
        self.keeps_outputs = "MomentumBuffer" in self._call_with_grad.__globals__ or any(
            "momentum" in option and value for guidance in guidances for option, value in guidance.config.items()
        )

    @_knowing_calls_per_step
    @torch.no_grad()
    def rehearse(
        self,
        prompts: Sequence[str],
        columns: dict[str, Sequence] | None = None,
        samples_per_prompt: int = 1,
        **call_kwargs: Any,
    ) -> Rehearsal:
        """
        Call the pipeline once, from the prompts to the decoded images, with only the first step of the transformer
        computed. Arguments that the pipeline refuses, it refuses here; everything it passes around has the shapes of a
        rollout.

        Args:
            prompts (`Sequence[str]`): P prompts.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`.
            samples_per_prompt (`int`): N = P x samples_per_prompt.
            **call_kwargs: Arguments of the pipeline's call in the place of those given at construction.

        Raises:
            ValueError: The pipeline cannot be called with these arguments.
        """
        if call_kwargs:
            check_call_kwargs(self.pipeline, call_kwargs)
            check_resolution(self.pipeline, call_kwargs.get("height"), call_kwargs.get("width"))
            return self._called_with(call_kwargs).rehearse(prompts, columns, samples_per_prompt)
        return self._calling.find(self._rehearse, prompts, columns, samples_per_prompt)

    def _rehearse(
        self, prompts: Sequence[str], columns: dict[str, Sequence] | None, samples_per_prompt: int
    ) -> Rehearsal:
        scheduler = RehearsalScheduler.of(self._scheduler)
        remembered: dict[str, list] = {name: [] for name in REMEMBERED}
        calls, outputs, decode_calls, decoded = [], [], [], []
        known: dict[str, Any] = {}  # by the shapes of the arguments
        callers: dict[int, list[str]] = defaultdict(list)

        def model(*args, **kwargs):
            callers[scheduler.steps_done].append(args[0] if self.has_several_transformers else TRAINED)
            shapes = repr(recursively_apply(lambda tensor: tensor.shape, (args, kwargs)))
            if scheduler.steps_done > 0 and shapes in known:
                return recursively_apply(torch.zeros_like, known[shapes])
            known[shapes] = self._call_model(*args, **kwargs)
            if scheduler.steps_done == 0:
                calls.append((args, kwargs))
                outputs.append(known[shapes])
            return known[shapes]

        generators = _generators([0] * len(prompts) * samples_per_prompt)
        call_kwargs = self._calling.arguments(self.call_kwargs, prompts, generators, columns)
        with (
            self._patched(scheduler, model, **remember(remembered)),
            recorded_decoding(self.pipeline, decode_calls, decoded),
            self._own_random_numbers(0),
        ):
            try:
                images = self._calling.samples(self.pipeline(**call_kwargs), len(generators))
            except (torch.OutOfMemoryError, UnreplayableError):
                raise
            except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                if _asserts_float32(error) and not self._scheduler.insists_on_float32:
                    self._scheduler.insists_on_float32 = True
                    return self._rehearse(prompts, columns, samples_per_prompt)
                options = {name: value for name, value in self.call_kwargs.items() if value is not None}
                # A call that took a step has its prompts as the pipeline takes them; images are needed again later.
                is_other_way = scheduler.steps_done == 0 or bool(columns) or isinstance(error, OtherWayError)
                reason = str(error) if isinstance(error, OtherWayError) else f"{type(error).__name__}: {error}"
                reason += _hint(self.pipeline, {*self.call_kwargs, *(columns or {})}, columns)
                raise (OtherWayError if is_other_way else ValueError)(
                    f"{type(self.pipeline).__name__} cannot be called with {options}: {reason}"
                ) from error
        self._rehearsed_prompts = self._rehearsed_prompts or list(prompts)
        if scheduler.latents is None:
            raise ValueError(
                f"{type(self.pipeline).__name__} took no step of its scheduler, perhaps steps of copies of it: there is nothing "
                "to train. Take another pipeline of the model."
            )
        idle = frozenset(place for place, stream in enumerate(scheduler.streams) if stream.is_idle)
        if len(scheduler.streams) > len(idle) > len(scheduler.idle_streams):
            self._scheduler.idle_streams = idle
            return self._rehearse(prompts, columns, samples_per_prompt)
        sigmas = scheduler.noise_levels.cpu()
        if scheduler.steps_done != len(sigmas) - 1:
            raise ValueError(
                f"{type(self.pipeline).__name__} denoised {len(scheduler.streams)} thing(s) in {scheduler.steps_done} steps of a "
                f"schedule of {len(sigmas) - 1}: a step of the schedule must be one of the call, and what is trained is "
                "all that a call makes. If it samples a video part by part, make the video so short that it is one part."
            )
        if not (sigmas[:-1] > sigmas[1:]).all():
            raise ValueError(
                f"The noise levels of {type(self.pipeline).__name__} must fall from step to step, and are "
                f"{sigmas.tolist()}: take another scheduler, or other `sigmas` or `timesteps` in `pipeline_kwargs`."
            )
        warn_of_other_frames(self.pipeline, self.call_kwargs.get("num_frames"), images)
        asked = (self.call_kwargs.get("height"), self.call_kwargs.get("width"))
        warn_of_other_size(self.pipeline, asked, images, decoded)
        return Rehearsal(
            sigmas=sigmas,
            skipped_steps=scheduler.first_step,
            noise_scale=scheduler.noise_scale,
            latents=scheduler.latents,
            velocity=scheduler.velocity,
            encoded=remembered["encode_prompt"],
            encoded_images=remembered["encode_image"],
            generated=remembered["generate"],
            prepared=remembered["prepare_latents"],
            model_calls=calls,
            outputs=outputs,
            decode_calls=decode_calls,
            images=images,
            callers=[callers[step] for step in range(len(sigmas) - 1)],
        )

    def try_replay(
        self,
        prompts: Sequence[str],
        columns: dict[str, Sequence] | None = None,
        *,
        parts: int = 1,
        branches: int | None = None,
        tolerance: float | None = None,
        steps: int = 2,
        decodes: bool = False,
    ) -> tuple[float, bool]:
        """
        Sample some prompts in a few steps, and replay each step: the self-check of the replay, before any work.

        Args:
            prompts (`Sequence[str]`): P prompts.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`.
            parts (`int`): Parts of equal size that the batch is split into, of which the first is replayed.
            branches (`int`, *optional*): Branches of each prompt that are replayed, the last ones. Default: all.
            tolerance (`float`, *optional*): As in [`check_replay`].
            steps (`int`): Steps of the call. One that has `sigmas` or `timesteps` takes those.
            decodes (`bool`): Also decode the samples with gradients.

        Returns:
            `tuple[float, bool]`: The largest [`replay_error`], and whether each velocity depends on every trained weight.

        Raises:
            ReplayError: A replayed velocity is not the recorded one.
            ValueError: The pipeline's call fails, or has no gradient from its latents to what it makes.
        """
        trained = {weight for weight in trained_module(self.pipeline).parameters() if weight.requires_grad}
        largest, depends_on_all = 0.0, True
        short = copy.copy(self)
        schedules = (self.call_kwargs.get(name) for name in ("sigmas", "timesteps"))
        schedule = next((values for values in schedules if values is not None), None)
        own_steps = self.call_kwargs.get("num_inference_steps") or 0
        if schedule is None:
            short.call_kwargs = {**self.call_kwargs, "num_inference_steps": steps}
        else:
            steps = len(schedule)
        try:
            count = len(prompts)
            noise_seeds = range(count * self.num_generations)
            batch = short.rollout(prompts, torch.zeros(steps + 1), range(count), noise_seeds, range(steps), columns)
            batch = short.split(replace(batch, images=None), [range(steps)] * parts)[0]
            if branches is not None and branches < self.num_generations:
                replayed, sampled = batch.endpoints.shape[:2]
                last = [n * sampled + a for n in range(replayed) for a in range(sampled - branches, sampled)]
                batch = short.choose(batch, last, prompts[:replayed], columns)
            for level, recorded in batch.velocities.items():
                # Nothing goes back through this graph: it keeps no activations.
                with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
                    velocity = short.velocity(batch, level)
                largest = max(largest, check_replay(velocity, recorded, self.pipeline, level, tolerance))
                depends_on_all = depends_on_all and trained <= _leaves(velocity)
        except (torch.OutOfMemoryError, ReplayError):
            raise
        except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
            if schedule is None and steps < own_steps:
                # Such as a guidance for each step, or a late start that leaves none of so few.
                options = {"parts": parts, "branches": branches, "tolerance": tolerance, "decodes": decodes}
                return self.try_replay(prompts, columns, steps=own_steps, **options)
            raise ValueError(
                f"A rollout of {type(self.pipeline).__name__} with {short.call_kwargs} cannot be sampled and replayed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if decodes:
            short._try_decoding(batch)
        return largest, depends_on_all

    def _try_decoding(self, batch: RolloutBatch) -> None:
        try:
            with torch.enable_grad():
                endpoints = batch.endpoints.flatten(0, 1).detach().requires_grad_()
                made = sum(leaf.float().sum() for leaf in tree_leaves(self.decode(batch, endpoints)))
                torch.autograd.grad(made, endpoints)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(self.pipeline).__name__} cannot be decoded with gradients ({type(error).__name__}: {error}), which "
                "direction='reward_gradient' needs. Set direction='finite_difference', which needs none."
            ) from error

    def axes(self, columns: dict[str, Sequence] | None = None) -> BatchAxes:
        """
        Find the samples in everything that the pipeline passes around. The first call rehearses the pipeline with some
        samples and with twice as many.

        Args:
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`, for one prompt, if the pipeline needs them.

        Raises:
            ValueError: The values cannot be taken apart into samples.
        """
        if self._axes is None:
            # The prompts differ in length: some pipelines have a mask only then.
            prompts = ["a cat"] if columns else ["a cat", "a red cat and a blue dog"]
            with unheard(type(self.pipeline)):
                try:
                    some = self.rehearse(prompts, columns)
                except ValueError:  # such as one that insists on prompts in JSON
                    prompts = self._rehearsed_prompts[: len(prompts)]
                    some = self.rehearse(prompts, columns)
                twice = self.rehearse(prompts, columns, 2)
            self._has_state = carries_state(some.outputs)
            names = [field.name for field in fields(BatchAxes)]
            try:
                self._axes = BatchAxes(*(sample_axes(getattr(some, name), getattr(twice, name)) for name in names))
            except ValueError as error:
                raise ValueError(
                    f"The batches of {type(self.pipeline).__name__} cannot be taken apart, which shared_prefix, "
                    "num_candidates, cache_prompt_embeds and a per_device_sampling_batch_size of its own need. Leave these options "
                    f"out. It passes {error}"
                ) from None
        return self._axes

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        samples_per_prompt: int = 1,
        columns: dict[str, Sequence] | None = None,
        **call_kwargs: Any,
    ) -> list:
        """
        Return value of each call of `encode_prompt` in a call of the pipeline, which ends where the transformer is needed.

        Args:
            prompts (`Sequence[str]`): P prompts.
            samples_per_prompt (`int`): N = P x samples_per_prompt.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`.
            **call_kwargs: Arguments of the pipeline's call in the place of those given at construction.
        """
        if call_kwargs:
            return self._called_with(call_kwargs).encode(prompts, samples_per_prompt, columns)
        remembered: dict[str, list] = {name: [] for name in REMEMBERED}

        def model(*args, **kwargs):
            raise StopPipeline(None)

        scheduler = RehearsalScheduler.of(self._scheduler)
        arguments = self._calling.arguments(
            self.call_kwargs, prompts, _generators([0] * len(prompts) * samples_per_prompt), columns
        )
        with (
            self._patched(scheduler, model, **remember(remembered)),
            self._own_random_numbers(0),
            contextlib.suppress(StopPipeline),
        ):
            self.pipeline(**arguments)
        return remembered["encode_prompt"]

    def encode_ahead(
        self,
        prompts: Sequence[str],
        samples_per_prompt: int = 1,
        columns: dict[str, Sequence] | None = None,
        **call_kwargs: Any,
    ) -> list | None:
        """
        The embeddings for a later `rollout` or `generate` with the same arguments, in host memory. If all batches are encoded
        ahead of the first one that is sampled, offloaded text encoders move to the device once.

        Returns:
            `list`: For the argument `encoded`. None where a later call has nothing to encode, or may as well do it itself.
        """
        if call_kwargs:
            return self._called_with(call_kwargs).encode_ahead(prompts, samples_per_prompt, columns)
        if self._calling.takes_one_prompt and len(prompts) > 1 or self._calling.makes_one:
            return None
        if self.encoders is None or self._knows(prompts):
            return None
        encoded = self.encode(prompts, samples_per_prompt, columns)
        # An evaluation names a prompt once for each of its images.
        equal = math.gcd(*(len(list(run)) for _, run in itertools.groupby(prompts)))
        return host_copy(once_per_prompt(encoded, equal * samples_per_prompt, len(prompts) * samples_per_prompt))

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        noise_amounts: Tensor,
        seeds: Sequence[int],
        noise_seeds: Sequence[int],
        levels: Collection[int],
        columns: dict[str, Sequence] | None = None,
        encoded: list | None = None,
    ) -> RolloutBatch:
        """
        Sample G images of each prompt with the noise of the algorithm's scheduler.

        Args:
            prompts (`Sequence[str]`): P prompts.
            noise_amounts (`Tensor`): Amount of noise that the scheduler adds at each level, in its own unit, such as the
                churn gamma: for all prompts, shape [T + 1], or for each, shape [P, T + 1].
            seeds (`Sequence[int]`): Seeds of the initial noise: one per prompt, which its branches share (P of them), or
                one per branch (N = P x G of them).
            noise_seeds (`Sequence[int]`): Seed of the noise that the scheduler adds to each branch, N of them.
            levels (`Collection[int]`): Steps in [0, T) whose tuples are recorded.
            columns (`dict[str, Sequence]`, *optional*): Further arguments of the call that differ between prompts, such
                as the image to be edited, P values each. With them, P must be 1.
            encoded (`list`, *optional*): Return value of `encode_ahead`.

        Returns:
            [`RolloutBatch`]: images, endpoints and recorded tuples.
        """
        branches = self.num_generations
        if not self._calling.makes_one:
            return self._rollout(prompts, noise_amounts, seeds, noise_seeds, levels, columns, encoded, branches)
        amounts = noise_amounts.expand(len(prompts), -1)
        own_seeds = repeat_each(seeds, len(noise_seeds) // len(seeds))
        parts = []
        for n, noise_seed in enumerate(noise_seeds):
            of_prompt = {name: [values[n // branches]] for name, values in (columns or {}).items()}
            row, prompt = amounts[n // branches], [prompts[n // branches]]
            parts.append(self._rollout(prompt, row, [own_seeds[n]], [noise_seed], levels, of_prompt, None, 1))
        return RolloutBatch.of_samples(parts, branches)

    @_knowing_calls_per_step
    def _rollout(
        self,
        prompts: Sequence[str],
        noise_amounts: Tensor,
        seeds: Sequence[int],
        noise_seeds: Sequence[int],
        levels: Collection[int],
        columns: dict[str, Sequence] | None,
        encoded: list | None,
        branches: int,
    ) -> RolloutBatch:
        """As `rollout`, in one call of the pipeline, with this many branches of each prompt."""
        scheduler = self.scheduler_class.of(self._scheduler)
        amounts_of_samples = noise_amounts.expand(len(prompts), -1).repeat_interleave(branches, dim=0)
        scheduler.record(amounts_of_samples, _generators(noise_seeds), levels)
        remembered: dict[str, list] = {name: [] for name in REMEMBERED}
        wrappers = remember(remembered)
        outputs = []
        call_model = self._call_model
        if self.shared_prefix:
            call_model = self._sharing_prefix(scheduler, len(prompts), branches, noise_amounts, self.axes(columns))

        def model(*args, **kwargs):
            output = call_model(*args, **kwargs)
            outputs.append(output if self.keeps_outputs else outline(output))
            return output

        if encoded is None:
            encoded = self._from_cache(prompts, branches)
        wrappers["encode_prompt"] = self._encoding_to(encoded, wrappers["encode_prompt"])
        prepare = wrappers["prepare_latents"]
        prepared_states: list[Tensor] = []

        def prepare_latents(original, *args, **kwargs):
            value = prepare(original, *args, **kwargs)
            prepared_states[:] = [generator.get_state() for generator in generators]
            return value

        wrappers["prepare_latents"] = prepare_latents
        # Branches that share a seed have their own generators from it: their initial noise is the same.
        generators = _generators(repeat_each(seeds, len(prompts) * branches // len(seeds)))
        call_kwargs = self._calling.arguments(self.call_kwargs, prompts, generators, columns)
        device = self.pipeline._execution_device  # walks through all modules
        with self._patched(scheduler, model, device=device, **wrappers), self._own_random_numbers(seeds[0]):
            images = self._calling.samples(self.pipeline(**call_kwargs), len(generators))
        samples = len(prompts) * branches
        remembered["encode_prompt"] = once_per_prompt(remembered["encode_prompt"], branches, samples)
        has_drawn = any(
            not torch.equal(generator.get_state(), state) for generator, state in zip(generators, prepared_states)
        )
        return RolloutBatch(
            images=images,
            endpoints=scheduler.endpoints.unflatten(0, (len(prompts), branches)),
            x_t=scheduler.x_t,
            velocities=scheduler.velocities,
            x_s=scheduler.x_s,
            sigmas=scheduler.noise_levels.cpu(),
            first_step=scheduler.first_step,
            device=device,
            call_kwargs=call_kwargs,
            remembered=remembered,
            outputs=outputs,
            generator_states=prepared_states if has_drawn else (),
            is_kept=scheduler.is_kept,
            velocity_rms=(scheduler.squared_velocity / scheduler.steps_done).sqrt(),
        )

    def split(self, batch: RolloutBatch, levels: Sequence[Sequence[int]]) -> list[RolloutBatch]:
        """
        Split a batch into smaller ones, each with equally many of its prompts.

        Args:
            batch ([`RolloutBatch`]): Return value of `rollout` for several prompts, without its images.
            levels (`Sequence[Sequence[int]]`): For each part, the recorded steps that it keeps.
        """
        if len(levels) == 1:
            return [batch]
        axes = None if batch.parts else self.axes()
        count = len(batch.endpoints) // len(levels)
        return [batch.part(number * count, count, kept, axes) for number, kept in enumerate(levels)]

    def choose(
        self,
        batch: RolloutBatch,
        samples: Sequence[int],
        prompts: Sequence[str],
        columns: dict[str, Sequence] | None = None,
    ) -> RolloutBatch:
        """
        A batch of some samples of another one, equally many of each prompt. Its tensors are copies.

        Args:
            batch ([`RolloutBatch`]): Return value of `rollout` without its images, or a part of it.
            samples (`Sequence[int]`): Their places in the batch, in [0, N), by prompt.
            prompts (`Sequence[str]`): The P prompts of the batch.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`.
        """
        axes = None if batch.parts else self.axes(columns)
        chosen = batch.of_places(samples, len(samples) // len(prompts), list(batch.x_t), axes)
        if batch.parts:  # each has a call of its own
            return chosen
        generators = [batch.call_kwargs["generator"][n] for n in samples]
        return replace(chosen, call_kwargs=self._calling.arguments(self.call_kwargs, prompts, generators, columns))

    def velocity(self, batch: RolloutBatch, level: int) -> Tensor:
        """
        Velocity of the model as it is now at the samples before step `level`, with gradients if enabled.

        Args:
            batch ([`RolloutBatch`]): A batch that `rollout` returned.
            level (`int`): A step whose samples are in `batch.x_t`: those that were recorded, or any others of this level.

        Returns:
            `Tensor`: Velocity v(x_t, t), guidance included, the shape of `batch.x_t[level]`.

        Raises:
            ReplayError: The pipeline takes no such step.
        """
        if batch.parts:
            x_t = batch.x_t[level]
            calls = [replace(part, x_t={level: x_t[n : n + 1]}) for n, part in enumerate(batch.parts)]
            return torch.cat([self.velocity(call, level) for call in calls])
        scheduler = ReplayScheduler.of(self._scheduler)
        # Already on the device, it is not copied.
        scheduler.replay(level, batch.x_t[level].to(batch.device, non_blocking=True))
        with self._replayed(batch, scheduler, lambda output: scheduler.is_there or carries_state(output)):
            try:
                self._call_with_grad(self.pipeline, **batch.call_kwargs)
            except StopPipeline as stop:
                return stop.value
        raise ReplayError(
            f"{type(self.pipeline).__name__} did not call `scheduler.step` in the replay of step {level}."
        )

    @property
    def takes_any_samples(self) -> bool:
        """False if the first step is that of the recorded samples alone: the pipeline takes its latents apart before it."""
        return self._scheduler.calls_per_step is None

    def decode(self, batch: RolloutBatch, endpoints: Tensor) -> Tensor | Media:
        """
        Decode final latents to images as the pipeline does, with gradients if enabled.

        Args:
            batch ([`RolloutBatch`]): The batch that the latents belong to.
            endpoints (`Tensor`): Final latents, shape [N, ...].

        Returns:
            `Tensor` or [`Media`]: Images, floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W]; audio [N, C, L].
        """
        if batch.parts:
            made = [self.decode(part, endpoints[n : n + 1]) for n, part in enumerate(batch.parts)]
            return accelerate.utils.concatenate(made)
        scheduler = DecodeScheduler.of(self._scheduler)
        scheduler.decode(endpoints)
        with self._replayed(batch, scheduler, lambda output: False):
            return self._calling.samples(self._call_with_grad(self.pipeline, **batch.call_kwargs), len(endpoints))

    @_knowing_calls_per_step
    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        columns: dict[str, Sequence] | None = None,
        encoded: list | None = None,
        **call_kwargs: Any,
    ) -> Tensor | Media:
        """
        Sample one image of each prompt by the pipeline's own sampler, without added noise, for evaluation.

        Args:
            prompts (`Sequence[str]`): N prompts.
            seeds (`Sequence[int]`): Seed of the initial noise of each image, N of them.
            columns (`dict[str, Sequence]`, *optional*): As in `rollout`, N values each. With them, N must be 1.
            encoded (`list`, *optional*): Return value of `encode_ahead`, with the same `call_kwargs`.
            **call_kwargs: Arguments of the pipeline's call in the place of those given at construction.

        Returns:
            `Tensor` or [`Media`]: Images, floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W]; audio [N, C, L].
        """
        if call_kwargs:
            return self._called_with(call_kwargs).generate(prompts, seeds, columns, encoded)
        if self._calling.takes_one_prompt and len(prompts) > 1:
            alone = [self.generate([prompt], [seed]) for prompt, seed in zip(prompts, seeds)]
            return accelerate.utils.concatenate(alone)
        scheduler = RolloutScheduler.of(self._scheduler)
        scheduler.record(torch.zeros(0), [], levels=())
        if encoded is None:
            encoded = self._from_cache(prompts)
        encode_prompt = self._encoding_to(encoded, call)
        encode_image = remember({"encode_image": []})["encode_image"]
        with (
            self._patched(scheduler, self._call_model, call, encode_image, call, encode_prompt=encode_prompt),
            self._own_random_numbers(seeds[0]),
        ):
            arguments = self._calling.arguments(self.call_kwargs, prompts, _generators(seeds), columns)
            return self._calling.samples(self.pipeline(**arguments), len(prompts))

    def arguments_with(self, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """
        The arguments of the pipeline's call with some in the place of those given at construction. None as the value of one
        leaves it to the pipeline.

        Raises:
            ValueError: They ask for another number of steps than their schedule has, which pipelines do not say.
        """
        unset = {name for name, value in call_kwargs.items() if value is None}
        arguments = {name: value for name, value in {**self.call_kwargs, **call_kwargs}.items() if name not in unset}
        check_steps(arguments, call_kwargs.get("num_inference_steps"))
        return arguments

    def _called_with(self, call_kwargs: dict[str, Any]) -> "PipelineFlow":
        """This flow with other arguments of the call, which may change the embeddings and the number of parts of a video."""
        other = copy.copy(self)
        other.call_kwargs = self.arguments_with(call_kwargs)
        if call_kwargs.keys() - AFTER_ENCODING:
            other.prompt_embeddings = {}
        other._scheduler = copy.copy(self._scheduler)
        other._scheduler.calls_per_step = None
        return other

    @contextlib.contextmanager
    def _replayed(self, batch: RolloutBatch, scheduler: StandIn, is_computed: Callable[[Any], bool]) -> Iterator[None]:
        """Prepare the pipeline to be called on `batch` again; few of the transformer's calls compute, by their output."""
        device = batch.device
        scheduler.known_first_step = batch.first_step
        remembered = send_to_device(batch.remembered, device, non_blocking=True)
        remembered["encode_prompt"] = repeated(remembered["encode_prompt"])
        remembered = {name: iter(values) for name, values in remembered.items()}
        outputs = iter(batch.outputs)
        generators = batch.call_kwargs["generator"]
        generators = generators if isinstance(generators, list) else [generators]

        def encode_prompt(original, *args, **kwargs):
            return next(remembered["encode_prompt"])

        def prepare_latents(original, *args, **kwargs):
            prepared = next(remembered["prepare_latents"])
            for generator, state in zip(generators, batch.generator_states):
                generator.set_state(state)
            return with_latents(prepared, scheduler.begin(latents_of(prepared)))

        def encode_image(original, *args, **kwargs):
            return Encoding(next(remembered["encode_image"]))

        def generate(original, *args, **kwargs):
            return next(remembered["generate"])

        def model(*args, **kwargs):
            output = next(outputs)
            if is_computed(output):
                return self._call_model(*args, **kwargs)
            # The scheduler ignores these steps: without momentum, only the shape matters.
            return recursively_apply(
                lambda kept: _zeros(kept, device) if kept.is_meta else kept.to(device, non_blocking=True), output
            )

        methods = {"encode_prompt": encode_prompt, "prepare_latents": prepare_latents, "encode_image": encode_image}
        with self._patched(scheduler, model, device=device, generate=generate, **methods):
            yield

    @contextlib.contextmanager
    def _patched(
        self,
        scheduler: StandIn,
        model: Callable,
        prepare_latents: Callable,
        encode_image: Callable | None = None,
        generate: Callable | None = None,
        device: torch.device | None = None,
        *,
        encode_prompt: Callable,
    ) -> Iterator[None]:
        def encode(original, *args, **kwargs):
            return encode_prompt(functools.partial(self._with_encoders, original), *args, **kwargs)

        def write(original, *args, **kwargs):
            return generate(functools.partial(self._with_encoders, original), *args, **kwargs)

        def begin(original, *args, **kwargs):
            with drawn_noise(original, scheduler.draw):
                prepared = original(*args, **kwargs)
            return with_latents(prepared, scheduler.begin(latents_of(prepared)))

        def prepare(original, *args, **kwargs):
            return prepare_latents(functools.partial(begin, original), *args, **kwargs)

        proxies = {
            # Several transformers are called by one wrapper, which gets their names.
            name: ModelProxy(
                functools.partial(model, name) if self.has_several_transformers else model, getattr(self.pipeline, name)
            )
            for name in self._transformers
        }
        methods = {"encode_prompt": encode, "prepare_latents": prepare, "prepare_audio_latents": prepare}
        device = device or self.pipeline._execution_device
        written = None if generate is None else write
        arguments = (self._part_names, scheduler, proxies, device, self._attention, encode_image, written)
        with patched(self.pipeline, *arguments, **methods):
            yield
        if scheduler.counted_calls > 0:  # of the only step
            raise StopPipeline(scheduler.counted_calls)

    def _with_encoders(self, encode: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.encoders is not None:
            self.encoders.come()
        return encode(*args, **kwargs)

    def _call_model(self, *args: Any, **kwargs: Any) -> Any:
        if self.encoders is not None:
            self.encoders.leave()
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _own_random_numbers(self, seed: int) -> Iterator[None]:
        """Some pipelines draw from the process's generator: their images must not depend on what it drew before."""
        device = self.pipeline._execution_device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _knows(self, prompts: Sequence[str]) -> bool:
        return all(prompt in self.prompt_embeddings for prompt in prompts)

    def _from_cache(self, prompts: Sequence[str], branches: int = 1) -> list | None:
        """The known embeddings of the prompts' samples, if all of them are known."""
        if not self._knows(prompts):
            return None
        axes = self.axes().encoded
        samples = repeat_each(range(len(prompts)), branches)
        known = concatenate([self.prompt_embeddings[prompt] for prompt in prompts], axes)
        return take(known, axes, samples, len(prompts))

    def _encoding_to(self, encoded: list | None, encode: Callable) -> Callable:
        """Give `encode`, a wrapper of `encode_prompt`, these embeddings instead, if there are any."""
        if encoded is None:
            return encode
        values = iter(repeated(send_to_device(encoded, self.pipeline._execution_device)))
        return lambda original, *args, **kwargs: encode(lambda *args, **kwargs: next(values))

    def _sharing_prefix(
        self, scheduler: RolloutScheduler, prompts: int, branches: int, noise_amounts: Tensor, axes: BatchAxes
    ) -> Callable:
        """
        The model; until the first noise is added to any branch, it is called with one branch of each prompt. A model whose
        first call makes a cache for the others is called with all of them, as its cache must be.
        """
        if self._has_state:
            return self._call_model
        total = prompts * branches
        noisy = (torch.atleast_2d(noise_amounts) > 0).any(dim=0).nonzero()
        shared_steps = int(noisy[0]) if len(noisy) else noise_amounts.shape[-1]
        calls: dict[int, int] = defaultdict(int)  # number of calls in each step

        def model(*args, **kwargs):
            number = calls[scheduler.steps_done]
            calls[scheduler.steps_done] += 1
            # Guidance may need more calls in later steps than in the first, whose axes are known.
            if scheduler.steps_done >= shared_steps or number >= len(axes.model_calls):
                return self._call_model(*args, **kwargs)
            args, kwargs = take((args, kwargs), axes.model_calls[number], range(0, total, branches), total)
            output = self._call_model(*args, **kwargs)
            return take(output, axes.outputs[number], repeat_each(range(prompts), branches), prompts)

        return model


def _hint(pipeline: DiffusionPipeline, given: Collection[str], columns: Mapping[str, Sequence] | None) -> str:
    """What else to try where a call fails: an argument that it needs is not there, or an image is the name of its file."""
    needed = [
        name
        for name, parameter in list(inspect.signature(type(pipeline).__call__).parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in (*given, "prompt", "generator")
    ]
    names = [name for name, values in (columns or {}).items() if names_image(values[0])]
    hint = ""
    if needed:
        hint += (
            f". It needs {', '.join(needed)}: give a column of that name in `pipeline_columns`, or one value for all "
            "prompts in `pipeline_kwargs`"
        )
    if names:
        hint += f". {', '.join(names)} names no file from here, such as {columns[names[0]][0]!r}: give images, or names that do"
    return hint


def _asserts_float32(error: Exception) -> bool:
    """Diffusers' schedulers return latents in the dtype of the velocity, which some pipelines assert to be float32."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return isinstance(error, AssertionError) and "float32" in line


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per seed, on the CPU so that the noise does not depend on the device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _zeros(shape: Tensor, device: torch.device) -> Tensor:
    """Zeros of the shape and dtype of a meta tensor, without memory of their own."""
    return torch.zeros((), dtype=shape.dtype, device=device).expand(shape.shape)


def _leaves(tensor: Tensor) -> set[Tensor]:
    """The tensors that get a gradient from a backward pass through this one."""
    found, seen, ahead = set(), set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        ahead += [function for function, _ in node.next_functions]
    return found
