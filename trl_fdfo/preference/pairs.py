"""Names of images and pairs by their content: the same pair has the same name in a run that was killed and resumed."""

import hashlib
import io
import json
from typing import Any


def image_id(png: bytes) -> str:
    """The SHA-256 of a PNG file, 64 hexadecimal digits."""
    return hashlib.sha256(png).hexdigest()


def pair_key(prompt: str, one: str, other: str) -> str:
    """The SHA-256 of a prompt and the ids of two images, in any order."""
    return hashlib.sha256(json.dumps([prompt, *sorted((one, other))]).encode()).hexdigest()


def as_png(images: Any, frame_rate: float | None = None) -> bytes:
    """A PNG file of a PIL image, or an animated one of a list of them."""
    # Pillow keeps the options of a save in the image, and another thread may be saving the same one.
    frames = [frame.copy() for frame in (images if isinstance(images, (list, tuple)) else [images])]
    buffer, options = io.BytesIO(), {}
    if len(frames) > 1:
        options = {"save_all": True, "append_images": frames[1:], "duration": 1000 / (frame_rate or 8), "loop": 0}
    frames[0].save(buffer, "PNG", **options)
    return buffer.getvalue()
