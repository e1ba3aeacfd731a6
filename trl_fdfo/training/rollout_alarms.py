"""
Alarms of rollouts: signs that a reward is being hacked, in what a rollout makes anyway. They need no control reward and no
evaluation, and never end a run. docs/troubleshooting.md says what to do, benchmarks/alarms.py how they were calibrated.

A sign is a metric of the rollouts that a hacked reward moves, of which the means over the first and the last `WINDOW` logs
are compared. A move raises an alarm, once in a run, if it is both relevant and more than chance:

    |last - first|  >  max(|change| first,  MIN_ERRORS sqrt(se_first^2 + se_last^2))

se is the standard error of a mean over its logs: rollouts have other prompts each time. All values stand in the logs, and so
in each checkpoint: a resumed run compares with the same first logs.

Dimensions: N images of P prompts, F frames.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate
from transformers import TrainerCallback
from transformers.utils import logging

from ..media import by_kind, evenly_spread
from ..pipeline.records import RolloutBatch


logger = logging.get_logger(__name__)

VELOCITY, HIGH_FREQUENCY, SATURATION, CONTRAST = "velocity_rms", "high_frequency", "saturation", "contrast"
PROMPT_DISTANCE = "prompt_distance"
# The columns of `traits` before the thumbnails.
_COLUMNS = (VELOCITY, HIGH_FREQUENCY, SATURATION, CONTRAST)

WINDOW = 5  # logs: a single rollout is too noisy, and a hack of the demo's pipeline takes ten or more
# Not 2, as an evaluation's alarms: each rollout asks anew, of several signs, and an error of 5 logs is rough.
MIN_ERRORS = 4
MOST_FRAMES = 4  # of a video: neighbouring frames say the same
THUMBNAIL = 8  # pixels: layout and colours of an image, without its details
PIXELS_AT_A_TIME = 2**22  # 50 MB in float32, however large a batch is


class Sign(NamedTuple):
    """
    Attributes:
        metric (`str`): A metric of the rollouts, >= 0.
        change (`float`): The relative change that raises an alarm: a fall if it is negative.
        meaning (`str`): What the change usually means.
    """

    metric: str
    change: float
    meaning: str


# Well beyond what any honest run of benchmarks/results/alarms.md moves, except for the velocity: to paint what
# the prompt says changes images too. Hacked runs there move several of these at a time.
SIGNS = (
    # arXiv 2606.27771 finds 5 to 15% where images have become worse, but the demo's honest runs with AWM reach 17%.
    Sign(VELOCITY, 0.2, "the updates inflate the velocity, which shows as oversaturated and oversharpened images"),
    Sign(HIGH_FREQUENCY, 0.5, "the reward likes noise, grids or oversharpened edges"),
    Sign(SATURATION, 0.6, "the reward likes loud colours"),
    Sign(SATURATION, -0.5, "the reward likes images without colour"),
    Sign(CONTRAST, 0.6, "the reward likes black and white without anything between"),
    Sign(CONTRAST, -0.4, "the reward likes images without content, of one tone"),
    # Honest runs lose less than a tenth.
    Sign(PROMPT_DISTANCE, -0.3, "the images of all prompts become alike, as the reward does not ask for the prompt"),
)


# The metrics ----------------------------------------------------------------------------------------------------------


def traits(sampled: RolloutBatch) -> Tensor:
    """
    What the signs need of some batches with images: a row per prompt, the mean over its images, in float32.

    Returns:
        `Tensor`: `[P, 4 + 192]`: the rms of the velocity, what `image_traits` returns; `[P, 1]`, the first of them, if
            the pipeline makes audio alone.
    """
    columns = [sampled.velocity_rms[:, None]]
    images = by_kind(sampled.images).get("images")
    if images is not None:
        videos = images if images.ndim == 5 else images[:, None]
        frames = videos[:, evenly_spread(videos.shape[1], MOST_FRAMES)]  # [N, F, 3, H, W]
        at_a_time = max(1, PIXELS_AT_A_TIME // frames[0, :, 0].numel())
        rows = [
            image_traits(part.flatten(0, 1)).unflatten(0, part.shape[:2]).mean(dim=1)
            for part in frames.split(at_a_time)
        ]
        columns.append(torch.cat(rows).to(sampled.velocity_rms.device))
    return torch.cat(columns, dim=1).unflatten(0, sampled.endpoints.shape[:2]).mean(dim=1)


def image_traits(images: Tensor) -> Tensor:
    """
    Measure images, floats in [0, 1], shape [N, 3, H, W].

    Returns:
        `Tensor`: `[N, 3 + 192]`: high frequency, the mean distance of a value from the mean of its block of 2 x 2 pixels, 0 to
            0.5 (not an rms, in which few sharp edges outweigh noise everywhere); saturation, the mean difference between the
            largest and the smallest channel of a pixel, 0 to 1; contrast, the standard deviation of the mean of the
            channels, 0 to 0.5; a thumbnail of 8 x 8 pixels.
    """
    images = images.float()
    means = avg_pool2d(images, 2)
    height, width = (2 * size for size in means.shape[-2:])
    details = images[..., :height, :width] - interpolate(means, scale_factor=2)
    red, green, blue = images.unbind(dim=1)
    saturation = torch.maximum(torch.maximum(red, green), blue) - torch.minimum(torch.minimum(red, green), blue)
    gray = ((red + green + blue) / 3).flatten(1)
    contrast = (gray - gray.mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt()
    columns = [details.abs().flatten(1).mean(dim=1), saturation.flatten(1).mean(dim=1), contrast]
    return torch.cat([torch.stack(columns, dim=1), adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)], dim=1)


def signs(traits: Tensor) -> dict[str, Tensor]:
    """
    The metrics of a rollout, from the `traits` of all its prompts: their means, and `prompt_distance`, the rms distance of
    a prompt's thumbnail from the mean of all thumbnails, 0 to 0.5.
    """
    values = dict(zip(_COLUMNS, traits.mean(dim=0)))
    thumbnails = traits[:, len(_COLUMNS) :]
    if thumbnails.shape[1]:
        values[PROMPT_DISTANCE] = thumbnails.var(dim=0, correction=0).mean().sqrt()
    return values


# The alarms -----------------------------------------------------------------------------------------------------------


def is_raised(sign: Sign, first: Sequence[float], last: Sequence[float]) -> bool:
    """Tell if the metric has moved from its first `WINDOW` values to its last by more than the sign allows, and chance."""
    before, after = np.mean(first), np.mean(last)
    error = math.hypot(np.std(first, ddof=1), np.std(last, ddof=1)) / math.sqrt(WINDOW)
    moved = math.copysign(1, sign.change) * (after - before)
    return bool(moved > abs(sign.change) * before and moved > MIN_ERRORS * error)  # False if a value is NaN


class RolloutAlarms(TrainerCallback):
    """Warns, once in a run for each of `SIGNS`, at the first log in which it shows."""

    def __init__(self):
        self._raised: set[Sign] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        # What the run has said before its checkpoint, it does not say again.
        self._raised = {sign for sign in SIGNS if raised_at(sign, _logged(state, sign)) is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for sign in SIGNS:
            if sign in self._raised or sign.metric not in (logs or {}):
                continue
            values = _logged(state, sign)
            if len(values) >= 2 * WINDOW and is_raised(sign, values[:WINDOW], values[-WINDOW:]):
                self._raised.add(sign)
                if state.is_world_process_zero:
                    rollout = state.global_step / args.steps_per_rollout
                    logger.warning(message(sign, values, rollout, args.smaller_updates))


def raised_at(sign: Sign, values: Sequence[float]) -> int | None:
    """How many of a run's logged values it takes to raise the alarm; None if all of them do not."""
    ends = range(2 * WINDOW, len(values) + 1)
    return next((end for end in ends if is_raised(sign, values[:WINDOW], values[end - WINDOW : end])), None)


def message(sign: Sign, values: Sequence[float], rollout: float, smaller_updates: str) -> str:
    before, after = np.mean(values[:WINDOW]), np.mean(values[-WINDOW:])
    return (
        f"Alarm after rollout {rollout:g}: {sign.metric} {'rose' if sign.change > 0 else 'fell'} from {before:.3g} (mean of the "
        f"first {WINDOW} logs) to {after:.3g} (of the last {WINDOW}), by more than {abs(sign.change):.0%}, which usually means "
        f"that {sign.meaning}. If the sheets in pictures/ show it, go back to an earlier checkpoint with "
        f"{smaller_updates}, or add a reward that dislikes it."
    )


def _logged(state, sign: Sign) -> list[float]:
    return [log[sign.metric] for log in state.log_history if sign.metric in log]
