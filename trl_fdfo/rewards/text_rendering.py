"""Text rendering: the agreement of the text in an image with the requested text, by OCR, as in arXiv 2505.05470."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..media import checked_frames, over_frames, split_frames


class TextRendering:
    """
    Agreement of the text in an image with the requested text, in [0, 1], read by OCR on the CPU.

    The reward is 1 - edit distance / length of the text (arXiv 2505.05470). The requested text stands in the prompt in
    double quotes, straight or typographic, as in `A shop window with the words "open late"`; several quotes are joined.
    A dataset column `text` takes precedence, except in rows where it is None or only repeats the prompt. Without a
    requested text the reward does not apply (None).

    - Letters, digits and punctuation are compared, in reading order. Case and whitespace do not count, so the text may
      be broken into lines anywhere.
    - A missing, a wrong and an additional character cost 1 / length each. Unlike in the paper, unrelated text boxes are
      free: otherwise a poster in the background would make a well-written sign worth nothing. Gibberish gains little by
      that: about 0.2 for ten words of random letters.
    - The OCR's best guess counts at any confidence, so that there is a slope from scribble to letters.

    The OCR is PP-OCRv6 (small), part of the package `rapidocr` (`pip install 'trl_fdfo[ocr]'`): nothing is downloaded.
    It reads Latin, Greek, Chinese and Japanese, also in malformed letters: combine it with a reward for quality.

    Args:
        frames (`str`): A video scores the `"mean"` over its frames, or that of its worst one, `"min"`.

    Raises:
        ImportError: `rapidocr` or `onnxruntime` is missing.
        ValueError: `frames` is something else.
    """

    image_type = "pil"
    background = True

    def __init__(self, frames: str = "mean"):
        self.frames = checked_frames(frames, type(self).__name__)
        try:
            import onnxruntime  # noqa: F401  # rapidocr itself imports it only at the first image
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("TextRendering needs rapidocr and onnxruntime: pip install 'trl_fdfo[ocr]'.") from error
        self._ocr = RapidOCR(
            params={
                # Log neither a line per model nor a warning per image without text.
                "Global.log_level": "error",
                # Do not read text that is upside down.
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                # Shrink larger images to 736 pixels to detect text; letters are read at full size. By default, smaller
                # images are enlarged to 736 pixels, at twice the cost, and the small print of large images is missed.
                "Det.limit_type": "max",
                "Det.limit_side_len": 736,
                # More threads make these small models no faster, and each process of a node would start as many.
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], text: Sequence[str | None] | None = None
    ) -> list[float | None]:
        """
        Rewards of N images, or of N videos as lists of frames: in [0, 1], or None if no text
        is requested. The column `text` has N requested texts.

        Raises:
            ValueError: A requested text is not a string.
        """
        targets = map(_target, prompts, text if text is not None else [None] * len(prompts))
        counts, frames, targets = split_frames(images, targets)
        scores = [self._score(frame, target) if target else None for frame, target in zip(frames, targets)]
        return over_frames(scores, counts, self.frames)

    def _score(self, image: Image.Image, target: str) -> float:
        result = self._ocr(image)
        boxes = [_normalized(result.txts[n]) for n in _reading_order(result.boxes)] if result.txts else []
        return 1 - _edit_distance(boxes, target) / len(target)


def _target(prompt: str, text: str | None) -> str:
    """The requested text, normalized; "" if there is none."""
    if text is None or text == prompt:
        text = " ".join(re.findall(f"(?<!\\d){_QUOTE}(.*?){_QUOTE}", prompt, re.DOTALL))
    elif not isinstance(text, str):
        raise ValueError(
            f"TextRendering got text={text!r}, a {type(text).__name__}, for the prompt {prompt!r}: the column 'text' must "
            "hold strings, the text that the image is to show, or None."
        )
    return _normalized(text)


# An opening quote does not follow a digit: behind a digit, the sign means inches.
_QUOTE = '["“”„«»]'

# OCR hardly tells these characters apart.
_LOOKALIKES = str.maketrans("‘’“”„–—", '\'\'"""--')


def _normalized(text: str) -> str:
    """Remove case and whitespace, and the widths and styles that Unicode has of the same character."""
    text = unicodedata.normalize("NFKC", text.translate(_LOOKALIKES))
    return "".join(text.casefold().split())


def _reading_order(boxes: np.ndarray) -> list[int]:
    """
    Sort N boxes, corners (x, y) of shape [N, 4, 2], line by line from the top, each line from the left. Boxes share a
    line if their middles are closer than half the larger height.
    """
    left, top = boxes.min(axis=1).T
    height = boxes[..., 1].max(axis=1) - top
    middle = top + height / 2
    lines = []
    for n in np.argsort(middle):
        first = lines[-1][0] if lines else None
        if first is None or middle[n] - middle[first] >= max(height[n], height[first]) / 2:
            lines.append([])
        lines[-1].append(n)
    return [n for line in lines for n in sorted(line, key=lambda n: left[n])]


def _edit_distance(boxes: Sequence[str], target: str) -> int:
    """Levenshtein distance of `target` to the closest text that a subset of the boxes forms in their order."""
    # row[i] is the distance of the first i characters of the target to the boxes so far.
    row = list(range(len(target) + 1))
    for box in boxes:
        without = row
        for character in box:
            above, row = row, [row[0] + 1]
            for i, wanted in enumerate(target):
                row.append(min(row[i] + 1, above[i + 1] + 1, above[i] + (character != wanted)))
        row = [min(pair) for pair in zip(without, row)]
    return row[-1]
