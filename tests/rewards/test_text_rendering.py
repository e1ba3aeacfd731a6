import functools
import itertools
import logging
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from transformers import TrainerState

from trl_fdfo.rewards import RewardFunctions
from trl_fdfo.rewards.text_rendering import TextRendering, _edit_distance, _reading_order, _target


def draw(*texts: tuple[int, int, int, str], size: int = 512) -> Image.Image:
    """Black on white: (x, y, font size, text)."""
    image = Image.new("RGB", (size, size), "white")
    for x, y, font_size, text in texts:
        ImageDraw.Draw(image).text((x, y), text, fill="black", font=ImageFont.load_default(font_size))
    return image


WELCOME = draw((80, 200, 60, "WELCOME"))
BLANK = draw()


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return TextRendering()


# ---------------------------------------------------------------------------------------------------------------------
# With the OCR


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("WELCOME", 1),
        ("Wel come", 1),
        ("ＷＥＬＣＯＭＥ", 1),
        ("WELCAME", 1 - 1 / 7),  # one wrong
        ("WELCOMED", 1 - 1 / 8),  # one missing in the image
        ("WELCOM", 1 - 1 / 6),  # one too many
        ("WELCOME HOME", 1 - 4 / 11),
        ("12", 0),  # nothing in common, and more read than asked for
    ],
)
def test_each_character_counts(reward, text, score):
    assert reward([WELCOME], [f'a sign with "{text}"']) == [pytest.approx(score)]


def test_no_text_is_0_and_no_quotes_do_not_apply(reward):
    prompts = ['a sign with "welcome"', "a sign", 'a sign with ""', "a sign with “welcome”"]
    assert reward([BLANK] * 4, prompts) == [0, None, None, 0]
    assert reward([WELCOME] * 4, prompts) == [1, None, None, 1]


def test_scribble_has_a_slope(reward):
    blurred = [WELCOME.filter(ImageFilter.GaussianBlur(radius)) for radius in (0, 9, 12, 40)]
    scores = reward(blurred, ['"welcome"'] * 4)
    assert scores[0] == 1 > scores[1] > scores[2] > 0 == scores[3]


def test_text_on_its_head_is_not_read(reward):
    assert reward([WELCOME.rotate(180)], ['"welcome"'])[0] < 0.5


def test_column_comes_before_the_quotes(reward):
    prompts = ['"welcome"', '"welcome"', '"welcome"', "welcome", "a sign", '"welcome"']
    text = ["WELCAME", None, '"welcome"', "welcome", "Welcome", ""]
    # The third and fourth repeat the prompt, as where the prompts' own column is called `text`.
    assert reward([WELCOME] * 6, prompts, text) == [pytest.approx(6 / 7), 1, 1, None, 1, None]
    with pytest.raises(ValueError, match="got text=2024, a int, for the prompt 'a year': the column 'text' must hold"):
        reward([BLANK], ["a year"], [2024])


def test_lines_and_words_in_reading_order(reward):
    # The low letters of "on" start further down than the high ones of "Hold": by their tops, "Hold" would come first.
    image = draw((20, 200, 60, "on"), (300, 200, 60, "Hold"), (20, 300, 60, "Please"))
    assert reward([image] * 3, ['"on hold please"', '"hold on please"', '"on" and "Hold" and "PLEASE"']) == [
        1,
        pytest.approx(1 - 2 / 12),  # as well as without "on"
        1,
    ]


def test_other_text_in_the_image_costs_nothing(reward):
    sign = [(20, 100, 40, "HOT"), (20, 200, 40, "COFFEE")]
    assert reward([draw(*sign, (320, 150, 40, "EXIT"))], ['"hot coffee"']) == [1]
    # Nor does it help.
    assert reward([draw((320, 150, 40, "EXIT"))], ['"hot coffee"'])[0] < 0.25


def test_punctuation_in_any_style(reward):
    image = draw((40, 200, 60, "DON'T STOP!"))
    assert reward([image] * 2, ["x"] * 2, ["don’t stop！", "don't stop?"]) == [1, pytest.approx(1 - 1 / 10)]


