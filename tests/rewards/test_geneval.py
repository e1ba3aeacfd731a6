"""GenEval and counting: what they say of known objects, and the detector, a tiny random Mask2Former."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from tiny_clip import save_clip, vary
from torch import nn
from transformers import Mask2FormerConfig, SwinConfig, TrainerState

from trl_fdfo.rewards import GenEval, ObjectCount, RewardFunctions
from trl_fdfo.rewards.geneval import COLORS, TASKS, relations
from trl_fdfo.rewards.object_detector import DetectedObject, Segmenter


# As in published checkpoints: some classes have other names than in GenEval's prompts.
LABELS = ["person", "dog", "sofa", "mouse"]
RGB = dict(zip(COLORS, ["red", "orange", "yellow", "green", "blue", "purple", "pink", "saddlebrown", "black", "white"]))
SIZE = {"shortest_edge": 64, "longest_edge": 96}


def segmenter() -> Segmenter:
    torch.manual_seed(0)
    swin = {"image_size": 32, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}
    model = Segmenter(
        Mask2FormerConfig(
            backbone_config=SwinConfig(**swin, out_features=["stage1", "stage2", "stage3", "stage4"]),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=8,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=8,
            num_queries=10,
            id2label=dict(enumerate(LABELS)),
        )
    )
    vary(model)
    # A trained model is sure of most of its queries.
    nn.init.constant_(model.class_predictor.bias[-1], -20)
    model.class_predictor.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    segmenter().save_pretrained(root / "detector")
    save_clip(root / "clip")
    return {"detector": str(root / "detector"), "clip": str(root / "clip")}


class Painted(nn.Module):
    """In the place of CLIP: an image is the color of what is not the background, a phrase the color that it names."""

    def in_batches(self, embed, values):
        return torch.stack([embed(value) for value in values])

    def embed_images(self, image):
        pixels = np.asarray(image).reshape(-1, 3).astype(np.float32)
        shown = pixels[(pixels != 0x99).any(axis=1)]
        return self.direction(shown.mean(axis=0))

    def embed_prompts(self, phrase):
        (color,) = [color for color in COLORS if f" {color}" in phrase]
        return self.direction(np.asarray(Image.new("RGB", (1, 1), RGB[color]), dtype=np.float32)[0, 0])

    def direction(self, color):
        return nn.functional.normalize(torch.cat([torch.tensor(color) - 127, torch.tensor([60.0])]), dim=0)

    def on_rollout_end(self):
        pass


def picture(*objects, size=(96, 64)):
    """An image of painted boxes, and what a perfect detector finds: (class, color, box, confidence)."""
    image = Image.new("RGB", size, "gray")
    found = {}
    for name, color, box, score in objects:
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), RGB[color])
        mask = torch.zeros(size[1], size[0], dtype=torch.bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        found.setdefault(LABELS.index(name), []).append(DetectedObject(score, mask, box))
    image.found = {label: sorted(each, key=lambda o: -o.score) for label, each in found.items()}
    return image


class Perfect:
    """Finds what was painted."""

    image_size = SIZE

    def detect(self, images, thresholds):
        return [
            {label: [o for o in each if o.score > threshold] for label, each in image.found.items()}
            for image, threshold in zip(images, thresholds)
        ]


class KnownGenEval(Perfect, GenEval):
    pass


class KnownCount(Perfect, ObjectCount):
    pass


@pytest.fixture(scope="module")
def geneval(folders):
    @functools.cache
    def make(**options):
        reward = KnownGenEval(**folders, device="cpu", batch_size=2, **options)
        reward.clip = Painted()
        return reward

    return make


LEFT, MIDDLE, RIGHT, LOW = (4, 20, 24, 40), (38, 20, 58, 40), (70, 20, 90, 40), (70, 44, 90, 64)


def dog(color="red", box=LEFT, score=0.95):
    return ("dog", color, box, score)


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


ONE = [clause("dog")]
TWO = [clause("dog"), clause("couch")]
THREE = [clause("dog", 3)]
RED = [clause("dog", color="red")]
BESIDE = [clause("dog"), clause("couch", position=["right of", 0])]
ATTRIBUTES = [clause("dog", color="red"), clause("couch", color="blue")]
sofa = lambda color="blue", box=RIGHT: ("sofa", color, box, 0.92)


@pytest.mark.parametrize(
    ("tag", "include", "objects", "expected"),
    [
        ("single_object", ONE, [dog()], 1),
        ("single_object", ONE, [dog(), dog(box=RIGHT)], 1),  # at least one
        ("single_object", ONE, [sofa()], 0),
        ("single_object", ONE, [dog(score=0.25)], 0),  # too uncertain
        ("two_object", TWO, [dog(), sofa()], 1),
        ("two_object", TWO, [dog()], 1 / 2),
        ("counting", THREE, [dog(), dog(box=MIDDLE), dog(box=RIGHT)], 1),
        ("counting", THREE, [dog(), dog(box=MIDDLE)], (2 / 3 + 1) / 2),
        ("counting", THREE, [dog(), dog(box=MIDDLE), dog(box=RIGHT, score=0.8)], (2 / 3 + 1) / 2),  # 0.9 is needed
        ("counting", THREE, [dog(), dog(box=MIDDLE), dog(box=RIGHT), dog(box=LOW)], (1 + 3 / 4) / 2),
        ("colors", RED, [dog("red")], 1),
        ("colors", RED, [dog("green")], 1 / 2),
        ("colors", RED, [dog("green", score=0.9), dog("red", RIGHT, 0.8)], 1 / 2),  # the more certain one counts
        ("colors", RED, [], 0),
        ("position", BESIDE, [dog(), sofa()], 1),
        ("position", BESIDE, [dog(box=RIGHT), sofa(box=LEFT)], 2 / 3),
        ("position", BESIDE, [sofa()], 1 / 3),
        ("color_attr", ATTRIBUTES, [dog("red"), sofa("blue")], 1),
        ("color_attr", ATTRIBUTES, [dog("blue"), sofa("red")], 1 / 2),
    ],
)
def test_each_task(geneval, tag, include, objects, expected):
    exclude = [clause("dog", 4)] if tag == "counting" else None
    columns = {"tag": [tag], "include": [include], "exclude": [exclude]}
    scores = geneval()(images=[picture(*objects)], **columns)
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx([expected])
    # The share is 1 exactly where GenEval says that the image is correct.
    assert geneval(strict=True)(images=[picture(*objects)], **columns).tolist() == [float(expected == 1)]
    # The same as JSON.
    as_json = {"include": [json.dumps(include)], "exclude": [json.dumps(exclude)]}
    assert torch.equal(geneval()(images=[picture(*objects)], tag=[tag], **as_json), scores)


def test_every_color_is_told_apart(geneval):
    reward = geneval(strict=True)
    images = [picture(dog(color)) for color in COLORS]
    for number, color in enumerate(COLORS):
        scores = reward(images, ["colors"] * 10, [[clause("dog", color=color)]] * 10)
        assert scores.tolist() == [float(n == number) for n in range(10)]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-40, 0, -20, 20), {"left of"}),
        ((40, 0, 60, 20), {"right of"}),
        ((0, -40, 20, -20), {"above"}),
        ((0, 40, 20, 60), {"below"}),
        ((40, 40, 60, 60), {"right of", "below"}),
        ((0, 0, 20, 20), set()),  # the same place
        ((3, 0, 23, 20), set()),  # 3 pixels of 40 are less than a tenth
        ((5, 0, 25, 20), set()),  # 1 pixel beyond the tenth is less than half of 5
        ((9, 0, 29, 20), {"right of"}),  # 5 of 9
    ],
)
def test_positions(box, expected):
    assert relations(box, (0, 0, 20, 20)) == expected


def test_columns_of_a_dataset_and_videos(geneval):
    # Arrow gives each clause all fields, with None where there is none; JSON keeps a position of a word and a number.
    dataset = Dataset.from_dict({"tag": ["colors", "counting"], "include": [RED, [clause("dog", 2)]]})
    assert dataset["include"][1] == [{"class": "dog", "count": 2, "color": None}]
    two, one = picture(dog(), dog(box=RIGHT)), picture(dog())
    videos = [[one, picture(dog("blue"))], [two, one, one, one]]
    assert geneval()(videos, **dataset[:]).tolist() == pytest.approx([0.75, 0.625])
    assert geneval(frames="min")(videos, **dataset[:]).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tag": "count"}, "tag='count' is no task: it must be one of single_object, .*color_attr"),
        ({"include": "[{"}, r"include='\[\{' is no JSON"),
        ({"include": "{}"}, r"include='\{\}' must be a list of clauses such as \{\"class\": \"dog\""),
        ({"include": []}, "include and exclude are empty"),
        ({"include": [clause("dogs")]}, "no class 'dogs' among its 4: did you mean 'dog'"),
        ({"include": [{"count": 1}]}, "no class None among its 4: "),
        ({"include": [clause("xylophone")]}, "no class 'xylophone' .*they are person, dog, sofa, mouse, couch"),
        ({"include": [clause("dog", 0)]}, "the count of 'dog' is 0: it must be a whole number"),
        ({"include": [clause("dog", "2")]}, "the count of 'dog' is '2'"),
        ({"include": [clause("dog", color="crimson")]}, "'crimson' is no color that is told apart: .* red, orange"),
        ({"include": [clause("dog", position=["near", 0])]}, r"the position of 'dog' is \['near', 0\]: .* left of"),
        ({"include": [clause("dog", position="left of")]}, "the position of 'dog' is 'left of': it must be one of"),
        (
            {"include": [clause("dog", position=["above", 0])]},
            "relative to the clause 0, and include has others from 0",
        ),
        ({"include": [clause("dog", position=["above", 3])]}, "relative to the clause 3"),
        ({"exclude": [clause("cat")]}, "no class 'cat'"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_before_a_run(geneval, columns, message):
    row = {"tag": "colors", "include": ONE, "exclude": []} | columns
    good = {"tag": "colors", "include": json.dumps(ONE), "exclude": "[]"}
    row = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    functions = RewardFunctions(geneval())
    dataset = Dataset.from_list([good, row])
    functions.check_rows(dataset.select([0]))
    with pytest.raises(ValueError, match=f"Reward 'KnownGenEval' cannot score eval_dataset: .* row 1: .*{message}"):
        functions.check_rows(dataset, "eval_dataset")


def test_a_dataset_without_the_columns_is_refused(geneval):
    functions = RewardFunctions([geneval(), KnownCount.__new__(KnownCount)])
    with pytest.raises(
        ValueError, match="'KnownGenEval' needs the argument 'tag', and train_dataset has no such column"
    ):
        functions.check_columns(["prompt"])
    with pytest.raises(ValueError, match="'KnownCount' needs the argument 'object'"):
        functions.check_columns(["prompt", "tag", "include"])


def test_by_a_server(geneval):
    pytest.importorskip("uvicorn")
    from trl_fdfo.rewards.serving import Scorer

    description = Scorer(geneval()).description
    assert description["needs"] == ["images", "tag", "include"] and description["takes"] == ["exclude"]
    assert description["image_type"] == "pil" and "strict=False" in description["settings"]


def test_counting(folders):
    reward = KnownCount(folders["detector"], device="cpu", batch_size=2)
    one, two = picture(dog()), picture(dog(), dog(box=RIGHT), sofa(box=MIDDLE))
    images, names = [one, two, one, two, two], ["dog", "dog", "dog", "couch", None]
    assert reward(images, names, [1, 1, 4, 4, 1]) == pytest.approx([1, 0, 0.25, 0.25, None])
    assert reward(images[:2], ["dog"] * 2, [3.0, 3]) == pytest.approx([1 / 3, 2 / 3])
    assert KnownCount(folders["detector"], threshold=0.96, device="cpu")([one], ["dog"], [1]) == [0]
    assert reward([[one, two]], ["dog"], [2]) == [0.75]
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"cannot read row 1: count={count} must be a whole number from 1 on"):
            reward.check_rows(["dog", "dog"], [1, count])
    with pytest.raises(ValueError, match="row 0: the detector has no class 'dogg' .*'dog'"):
        reward.check_rows(["dogg"], [1])
    with pytest.raises(ValueError, match="threshold=1 of ObjectCount is a confidence"):
        ObjectCount(folders["detector"], threshold=1)


# ---------------------------------------------------------------------------------------------------------------------
# The detector


class Small(ObjectCount):
    image_size = SIZE


class Large(ObjectCount):
    image_size = {"shortest_edge": 384, "longest_edge": 384}


def test_objects_are_those_of_transformers(folders):
    """At 384 pixels, where its own post-processing works at the size of the image."""
    reward = Large(folders["detector"], device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(384, 384, 3), dtype=np.uint8))
    inputs = reward.image_processor([image], return_tensors="pt")
    with torch.no_grad():
        classes, masks = reward.model(**inputs)
        (objects,) = reward.detect([image], [0.2])
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    (expected,) = reward.image_processor.post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)], return_binary_maps=True
    )
    assert len(expected["segments_info"]) > 2
    for info, mask in zip(expected["segments_info"], expected["segmentation"]):
        (found,) = [o for o in objects[info["label_id"]] if o.score == pytest.approx(info["score"], abs=2e-6)]
        assert torch.equal(found.mask, mask.bool())
        rows, columns = mask.nonzero(as_tuple=True)
        assert found.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert sum(map(len, objects.values())) == len(expected["segments_info"])
    for each in objects.values():
        assert [o.score for o in each] == sorted((o.score for o in each), reverse=True)


class Fixed(nn.Module):
    """Logits of three queries: a sure dog at the top left, an unsure one at the bottom right, and an empty mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("device_of", torch.zeros(1))
        classes = torch.zeros(3, 5)
        for query, probability in enumerate([0.96, 0.6, 0.9]):
            classes[query] = torch.tensor([0.0, 1, 0, 0, 0]) * torch.tensor(4 * probability / (1 - probability)).log()
        masks = torch.full((3, 16, 24), -20.0)
        masks[0, 4:8, 2:10] = 20
        masks[1, 8:12, 12:24] = 20
        self.classes, self.masks = classes, masks

    @property
    def device(self):
        return self.device_of.device

    def forward(self, pixel_values, pixel_mask):
        assert pixel_values.shape[-2:] == (64, 96)
        count = len(pixel_values)
        return self.classes.expand(count, -1, -1), self.masks.expand(count, -1, -1, -1)


