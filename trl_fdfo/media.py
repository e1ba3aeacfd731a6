"""
The layout of images and videos.

Tensors hold floats in [0, 1]. N samples, or P prompts with S samples each; F frames:

    one image        [3, H, W]             one video         [F, 3, H, W]
    N images         [N, 3, H, W]          N videos          [N, F, 3, H, W]
    P prompts        [P, S, 3, H, W]       P prompts         [P, S, F, 3, H, W]

In PIL, a video is a list of frames. The score of a video is the mean over its frames.
"""

import inspect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


def makes_video(pipeline: DiffusionPipeline) -> bool:
    """True if the pipeline makes videos: its call takes a number of frames."""
    return "num_frames" in inspect.signature(pipeline.__call__).parameters


def to_pil(images: Tensor) -> list:
    """Images [N, 3, H, W] as N PIL images; videos [N, F, 3, H, W] as N lists of F frames."""
    if images.ndim == 5:
        return [to_pil(frames) for frames in images]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))


def unbind_frames(images: Tensor) -> tuple[Tensor, ...]:
    """Videos [P, S, F, 3, H, W] as F tensors of images [P, S, 3, H, W]; such images as one tensor."""
    return images.unbind(dim=2) if images.ndim == 6 else (images,)


def middle_frame(images: Tensor) -> Tensor:
    """Images [P, S, 3, H, W] unchanged; of videos [P, S, F, 3, H, W] the frame in the middle, [P, S, 3, H, W]."""
    frames = unbind_frames(images)
    return frames[len(frames) // 2]


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` places out of `count`."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def spread_frames(sample: Tensor, most: int) -> list[Tensor]:
    """An image [3, H, W] as a list of one; of a video [F, 3, H, W] at most `most` evenly spread frames [3, H, W]."""
    return [sample] if sample.ndim == 3 else [sample[place] for place in evenly_spread(len(sample), most)]


def split_frames(images: Sequence, *columns: Iterable) -> tuple[list, ...]:
    """
    Put the frames of N PIL images or videos in one row, for a score of single images; `mean_over_frames` then averages
    each video. An image is a video of one frame.

    Returns:
        `tuple`: Number of frames of each sample; all frames; and each of the columns, such as the prompts, with its N
        values repeated for every frame.
    """
    videos = [image if isinstance(image, (list, tuple)) else [image] for image in images]
    repeated = ([value for value, video in zip(column, videos) for _ in video] for column in columns)
    return [len(video) for video in videos], [frame for video in videos for frame in video], *repeated


def mean_over_frames(scores: Any, counts: Sequence[int]) -> Any:
    """
    Average the scores (or vectors) of the frames that `split_frames` has put in one row, by the numbers of frames: a
    tensor, or a list that has None for a video if one of its frames has None.
    """
    if isinstance(scores, Tensor):
        return torch.stack([frames.mean(dim=0) for frames in scores.split(counts)])
    rest = iter(scores)
    videos = [list(itertools.islice(rest, count)) for count in counts]
    return [None if None in frames else sum(frames) / len(frames) for frames in videos]
