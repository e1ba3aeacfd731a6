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
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): N images, or N videos as lists of frames. A video scores the mean over
                its frames.

        Returns:
            `list[float]`: N sizes in kilobytes (1000 bytes), negative.
        """
        counts, frames = split_frames(images)
        return mean_over_frames([-self._kilobytes(frame) for frame in frames], counts)

    def _kilobytes(self, image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class JPEGIncompressibility(JPEGCompressibility):
    """
    The size of each image as a JPEG file: higher is larger, which makes pictures busy, or noisy.

    The argument and the error are as in [`JPEGCompressibility`].
    """

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): As in [`JPEGCompressibility`].

        Returns:
            `list[float]`: N sizes in kilobytes (1000 bytes).
        """
        return [-size for size in super().__call__(images)]
