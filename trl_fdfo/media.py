"""
The layout of what a pipeline makes: images, videos, audio.

Tensors of images and videos hold floats in [0, 1], those of audio floats of about -1 to 1. N samples, or P prompts with S
samples each; F frames; C channels of L values:

    one image        [3, H, W]             one video         [F, 3, H, W]             one sound         [C, L]
    N images         [N, 3, H, W]          N videos          [N, F, 3, H, W]          N sounds          [N, C, L]
    P prompts        [P, S, 3, H, W]       P prompts         [P, S, F, 3, H, W]       P prompts         [P, S, C, L]

So the number of axes says what a tensor is. A pipeline that makes one of them gives its tensor; one that makes both, such
as videos with their sound, gives a [`Media`]: Accelerate's `recursively_apply`, `concatenate` and `gather` take either.

In PIL, a video is a list of frames.
"""

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor


class Media(NamedTuple):
    """Images (or videos) and audio of the same samples, from a pipeline that makes both."""

    images: Tensor
    audio: Tensor


def made_by(output: Iterable[Any]) -> Tensor | Media:
    """
    What a pipeline made, in float32.

    Args:
        output (`Iterable`): The tuple that its call returned. A list of tensors or arrays of one shape counts as a tensor. The
            first tensor of 4 or 5 axes holds images or videos (transparent ones are laid on white), the first of 2 or 3
            audio; audio [N, L] has one channel.

    Returns:
        `Tensor` or [`Media`]: Images [N, 3, H, W], videos [N, F, 3, H, W] or audio [N, C, L]; both if there are both.

    Raises:
        ValueError: There is neither.
    """
    tensors = [tensor for tensor in map(_as_tensor, output) if tensor is not None]
    images = next((_on_white(tensor.float()) for tensor in tensors if tensor.ndim in (4, 5)), None)
    audio = next((tensor.float() for tensor in tensors if tensor.ndim in (2, 3)), None)
    if audio is not None and audio.ndim == 2:
        audio = audio[:, None]
    if images is None and audio is None:
        shown = [f"{type(part).__name__} {list(getattr(part, 'shape', ()))}" for part in output]
        raise ValueError(
            f"the call returned {', '.join(shown) or 'nothing'}, and a reward needs a tensor: images [N, 3, H, W], videos "
            "[N, F, 3, H, W] or audio [N, C, samples]. Samples of different sizes cannot be in one: let the call fix the size."
        )
    if images is not None and audio is not None:
        return Media(images, audio)
    return audio if images is None else images


def names_image(value: object) -> bool:
    """Tell if a value is text that ends as the name of an image file does, such as ".png"."""
    return isinstance(value, str) and Path(value).suffix.lower() in Image.registered_extensions()


def images_are_signed(made: Tensor | Media) -> bool:
    """Tell if images or videos are in [-1, 1]: a pipeline has not put them into [0, 1]."""
    images = by_kind(made).get("images")
    return images is not None and bool(images.min() < 0)


def unsigned(made: Tensor | Media) -> Tensor | Media:
    """Images or videos in [-1, 1], put into [0, 1]; their audio as it is."""
    if isinstance(made, Media):
        return Media(unsigned(made.images), made.audio)
    return made.div(2).add(0.5).clamp(0, 1)


def _on_white(images: Tensor) -> Tensor:
    """
    Images or videos of 4 channels, the last of which is opacity, with 3 channels; others as they are. Channels that come last
    come before height and width.
    """
    if images.shape[-1] == 3 != images.shape[-3]:
        images = images.movedim(-1, -3)
    if images.shape[-3] != 4:
        return images
    colors, opacity = images.split([3, 1], dim=-3)
    return opacity * colors + (1 - opacity)


