"""Files of what moves or sounds: a video as .mp4 or animated .webp, audio as .wav."""

import wave
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import export_to_video
from PIL import Image
from torch import Tensor

from ..media import Media, Outputs, to_pil


FRAME_RATE = 16.0  # of a pipeline that does not say its own


def save_clips(sample: Tensor | Media, stem: Path, outputs: Outputs) -> list[Path]:
    """
    Write a video [F, 3, H, W], audio [C, L], or both, as files beside each other; the paths. An image has none, nor has audio
    of which `outputs` do not say the sampling rate.

    Args:
        sample (`Tensor` or [`Media`]): One sample. Videos are in [0, 1], audio in [-1, 1]: what is beyond is cut off.
        stem (`Path`): Path of the files, without the ending.
        outputs ([`Outputs`]): Their rates.
    """
    if isinstance(sample, Media):
        return [path for part in sample for path in save_clips(part, stem, outputs)]
    if sample.ndim == 2 and outputs.sampling_rate is not None:
        return [_save_wav(sample, _path(stem, ".wav"), outputs.sampling_rate)]
    if sample.ndim == 4:
        frames = to_pil(sample.detach().float().nan_to_num(0, 0, 0).clamp(0, 1))
        frame_rate = outputs.frame_rate or FRAME_RATE
        # Not by OpenCV, which diffusers would take without imageio: browsers do not play its format.
        if find_spec("imageio") and find_spec("imageio_ffmpeg"):
            return [Path(export_to_video(frames, str(_path(stem, ".mp4")), fps=frame_rate))]
        return [_save_webp(frames, _path(stem, ".webp"), frame_rate)]
    return []


def _path(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)  # `with_suffix` would take what is behind a dot in the name for an ending


def _save_webp(frames: list[Image.Image], path: Path, frame_rate: float) -> Path:
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / frame_rate), loop=0, quality=90)
    return path


def _save_wav(audio: Tensor, path: Path, sampling_rate: int) -> Path:
    values = (32767 * audio.detach().float().nan_to_num(0, 0, 0).clamp(-1, 1)).round().short()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(values))
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(values.T.contiguous().cpu().numpy().astype("<i2").tobytes())
    return path


def read_wav(path: Path) -> Tensor:
    """The audio [C, L], in [-1, 1], of a file of `save_clips`."""
    with wave.open(str(path), "rb") as file:
        values = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, file.getnchannels())
    return torch.from_numpy(values.astype(np.float32) / 32767).T
