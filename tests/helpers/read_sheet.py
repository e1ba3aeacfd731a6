"""Reads the pictures of a sheet back from its file."""

import numpy as np
from PIL import Image

from trl_fdfo.reporting.sheets import GAP, MARGIN


def panels(path: str, rows: int, columns: int) -> list[list[np.ndarray]]:
    """Each picture as 16 x 16 pixels; the sheet shows them magnified 16 times, in sections of equal heights."""
    page = np.asarray(Image.open(path))
    framed = [y for y in range(page.shape[0]) if (page[y, MARGIN : MARGIN + 256] == 192).all()]
    tops = [y + 1 for y, next_y in zip(framed, framed[1:]) if next_y - y == 257]
    assert len(tops) == rows
    lefts = [MARGIN + column * (256 + GAP) for column in range(columns)]
    return [[page[top : top + 256 : 16, left : left + 256 : 16] for left in lefts] for top in tops]
