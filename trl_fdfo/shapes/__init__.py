"""
The demo world "shapes": 54 captions, a reward, a strict check and a tiny pretrained pipeline, all in this folder.

Every caption names a colour, a shape and a background: "a red circle on a white background". The packaged pipeline was
pretrained (`examples/shapes/pretrain.py`) with wrong colour words in many captions, so it often paints a wrong colour:
a visible fault that RL post-training repairs in minutes on a laptop.

    reward(images, prompts)   the objective of RL: smooth, with a slope for wrong images too
    strict(images, prompts)   the check: it differs from the reward, so it reveals reward hacking
    metrics(images, prompts)  strict accuracy per class, and the diversity that RL should preserve

Images are float [N, 3, 32, 32] in [0, 1]. Lengths are in pixels; `x` points right and `y` down. The `size` of a shape
is the square root of its area, so shapes of one size have equal area.

Dimensions: N images, K = 3 shapes, H = W = 32.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import torch


COLORS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (1.00, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.85),
    "cyan": (0.10, 0.80, 0.90),
}
SHAPES = ("circle", "cross", "triangle")
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}

IMAGE_SIZE = 32
SIZE_RANGE = (11.0, 17.0)  # smaller crosses have arms too thin for an 8 x 8 latent
MIN_IOU = 0.75  # of the strict check; a circle and a cross at their best overlap reach about 0.7

PIPELINE_FOLDER = Path(__file__).parent / "pipeline"

# Shapes with area 1, centred on their centroids: radius, arm length and width, triangle side and height.
_RADIUS = 0.5642
_ARM_LENGTH, _ARM_WIDTH = 1.3019, 0.4687  # area = width (2 length - width), width = 0.36 length
_SIDE, _HEIGHT = 1.5197, 1.3161
# Reach of each shape of area 1 from its centroid: sideways, up, down.
_REACH = torch.tensor([[_RADIUS] * 3, [_ARM_LENGTH / 2] * 3, [_SIDE / 2, _HEIGHT * 2 / 3, _HEIGHT / 3]])


def captions() -> list[str]:
    """The 54 captions in a fixed order: colours outermost, then shapes, then backgrounds."""
    return [
        f"a {color} {shape} on a {background} background"
        for color, shape, background in itertools.product(COLORS, SHAPES, BACKGROUNDS)
    ]


def load_pipeline(**kwargs):
    """
    Load the packaged pipeline, without network access. The weights are stored in float16 and loaded in float32.

    Call the pipeline with `max_sequence_length=0` and `num_inference_steps=8`. Otherwise it appends empty tokens for
    the third text encoder, which it lacks, and its transformer has never seen such tokens.

    Args:
        **kwargs: Arguments of `DiffusionPipeline.from_pretrained`, such as another `dtype`.
    """
    # Imported here: the reward and the metrics need neither diffusers nor transformers.
    from ..pipeline.loading import load_pipeline

    return load_pipeline(PIPELINE_FOLDER, **{"dtype": torch.float32, **kwargs})


def parse(prompts: Sequence[str]) -> torch.Tensor:
    """
    Indices [N, 3] of each caption's colour, shape and background in `COLORS`, `SHAPES` and `BACKGROUNDS`.

    Raises:
        ValueError: A prompt is not one of the captions.
    """
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    rows = []
    for prompt in prompts:
        match = re.fullmatch(r"a (\w+) (\w+) on a (\w+) background", prompt)
        try:
            color, shape, background = match.groups()
            rows.append([colors.index(color), SHAPES.index(shape), backgrounds.index(background)])
        except (AttributeError, ValueError):
            raise ValueError(f"{prompt!r} is not a caption of this world; see trl_fdfo.shapes.captions()") from None
    return torch.tensor(rows).reshape(-1, 3)


# Drawing --------------------------------------------------------------------------------------------------------------


def coverage(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """
    Anti-aliased masks [..., K, H, W] of all three shapes, by `center` [..., 2], the centroid (x, y), and `size` [...].

    The mask is the part of each pixel that the shape covers, in [0, 1], estimated from the distance between the pixel's
    centre and the nearest edge.
    """
    pixels = torch.arange(IMAGE_SIZE, device=center.device) + 0.5
    x = pixels - center[..., 0, None, None]  # [..., 1, W]
    y = pixels[:, None] - center[..., 1, None, None]  # [..., H, 1]
    s = size[..., None, None]

    # Signed distances to the edge, positive inside.
    circle = _RADIUS * s - (x.square() + y.square()).clamp(min=1e-12).sqrt()

    long, short = _ARM_LENGTH / 2 * s, _ARM_WIDTH / 2 * s
    horizontal = torch.minimum(long - x.abs(), short - y.abs())
    vertical = torch.minimum(short - x.abs(), long - y.abs())
    cross = torch.maximum(horizontal, vertical)

    # Each edge of an equilateral triangle is height / 3 from the centroid; slanted edges have normals at 30 degrees.
    inradius = _HEIGHT / 3 * s
    slanted = inradius - (x.abs() * 3**0.5 / 2 - y / 2)
    triangle = torch.minimum(slanted, inradius - y)

    return torch.stack([circle, cross, triangle], dim=-3).add(0.5).clamp(0, 1)


def render(prompts: Sequence[str], generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Draw the captions: images [N, 3, 32, 32] with the size uniform in `SIZE_RANGE`, and the position uniform with a
    margin of at least one pixel around the shape.
    """
    color, shape, background = parse(prompts).unbind(dim=1)
    n = len(color)
    size = torch.empty(n).uniform_(*SIZE_RANGE, generator=generator)
    sideways, up, down = (_REACH[shape] * size[:, None] + 1).unbind(dim=1)
    low = torch.stack([sideways, up], dim=1)
    high = IMAGE_SIZE - torch.stack([sideways, down], dim=1)
    center = low + (high - low) * torch.rand(n, 2, generator=generator)

    mask = coverage(center, size)[torch.arange(n), shape, None]  # [N, 1, H, W]
    foreground = torch.tensor(list(COLORS.values()))[color][..., None, None]
    behind = torch.tensor(list(BACKGROUNDS.values()))[background][..., None, None]
    return mask * foreground + (1 - mask) * behind


