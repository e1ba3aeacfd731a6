"""JPEG compressibility and its opposite: rewards of DDPO (arXiv 2305.13301) that need no model, for a first run."""

import io
from collections.abc import Sequence

from PIL import Image

from ..media import mean_over_frames, split_frames


class JPEGCompressibility:
    """
    Minus the size of each image as a JPEG file: higher is smaller, which makes pictures plain.

    Args:
        quality (`int`): Quality of the JPEG files, from 1 to 100. DDPO (arXiv 2305.13301) uses the default.

    Raises:
        ValueError: `quality` is not a whole number from 1 to 100.
    """

    image_type = "pil"

    def __init__(self, quality: int = 95):
        # Pillow silently replaces 0 by its default and caps larger values.
        if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
            raise ValueError(f"quality={quality!r} of {type(self).__name__} must be a whole number from 1 to 100.")
        self.quality = quality

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """Minus the sizes of N images in kilobytes (1000 bytes); of N videos, lists of frames, the mean over frames."""
        counts, frames = split_frames(images)
        scores = []
        for frame in frames:
            buffer = io.BytesIO()
            frame.convert("RGB").save(buffer, format="JPEG", quality=self.quality)
            scores.append(-buffer.tell() / 1000)
        return mean_over_frames(scores, counts)


class JPEGIncompressibility(JPEGCompressibility):
    """
    The size of each image as a JPEG file: higher is larger, which makes pictures busy, or noisy.

    The argument and the error are as in [`JPEGCompressibility`].
    """

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """The sizes in kilobytes of N images, or of N videos, as in [`JPEGCompressibility`]."""
        return [-size for size in super().__call__(images)]
