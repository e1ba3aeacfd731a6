"""
Records of a pipeline's calls: a rehearsal, a rollout, and the axes of the samples in them.

Dimensions: P prompts, G branches (images per prompt), N = P x G samples in prompt-major order, T steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import concatenate, honor_type, recursively_apply
from torch import Tensor

from ..media import Media
from .sample_axes import take


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """
    Everything that passes between a pipeline and its parts in a call with N samples, of which only one step was real.

    Attributes:
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T = 0 in [0, 1], shape [T + 1], on the CPU.
        latents (`Tensor`): Noisy latents as the scheduler gets them, shape [N, ...].
        velocity (`Tensor`): Their velocity as the scheduler gets it, of the same shape.
        skipped_steps (`int`): Steps at the start of the schedule that the pipeline does not take.
        noise_scale (`float`): Standard deviation of the noise that the pipeline starts from; 1 if it starts from more than noise.
        encoded (`list`): Return value of each call of `encode_prompt`.
        encoded_images (`list`): Tensors taken from the return value of each call of the VAE's `encode`.
        generated (`list`): Return value of each call of a language model's `generate` outside `encode_prompt`.
        prepared (`list`): Return value of each call of `prepare_latents`.
        model_calls (`list[tuple[tuple, dict]]`): Arguments of each call of the transformer in the first step.
        outputs (`list`): Return value of each of these calls.
        decode_calls (`list[tuple[tuple, dict]]`): Arguments of each call of the VAE's `decode`.
        images (`Tensor` or [`Media`]): What was made: images or videos, floats in [0, 1], shape [N, 3, H, W] or
            [N, F, 3, H, W]; audio [N, C, L]; or both. They show nothing.
        callers (`list[list[str]]`): Names of the transformers that each step calls, one for each call.
    """

    sigmas: Tensor
    latents: Tensor
    velocity: Tensor
    skipped_steps: int
    noise_scale: float
    encoded: list
    encoded_images: list
    generated: list
    prepared: list
    model_calls: list[tuple[tuple, dict]]
    outputs: list
    decode_calls: list[tuple[tuple, dict]]
    images: Tensor | Media
    callers: list[list[str]]


@dataclass(frozen=True)
class BatchAxes:
    """Axes of the samples, from [`sample_axes`], in the fields of a [`Rehearsal`] of these names."""

    encoded: Any
    encoded_images: Any
    generated: Any
    prepared: Any
    model_calls: Any
    outputs: Any


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """
    A rollout of one batch of prompts, with all that its replay needs.

    Attributes:
        images (`Tensor` or [`Media`]): What was made: images or videos, floats in [0, 1], shape [N, 3, H, W] or
            [N, F, 3, H, W]; audio [N, C, L]; or both. None in a part.
        endpoints (`Tensor`): Final latents x_0 as the pipeline lays them out, shape [P, G, ...].
        x_t (`dict[int, Tensor]`): Noisy latents that the pipeline gets for step k, for each recorded k in [0, T), shape
            [N, ...], in the pipeline's dtype; float32 if the scheduler records x_s.
        velocities (`dict[int, Tensor]`): Velocity of step k, for each recorded k, the shape of `x_t[k]`, float32.
        x_s (`dict[int, Tensor]`): Noisy latents after step k, if the scheduler records them, the shape of `x_t[k]`,
            float32.
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T of its steps, which may depend on the size of the images, shape
            [T + 1], on the CPU.
        first_step (`int`): Steps at the start of the schedule that the pipeline does not take.
        device (`torch.device`): The device that the pipeline computes on.
        call_kwargs (`dict`): Arguments of the pipeline's call.
        remembered (`dict[str, list]`): Return values of the pipeline's methods that the replay does not repeat; those of
            `encode_prompt` once per prompt, by [`once_per_prompt`].
        outputs (`list`): Return value of each call of the transformer; as tensors on the meta device, if the replay needs
            their shapes alone.
        generator_states (`Sequence[Tensor]`): State of each sample's generator after the pipeline prepared its latents, if it
            draws from the generators after that, such as noise for an image in each step; none otherwise.
        parts (`Sequence[RolloutBatch]`): If each sample had a call of its own: what the replay of each needs, without its
            tuples. The four fields above are then those of the first.
        is_kept (`Tensor`, *optional*): True for each element of the latents that the sampler leaves as it is, such as a
            condition, shape [N, ...]. None if it denoises all.
        velocity_rms (`Tensor`, *optional*): Root mean square of each sample's velocity over all steps, recorded or not,
            guidance included, shape [N], float32. None in a part.
    """

    images: Tensor | Media
    endpoints: Tensor
    x_t: dict[int, Tensor]
    velocities: dict[int, Tensor]
    x_s: dict[int, Tensor]
    sigmas: Tensor
    first_step: int
    device: torch.device
    call_kwargs: dict[str, Any]
    remembered: dict[str, list]
    outputs: list
    generator_states: Sequence[Tensor] = ()
    parts: Sequence["RolloutBatch"] = ()
    is_kept: Tensor | None = None
    velocity_rms: Tensor | None = None

    @classmethod
    def of_samples(cls, parts: Sequence["RolloutBatch"], branches: int) -> "RolloutBatch":
        """One batch of N calls of a pipeline that makes one sample per call; `branches` neighbours are of one prompt."""
        together = {
            name: {
                level: torch.cat([getattr(part, name)[level] for part in parts]) for level in getattr(parts[0], name)
            }
            for name in ("x_t", "velocities", "x_s")
        }
        names = ("images", "endpoints", "is_kept", "velocity_rms")
        nothing = {**dict.fromkeys(names), "x_t": {}, "velocities": {}, "x_s": {}}
        return replace(
            parts[0],
            images=concatenate([part.images for part in parts]),
            endpoints=torch.cat([part.endpoints for part in parts]).flatten(0, 1).unflatten(0, (-1, branches)),
            is_kept=None if parts[0].is_kept is None else torch.cat([part.is_kept for part in parts]),
            velocity_rms=torch.cat([part.velocity_rms for part in parts]),
            parts=[replace(part, **nothing) for part in parts],
            **together,
        )

    def part(self, first: int, count: int, levels: Sequence[int], axes: BatchAxes) -> "RolloutBatch":
        """A batch of `count` prompts from the place `first` on, with the recorded `levels` alone and without images."""
        branches = self.endpoints.shape[1]
        return self.of_places(range(first * branches, (first + count) * branches), branches, levels, axes)

    def of_places(
        self, samples: Sequence[int], branches: int, levels: Sequence[int], axes: BatchAxes
    ) -> "RolloutBatch":
        """A batch of the samples at these places, `branches` neighbours of each prompt, otherwise as `part`."""
        total = self.endpoints.shape[:2].numel()
        # Copies: a view would keep the whole in memory.
        part = partial(take, samples=samples, total=total)
        endpoints = part(self.endpoints.flatten(0, 1), 0).unflatten(0, (-1, branches))
        is_kept = part(self.is_kept, 0)
        if self.parts:
            pick = lambda recorded: {level: part(recorded[level], 0) for level in levels if level in recorded}
            return replace(
                self,
                images=None,
                endpoints=endpoints,
                x_t=pick(self.x_t),
                velocities=pick(self.velocities),
                x_s=pick(self.x_s),
                parts=[self.parts[n] for n in samples],
                is_kept=is_kept,
                velocity_rms=None,
            )
        encoded = part(repeated(self.remembered["encode_prompt"]), axes.encoded)
        is_listed = lambda name, value: is_per_sample(name) and isinstance(value, list) and len(value) == total
        return RolloutBatch(
            images=None,
            endpoints=endpoints,
            x_t={level: part(self.x_t[level], 0) for level in levels},
            velocities={level: part(self.velocities[level], 0) for level in levels},
            x_s={level: part(self.x_s[level], 0) for level in levels if level in self.x_s},
            sigmas=self.sigmas,
            first_step=self.first_step,
            device=self.device,
            call_kwargs={
                name: [value[n] for n in samples] if is_listed(name, value) else value
                for name, value in self.call_kwargs.items()
            },
            remembered={
                "encode_prompt": once_per_prompt(encoded, branches, len(samples)),
                "prepare_latents": part(self.remembered["prepare_latents"], axes.prepared),
                "encode_image": part(self.remembered["encode_image"], axes.encoded_images),
                "generate": part(self.remembered["generate"], axes.generated),
            },
            outputs=[part(output, axes.outputs[0]) for output in self.outputs],
            generator_states=[self.generator_states[n] for n in samples] if self.generator_states else (),
            is_kept=is_kept,
        )

    def on_host(self) -> "RolloutBatch":
        """The batch with all that the replay needs in host memory, from which `velocity` takes one step at a time."""
        return replace(
            self,
            x_t=host_copy(self.x_t),
            velocities=host_copy(self.velocities),
            x_s=host_copy(self.x_s),
            remembered=host_copy(self.remembered),
            outputs=host_copy(self.outputs),
            is_kept=host_copy(self.is_kept),
            parts=[part.on_host() for part in self.parts],
        )


def host_copy(data: Any) -> Any:
    """
    Copy the tensors of nested lists, tuples and dicts to host memory; it is pinned if a GPU will copy them back. Those on the
    meta device stay there.
    """
    pin = torch.cuda.is_available()

    def copy(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin).copy_(tensor)

    return recursively_apply(copy, data)


class OncePerPrompt(NamedTuple):
    """
    A tensor, or a list of tensors, that had each of its rows several times in succession.

    Attributes:
        rows (`Tensor` or `list[Tensor]`): The rows, each once.
        times (`int`): How often each of them stood there: once for each branch of a prompt.
    """

    rows: Any
    times: int


def once_per_prompt(value: Any, branches: int, samples: int) -> Any:
    """
    Keep what the branches of a prompt share once per prompt, where they share it to the bit; [`repeated`] is the inverse.

    Args:
        value: Nested lists, tuples and dicts of tensors, such as return values of `encode_prompt`.
        branches (`int`): Branches G of each prompt.
        samples (`int`): Samples N = P x G. Only a first axis that is a multiple of N is looked at.
    """
    if isinstance(value, Tensor):
        if value.ndim and len(value) and len(value) % samples == 0:
            groups = value.unflatten(0, (-1, branches))
            if torch.equal(groups, groups[:, :1].expand_as(groups)):
                return OncePerPrompt(groups[:, 0].clone(), branches)
        return value
    if isinstance(value, dict):
        return type(value)({name: once_per_prompt(item, branches, samples) for name, item in value.items()})
    if isinstance(value, list) and value and len(value) % samples == 0 and all(isinstance(v, Tensor) for v in value):
        groups = [value[start : start + branches] for start in range(0, len(value), branches)]
        if all(torch.equal(group[0], other) for group in groups for other in group[1:]):
            return OncePerPrompt([group[0].clone() for group in groups], branches)
    if isinstance(value, (list, tuple)):
        return honor_type(value, (once_per_prompt(item, branches, samples) for item in value))
    return value


def repeated(value: Any) -> Any:
    """Nested lists, tuples and dicts with the rows of each [`OncePerPrompt`] as often as they stood there."""
    if isinstance(value, OncePerPrompt):
        rows, times = value
        return rows.repeat_interleave(times, dim=0) if isinstance(rows, Tensor) else repeat_each(rows, times)
    if isinstance(value, dict):
        return type(value)({name: repeated(item) for name, item in value.items()})
    return honor_type(value, map(repeated, value)) if isinstance(value, (list, tuple)) else value


def repeat_each(values: Sequence, times: int) -> list:
    """Each value `times` times in a row: [P] to [P x G]."""
    return [value for value in values for _ in range(times)]


def is_per_sample(name: str) -> bool:
    """Tell if an argument of a pipeline's call, when it is a list, has one item for each sample."""
    return name in ("prompt", "generator") or name.startswith(("prompt_", "negative_prompt"))
