"""Counting: how close the number of objects in an image is to the number that was asked for, as in arXiv 2505.05470."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .geneval import COUNTING_THRESHOLD
from .object_detector import DetectorReward


class ObjectCount(DetectorReward):
    """
    How close the number of objects is to the one asked for, 0 to 1, by Mask2Former.

    The reward is max(0, 1 - |found - count| / count) (arXiv 2505.05470). The dataset's columns `object` and `count` say
    which class of COCO is counted, and how many there should be; in rows where one is None it does not apply (None).

    Args:
        detector (`str`): As in [`DetectorReward`].
        threshold (`float`): Confidence from which an object counts. The default is GenEval's for this task.
        device, batch_size, offload, frames: As in [`LearnedReward`].

    Raises:
        OSError: The detector does not exist.
        ValueError: `threshold` is not in [0, 1). In a call and before a run: a row has an unknown class, or a count that
            is no whole number of at least 1.
    """

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        *,
        threshold: float = COUNTING_THRESHOLD,
        device: str | torch.device | None = None,
        batch_size: int = 4,
        offload: bool = False,
        frames: str = "mean",
    ):
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold} of ObjectCount is a confidence: it must be in [0, 1).")
        self.threshold = threshold
        super().__init__(detector, device=device, batch_size=batch_size, offload=offload, frames=frames)

    def __call__(
        self, images: Sequence[Any], object: Sequence[str | None], count: Sequence[int | None]
    ) -> list[float | None]:
        """Score N images, or N videos as lists of frames: N floats in [0, 1], None where it does not apply."""
        wanted = self.check_rows(object, count)
        rows = [row for row, each in enumerate(wanted) if each is not None]
        rewards: list[float | None] = [None] * len(wanted)
        if rows:
            scores = super().__call__([images[row] for row in rows], [wanted[row] for row in rows])
            for row, score in zip(rows, scores.tolist()):
                rewards[row] = score
        return rewards

    def check_rows(self, object: Sequence[str | None], count: Sequence[int | None]) -> list[tuple[int, int] | None]:
        """The number of the class and the count of N rows. Raises a ValueError, which names the row."""
        wanted = []
        for row, (name, number) in enumerate(zip(object, count)):
            if name is None or number is None:
                wanted.append(None)
                continue
            if isinstance(number, bool) or number != int(number) or number < 1:
                raise ValueError(
                    f"ObjectCount cannot read row {row}: count={number!r} must be a whole number from 1 on."
                )
            try:
                wanted.append((self.class_number(name), int(number)))
            except ValueError as error:
                raise ValueError(f"ObjectCount cannot read row {row}: {error}") from error
        return wanted

    def score(self, images: Sequence[Image.Image], wanted: Sequence[tuple[int, int]]) -> Tensor:
        found = self.detect(images, [self.threshold] * len(images))
        return torch.tensor(
            [
                max(0.0, 1 - abs(len(objects.get(label, [])) - count) / count)
                for objects, (label, count) in zip(found, wanted)
            ]
        )
