"""JPEG compressibility and its opposite: rewards of DDPO (arXiv 2305.13301) that need no model, for trying a run out."""

import io
from collections.abc import Sequence

from PIL import Image


class JPEGCompressibility:
    """
    Minus the size of each image as a JPEG file: higher is smaller, which makes pictures plain.

    Args:
        quality (`int`): Quality of the JPEG files, from 1 to 100. The default is that of DDPO (arXiv 2305.13301).

    Raises:
        ValueError: `quality` is none of 1 to 100.
    """

    image_type = "pil"

    def __init__(self, quality: int = 95):
        # Pillow takes 0 for "the default" and cuts off what is larger, without a word.
        if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
            raise ValueError(f"quality={quality!r} of {type(self).__name__} must be a whole number from 1 to 100.")
        self.quality = quality

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): N images, or N videos as lists of frames, each scored by the mean over
                its frames.

        Returns:
            `list[float]`: N sizes in kilobytes (1000 bytes), negative.
        """
        return [-self._kilobytes(image) for image in images]

    def _kilobytes(self, image: Image.Image | Sequence[Image.Image]) -> float:
        if isinstance(image, (list, tuple)):
            return sum(self._kilobytes(frame) for frame in image) / len(image)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class JPEGIncompressibility(JPEGCompressibility):
    """
    The size of each image as a JPEG file: higher is larger, which makes pictures busy, or noisy.

    Args:
        quality (`int`): Quality of the JPEG files, from 1 to 100.

    Raises:
        ValueError: `quality` is none of 1 to 100.
    """

    def __call__(self, images: Sequence[Image.Image]) -> list[float]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): As for [`JPEGCompressibility`].

        Returns:
            `list[float]`: N sizes in kilobytes (1000 bytes).
        """
        return [self._kilobytes(image) for image in images]
