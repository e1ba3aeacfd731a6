"""JPEG compressibility and its opposite: rewards of DDPO (arXiv 2305.13301) that need no model, for a first run."""

import io
from collections.abc import Sequence

from PIL import Image

from ..media import checked_frames, over_frames, split_frames


class JPEGCompressibility:
    """
    Minus the size of each image as a JPEG file: higher is smaller, which makes pictures plain.

    Args:
        quality (`int`): Quality of the JPEG files, from 1 to 100. DDPO (arXiv 2305.13301) uses the default.
        frames (`str`): A video scores the `"mean"` over its frames, or that of its worst one, `"min"`.

    Raises:
        ValueError: `quality` is not a whole number from 1 to 100, or `frames` is something else.
    """

    image_type = "pil"
    _sign = -1

    def __init__(self, quality: int = 95, frames: str = "mean"):
        # Pillow silently replaces 0 by its default and caps larger values.
        if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
            raise ValueError(f"quality={quality!r} of {type(self).__name__} must be a whole number from 1 to 100.")
        self.quality = quality
        self.frames = checked_frames(frames, type(self).__name__)

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """Scores of N images, or of N videos as lists of frames: sizes in kilobytes (1000 bytes), with the sign of the class."""
        counts, frames = split_frames(images)
        scores = []
        for frame in frames:
            buffer = io.BytesIO()
            frame.convert("RGB").save(buffer, format="JPEG", quality=self.quality)
            scores.append(self._sign * buffer.tell() / 1000)
        return over_frames(scores, counts, self.frames)


class JPEGIncompressibility(JPEGCompressibility):
    """
    The size of each image as a JPEG file: higher is larger, which makes pictures busy, or noisy.

    The arguments and the errors are as in [`JPEGCompressibility`].
    """

    _sign = 1
