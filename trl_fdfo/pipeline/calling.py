"""
How a pipeline is called: the ways in which it takes prompts, images and a number of samples, and what it returns.

Pipelines differ in this, and say it nowhere: the first way that works is found by trying.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from ..media import Media, by_kind, images_are_signed, made_by, unsigned
from .records import Rehearsal, is_per_sample, repeat_each


# A call, or a rehearsal of one: (prompts, columns, samples per prompt).
Attempt = Callable[[Sequence[str], dict[str, Sequence] | None, int], Rehearsal]


class OtherWayError(ValueError):
    """The pipeline takes its prompts, its images or the number of samples in another way, or not at all."""


class Calling:
    """
    How a pipeline is called, which [`Calling.find`] finds.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.

    Attributes:
        makes_one (`bool`): A call makes one sample.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        self.makes_one = False
        self._name = type(pipeline).__name__
        options = inspect.signature(type(pipeline).__call__).parameters
        # `num_images_per_prompt` or `num_videos_per_prompt`.
        self._per_prompt_option = next((name for name in options if re.fullmatch(r"num_\w+_per_prompt", name)), None)
        # Where the prompt has other names, it is in the columns.
        self._takes_prompt = "prompt" in options
        self._ways = self._all_ways()
        self._image_modes: dict[str, str] = {}  # by column
        self._has_signed_images = False  # in [-1, 1], as its VAE or its transformer makes them

    @property
    def takes_one_prompt(self) -> bool:
        """A call without images takes one prompt at a time."""
        return self.makes_one or self._ways[False][0][0] == "alone"

    def find(
        self, attempt: Attempt, prompts: Sequence[str], columns: dict[str, Sequence] | None, samples_per_prompt: int
    ) -> Rehearsal:
        """
        Rehearse in the first of the ways that work; later calls are made in that way.

        Args:
            attempt (`Callable`): Makes a call by `arguments`, and raises [`OtherWayError`] if it fails.
            prompts (`Sequence[str]`): P prompts.
            columns (`dict[str, Sequence]`, *optional*): Arguments that differ between prompts, P values each.
            samples_per_prompt (`int`): N = P x samples_per_prompt.

        Raises:
            ValueError: No way works, or the batch is too large for the pipeline.
        """
        if self.makes_one:
            prompts, samples_per_prompt = prompts[:1], 1
            columns = {name: values[:1] for name, values in (columns or {}).items()}
        try:
            return self._find_among_ways(attempt, prompts, columns, samples_per_prompt)
        except OtherWayError as error:
            refusal = error
        if len(prompts) > 1 and not columns:
            try:
                rehearsal = self.find(attempt, prompts[:1], columns, samples_per_prompt)
            except OtherWayError:
                raise refusal from refusal.__cause__
            if self.makes_one:  # and so of all prompts
                return rehearsal
            raise ValueError(
                f"{self._name} takes one prompt at a time: set per_device_prompt_batch_size=1 and "
                f"per_device_sampling_batch_size=1. With {len(prompts)} prompts, {refusal}"
            ) from refusal
        if samples_per_prompt > 1:
            ways, self.makes_one = self._ways, True
            self._ways = self._all_ways()  # more for one sample than for several
            with contextlib.suppress(OtherWayError):
                return self.find(attempt, prompts, columns, samples_per_prompt)
            self.makes_one, self._ways = False, ways
        raise refusal

    def _find_among_ways(
        self, attempt: Attempt, prompts: Sequence[str], columns: dict[str, Sequence] | None, samples_per_prompt: int
    ) -> Rehearsal:
        gets_images = bool(columns)
        ways, refusal = self._ways[gets_images], None
        # The other ways take one prompt.
        for number in range(len(ways) if len(prompts) == 1 else 1):
            self._ways[gets_images] = ways[number:]
            try:
                rehearsal = attempt(prompts, columns, samples_per_prompt)
            except OtherWayError as error:
                refusal = refusal or error
                continue
            if images_are_signed(rehearsal.images) and not self._has_signed_images:
                self._has_signed_images = True
                rehearsal = attempt(prompts, columns, samples_per_prompt)
            self._image_modes |= {name: mode for name, mode in map(_image_mode, (columns or {}).items()) if mode}
            return rehearsal
        self._ways[gets_images] = ways
        raise refusal

    def _all_ways(self) -> dict[bool, list[tuple[str, bool]]]:
        """
        How a call may get its prompts (repeated for each sample, listed once, or one alone as a string), and if its images
        are repeated, by whether it gets images. The first way that the pipeline takes is taken.

        Prompts that are not repeated need the pipeline's own option for the number of samples. Without images that option
        comes last: pipelines differ in how they order repeated samples, and some give the images of one prompt the attention
        mask of another.
        """
        ways = {
            True: [("listed", False), ("repeated", True), ("repeated", False), ("listed", True), ("alone", False)],
            False: [("repeated", False), ("alone", False)],
        }
        possible = lambda way: way[0] == "repeated" or self.makes_one or self._per_prompt_option is not None
        return {columns: [way for way in listed if possible(way)] for columns, listed in ways.items()}

    def arguments(
        self,
        call_kwargs: dict[str, Any],
        prompts: Sequence[str],
        generators: list[torch.Generator],
        columns: dict[str, Sequence] | None = None,
    ) -> dict[str, Any]:
        """
        Arguments of a call that makes one sample for each generator.

        Args:
            call_kwargs (`dict[str, Any]`): Those that are the same for all calls.
            prompts (`Sequence[str]`): P prompts.
            generators (`list[torch.Generator]`): N generators, equally many of each prompt.
            columns (`dict[str, Sequence]`, *optional*): As in `find`.

        Raises:
            ValueError: A call takes one prompt, and there are more.
        """
        branches = len(generators) // len(prompts)
        prompts_are, columns_repeated = self._ways[bool(columns)][0]
        # Some pipelines take a list of images as one per prompt, others as all for one: with one prompt they agree.
        if len(prompts) > 1 and (
            prompts_are == "alone" or columns and (prompts_are, columns_repeated) != ("repeated", True)
        ):
            others = f" with {', '.join(columns)}" if columns else ""
            raise ValueError(f"{len(prompts)} prompts{others}: a call of {self._name} takes one prompt.")
        if prompts_are == "repeated":
            varying: dict[str, Any] = {"prompt": repeat_each(prompts, branches)}
        else:
            varying = {"prompt": prompts[0] if prompts_are == "alone" else list(prompts)}
            if branches > 1:
                varying[self._per_prompt_option] = branches
            elif prompts_are == "alone":
                varying["generator"] = generators[0]
        for name, values in (columns or {}).items():
            varying[name] = repeat_each(values, branches) if columns_repeated else values[0]
        count = len(varying["prompt"]) if prompts_are != "alone" else None
        if not self._takes_prompt:
            del varying["prompt"]
        varying = {name: self._as_found(name, value) for name, value in varying.items()}
        arguments = {**call_kwargs, "generator": generators, "output_type": "pt", "return_dict": False, **varying}
        for name, value in arguments.items():
            if is_per_sample(name) and isinstance(value, str) and count is not None:
                # One for all: not every pipeline repeats it itself.
                arguments[name] = [value] * count
            elif isinstance(value, list):
                # Some pipelines write into the lists that they are given.
                arguments[name] = list(value)
        return arguments

    def _as_found(self, name: str, value: Any) -> Any:
        """An image in the mode of the first one that the pipeline took, as `diffusers.utils.load_image` converts it."""
        if isinstance(value, list):
            return [self._as_found(name, item) for item in value]
        mode = self._image_modes.get(name)
        # Not to a mode with less in it, such as a mask's.
        return value.convert(mode) if mode in ("RGB", "RGBA") and isinstance(value, Image.Image) else value

    def samples(self, output: tuple, count: int) -> Tensor | Media:
        """
        What a call returned, as [`made_by`].

        Args:
            output (`tuple`): Return value of the call.
            count (`int`): Samples that were asked for.

        Raises:
            OtherWayError: It is another number of samples.
        """
        made = made_by([_together(part, count) for part in output])
        found = {kind: len(values) for kind, values in by_kind(made).items()}
        if set(found.values()) != {count} and count == 1:
            # The single sample has no axis of samples: a video's frames look like images.
            is_array = lambda values: isinstance(values, (Tensor, np.ndarray))
            alone = [recursively_apply(lambda values: values[None], part, test_type=is_array) for part in output]
            made = made_by([part for part in alone if part is not None])
            found = {kind: len(values) for kind, values in by_kind(made).items()}
        if set(found.values()) != {count}:
            raise OtherWayError(f"asked for {count} samples, it made {found}")
        # Some pipelines return tensors as they sample them.
        return unsigned(made) if self._has_signed_images else made


def _image_mode(column: tuple[str, Sequence]) -> tuple[str, str | None]:
    name, values = column
    first = values[0][0] if isinstance(values[0], list) and values[0] else values[0]
    return name, first.mode if isinstance(first, Image.Image) else None


def _together(part: Any, count: int) -> Any:
    """A list of tensors of several lengths, which a pipeline has cut at the wrong places, as a tensor [count, ...]."""
    if not isinstance(part, list) or not all(isinstance(values, Tensor) for values in part):
        return part
    several = len({len(values) for values in part}) > 1
    return torch.cat(part).unflatten(0, (count, -1)) if several else part
