"""Text rendering: how well an image shows the text that was asked for, read by OCR as in Flow-GRPO (arXiv 2505.05470)."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image


class TextRendering:
    """
    How well an image shows the text that was asked for, in [0, 1], read by OCR on the CPU.

    1 - edit distance / length of the text, as in Flow-GRPO (arXiv 2505.05470). The text is what the prompt has in double
    quotes, straight or typographic (several parts are joined), as in `A shop window with the words "open late"`; where
    the dataset has a column `text`, it is what stands there. A row of that column which is None, or only repeats the
    prompt, leaves it to the quotes. Without a text to show, the reward does not apply (None).

    - Letters, digits and punctuation are compared, in reading order. Case and whitespace do not count, so the text may
      be broken into lines anywhere.
    - A missing, a wrong and an additional character cost 1 / length each. Unlike in the paper, other text in a text box
      of its own costs nothing: else a poster behind it would make a well-written sign as bad as none. Gibberish gains
      little by that: about 0.2 for ten words of random letters.
    - The OCR's best guess counts however unsure it is, so that there is a slope from scribble to letters.

    The OCR is PP-OCRv6 (small), part of the package `rapidocr` (`pip install 'trl_fdfo[ocr]'`): nothing is downloaded. It
    reads Latin and Greek letters, Chinese and Japanese, and malformed letters with goodwill: let another reward see to
    the looks.

    Raises:
        ImportError: `rapidocr` or `onnxruntime` is missing.
    """

    image_type = "pil"
    background = True

    def __init__(self):
        try:
            import onnxruntime  # noqa: F401  # rapidocr would look for it as late as at the first image
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("TextRendering needs rapidocr and onnxruntime: pip install 'trl_fdfo[ocr]'.") from error
        self._ocr = RapidOCR(
            params={
                # Not a line of log per model, nor a warning per image without text.
                "Global.log_level": "error",
                # Text that stands on its head is no text.
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                # Detects in at most 736 x 736 pixels; letters are read at full size. By default, smaller images are
                # enlarged to that, at twice the cost, and the small print of large ones is missed.
                "Det.limit_type": "max",
                "Det.limit_side_len": 736,
                # More threads make these small models no faster, and every process of a node would have as many.
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], text: Sequence[str | None] | None = None
    ) -> list[float | None]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): N images, or N videos as lists of frames, each scored by the mean over
                its frames.
            prompts (`Sequence[str]`): N prompts.
            text (`Sequence[str]`, *optional*): N texts to show, a column of the dataset.

        Returns:
            `list[float]`: N rewards in [0, 1]; None where there is no text to show.

        Raises:
            ValueError: A text to show is not a string.
        """
        targets = map(_target, prompts, text if text is not None else [None] * len(prompts))
        return [self._score(image, target) if target else None for image, target in zip(images, targets)]

    def _score(self, image: Image.Image | Sequence[Image.Image], target: str) -> float:
        if isinstance(image, (list, tuple)):
            return sum(self._score(frame, target) for frame in image) / len(image)
        return 1 - _edit_distance([_normalized(box) for box in self._read(image)], target) / len(target)

    def _read(self, image: Image.Image) -> list[str]:
        """The text boxes of an image in reading order."""
        result = self._ocr(image)
        return [result.txts[n] for n in _reading_order(result.boxes)] if result.txts else []


def _target(prompt: str, text: str | None) -> str:
    if text is None or text == prompt:
        text = " ".join(re.findall(f"(?<!\\d){_QUOTE}(.*?){_QUOTE}", prompt, re.DOTALL))
    elif not isinstance(text, str):
        raise ValueError(
            f"TextRendering got text={text!r}, a {type(text).__name__}, for the prompt {prompt!r}: the column 'text' must "
            "hold strings, the text that the image is to show, or None."
        )
    return _normalized(text)


# An opening quote does not follow a digit: there it says inches.
_QUOTE = '["“”„«»]'

# What OCR hardly tells apart.
_LOOKALIKES = str.maketrans("‘’“”„–—", '\'\'"""--')


def _normalized(text: str) -> str:
    """Without case and whitespace, and with one form for characters that Unicode has in several widths and styles."""
    text = unicodedata.normalize("NFKC", text.translate(_LOOKALIKES))
    return "".join(text.casefold().split())


def _reading_order(boxes: np.ndarray) -> list[int]:
    """
    Line by line from the top, each from the left. Boxes are on one line where the middle of one lies beside the other.

    Args:
        boxes (`np.ndarray`): Corners (x, y) of N boxes in pixels, shape [N, 4, 2].
    """
    left, top = boxes.min(axis=1).T
    height = boxes[..., 1].max(axis=1) - top
    middle = top + height / 2
    lines = []
    for n in np.argsort(middle):
        first = lines[-1][0] if lines else None
        if first is not None and middle[n] - middle[first] < max(height[n], height[first]) / 2:
            lines[-1].append(n)
        else:
            lines.append([n])
    return [n for line in lines for n in sorted(line, key=lambda n: left[n])]


def _edit_distance(boxes: Sequence[str], target: str) -> int:
    """Levenshtein distance of `target` to those of the boxes, in their order, that together come closest to it."""
    # row[i]: the distance of the first i characters of the target to what has been read so far.
    row = list(range(len(target) + 1))
    for box in boxes:
        without = row
        for character in box:
            above, row = row, [row[0] + 1]
            for i, wanted in enumerate(target):
                row.append(min(row[i] + 1, above[i + 1] + 1, above[i] + (character != wanted)))
        row = [min(pair) for pair in zip(without, row)]
    return row[-1]
