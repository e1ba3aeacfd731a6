"""
GenEval (arXiv 2310.11513): whether an image shows the objects that its prompt names, in their number, colours and places.

A row of the data set says what its image must show, in the columns of GenEval's own prompts:

    tag       the task: single_object, two_object, counting, colors, position or color_attr
    include   [{"class": "dog", "count": 1, "color": "red"}, {"class": "car", "count": 1, "position": ["left of", 0]}]
    exclude   [{"class": "dog", "count": 3}]: fewer dogs than 3. None or missing: nothing

Color and position may be missing. A position is relative to the objects of that number in `include`. Both columns may be
lists, or the same as JSON.

It departs from the paper's program in the weights of its Mask2Former: it has Meta's, which transformers loads, of the same
architecture (Swin-S), data and training, and the program has those of MMDetection.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .clip_score import CLIPScore
from .object_detector import DetectedObject, DetectorReward


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

# Published with GenEval (github.com/djghosh13/geneval, MIT), like the two other numbers and the phrases below.
THRESHOLD = 0.3  # confidence of an object
COUNTING_THRESHOLD = 0.9  # in the task "counting"
TOLERANCE = 0.1  # of a position, as a part of the sizes of both objects
BACKGROUND = "#999"  # of an object whose color is asked for
PHRASES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


@dataclass(frozen=True)
class Requirement:
    """At least `count` objects of a class, with a color or a position if there is one; or, of `exclude`, fewer of them."""

    name: str
    label: int  # number of the class
    count: int
    color: str | None = None
    relation: str | None = None
    target: int | None = None  # number of the requirement whose objects the relation is to


@dataclass(frozen=True)
class Task:
    """What an image must show."""

    tag: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...]


class GenEval(DetectorReward):
    """
    GenEval (arXiv 2310.11513): the share of what the prompt asks for that the image shows, 0 to 1.

    The share is the mean over the parts of all requirements: the share of the objects that are there; of those that have
    the color; of pairs that have the position; and, of what is excluded, the number that is allowed by the number found.
    It is 1 exactly where GenEval calls an image correct, and `strict=True` gives GenEval's own 0 or 1. Flow-GRPO
    (arXiv 2505.05470) trains on such a share too, which also falls with every object more than asked for, in all tasks.

    An object counts from a confidence of 0.3, in the task "counting" of 0.9. Mask2Former finds the objects. CLIP tells the
    color of an object, in front of gray, among ten. An object is left of another if its middle is, by more than a tenth of
    the sizes of both, and by more to the left than half the distance.

    Args:
        detector (`str`): As in [`DetectorReward`].
        clip (`str`): Hub id or folder of a [`~transformers.CLIPModel`] with its processor.
        strict (`bool`): 1 if all requirements are met, otherwise 0: for evaluations.
        device, batch_size, offload, frames: As in [`LearnedReward`].

    Raises:
        OSError: A model does not exist.
        ValueError: In a call and before a run: a row has another form, or an unknown class, color, relation or task.
    """

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        *,
        strict: bool = False,
        device: str | torch.device | None = None,
        batch_size: int = 4,
        offload: bool = False,
        frames: str = "mean",
    ):
        self.strict = strict
        self.clip = CLIPScore(clip, device=device, offload=offload)
        self._colors: dict[str, Tensor] = {}
        super().__init__(detector, device=device, batch_size=batch_size, offload=offload, frames=frames)

    def __call__(
        self,
        images: Sequence[Any],
        tag: Sequence[str],
        include: Sequence[Any],
        exclude: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score N images, or N videos as lists of frames: float32 on the CPU, shape [N], in [0, 1]."""
        return super().__call__(images, self.check_rows(tag, include, exclude))

    def check_rows(
        self, tag: Sequence[str], include: Sequence[Any], exclude: Sequence[Any] | None = None
    ) -> list[Task]:
        """Read the columns of N rows. Raises a ValueError, which names the row, if a row cannot be read."""
        tasks = []
        for row, columns in enumerate(zip(tag, include, exclude if exclude is not None else [None] * len(tag))):
            try:
                tasks.append(self._task(*columns))
            except ValueError as error:
                raise ValueError(f"GenEval cannot read row {row}: {error}") from error
        return tasks

    def score(self, images: Sequence[Image.Image], tasks: Sequence[Task]) -> Tensor:
        thresholds = [COUNTING_THRESHOLD if task.tag == "counting" else THRESHOLD for task in tasks]
        scores = []
        for image, task, objects in zip(images, tasks, self.detect(images, thresholds)):
            parts = self._parts(image, task, objects)
            scores.append(float(min(parts) == 1) if self.strict else sum(parts) / len(parts))
        return torch.tensor(scores)

    def on_rollout_end(self) -> None:
        super().on_rollout_end()
        self.clip.on_rollout_end()

    def _parts(self, image: Image.Image, task: Task, objects: dict[int, list[DetectedObject]]) -> list[float]:
        """How far each part of each requirement is met, in [0, 1]."""
        # The color and the position of the most confident objects count.
        groups = [objects.get(required.label, [])[: required.count] for required in task.include]
        parts = []
        for required, group in zip(task.include, groups):
            parts.append(len(group) / required.count)
            if required.color is not None:
                colors = self._colors_of(image, group, required.name)
                parts.append(colors.count(required.color) / required.count)
            if required.relation is not None:
                target = groups[required.target]
                complete = len(group) == required.count and len(target) == task.include[required.target].count
                pairs = [required.relation in relations(a.box, b.box) for a in group for b in target]
                parts.append(sum(pairs) / len(pairs) if complete else 0.0)
        for excluded in task.exclude:
            count = len(objects.get(excluded.label, []))
            parts.append(1.0 if count < excluded.count else (excluded.count - 1) / count)
        return parts

    def _colors_of(self, image: Image.Image, objects: Sequence[DetectedObject], name: str) -> list[str]:
        """The color of each object, which CLIP sees alone in front of gray."""
        if not objects:
            return []
        gray = Image.new("RGB", image.size, BACKGROUND)
        crops = [
            Image.composite(image.convert("RGB"), gray, Image.fromarray(each.mask.numpy())).crop(each.box)
            for each in objects
        ]
        if name not in self._colors:
            phrases = [phrase.format(color=color, name=name) for color in COLORS for phrase in PHRASES]
            embedded = self.clip.in_batches(self.clip.embed_prompts, phrases)
            self._colors[name] = normalize(embedded.unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        likeness = self.clip.in_batches(self.clip.embed_images, crops) @ self._colors[name].T
        return [COLORS[number] for number in likeness.argmax(dim=-1).tolist()]

    def _task(self, tag: Any, include: Any, exclude: Any) -> Task:
        if tag not in TASKS:
            raise ValueError(f"tag={tag!r} is no task: it must be one of {', '.join(TASKS)}.")
        include, exclude = _clauses(include, "include"), _clauses(exclude, "exclude")
        if not include + exclude:
            raise ValueError("include and exclude are empty, so that nothing is asked for.")
        task = Task(tag, *(tuple(map(self._requirement, clauses)) for clauses in (include, exclude)))
        for number, required in enumerate(task.include):
            if required.target is not None and not 0 <= required.target < len(include) or required.target == number:
                raise ValueError(
                    f"the position of {required.name!r} is relative to the clause {required.target}, and include has "
                    f"others from 0 to {len(include) - 1}."
                )
        return task

    def _requirement(self, clause: dict[str, Any]) -> Requirement:
        name, count = clause.get("class"), clause.get("count")
        color, position = clause.get("color"), clause.get("position")
        label = self.class_number(name)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"the count of {name!r} is {count!r}: it must be a whole number of at least 1.")
        if color is not None and color not in COLORS:
            raise ValueError(f"{color!r} is no color that is told apart: it must be one of {', '.join(COLORS)}.")
        if position is None:
            return Requirement(name, label, count, color)
        try:
            relation, target = position
            target = int(target)
        except (TypeError, ValueError):
            relation, target = None, None
        if relation not in RELATIONS:
            raise ValueError(
                f"the position of {name!r} is {position!r}: it must be one of {', '.join(RELATIONS)}, and the number of a "
                'clause of include, such as ["left of", 0].'
            )
        return Requirement(name, label, count, color, relation, target)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The positions of a box (left, top, right, bottom) relative to another: up to two of `RELATIONS`."""
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = box, other
    offset = torch.tensor([left + right - other_left - other_right, top + bottom - other_top - other_bottom]) / 2
    sizes = torch.tensor([right - left + other_right - other_left, bottom - top + other_bottom - other_top])
    beyond = (offset.abs() - TOLERANCE * sizes).clamp(min=0) * offset.sign()
    if beyond.abs().max() < 1e-3:
        return set()
    x, y = (beyond / offset.norm()).tolist()
    met = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, is_met in met.items() if is_met}


def _clauses(value: Any, column: str) -> list[dict[str, Any]]:
    """The clauses of a cell: a list of dicts, the same as JSON, or None."""
    if isinstance(value, str):
        try:
            clauses = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{column}={value!r} is no JSON ({error}).") from error
    else:
        clauses = value
    clauses = [] if clauses is None else clauses
    if not isinstance(clauses, list) or not all(isinstance(clause, dict) for clause in clauses):
        raise ValueError(
            f'{column}={value!r} must be a list of clauses such as {{"class": "dog", "count": 1}}, or the same as JSON.'
        )
    return clauses