def test_boxes_and_scores_in_images_of_several_sizes(folders):
    reward = Small(folders["detector"], device="cpu")
    reward.model = Fixed()
    sizes = [(96, 64), (192, 128), (64, 64)]
    wide, double, square = reward.detect([Image.new("RGB", size) for size in sizes], [0.3, 0.3, 0.9])
    first, second = wide[1]
    assert first.box == (8, 16, 40, 32) and second.box == (48, 32, 96, 48)
    assert first.score == pytest.approx(0.96, abs=0.02) and second.score == pytest.approx(0.6, abs=0.02)
    assert first.mask.shape == (64, 96) and first.mask.sum() == 32 * 16 - 4  # without its corners
    # In an image of twice the size, boxes are twice as large; a narrower one is padded, and the padding is cut off.
    assert [each.box for each in double[1]] == [(16, 32, 80, 64), (96, 64, 192, 96)]
    assert [each.box for each in square[1]] == [(8, 16, 40, 32)]
    assert first.mask.device.type == "cpu" and list(wide) == [1]


def test_names_of_classes(folders):
    reward = Small(folders["detector"], device="cpu")
    names = ("sofa", "couch", "Couch", "computer mouse", "mouse", "dog")
    assert [reward.class_number(name) for name in names] == [2, 2, 2, 3, 3, 1]


def test_other_models_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"detector='.*clip' is no Mask2Former: it lacks \d+ weights, such as"):
        ObjectCount(folders["clip"])
    with pytest.raises(OSError, match="Cannot load a Segmenter from '.*nothing', which must be a folder or a model"):
        ObjectCount(str(tmp_path / "nothing"))


def test_as_a_reward_of_a_trainer(folders):
    reward = GenEval(**folders, device="cpu", offload=True)
    reward.image_processor = Small(folders["detector"], device="cpu").image_processor
    functions = RewardFunctions(reward)
    columns = {"prompt": ["a", "b"], "tag": ["color_attr", "position"], "include": [ATTRIBUTES, BESIDE]}
    functions.check_columns(list(columns))
    functions.check_rows(Dataset.from_dict({**columns, "include": list(map(json.dumps, columns["include"]))}))
    scores = functions(torch.rand(2, 3, 64, 64), columns["prompt"], TrainerState(), columns)
    assert scores.shape == (2, 1) and 0 <= scores.min() and scores.max() <= 1
    functions.on_rollout_end()
    assert not any(
        p.requires_grad or p.is_cuda for model in (reward.model, reward.clip.model) for p in model.parameters()
    )
    assert set(TASKS) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
