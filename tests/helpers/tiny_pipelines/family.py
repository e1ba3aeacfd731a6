"""What the tests know of a family of pipelines; each module here lists its own in `FAMILIES`, and in `REFUSED`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline


PROMPTS = ("a cat", "two dogs in a garden", "a red ball on a table", "green hills")


@dataclass
class Family:
    """
    Args:
        build (`Callable`): Makes the pipeline, with the same weights each time.
        calls (`dict[str, dict]`): Arguments of its call beside the prompt, by the name of the call.
        images (`Callable`, *optional*): Makes the images that the pipeline is given for a number of prompts: a list for its
            argument `image`, or a dict of lists by argument. A call then has one prompt.
        prompts (`Sequence[str]`): At least 4 prompts, of different length.
        reason (`str`): Why it is refused.
        error (`str`): A pattern of the error, if it is refused.
    """

    build: Callable[..., DiffusionPipeline]
    calls: dict[str, dict]
    images: Callable | None = None
    prompts: Sequence[str] = PROMPTS
    reason: str = ""
    error: str = ""
