"""
Sheets of labelled pictures, for logs and files, and the grid of a model card.

A sheet is a column of sections. A section is a title above rows of panels, and a panel is a picture above its label.
Tiny images are magnified and large ones reduced, so that the text is readable beside both.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d
from transformers.utils import logging

from ..media import Media, spread_frames


logger = logging.get_logger(__name__)

# Lengths in pixels of the sheet.
SHEET_WIDTH = 2048
SMALLEST, LARGEST = 160, 512  # width of a panel: its label needs the smallest
MAGNIFIED = 256  # height of a magnified tiny image
MARGIN, GAP = 16, 8

FRAMES = 4  # frames that are shown of a video

# A picture of audio: its spectrogram, with the low frequencies at the bottom.
WINDOW = 256  # values that a spectrum is computed from; it has half as many frequencies
COLUMNS = 256  # at most
QUIETEST = -80.0  # in decibels, black; a sine of amplitude 1 has 0, white

# PIL's own font has little more than ASCII. Linux, macOS and Windows come with these fonts.
FONTS = ("DejaVuSans.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")


class Panel(NamedTuple):
    picture: Image.Image  # a result of the function `picture`
    label: str  # text below the picture; its line breaks are kept


class Section(NamedTuple):
    title: str  # text above the rows, such as a prompt; "" for none
    rows: list[list[Panel]]


def picture(image: Tensor | Media) -> Image.Image:
    """
    Convert an image, floats in [0, 1], shape [3, H, W]; some frames of a video [F, 3, H, W], side by side; audio [C, L], as
    its spectrogram; or images above the spectrogram of their sound. Values that are not finite become black.
    """
    if isinstance(image, Media):
        above, below = map(picture, image)
        below = below.resize((above.width, below.height))
        both = Image.new("RGB", (above.width, above.height + below.height))
        both.paste(above)
        both.paste(below, (0, above.height))
        return both
    if image.ndim == 2:
        image = spectrogram(image)
    line = image.new_ones(3, image.shape[-2], max(1, image.shape[-1] // 64))
    strip = [part for frame in spread_frames(image, FRAMES) for part in (line, frame)][1:]
    image = torch.cat(strip, dim=-1).detach().float().nan_to_num(0, 0, 0).clamp(0, 1)
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def spectrogram(audio: Tensor) -> Tensor:
    """Loudness of the frequencies of audio [C, L] over time, the mean of its channels, as an image [3, 128, at most 256]."""
    sound = audio.detach().float().cpu().nan_to_num(0, 0, 0).mean(dim=0)
    # The windows overlap, so that nothing is left out: a column of a long sound is the mean power of several.
    hop = min(WINDOW // 2, max(1, -(-len(sound) // COLUMNS)))
    window = torch.hann_window(WINDOW)
    # Zeros around it: audio may be shorter than the window.
    bins = torch.stft(sound, WINDOW, hop, window=window, pad_mode="constant", return_complex=True)[:-1].abs()
    power = adaptive_avg_pool1d((2 * bins / window.sum()).square(), min(bins.shape[1], COLUMNS))
    decibels = 10 * power.clamp(min=1e-20).log10()
    shades = (1 - decibels / QUIETEST).clamp(0, 1).flip(0)
    return shades.expand(3, -1, -1)


def rows_of(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """Arrange panels in rows of at most `columns`."""
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def sheet(sections: Sequence[Section]) -> Image.Image:
    """Draw sections below each other. All columns are as wide as the widest panel."""
    panels = [panel for section in sections for row in section.rows for panel in row]
    columns = max(len(row) for section in sections for row in section.rows)
    strips = any(panel.picture.width > 2 * panel.picture.height for panel in panels)  # of videos
    largest = min(max((SHEET_WIDTH - 2 * MARGIN) // columns - GAP, SMALLEST), LARGEST * (2 if strips else 1))
    scaled = {id(panel): _scaled(panel.picture, largest) for panel in panels}
    width = max(SMALLEST, *(image.width for image in scaled.values()))
    # All text is in one font.
    characters = set("".join([*(section.title for section in sections), *(panel.label for panel in panels)]))
    label_size = min(max(width // 18, 14), 22)
    label_font, title_font = _font(characters, label_size), _font(characters, label_size + 4)

    drawn: list[tuple[int, int, Image.Image, bool]] = []  # left, top, image, and True if it gets an edge
    page_width = columns * (width + GAP) - GAP
    y = 0
    for section in sections:
        y += MARGIN
        if section.title:
            title = _text(section.title, title_font, page_width)
            drawn.append((0, y, title, False))
            y += title.height + GAP
        for row in section.rows:
            labels = [_text(panel.label, label_font, width) for panel in row]
            height = max(scaled[id(panel)].height for panel in row)
            for column, (panel, label) in enumerate(zip(row, labels)):
                x = column * (width + GAP)
                drawn.append((x, y, scaled[id(panel)], True))
                drawn.append((x, y + height + GAP // 2, label, False))
            y += height + GAP // 2 + max(label.height for label in labels) + MARGIN
    page = Image.new("RGB", (page_width + 2 * MARGIN, y), "white")
    draw = ImageDraw.Draw(page)
    for x, y, image, has_edge in drawn:
        page.paste(image, (x + MARGIN, y))
        if has_edge:
            draw.rectangle((x + MARGIN - 1, y - 1, x + MARGIN + image.width, y + image.height), outline="silver")
    return page


def before_after_grid(
    prompts: Sequence[str], before: Tensor, after: Tensor, titles: tuple[str, str] = ("before", "after")
) -> Image.Image:
    """
    Draw the images of P prompts, which label the columns, before training and, below them, after training. `before` and
    `after` are images in [0, 1] from the same S seeds, shape [P, S, 3, H, W]. `titles` label the two halves.
    """
    largest = min(max((SHEET_WIDTH - 2 * MARGIN) // len(prompts) - GAP, SMALLEST), LARGEST)
    halves = [
        [[_scaled(picture(image), largest) for image in row] for row in images.unbind(dim=1)]
        for images in (before, after)
    ]
    width, height = max(halves[0][0][0].width, SMALLEST), halves[0][0][0].height
    half_height = len(halves[0]) * (height + GAP) - GAP
    label_size = min(max(width // 12, 14), 22)
    font, title_font = (_font(set("".join([*prompts, *titles])), size) for size in (label_size, label_size + 6))
    labels = [_text(prompt, font, width, max_lines=5) for prompt in prompts]
    # A title is broken only if it is longer than its half.
    upright = [
        _text(title, title_font, min(math.ceil(title_font.getlength(title)), half_height), max_lines=2)
        for title in titles
    ]
    left = MARGIN + max(title.height for title in upright) + GAP
    top = MARGIN + max(label.height for label in labels) + GAP
    page_width = left + len(prompts) * (width + GAP) - GAP + MARGIN
    page = Image.new("RGB", (page_width, top + 2 * half_height + 2 * MARGIN), "white")
    for column, label in enumerate(labels):
        page.paste(label, (left + column * (width + GAP), top - GAP - label.height))
    for number, (title, rows) in enumerate(zip(upright, halves)):
        y = top + number * (half_height + MARGIN)
        page.paste(title.rotate(90, expand=True), (MARGIN, y + (half_height - title.width) // 2))
        for row, images in enumerate(rows):
            for column, image in enumerate(images):
                page.paste(image, (left + column * (width + GAP), y + row * (height + GAP)))
    return page


def save_sheet(page: Image.Image, path: Path) -> Path:
    """Write a sheet into a file, and return its path: a .png beside `path` if the format of that cannot hold its size."""
    try:
        page.save(path)
        return path
    except (OSError, ValueError) as error:
        if path.suffix.lower() == ".png":
            raise
        instead = path.with_suffix(".png")
        page.save(instead)
        path.unlink(missing_ok=True)  # of a smaller sheet before
        logger.warning(
            f"{path} cannot hold a page of {page.width} x {page.height} pixels ({error}): it is in {instead}."
        )
        return instead


def _scaled(image: Image.Image, largest: int) -> Image.Image:
    """Magnify a tiny image without smoothing; reduce a large one to the width `largest`, in its proportions."""
    factor = min(MAGNIFIED // image.height, largest // image.width)
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    if image.width <= largest:
        return image
    return image.resize((largest, max(1, round(image.height * largest / image.width))), Image.Resampling.LANCZOS)


def _text(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = 8) -> Image.Image:
    """Draw text as an image of the given width. Text of more than `max_lines` lines is cut and ends in "..."."""
    lines = [line for paragraph in text.split("\n") for line in _lines(paragraph, font, width)]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} ..."]
        while font.getlength(lines[-1]) > width:
            lines[-1] = f"{lines[-1][:-5]} ..."
    ascent, descent = font.getmetrics()
    height = round(1.15 * (ascent + descent))
    image = Image.new("RGB", (width, max(1, len(lines) * height)), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, number * height), line, fill="black", font=font)
    return image


def _lines(paragraph: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a paragraph at spaces. A word longer than a line, such as a Chinese sentence, fills whole lines."""
    lines = [""]
    for word in paragraph.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _font(characters: set[str], size: int) -> ImageFont.FreeTypeFont:
    """Return the first font that has all of the characters, otherwise the font that has most of them."""
    characters = {character for character in characters if character.isprintable() and not character.isspace()}
    best, most = None, -1
    for name in (None, *FONTS):
        font = _load_font(name, size)
        if font is not None:
            missing = bytes(font.getmask("\uffff"))  # no character: a font draws its sign for a missing one
            has = sum(bytes(font.getmask(character)) != missing for character in characters)
            if has > most:
                best, most = font, has
            if has == len(characters):
                break
    return best


@functools.cache
def _load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
    except OSError:
        return None
