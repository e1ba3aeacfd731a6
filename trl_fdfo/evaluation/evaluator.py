"""
One evaluation, in training, before and after it, and in the script: samples of prompts, and what rewards, control rewards
and diversity say of them.

Dimensions: P prompts, S images of each, R rewards, C control rewards.
"""

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import concatenate, gather, gather_object, recursively_apply
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerState

from ..media import Media, by_kind, unbind
from ..metric_names import CONTROL, DIVERSITY, REWARD, deviation, part, standard_error
from ..pipeline.records import repeat_each
from ..rewards.reward_functions import RewardFunctions, parameters_of
from .estimates import Estimate


@dataclass(frozen=True)
class Evaluation:
    """
    Scores of P prompts with S images each, whole on each process.

    Attributes:
        rewards (`Tensor`): Shape [P, S, R], NaN where a reward does not apply.
        controls (`Tensor`, *optional*): Shape [P, S, C].
        diversity (`Tensor`, *optional*): Shape [P].
    """

    rewards: Tensor
    controls: Tensor | None
    diversity: Tensor | None


class DifferentSizesError(ValueError):
    """Images of different sizes, where a tensor holds all of them."""


class Evaluator:
    """
    Samples images of prompts and scores them. Processes share the prompts.

    Args:
        sample (`Callable`): `(prompts, seeds, columns, **call_kwargs) -> images [N, 3, H, W]` in [0, 1]; videos
            [N, F, 3, H, W]; audio [N, C, L]; or a [`Media`]. Called with at most `batch_size` images at a time.
        rewards ([`RewardFunctions`]): Rewards.
        controls ([`RewardFunctions`], *optional*): Control rewards, which nothing is trained on.
        diversity (`Callable`, *optional*): Images [P, S, ...] -> distance of the images of each prompt, [P]. Audio has none.
        prompt_column (`str`): Column of a dataset that holds the prompts.
        sampled_columns (`Sequence[str]`): Columns of a dataset that `sample` gets.
        batch_size (`int`): Images that are sampled at a time.
        device (`torch.device`): Device that the processes gather on.
        disable_tqdm (`bool`): Show no progress bar.
        encode_ahead (`Callable`, *optional*): `(prompts, columns, **call_kwargs) -> encoded`, called for all batches before
            the first is sampled, if text encoders and sampling share a device in turns. `sample` gets its return value as
            the argument `encoded`.
    """

    def __init__(
        self,
        sample: Callable[..., Tensor | Media],
        rewards: RewardFunctions,
        controls: RewardFunctions | None = None,
        diversity: Callable[[Tensor], Tensor] | None = None,
        *,
        prompt_column: str = "prompt",
        sampled_columns: Sequence[str] = (),
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        disable_tqdm: bool = False,
        encode_ahead: Callable[..., Any] | None = None,
    ):
        self.rewards = rewards
        self.controls = controls
        self.diversity = diversity
        self._sample = sample
        self._prompt_column = prompt_column
        self._sampled_columns = list(sampled_columns)
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._disable_tqdm = disable_tqdm
        self._encode_ahead = encode_ahead

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], columns: dict[str, Sequence], **call_kwargs: Any
    ) -> Tensor | Media:
        """
        One image per prompt and seed, on the CPU, whole on each process, [N, ...]; all processes must call it.

        Raises:
            DifferentSizesError: The images differ in size, which `sampled_columns` decide.
        """
        columns = {name: columns[name] for name in self._sampled_columns}
        own = self._share(len(prompts))
        rows = {name: [values[n] for n in own] for name, values in columns.items()}
        rows[self._prompt_column] = [prompts[n] for n in own]
        encoded = self._encoded(self._calls(rows), **call_kwargs)
        seeds = [operator.index(seeds[n]) for n in own]
        batches = self._sample_in_batches(rows, seeds, encoded, **call_kwargs)
        # Only one batch at a time is on the device.
        bar = self._with_bar(batches, -(-len(own) // self._batch_size), "sampling")
        images = [recursively_apply(Tensor.cpu, batch) for batch in bar]
        for kind in by_kind(images[0]) if columns else ():
            axes = "channels, length" if kind == "audio" else "height, width"
            own_sizes = [list(by_kind(batch)[kind].shape[-2:]) for batch in images]
            sizes = sorted({tuple(size) for size in gather_object(own_sizes)})
            if len(sizes) > 1:
                raise DifferentSizesError(
                    f"The {kind} of these rows have different sizes ({axes}), such as {sizes[0]} and {sizes[-1]}, "
                    "and are returned as one tensor: sample rows of one size at a time."
                )
        processes = PartialState().num_processes
        if processes > 1:
            whole = lambda own: gather(own.to(self._device)).cpu().unflatten(0, (processes, -1))
            images = concatenate([recursively_apply(whole, batch) for batch in images], dim=1)
            return recursively_apply(lambda made: made.flatten(0, 1)[: len(prompts)], images)
        return concatenate(images)

    def evaluate(
        self,
        dataset: Dataset,
        seed_of: Callable[[int, int], int],
        images_per_prompt: int,
        state: TrainerState,
        *,
        prompts_at_a_time: int | None = None,
        on_images: Callable[[int, Tensor | Media], None] = lambda number, images: None,
        title: str = "sampling",
    ) -> Evaluation:
        """
        Sample and score S images of each prompt. The images of a prompt are sampled together, for their diversity, and
        scored while the next ones are sampled. All processes must call it.

        Args:
            dataset (`datasets.Dataset`): P prompts, with the columns that the rewards take.
            seed_of (`Callable`): Number of the prompt and of its image -> seed of the initial noise.
            images_per_prompt (`int`): S, at least 2 for diversity.
            state (`TrainerState`): Passed to the rewards.
            prompts_at_a_time (`int`, *optional*): Prompts that are scored together; as many as fit into a batch by default.
            on_images (`Callable`): Called with the number of each prompt of this process and its images [S, ...].
            title (`str`): Title of the progress bar.
        """
        needed = self.needed_columns(dataset)
        if prompts_at_a_time is None:
            prompts_at_a_time = max(1, self._batch_size // images_per_prompt)

        def rows_of(numbers: list[int], names: Sequence[str]) -> dict[str, list]:
            columns = read_rows(dataset, numbers, names)
            return {name: repeat_each(values, images_per_prompt) for name, values in columns.items()}

        own = self._share(len(dataset))
        parts = [own[start : start + prompts_at_a_time] for start in range(0, len(own), prompts_at_a_time)]
        sampled = [self._prompt_column, *self._sampled_columns]
        encoded = self._encoded(call for part in parts for call in self._calls(rows_of(part, sampled)))
        pending, diversity = [], []
        for numbers in self._with_bar(parts, len(parts), title):
            rows = rows_of(numbers, needed)
            seeds = [operator.index(seed_of(n, image)) for n in numbers for image in range(images_per_prompt)]
            with noted(f"Raised by the rows {numbers} of the evaluated dataset."):
                images = concatenate(list(self._sample_in_batches(rows, seeds, encoded)))
            for batch in pending:
                for scores in batch:
                    scores.raise_errors()
            pending.append([f.submit(images, rows[self._prompt_column], state, rows) for f in self._kinds()])
            seen = by_kind(images).get("images")
            if self.diversity is not None and seen is not None:
                distances = self.diversity(seen.unflatten(0, (-1, images_per_prompt)))
                diversity.append(distances.to(self._device, torch.float32))
            images = recursively_apply(lambda made: made.unflatten(0, (-1, images_per_prompt)), images)
            for number, of_prompt in zip(numbers, unbind(images)):
                on_images(number, of_prompt)
        scores = [torch.cat([batch[kind].result() for batch in pending]) for kind in range(len(self._kinds()))]
        scores = [values.unflatten(0, (-1, images_per_prompt)) for values in scores]
        for functions in self._kinds():
            functions.on_rollout_end()
        # In the order of the dataset, and averaged by each process alike: the same for any number of processes.
        whole = lambda values: gather(values.to(self._device)).cpu()[: len(dataset)]
        rewards, *controls = map(whole, scores)
        return Evaluation(
            rewards, controls[0] if controls else None, whole(torch.cat(diversity)) if diversity else None
        )

    def score(self, images: Tensor | Media, columns: dict[str, Sequence], state: TrainerState) -> Evaluation:
        """
        Scores of images that are there already, on this process alone, without diversity.

        Args:
            images (`Tensor` or [`Media`]): Floats in [0, 1], shape [P, S, 3, H, W]; videos [P, S, F, 3, H, W]; audio
                [P, S, C, L].
            columns (`dict[str, Sequence]`): Columns of the dataset, P x S values each.
            state (`TrainerState`): Passed to the rewards.
        """
        prompts = columns[self._prompt_column]
        flat = recursively_apply(lambda made: made.flatten(0, 1), images)
        scores = [functions(flat, prompts, state, columns) for functions in self._kinds()]
        for functions in self._kinds():
            functions.on_rollout_end()
        of_prompts = len(unbind(images))
        rewards, *controls = (values.unflatten(0, (of_prompts, -1)) for values in scores)
        return Evaluation(rewards, controls[0] if controls else None, None)

    def needed_columns(self, dataset: Dataset) -> list[str]:
        """The columns of a dataset that are sampled with, or that a reward takes."""
        return needed_columns(dataset, self._kinds(), [self._prompt_column, *self._sampled_columns])

    def _kinds(self) -> list[RewardFunctions]:
        return [functions for functions in (self.rewards, self.controls) if functions is not None]

    def _sample_in_batches(
        self, rows: dict[str, Sequence], seeds: Sequence[int], encoded: Iterator[dict[str, Any]], **call_kwargs: Any
    ) -> Iterator[Tensor | Media]:
        """Images of some rows with a seed each, a batch at a time."""
        for number, (prompts, columns) in enumerate(self._calls(rows)):
            part = slice(number * self._batch_size, (number + 1) * self._batch_size)
            yield self._sample(prompts, seeds[part], columns, **next(encoded), **call_kwargs)

    def _calls(self, rows: dict[str, Sequence]) -> Iterator[tuple[Sequence[str], dict[str, Sequence]]]:
        """Prompts and columns of each batch that is sampled of some rows."""
        for start in range(0, len(rows[self._prompt_column]), self._batch_size):
            part = slice(start, start + self._batch_size)
            yield rows[self._prompt_column][part], {name: rows[name][part] for name in self._sampled_columns}

    def _encoded(
        self, calls: Iterable[tuple[Sequence[str], dict[str, Sequence]]], **call_kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """For each of some calls the arguments of `sample` with its embeddings, all of them made before the first is."""
        if self._encode_ahead is None:
            return itertools.repeat({})
        return iter([{"encoded": self._encode_ahead(*each, **call_kwargs)} for each in calls])

    def _with_bar(self, parts: Iterable, total: int, title: str) -> Iterable:
        disable = self._disable_tqdm or not PartialState().is_main_process
        return tqdm(parts, title, total, leave=False, disable=disable)

    def _share(self, total: int) -> list[int]:
        """This process's numbers out of [0, total): consecutive, as many for each process, wrapped around at the end."""
        processes = PartialState()
        per_process = -(-total // processes.num_processes)
        first = processes.process_index * per_process
        return [number % total for number in range(first, first + per_process)]


def needed_columns(dataset: Dataset, rewards: Sequence[RewardFunctions], others: Sequence[str]) -> list[str]:
    """The columns of a dataset that the rewards take, and `others`."""
    named = [(name, function) for each in rewards for name, function in zip(each.names, each.functions)]
    parameters = [parameter for name, function in named for parameter in parameters_of(name, function)]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    taken = {*others, *(parameter.name for parameter in parameters)}
    return [name for name in dataset.column_names if takes_all or name in taken]


def read_rows(
    dataset: Dataset, rows: Sequence[int], columns: Sequence[str], name: str = "the evaluated dataset"
) -> dict[str, list]:
    """
    Values of some rows, by column. Columns that nothing uses are not read: an image there may be damaged.

    Args:
        dataset (`datasets.Dataset`): Prompts, with their columns.
        rows (`Sequence[int]`): Numbers of the rows.
        columns (`Sequence[str]`): Columns to read; a transform of the dataset reads all.
        name (`str`): Name of the dataset in errors.

    Raises:
        ValueError: A row cannot be read.
    """
    if dataset.format["type"] != "custom":
        dataset = dataset.select_columns(list(columns))
    try:
        return dataset[list(rows)]
    except Exception as error:  # of a decoder, without the number of the row
        place = next(
            ((row, column) for row in rows for column in columns if not _is_readable(dataset, row, column)), None
        )
        if place is None:
            raise
        raise ValueError(
            f"Row {place[0]} of {name} cannot be read: its column '{place[1]}' is damaged or missing "
            f"({type(error).__name__}: {error}). Mend it, or leave the row out (`dataset.select`)."
        ) from error


def _is_readable(dataset: Dataset, row: int, column: str) -> bool:
    try:
        dataset[column][row]
    except Exception:
        return False
    return True


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """Add a note to any error raised."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(note)
        raise


def summarize(
    evaluation: Evaluation, rewards: RewardFunctions, controls: RewardFunctions | None = None
) -> dict[str, float]:
    """
    Means over the prompts, under the names of [`~trl_fdfo.metric_names`]: the images of a prompt are averaged first, then
    the prompts, in double precision and in the order of the dataset.
    """
    metrics = {}
    for kind, functions, values in ((REWARD, rewards, evaluation.rewards), (CONTROL, controls, evaluation.controls)):
        if functions is None:
            continue
        values = values.double()
        # Each image as a prompt of its own: a reward that does not apply to one of them applies to the others.
        total = functions.total(values.flatten(0, 1)[:, None]).reshape(values.shape[:2])
        metrics[kind], _, _ = _over_prompts(total.nanmean(dim=1))
        for name, value in zip(functions.names, values.unbind(dim=-1)):
            mean = part(kind, name)
            metrics[mean], metrics[deviation(mean)], metrics[standard_error(mean)] = _over_prompts(value.nanmean(dim=1))
    if evaluation.diversity is not None:
        metrics[DIVERSITY], _, metrics[standard_error(DIVERSITY)] = _over_prompts(evaluation.diversity)
    return metrics


def reported_metrics(
    rewards: RewardFunctions, controls: RewardFunctions | None = None, has_diversity: bool = False
) -> list[str]:
    """The metrics of an evaluation that can say which model is best: means of scores, and diversity."""
    names = []
    for kind, functions in ((REWARD, rewards), (CONTROL, controls)):
        if functions is not None and functions.scores:
            names += [kind, *(part(kind, name) for name in functions.scores)]
    return [*names, DIVERSITY] if has_diversity else names


def _over_prompts(values: Tensor) -> tuple[float, float, float]:
    """Mean, standard deviation and standard error of the mean of one value per prompt; NaN where there is no value."""
    estimate = Estimate.of(values.tolist())
    if estimate.mean is None:
        return math.nan, math.nan, math.nan
    # One prompt gives no error.
    error = math.nan if estimate.standard_error is None else estimate.standard_error
    return estimate.mean, error * math.sqrt(estimate.num_prompts), error
