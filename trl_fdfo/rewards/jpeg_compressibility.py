"""JPEG compressibility: the reward of DDPO (arXiv 2305.13301) that needs no model, for trying a run out."""

import io
from collections.abc import Sequence

from PIL import Image


QUALITY = 95  # of 100


def jpeg_compressibility(images: Sequence[Image.Image]) -> list[float]:
    """
    Minus the size of each image as a JPEG file of quality 95.

    Args:
        images (`Sequence[Image.Image]`): N images.

    Returns:
        `list[float]`: N sizes in kilobytes (1000 bytes), negative: higher is smaller.
    """
    return [-_jpeg_bytes(image) / 1000 for image in images]


jpeg_compressibility.image_type = "pil"


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
