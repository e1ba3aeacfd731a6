"""
The world "counts": 60 captions, an exact-match reward of 0 or 1, and a tiny pretrained pipeline, all in this folder.

Every caption names a count, a colour and a shape: "three red circles". The packaged pipeline was pretrained
(`benchmarks/counts/pretrain.py`) with wrong count words in many captions, so it often paints a wrong number: RL has to
learn to count, from a reward that has no slope.

    reward(images, prompts)        1 if the image shows exactly that many blobs, all in the caption's colour, else 0
    metrics(images, prompts)       exact accuracy in all and per count, and the diversity that RL should preserve

No reward judges the shape: at this size circles and crosses look alike once the VAE has decoded them.

Images are float [N, 3, 32, 32] in [0, 1], on gray. Lengths are in pixels. The colours, and the masks that the shapes are
drawn by, are those of `trl_fdfo.shapes`.

Dimensions: N images, H = W = 32.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import max_pool2d

from trl_fdfo import shapes
from trl_fdfo.pipeline.loading import load_pipeline as load_pipeline_from


COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SHAPES = ("circle", "cross")
BACKGROUND = shapes.BACKGROUNDS["gray"]

IMAGE_SIZE = shapes.IMAGE_SIZE
# Shapes stand on a grid of 3 x 3 places, so that any two leave a gap that an 8 x 8 latent still shows.
PLACES, SPACING, JITTER = 3, 10.0, 0.5
SIZE_RANGE = (5.2, 6.2)  # square root of a shape's area

CONTRAST = 0.3  # a pixel this far from the background belongs to a blob; the nearest colour, green, is 0.57 from gray
SMALLEST_BLOB = 8  # pixels; less is a speck. A rendered shape has 23 and more

PIPELINE_FOLDER = Path(__file__).parent / "pipeline"


def captions() -> list[str]:
    """The 60 captions in a fixed order: counts outermost, then colours, then shapes."""
    return [
        f"{count} {color} {_plural(shape) if COUNTS[count] > 1 else shape}"
        for count, color, shape in itertools.product(COUNTS, shapes.COLORS, SHAPES)
    ]


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


ATTRIBUTES = dict(zip(captions(), itertools.product(COUNTS.values(), range(len(shapes.COLORS)), range(len(SHAPES)))))


def load_pipeline(**kwargs):
    """Load the pipeline of this folder, as `trl_fdfo.shapes.load_pipeline` does; call it with `max_sequence_length=0`."""
    return load_pipeline_from(PIPELINE_FOLDER, **{"dtype": torch.float32, **kwargs})


def parse(prompts: Sequence[str]) -> torch.Tensor:
    """
    Each caption's count, and the indices of its colour and its shape: [N, 3].

    Raises:
        ValueError: A prompt is not one of the captions.
    """
    if unknown := set(prompts) - ATTRIBUTES.keys():
        raise ValueError(f"{min(unknown)!r} is not a caption of this world; see benchmarks.counts.world.captions()")
    return torch.tensor([ATTRIBUTES[prompt] for prompt in prompts]).reshape(-1, 3)


# Drawing --------------------------------------------------------------------------------------------------------------


def render(prompts: Sequence[str], generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Draw the captions: images [N, 3, 32, 32]. The places are drawn without replacement, the whole grid is shifted by up to
    a pixel, and each shape has a jitter and a size of its own.
    """
    count, color, shape = parse(prompts).unbind(dim=1)
    n, most = len(count), max(COUNTS.values())
    place = torch.rand(n, PLACES**2, generator=generator).topk(most, dim=1).indices  # [N, 5]
    grid = torch.stack([place % PLACES, place // PLACES], dim=2) - (PLACES - 1) / 2
    shift = torch.empty(n, 1, 2).uniform_(-1, 1, generator=generator)
    jitter = torch.empty(n, most, 2).uniform_(-JITTER, JITTER, generator=generator)
    center = IMAGE_SIZE / 2 + SPACING * grid + shift + jitter
    size = torch.empty(n, most).uniform_(*SIZE_RANGE, generator=generator)

    kind = torch.tensor([shapes.SHAPES.index(name) for name in SHAPES])[shape]
    masks = shapes.coverage(center, size)[torch.arange(n), :, kind]  # [N, 5, H, W]
    shown = torch.arange(most) < count[:, None]
    mask = (masks * shown[..., None, None]).amax(dim=1)[:, None]
    foreground = torch.tensor(list(shapes.COLORS.values()))[color][..., None, None]
    return mask * foreground + (1 - mask) * torch.tensor(BACKGROUND)[:, None, None]


# Seeing ---------------------------------------------------------------------------------------------------------------


def label(mask: torch.Tensor) -> torch.Tensor:
    """
    The connected components of masks [N, H, W], bool: [N, H, W], 0 outside and one positive number per component, which
    is connected along the edges of pixels.
    """
    # Each pixel starts with a number of its own, and the largest spreads through its component.
    numbers = torch.arange(1.0, mask[0].numel() + 1, device=mask.device).reshape(mask.shape[1:]) * mask
    while True:
        sideways = max_pool2d(numbers, (1, 3), stride=1, padding=(0, 1))
        spread = torch.maximum(sideways, max_pool2d(numbers, (3, 1), stride=1, padding=(1, 0))) * mask
        if torch.equal(spread, numbers):
            return numbers.long()
        numbers = spread


def blobs(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The blobs of each image, each a component of pixels unlike the background, largest first: their areas in pixels
    [N, B], 0 beyond the image's own blobs, and the index of each one's nearest colour [N, B].
    """
    images = images.float()
    background = torch.tensor(BACKGROUND, device=images.device)[:, None, None]
    numbers = label(torch.linalg.vector_norm(images - background, dim=1) > CONTRAST).flatten(1)  # [N, HW]
    sums = torch.zeros(len(images), numbers.shape[1] + 1, 4, device=images.device)
    pixels = torch.cat([images.flatten(2), torch.ones_like(images[:, :1]).flatten(2)], dim=1).mT  # [N, HW, 4]
    sums.scatter_add_(1, numbers[..., None].expand_as(pixels), pixels)
    sums[:, 0] = 0  # the background
    area, order = sums[..., 3].sort(dim=1, descending=True)
    area = torch.where(area < SMALLEST_BLOB, 0, area)
    most = max(1, int((area > 0).sum(dim=1).max()))
    mean = (sums[..., :3] / sums[..., 3:].clamp(min=1)).gather(1, order[:, :most, None].expand(-1, -1, 3))
    palette = torch.tensor(list(shapes.COLORS.values()), device=images.device)
    return area[:, :most], torch.cdist(mean, palette.expand(len(mean), -1, -1)).argmin(dim=2)


# Judging --------------------------------------------------------------------------------------------------------------


def exact(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Check each image, bool [N]: as many blobs as the caption says, all nearest to the caption's colour."""
    count, color, _ = parse(prompts).to(images.device).unbind(dim=1)
    area, colors = blobs(images)
    is_blob = area > 0
    return (is_blob.sum(dim=1) == count) & ((colors == color[:, None]) | ~is_blob).all(dim=1)


def reward(images: torch.Tensor, prompts: Sequence[str], **kwargs) -> torch.Tensor:
    """1.0 for an image that is `exact`, 0.0 for any other: [N], float32."""
    return exact(images, prompts).float()


def metrics(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """
    - `exact`: the share of images that pass the check, and `exact/<count>` for each count.
    - `diversity`: mean rms pixel distance between two exact images of a prompt; nan where no prompt has two.
    """
    right, count = exact(images, prompts), parse(prompts)[:, 0]
    result = {"exact": right.float().mean().item()}
    for name, number in COUNTS.items():
        if (count == number).any():
            result[f"exact/{name}"] = right[count == number].float().mean().item()
    distances = []
    for prompt in set(prompts):
        rows = torch.tensor([other == prompt for other in prompts]) & right.cpu()
        if rows.sum() > 1:
            pixels = images[rows].float().flatten(1)
            distances.append(torch.pdist(pixels).mean().item() / pixels.shape[1] ** 0.5)
    result["diversity"] = sum(distances) / len(distances) if distances else float("nan")
    return result
