"""A judge of edits: a VLM that sees what was edited, the result, and the instruction."""

import inspect
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from .questions import VLMReward
from .vlm_score import VLMScore
from .vlm_server import VLMServer


class EditJudge:
    """
    The answer of a VLM to a question about an edit: 0 to 100, higher is better.

    The VLM sees the image that was edited (or several, if a row has a list), then the result, then the question, which names
    the instruction. The score is that of [`VLMScore`].

    Args:
        vlm ([`VLMReward`]): Asks the question, of this process or of a server.
        column (`str`): Column of the dataset that holds the images to edit.

    Raises:
        ValueError: The question of `vlm` is about something else.
    """

    image_type = "pil"

    def __init__(self, vlm: VLMReward, column: str = "image"):
        vlm.question.check("edit")
        self.vlm, self.column = vlm, column
        self.__name__ = vlm.__name__
        # A reward is called with the arguments that its signature names.
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("images", "prompts", column)]
        )
        self.on_rollout_end = getattr(vlm, "on_rollout_end", lambda: None)

    def __call__(self, images: Sequence[Any], prompts: Sequence[str], **columns: Sequence[Any]) -> Any:
        """
        Score N results, images or videos as lists of frames, of N instructions: float32, shape [N]; an awaitable from a server.
        The column has N images, or lists of images.
        """
        sources = [list(value) if isinstance(value, (list, tuple)) else [value] for value in columns[self.column]]
        sources = [[_in_rgb(image, self.column) for image in shown] for shown in sources]
        odds = self.vlm.log_odds(*self.vlm.asked(prompts, images, before=sources))

        async def awaited() -> Tensor:
            return 100 * (await odds).sigmoid()

        return awaited() if inspect.isawaitable(odds) else 100 * odds.sigmoid()


def vlm_edit(
    url: str | list[str] | None = None, question: str = "edit", column: str = "image", **options: Any
) -> EditJudge:
    """
    A VLM's Yes to whether an image was edited as the prompt says, and no more: 0 to 100, higher is better.

    Args:
        url (`str` or `list[str]`, *optional*): Server(s), as in [`VLMServer`]. Default: [`VLMScore`] in this process.
        question (`str`): Preset or template. It is asked about the last image; those before it are what it was made from.
        column (`str`): Column of the dataset that holds the images to edit.
        **options: Further arguments of [`VLMServer`] or [`VLMScore`].
    """
    vlm = VLMScore(question=question, **options) if url is None else VLMServer(url, question=question, **options)
    judge = EditJudge(vlm, column)
    judge.__name__ = "vlm_edit"
    return judge


def _in_rgb(image: Any, column: str) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"The column '{column}' has {image!r}, a {type(image).__name__}, where an image was edited: it must hold PIL "
            "images, as the feature `datasets.Image()` decodes them."
        )
    return image.convert("RGB")