# Seeing ---------------------------------------------------------------------------------------------------------------


def find_mask(images: torch.Tensor) -> torch.Tensor:
    """
    Find the shape in each image, in any colour: masks [N, H, W] in [0, 1].

    The border gives the colour of the background. The strongest contrast to it (mean of the 5% most different pixels)
    gives the contrast of the shape, and the mask rises from 0 to 1 around half of that contrast.
    """
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)
    background = border.median(dim=-1).values  # [N, 3]
    contrast = torch.linalg.vector_norm(images - background[..., None, None], dim=1)  # [N, H, W]
    strongest = contrast.flatten(1).topk(IMAGE_SIZE**2 // 20).values.mean(dim=1)
    # The floor keeps the noise of an empty picture from becoming a mask. The most similar pair of colour and
    # background, green on gray, differs by 0.57.
    relative = contrast / strongest.clamp(min=0.25)[:, None, None]
    return (2 * relative - 0.5).clamp(0, 1)


def moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroid [N, 2] (x, y) and size [N] (square root of the area) of masks [N, H, W], in pixels."""
    pixels = torch.arange(IMAGE_SIZE, device=mask.device) + 0.5
    area = mask.sum(dim=(1, 2))
    x = (mask.sum(dim=1) * pixels).sum(dim=1)
    y = (mask.sum(dim=2) * pixels).sum(dim=1)
    # The square root of 0 has no finite gradient.
    return torch.stack([x, y], dim=1) / area.clamp(min=1)[:, None], area.clamp(min=1e-12).sqrt()


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of soft masks [..., H, W], in [0, 1]."""
    return torch.minimum(a, b).sum(dim=(-2, -1)) / torch.maximum(a, b).sum(dim=(-2, -1)).clamp(min=1)


def best_iou(mask: torch.Tensor) -> torch.Tensor:
    """
    IoU [N, K] of masks [N, H, W] with each shape at its best position and size. The search is around the moments of the
    mask: one pixel to each side, up to 15% smaller and larger.
    """
    center, size = moments(mask)
    best = torch.zeros(len(mask), len(SHAPES), device=mask.device)
    for scale, *shift in itertools.product((0.85, 0.93, 1.0, 1.08, 1.15), (-1, 0, 1), (-1, 0, 1)):
        shifted = center + torch.tensor(shift, device=mask.device)
        best = torch.maximum(best, iou(mask[:, None], coverage(shifted, size * scale)))
    return best


def _weighted_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [N, ..., H, W] over the pixels, weighted by `weight` (broadcastable)."""
    return (values * weight).sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1)).clamp(min=1)


def _cores(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, H, W] of the pixels inside the shape and outside, without its edge, which blends the colours."""
    return (4 * mask - 3).clamp(min=0), (1 - 4 * mask).clamp(min=0)


# Judging --------------------------------------------------------------------------------------------------------------


def reward(images: torch.Tensor, prompts: Sequence[str], **kwargs) -> torch.Tensor:
    """
    Agreement of each image with its caption: 0.15 background + 0.5 colour + 0.35 shape x size.

    Each term lies in [0, 1] and has a slope for wrong images too: otherwise RL stalls. The mask comes from the contrast
    of the image, so the shape counts in any colour. Colours are compared pixel by pixel, so a shape in two colours
    gains nothing from their average.

    Returns:
        `[N]`, float32 in [0, 1]; images by `render` score 0.9 to 1.

    Raises:
        ValueError: A prompt is not one of the captions.
    """
    images = images.float()
    color, shape, background = parse(prompts).to(images.device).unbind(dim=1)
    mask = find_mask(images)
    inner, outer = _cores(mask)

    def closeness(palette, index, weight):
        """Half a Gaussian, with a slope near the right colour, and half a line, with a slope far from it."""
        target = torch.tensor(list(palette.values()), device=images.device)[index]
        distance = torch.linalg.vector_norm(images - target[..., None, None], dim=1)  # [N, H, W], in [0, sqrt(3)]
        return _weighted_mean(0.5 * (-(distance / 0.35).square()).exp() + 0.5 * (1 - distance / 3**0.5), weight)

    center, size = moments(mask)
    ideal = coverage(center, size)[torch.arange(len(mask)), shape]
    # The shapes overlap: a circle reaches an IoU of 0.7 with a cross. The cube widens the remaining range.
    shape_score = iou(mask, ideal) ** 3
    outside = (SIZE_RANGE[0] - size).clamp(min=0) + (size - SIZE_RANGE[1]).clamp(min=0)
    size_score = (-(outside / 4).square()).exp()

    return (
        0.15 * closeness(BACKGROUNDS, background, outer)
        + 0.5 * closeness(COLORS, color, inner)
        + 0.35 * shape_score * size_score
    )


def inspect(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Content of each image, without its caption: `mask` [N, H, W] in [0, 1], the indices `color` and `background` [N] of
    the nearest colours, and `iou` [N, K] with each shape at its best position and size.
    """
    images = images.float()
    mask = find_mask(images)

    def nearest(palette, weight):
        mean = _weighted_mean(images, weight[:, None])  # [N, 3]
        return torch.cdist(mean, torch.tensor(list(palette.values()), device=images.device)).argmin(dim=1)

    inner, outer = _cores(mask)
    return {
        "mask": mask,
        "color": nearest(COLORS, inner),
        "background": nearest(BACKGROUNDS, outer),
        "iou": best_iou(mask),
    }


def _verdicts(seen: dict[str, torch.Tensor], prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two verdicts, bool [N]: the caption's shape is drawn cleanly; colour and background are right too."""
    color, shape, background = parse(prompts).to(seen["color"].device).unbind(dim=1)
    best, best_shape = seen["iou"].max(dim=1)
    clean = (best_shape == shape) & (best > MIN_IOU)
    return clean, clean & (seen["color"] == color) & (seen["background"] == background)


def strict(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """
    Check each image, bool [N]. An image is right if its nearest colour, nearest background and best-matching shape are
    the caption's, and its IoU with the ideal shape at the best position and size exceeds 0.75.
    """
    return _verdicts(inspect(images), prompts)[1]


def metrics(images: torch.Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """
    Strict accuracy and diversity of several images per prompt, in any order.

    - `strict_accuracy`, and `strict_accuracy/<class>` for each colour, shape and background in the prompts.
    - `diversity/position`, `diversity/size`: standard deviation in pixels, within a prompt, of the mask's centroid
      (both axes together) and size.
    - `diversity/mask`: mean 1 - IoU between the masks of two images of a prompt.
    - `diversity/pixels`: mean rms pixel distance between two images of a prompt.

    Diversity counts only good images: otherwise a blot or a wrong shape would count as variety, and training would seem
    to lose diversity by removing it. The first three measures take images that draw the prompt's shape cleanly, in any
    colour; `pixels`, which sees colour, takes images that pass the strict check. Variances are unbiased and averaged
    over the prompts before the root, so they do not depend on the number of images that pass. Prompts with fewer than
    two such images are left out; the value is nan if no prompt is left.
    """
    seen = inspect(images)
    clean, right = (verdict.cpu() for verdict in _verdicts(seen, prompts))
    center, size = (moment.cpu() for moment in moments(seen["mask"]))
    mask, pixels = seen["mask"].cpu(), images.float().cpu().flatten(1)

    result = {"strict_accuracy": right.float().mean().item()}
    attributes = parse(prompts)
    for column, names in zip((1, 0, 2), (SHAPES, COLORS, BACKGROUNDS), strict=True):
        for index, name in enumerate(names):
            chosen = attributes[:, column] == index
            if chosen.any():
                result[f"strict_accuracy/{name}"] = right[chosen].float().mean().item()

    spread = {"position": [], "size": [], "mask": [], "pixels": []}
    for attribute in attributes.unique(dim=0):
        same = (attributes == attribute).all(dim=1)
        rows, right_rows = (same & clean).nonzero()[:, 0], (same & right).nonzero()[:, 0]
        if len(rows) > 1:
            spread["position"].append(center[rows].var(dim=0).sum())
            spread["size"].append(size[rows].var())
            a, b = torch.combinations(rows).unbind(dim=1)
            spread["mask"].append((1 - iou(mask[a], mask[b])).mean())
        if len(right_rows) > 1:
            a, b = torch.combinations(right_rows).unbind(dim=1)
            spread["pixels"].append((pixels[a] - pixels[b]).square().mean(dim=1).sqrt().mean())
    for name, values in spread.items():
        mean = torch.stack(values).mean() if values else torch.tensor(float("nan"))
        result[f"diversity/{name}"] = (mean.sqrt() if name in ("position", "size") else mean).item()
    return result