def test_a_video_is_the_mean_or_the_minimum_of_its_frames(reward):
    videos = [[WELCOME, BLANK, BLANK, BLANK], [WELCOME, WELCOME]]
    assert reward(videos, ['"welcome"'] * 2) == [0.25, 1]
    assert reward(videos, ["none"] * 2) == [None, None]
    assert TextRendering(frames="min")(videos, ['"welcome"'] * 2) == [0, 1]


def test_images_of_any_size(reward):
    rng = np.random.default_rng(0)
    shapes = [(1, 1, 3), (16, 16, 3), (8, 1024, 3), (1024, 8, 3)]
    images = [Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)) for shape in shapes]
    # OCR may see a letter or two in noise.
    assert all(0 <= score < 0.5 for score in reward(images, ['"welcome"'] * 4))
    # Small print of a large image.
    assert reward([draw((100, 600, 16, "open all night"), size=1024)], ['"open all night"']) == [1]


def test_through_the_trainers_images_and_from_several_threads(reward):
    assert TextRendering.background is True
    functions = RewardFunctions(reward)
    functions.check_columns(["prompt"])
    images = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in (WELCOME, BLANK)])
    prompts = ['"welcome"'] * 2
    assert functions(images, prompts, TrainerState(), {"prompt": prompts})[:, 0].tolist() == [1, 0]
    texts = ["welcome", "welcame", "exit", "12"]
    expected = [reward([WELCOME], ["x"], [text]) for text in texts] * 2
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: reward([WELCOME], ["x"], [text]), texts * 2)) == expected


def test_ocr_is_silent(caplog):
    pytest.importorskip("rapidocr")
    log = logging.getLogger("RapidOCR")
    log.addHandler(caplog.handler)
    try:
        # Loads the models, and finds no text.
        reward = TextRendering()
        reward([BLANK], ['"welcome"'])
        assert not [record for record in caplog.records if record.name == log.name]
        log.setLevel("INFO")
        reward([BLANK], ['"welcome"'])
        assert "text detection result is empty" in caplog.text
    finally:
        log.setLevel("ERROR")
        log.removeHandler(caplog.handler)


# ---------------------------------------------------------------------------------------------------------------------
# Without it


@pytest.mark.parametrize("module", ["rapidocr", "onnxruntime"])
def test_missing_library_says_what_to_install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs rapidocr and onnxruntime: pip install 'trl_fdfo\[ocr\]'"):
        TextRendering()


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a "Big  Sale" today', "bigsale"),
        ("“Open” above «late»", "openlate"),
        ("„Auf“ und »zu«", "aufzu"),
        ('写着"你好"的牌子', "你好"),
        ('two lines: "one\ntwo"', "onetwo"),
        ('a 12" pizza in a box that says "HOT"', "hot"),
        ('"Route 66" and "7"', "route667"),
        ("it's a dog's life", ""),
        ('an "unclosed quote', ""),
        ('" "', ""),
    ],
)
def test_text_in_quotes(prompt, target):
    assert _target(prompt, None) == target


def test_edit_distance_is_that_of_the_best_choice_of_boxes():
    @functools.cache
    def levenshtein(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(levenshtein(a[1:], b) + 1, levenshtein(a, b[1:]) + 1, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    word = lambda longest: "".join(rng.choices("abc", k=rng.randint(1, longest)))
    left_out = 0
    for _ in range(200):
        boxes, target = [word(4) for _ in range(rng.randint(0, 4))], word(8)
        choices = [chosen for n in range(len(boxes) + 1) for chosen in itertools.combinations(boxes, n)]
        assert _edit_distance(boxes, target) == min(levenshtein("".join(chosen), target) for chosen in choices)
        left_out += _edit_distance(boxes, target) < levenshtein("".join(boxes), target)
    assert 20 < left_out < 180
    # With one box, the plain distance, at most the length: the reward lies in [0, 1].
    assert _edit_distance(["kitten"], "sitting") == 3
    assert _edit_distance(["something else"], "abc") == 3


def test_reading_order():
    def box(left, top, width, height):
        return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]

    boxes = [
        # A large word, and beside it two small ones at somewhat different heights.
        *(box(120, 30, 80, 30), box(20, 10, 80, 100), box(220, 22, 80, 30)),
        # A small word, and beside it a large one whose middle is higher.
        *(box(200, 150, 80, 100), box(60, 205, 80, 30)),
    ]
    assert _reading_order(np.array(boxes)) == [1, 0, 2, 4, 3]
