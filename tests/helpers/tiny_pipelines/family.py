"""What the tests know of a family of pipelines; each module here lists its own in `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline


@dataclass
class Family:
    """
    Args:
        build (`Callable`): Makes the pipeline, with the same weights each time.
        calls (`dict[str, dict]`): Arguments of its call beside the prompt, by the name of the call.
        images (`Callable`, *optional*): Makes the images that the pipeline is given for a number of prompts: a list for its
            argument `image`, or a dict of lists by argument.
    """

    build: Callable[..., DiffusionPipeline]
    calls: dict[str, dict]
    images: Callable | None = None
