"""
VisualClozeGenerationPipeline: fills the gap in a grid of images, by examples in its other rows. Its call has no `prompt`,
but a prompt of the task and one of the content.
"""

from diffusers import VisualClozeGenerationPipeline, VisualClozePipeline

from .conditioned import _flux, _quiet, other_pictures, pictures
from .family import Family


# A row with an example, and a row that lacks its second image. `datasets` makes no images of a list of lists by itself, so
# that the grid is the same for all prompts here.
GRID = [pictures(1) + other_pictures(1), [other_pictures(2)[1], None]]
CALLS = {"plain": {"image": GRID, "guidance_scale": 30.0, "max_sequence_length": 192}}


def prompts(count: int) -> dict[str, list]:
    contents = ["a cat", "two dogs in a garden", "the sea", "a red ball", "snow"]
    return {"task_prompt": ["turn it"] * count, "content_prompt": contents[:count]}


def build() -> VisualClozeGenerationPipeline:
    """4 images of 16 x 16, each 16 tokens: 16 channels of latents, 16 of the image's latents and 2 x 2 x 4 of its mask."""
    pipeline = _flux(VisualClozeGenerationPipeline, 16 + 16 + 16)
    return _quiet(VisualClozeGenerationPipeline(**pipeline.components, resolution=16))


def build_combined() -> VisualClozePipeline:
    """Samples the gap by one pipeline, then a larger image from it by another one, with the same weights."""
    pipeline = build()
    return _quiet(VisualClozePipeline(**pipeline.components, resolution=16))


FAMILIES = {
    "VisualCloze": Family(build, CALLS, prompts),
}
REFUSED = {
    "VisualCloze with upsampling": Family(
        build_combined,
        CALLS,
        prompts,
        reason="two pipelines one after the other: train `VisualClozeGenerationPipeline`, with the same parts",
        error="has no `prepare_latents`",
    ),
}
