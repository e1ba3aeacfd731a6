"""Before and after: images of the same prompts from the same seeds, and their rewards."""

import contextlib
import json
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import recursively_apply
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState
from transformers.utils import logging

from ..media import Media, by_kind
from ..metric_names import CONTROL, REWARD, part
from ..pipeline.records import repeat_each
from ..reporting.logs import finite
from ..seeds import FIRST_SEED
from .diversity import load_diversity
from .evaluator import DifferentSizesError, Evaluator, read_rows, summarize


logger = logging.get_logger(__name__)

RESULTS_FILE = "results.json"
# The mean of fewer images moves by a quarter of their spread or more from one choice of seeds to another.
FEW_IMAGES = 16


class BeforeAfter:
    """
    Samples of a model before and after training, for its model card. Call `sample("before")` before training and
    `sample("after")` after it; a push to the Hub completes what is missing by itself.

    Args:
        evaluator ([`~trl_fdfo.evaluation.evaluator.Evaluator`]): Scores the images.
        generate (`Callable`): `(prompts, seeds, columns, **call_kwargs) -> images [N, ...]` of the model as it is now.
        state (`Callable`): Returns the [`~transformers.TrainerState`], whose step tells whether "after" is up to date.
        dataset (`datasets.Dataset`): Its first prompts are taken.
        prompt_column (`str`): Column that holds them.
        trained (`Collection[str]`): The prompts that are trained on.
        untrained (`tuple`, *optional*): A name for the model as it was before training, and a context manager in which
            `generate` samples it.
        num_prompts (`int`): Prompts P, at most as many as the dataset has.
        images_per_prompt (`int`): Images S of each; at least 2 for their distance.
        metrics (`Callable`, *optional*): `(images, prompts) -> dict of floats`, reported beside the rewards; images
            [P S, 3, H, W] in [0, 1], or what else `generate` makes.
        diversity (`str` or `Callable`): A name for [`~trl_fdfo.evaluation.diversity.load_diversity`], such as "clip", or a
            callable `(images [P, S, ...]) -> Tensor [P]`, reported under its `__name__`.

    Attributes:
        evaluator ([`~trl_fdfo.evaluation.evaluator.Evaluator`]): The evaluator that it was made with.
        prompts (`list[str]`): The P prompts.
        held_out (`bool`): None of the prompts is trained on.
        diversity (`Callable`): The measure of diversity.
        images (`dict[str, Tensor]`): Samples by name, on the CPU, [P, S, 3, H, W] in [0, 1]; videos [P, S, F, 3, H, W];
            audio [P, S, C, L]; a [`Media`] of both.
        results (`dict[str, dict[str, float]]`): Means of rewards, metrics and diversity by name, on the main process.

    Raises:
        ValueError: A number is no int >= 1, or `metrics` or `diversity` cannot be called.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        generate: Callable[..., Tensor | Media],
        state: Callable[[], TrainerState],
        dataset: Dataset,
        prompt_column: str,
        trained: Collection[str],
        untrained: tuple[str, Callable[[], contextlib.AbstractContextManager]] | None = None,
        *,
        num_prompts: int = 8,
        images_per_prompt: int = 2,
        metrics: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None,
        diversity: str | Callable[[Tensor], Tensor] = "pixels",
    ):
        num_prompts = _at_least_one("num_prompts", num_prompts)
        images_per_prompt = _at_least_one("images_per_prompt", images_per_prompt)
        self.diversity = load_diversity(diversity) if isinstance(diversity, str) else diversity
        if not callable(self.diversity):
            raise ValueError(f"diversity={diversity!r} is neither a name, such as 'pixels', nor a callable on images.")
        if metrics is not None and not callable(metrics):
            raise ValueError(f"metrics={metrics!r} is not a callable `(images, prompts) -> dict of floats`.")
        self.evaluator = evaluator
        self._generate, self._state = generate, state
        self._untrained, self._metrics = untrained, metrics
        rows = range(min(num_prompts, len(dataset)))
        columns = read_rows(dataset, rows, evaluator.needed_columns(dataset))
        self._columns = {name: repeat_each(values, images_per_prompt) for name, values in columns.items()}
        self._all_prompts = self._columns[prompt_column]
        self._images_per_prompt = images_per_prompt
        self.prompts = self._all_prompts[::images_per_prompt]
        self.held_out = set(trained).isdisjoint(self.prompts)
        self.images: dict[str, Tensor | Media] = {}
        self.results: dict[str, dict[str, float]] = {}
        self._after_step: int | None = None

    def sample(self, name: str, **call_kwargs: Any) -> None:
        """
        Sample the images and score them. All processes must call it.

        Args:
            name (`str`): Name of the images: "before", "after", or something between for the table.
            **call_kwargs: Arguments of the pipeline's call in the place of the configured ones.

        Raises:
            DifferentSizesError: The images differ in size, which columns of the prompts decide.
        """
        self._sample(name, **call_kwargs)
        self._score(name)

    def complete(self) -> None:
        """
        Sample "after" from the weights as they are now and, if nothing was sampled before training, the untrained model.
        All processes must call it. Warns if a reward fails, or if the images have different sizes.
        """
        try:
            if not self.images and self._untrained is not None:
                name, untrained = self._untrained
                with untrained():
                    self._sample(name)
            if self._after_step != self._state().global_step:
                self._sample("after")
        except DifferentSizesError as error:
            logger.warning(f"The model card has no images: {error}")
        for name in self.images.keys() - self.results.keys():
            try:
                self._score(name)
            except Exception as error:  # the user's: training is over, and the result is to be saved all the same
                logger.warning(
                    f"The images '{name}' have no rewards in the model card ({type(error).__name__}: {error})."
                )

    @property
    def is_few(self) -> bool:
        """True if the images are too few for their means to tell anything."""
        return len(self._all_prompts) < FEW_IMAGES

    def write(self, folder: str | Path, **more: Any) -> None:
        """
        Write the results, and `more` values before them, into `results.json`: null where a metric has no value, and text where a
        value is none of JSON's, such as a tensor.
        """
        results = {name: finite(values) for name, values in self.results.items()}
        Path(folder, RESULTS_FILE).write_text(json.dumps({**more, **results}, indent=2, default=str) + "\n")

    def table(self) -> str:
        """The results as text: a row per metric, a column per name, and a warning if they are of few images."""
        metrics = list(dict.fromkeys(metric for values in self.results.values() for metric in values))
        cell = lambda value: f"{value:22.3f}" if math.isfinite(value) else f"{'-':>22}"
        width = max(map(len, metrics), default=0)
        lines = [" ".join([" " * width, *(f"{name:>22}" for name in self.results)])]
        for metric in metrics:
            cells = [values.get(metric, math.nan) for values in self.results.values()]
            if not any(map(math.isfinite, cells)) and not self.is_few:
                continue  # a reward that compares images gives none a score
            lines.append(" ".join([f"{metric:{width}}", *map(cell, cells)]))
        if self.is_few:
            images = "one image" if len(self._all_prompts) == 1 else f"{len(self._all_prompts)} images"
            lines.append(f"Means of {images} say nothing: take more prompts, or more images of each.")
        return "\n".join(lines)

    def forget_after(self) -> None:
        """Drop the samples "after": training goes on."""
        self.images.pop("after", None)
        self.results.pop("after", None)
        self._after_step = None

    def _sample(self, name: str, **call_kwargs: Any) -> None:
        seeds = range(FIRST_SEED, FIRST_SEED + len(self._all_prompts))
        images = self._generate(self._all_prompts, seeds, self._columns, **call_kwargs)
        self.images.pop(name, None)  # to the end of the table
        self.images[name] = recursively_apply(lambda made: made.unflatten(0, (-1, self._images_per_prompt)), images)
        self.results.pop(name, None)
        if name == "after":
            self._after_step = self._state().global_step

    def _score(self, name: str) -> None:
        if not PartialState().is_main_process:
            return
        images, rewards, controls = self.images[name], self.evaluator.rewards, self.evaluator.controls
        figures = summarize(self.evaluator.score(images, self._columns, self._state()), rewards, controls)
        # A sum of one reward is that reward; a control is known by its own name.
        shown = [REWARD, *(part(REWARD, f) for f in rewards.names if len(rewards.names) > 1)]
        if controls is not None:
            shown += [CONTROL] if len(controls.names) > 1 else []
            shown += [part(CONTROL, f) for f in controls.names]
        results = {metric: figures[metric] for metric in shown}
        flat = recursively_apply(lambda made: made.flatten(0, 1), images)
        if self._metrics is not None:
            metrics = self._metrics(flat, self._all_prompts)
            if not isinstance(metrics, Mapping):
                raise ValueError(f"metrics returned {metrics!r}: it must return a dict of floats, by their names.")
            _add(results, metrics, "metrics")
        seen = by_kind(flat).get("images")
        if self._images_per_prompt > 1 and seen is not None:
            title = getattr(self.diversity, "__name__", type(self.diversity).__name__)
            _add(results, {title: self.diversity(seen.unflatten(0, (-1, self._images_per_prompt))).mean()}, "diversity")
        self.results[name] = results


def _at_least_one(name: str, value: int) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r} must be an int, at least 1.")
    return number


def _add(results: dict[str, float], more: Mapping[str, float], source: str) -> None:
    """Add results that `source`, a name for errors, has given."""
    for name, value in more.items():
        if name in results:
            raise ValueError(f"{source} has a result '{name}', and so has another of {', '.join(results)}: rename it.")
        number = None
        if not isinstance(value, str):
            with contextlib.suppress(TypeError, ValueError):
                number = float(value)
        if number is None:
            raise ValueError(f"{source} has {value!r} as its result '{name}', which is not a number.")
        results[name] = number
