import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from trl_fdfo.media import Media
from trl_fdfo.reporting.curves import reward_curve
from trl_fdfo.reporting.sheets import (
    GAP,
    MARGIN,
    Panel,
    Section,
    _font,
    _lines,
    before_after_grid,
    picture,
    rows_of,
    save_sheet,
    sheet,
)


LONG = "An elderly fisherman with a weathered face, mending a blue net on a stone pier at dawn, 35 mm film grain. " * 9
COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (200, 0, 200), (0, 200, 200)]


def solid(n: int, height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), COLORS[n % len(COLORS)])


def box_of(pixels: np.ndarray, color: tuple) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the filled rectangle of one colour in an image [H, W, 3]."""
    rows, columns = np.nonzero((pixels == color).all(axis=-1))
    left, top, width, height = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
    assert len(rows) == width * height, f"something covers a part of the picture of colour {color}"
    return left, top, width, height


def test_picture_has_the_values_of_the_tensor():
    image = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, float("nan")]).reshape(1, 2, 3).expand(3, 2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        assert np.asarray(picture(image.to(dtype)))[..., 0].tolist() == [[0, 128, 255], [255, 0, 0]]


def test_a_video_is_four_frames_from_its_first_to_its_last():
    frames = torch.arange(10)[:, None, None, None].expand(10, 3, 2, 64) / 255
    strip = np.asarray(picture(frames))
    assert strip.shape == (2, 4 * 64 + 3, 3)
    assert strip[0, :, 0].tolist() == [0] * 64 + [255] + [3] * 64 + [255] + [6] * 64 + [255] + [9] * 64
    assert picture(frames[:1]).size == (64, 2)


def test_audio_is_its_spectrogram():
    time = torch.arange(4000) / 8000
    tone = torch.sin(2 * torch.pi * 1000 * time)  # hertz: 32 of the 128 frequencies from the bottom
    pixels = np.asarray(picture(torch.stack([tone, tone])))
    assert pixels.shape == (128, 251, 3)
    assert (pixels[:, 20:230, 0].argmax(axis=0) == 127 - 32).all() and (pixels[127 - 32, 20:230] == 255).all()
    assert pixels[:60, 20:230].max() == 0  # nothing above 2 kHz is louder than -80 dB
    quieter = np.asarray(picture(tone[None] / 100))  # by 40 dB of 80
    assert abs(int(quieter[127 - 32, 100, 0]) - 127) <= 1
    assert np.asarray(picture(torch.zeros(1, 3))).max() == 0
    # A click in a long sound is seen wherever it is.
    clicks = torch.zeros(4, 1, 200_000)
    for sound, place in zip(clicks, (50_000, 50_300, 50_600, 50_900)):
        sound[0, place] = 1
    for sound in clicks:
        pixels_of_click = np.asarray(picture(sound))
        assert pixels_of_click.shape == (128, 256, 3) and (pixels_of_click[:, 62:67].max(axis=1) > 30).all()
    both = np.asarray(picture(Media(torch.ones(3, 20, 251), torch.stack([tone, tone]))))
    assert both.shape == (148, 251, 3) and (both[:20] == 255).all() and (both[20:] == pixels).all()


def test_tiny_images_are_shown_as_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    page = sheet([Section("", [[Panel(Image.fromarray(pixels), "one")]])])
    shown = np.asarray(page)[MARGIN : MARGIN + 256, MARGIN : MARGIN + 256]
    assert (shown == pixels.repeat(16, axis=0).repeat(16, axis=1)).all()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 131), (512, 512), (1024, 768), (480, 3000)])
@pytest.mark.parametrize("text", ["a cat", LONG, "x" * 400, "一只戴草帽的猫" * 30, "a\x00b\n\tc"], ids=len)
def test_nothing_overlaps_and_nothing_is_stretched(height, width, text):
    panels = [Panel(solid(n, height, width), text) for n in range(6)]
    page = np.asarray(sheet([Section(text, [panels[:2], panels[2:4]]), Section(text, [panels[4:]])])).astype(int)
    assert (page[: MARGIN - 2] == 255).all() and (page[:, : MARGIN - 2] == 255).all()
    assert (page[-MARGIN + 2 :] == 255).all() and (page[:, -MARGIN + 2 :] == 255).all()

    boxes = [box_of(page, color) for color in COLORS]
    text_is_in = lambda top, bottom, left, right: (page[top:bottom, left:right] < 100).all(axis=-1).any()
    bottom_of_row_above = None
    for (left, top, shown_width, shown_height), (left_2, top_2, *size_2) in zip(boxes[::2], boxes[1::2]):
        assert shown_width / shown_height == pytest.approx(width / height, rel=0.02)
        assert top == top_2 and size_2 == [shown_width, shown_height]
        bottom = top + shown_height
        for x in (left, left_2):
            assert text_is_in(bottom + 1, bottom + 24, x, x + 100), "no label"
            # A gap separates the picture from the label or title above it.
            assert (page[top - 3 : top - 1, x : x + shown_width] == 255).all()
        # The gap between columns is white but for the edges of the pictures: no label runs into the next.
        assert (page[top - 2 : bottom + 24, left_2 - GAP + 1 : left_2 - 1] == 255).all()
        assert bottom_of_row_above is None or top > bottom_of_row_above + 14
        bottom_of_row_above = bottom
    assert text_is_in(MARGIN, boxes[0][1] - 1, boxes[0][0], boxes[0][0] + 100), "no title"


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 32), (24, 64), (512, 512)])
@pytest.mark.parametrize("text", ["a cat", LONG, "一只戴草帽的猫" * 30], ids=len)
def test_before_and_after_stand_below_each_other(height, width, text):
    colors = torch.tensor(COLORS[:4]).reshape(2, 2, 3, 1, 1) / 255  # of two prompts and two seeds
    before = colors.expand(2, 2, 3, height, width)
    page = np.asarray(before_after_grid([text] * 2, before, before * 0.5, titles=("before, guidance 1.5", "after")))
    shown = [box_of(page, color) for color in COLORS[:4]]
    shown += [box_of(page, tuple(round(value * 0.5) for value in color)) for color in COLORS[:4]]
    left, top, shown_width, shown_height = shown[0]
    assert shown_width / shown_height == pytest.approx(width / height, rel=0.02)
    # Columns are prompts, rows are seeds, and the halves stand below each other.
    columns = sorted({box[0] for box in shown})
    rows = sorted({box[1] for box in shown})
    assert [(columns.index(x), rows.index(y)) for x, y, *_ in shown] == [
        *((0, 0), (0, 1), (1, 0), (1, 1)),
        *((0, 2), (0, 3), (1, 2), (1, 3)),
    ]
    assert all(tuple(size) == (shown_width, shown_height) for _, _, *size in shown)
    # Text stands above the columns and left of the halves, inside a white margin.
    dark = lambda area: (area < 100).all(axis=-1).any()
    assert all(dark(page[MARGIN:top, x : x + 160]) for x in columns)
    assert all(dark(page[y : y + 2 * shown_height + GAP, :left]) for y in (rows[0], rows[2]))
    assert (page[: MARGIN - 2] == 255).all() and (page[-MARGIN + 2 :] == 255).all()
    assert (page[:, : MARGIN - 2] == 255).all() and (page[:, -MARGIN + 2 :] == 255).all()
    assert (page[:top, columns[1] - GAP : columns[1]] == 255).all()


def test_each_reward_has_an_axis_of_its_own(tmp_path):
    log = [{"reward": 20 + n, "rewards/a/mean": n, "rewards/b/mean": 60 * n, "epoch": n + 1} for n in range(3)]
    reward_curve(log, tmp_path / "several.png")
    reward_curve([{"reward": n, "rewards/a/mean": n, "epoch": n + 1} for n in range(3)], tmp_path / "one.png")
    several, one = (Image.open(tmp_path / f"{name}.png") for name in ("several", "one"))
    assert (one.size, several.size) == ((900, 525), (900, 900))


@pytest.mark.parametrize("resumed", [["a"], ["a", "b", "c"], ["c"]])
def test_a_reward_that_a_resumed_run_lacks_or_adds_has_a_curve(tmp_path, resumed):
    log = lambda n, names: {"reward": n, "epoch": n, **{f"rewards/{name}/mean": n for name in names}}
    reward_curve([*(log(n, ["a", "b"]) for n in range(2)), log(2, resumed)], tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").height == 300 * (1 + len({"a", "b", *resumed}))


def test_wide_rows_are_reduced_to_a_sheet_that_a_screen_can_show():
    page = sheet([Section("a", rows_of([Panel(solid(n, 1024, 1024), "r") for n in range(16)], 8))])
    assert page.width <= 2048
    assert sheet([Section("a", [[Panel(solid(0, 1024, 1024), "r")] * 2])]).width == 2 * 512 + GAP + 2 * MARGIN


def test_lines_keep_every_word_and_fit():
    font = ImageFont.load_default(16)
    for text in (LONG, "x" * 400, "a " + "y" * 100 + " b"):
        lines = _lines(text, font, 200)
        assert all(0 < font.getlength(line) <= 200 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert _lines(" a  b ", font, 200) == ["a b"]


def test_text_that_is_too_long_says_so():
    short, long = (sheet([Section(text, [[Panel(solid(0, 256, 256), "")]])]) for text in (LONG[:900], LONG))
    assert short.size == long.size, "eight lines each"
    assert np.asarray(short).tobytes() == np.asarray(long).tobytes()


def test_a_font_that_has_the_characters_is_taken():
    missing = lambda font, character: bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))
    plain = _font(set("abc 123"), 16)
    assert plain.getname() == ImageFont.load_default(16).getname()
    accented = _font(set("café"), 16)
    if accented.getname() == plain.getname():
        pytest.skip("this machine has no other font")
    assert missing(plain, "é") and not missing(accented, "é")


def test_a_sheet_that_a_format_cannot_hold_is_a_png(tmp_path, caplog):
    path = tmp_path / "my.grid.webp"
    assert save_sheet(Image.new("RGB", (8, 16_000)), path) == path and Image.open(path).height == 16_000
    written = save_sheet(Image.new("RGB", (8, 17_000), "red"), path)
    assert "my.grid.webp cannot hold a page of 8 x 17000 pixels" in caplog.text
    assert list(tmp_path.iterdir()) == [written] and written.name == "my.grid.png"
    assert Image.open(written).getpixel((7, 16_999)) == (255, 0, 0)