def _as_tensor(value: Any) -> Tensor | None:
    """A tensor or array, or a list of them that have one shape, as a tensor; None for anything else."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, (list, tuple)):
        parts = [_as_tensor(part) for part in value]
        is_one = parts and all(part is not None and part.shape == parts[0].shape for part in parts)
        return torch.stack(parts) if is_one else None
    return value if isinstance(value, Tensor) else None


def by_kind(made: Tensor | Media) -> dict[str, Tensor]:
    """N samples by the names that rewards take them by: "images" for both images and videos, "videos", "audio"."""
    if isinstance(made, Media):
        return by_kind(made.images) | by_kind(made.audio)
    if made.ndim == 3:
        return {"audio": made}
    return {"images": made, "videos": made} if made.ndim == 5 else {"images": made}


def unbind(made: Tensor | Media) -> list:
    """The samples of N, or the prompts of P: a list of tensors or of [`Media`]."""
    if isinstance(made, Media):
        return [Media(*pair) for pair in zip(*made)]
    return list(made)


class Outputs(NamedTuple):
    """
    What the calls of a pipeline make.

    Attributes:
        kinds (`tuple[str]`): Names of [`by_kind`].
        frame_rate (`float`, *optional*): Frames of a video per second. None if the call has no such argument.
        sampling_rate (`int`, *optional*): Values of audio per second and channel, in hertz. None if no part says so.
    """

    kinds: tuple[str, ...] = ("images",)
    frame_rate: float | None = None
    sampling_rate: int | None = None

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any], made: Tensor | Media) -> "Outputs":
        """Describe a pipeline that is called with `call_kwargs`, by what one call `made`."""
        kinds = tuple(by_kind(made))
        return cls(
            kinds,
            frame_rate(pipeline, call_kwargs) if "videos" in kinds else None,
            sampling_rate(pipeline) if "audio" in kinds else None,
        )


def frame_rate(pipeline: DiffusionPipeline, call_kwargs: Mapping[str, Any]) -> float | None:
    """Frames per second: the argument `frame_rate` or `fps` of the pipeline's call, or its default."""
    parameters = inspect.signature(pipeline.__call__).parameters
    for name in ("frame_rate", "fps"):
        if name in parameters:
            given = call_kwargs.get(name)
            given = parameters[name].default if given is None else given
            return given if isinstance(given, (int, float)) else None
    return None


def sampling_rate(pipeline: DiffusionPipeline) -> int | None:
    """
    Values per second of the audio that a pipeline makes, in hertz: from the config of the part that makes it, a vocoder if
    there is one, otherwise the VAE; or an attribute of the pipeline.
    """
    named = [part for kind in ("vocoder", "vae") for name, part in pipeline.components.items() if kind in name]
    for part in (*(getattr(part, "config", None) for part in named), pipeline):
        for name in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            rate = getattr(part, name, None)
            if isinstance(rate, (int, float)):
                return int(rate)
    return None


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
    Put the frames of N images or videos in one row, for a score of single images; `over_frames` then makes one score of each
    video. An image is a video of one frame. They are in PIL, or tensors [3, H, W] and [F, 3, H, W].

    Returns:
        `tuple`: Number of frames of each sample; all frames; and each of the columns, such as the prompts, with its N
        values repeated for every frame.
    """
    is_video = lambda image: isinstance(image, (list, tuple)) or (isinstance(image, Tensor) and image.ndim == 4)
    videos = [list(image) if is_video(image) else [image] for image in images]
    repeated = ([value for value, video in zip(column, videos) for _ in video] for column in columns)
    return [len(video) for video in videos], [frame for video in videos for frame in video], *repeated


def checked_frames(frames: str, owner: str) -> str:
    """The option `frames` of a reward of single frames; a ValueError, which names the owner, if it is none."""
    if frames not in ("mean", "min"):
        raise ValueError(
            f"frames={frames!r} of {owner}: a video scores the 'mean' over its frames, or 'min', the score of its worst frame."
        )
    return frames


def over_frames(scores: Any, counts: Sequence[int], frames: str = "mean") -> Any:
    """
    The mean or the minimum of the scores of the frames that `split_frames` has put in one row, by the numbers of frames: a
    tensor, or a list that has None for a video if one of its frames has None.
    """
    if isinstance(scores, Tensor):
        return torch.stack(
            [part.mean(dim=0) if frames == "mean" else part.amin(dim=0) for part in scores.split(counts)]
        )
    rest = iter(scores)
    videos = [list(itertools.islice(rest, count)) for count in counts]
    total = min if frames == "min" else lambda video: sum(video) / len(video)
    return [None if None in video else total(video) for video in videos]
