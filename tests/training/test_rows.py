"""Rows beyond the first: of other sizes, of other image modes, and damaged."""

import io

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights
from datasets import Dataset, Image
from PIL import Image as PILImage
from tiny_pipelines import flux_kontext
from tiny_runs import PROMPTS, UnplannedTrainer, redness

from trl_fdfo import FDFOTrainer
from trl_fdfo.evaluation.evaluator import DifferentSizesError, needed_columns, read_rows
from trl_fdfo.rewards.reward_functions import RewardFunctions
from trl_fdfo.seeds import derive_seed


def brightness(images, prompts):
    return images.flatten(1).mean(dim=1)


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def images(*pictures):
    """A column of images; None is a damaged one."""
    return [{"bytes": b"damaged", "path": None} if p is None else encoded(p) for p in pictures]


@pytest.fixture
def train(make_config):
    """A trainer of a dataset with the columns."""

    def make(columns, pipeline=None, reward_fn=brightness, config=make_config, eval_dataset=None, **options):
        dataset = Dataset.from_dict({"prompt": PROMPTS[:4], **columns})
        for name, values in columns.items():
            if isinstance(values[0], dict):
                dataset = dataset.cast_column(name, Image())
        config = config(num_rollouts=1, **options)
        return UnplannedTrainer(
            config, pipeline or tiny_pipelines.sd3(), reward_fn, train_dataset=dataset, eval_dataset=eval_dataset
        )

    return make


def test_names_of_image_files_are_opened(train, tmp_path):
    files = [str(tmp_path / f"{n}.png") for n in range(4)]
    for n, file in enumerate(files):
        PILImage.new("RGB", (16, 16), (60 * n, 0, 0)).save(file)
    seen = []

    def closeness(images, image):
        seen.extend(image)
        return images.flatten(1).mean(dim=1)

    options = {"pipeline_columns": ["image"], "per_device_prompt_batch_size": 1, "height": None, "width": None}
    call = {"max_area": 16 * 16, "_auto_resize": False, "max_sequence_length": 8}
    train({"image": files}, flux_kontext.build(), closeness, pipeline_kwargs=call, **options).train()
    assert {image.getpixel((0, 0)) for image in seen} == {(60 * n, 0, 0) for n in range(4)}


# Sizes ----------------------------------------------------------------------------------------------------------------


SIZES = {"height": None, "width": None, "per_device_prompt_batch_size": 1, "pipeline_columns": ["height", "width"]}


def test_sizes_may_differ_between_batches(train, caplog):
    columns = {"height": [16, 32, 16, 16], "width": [16, 16, 24, 16]}
    trainer = train(columns, logging_images_steps=2, **SIZES)
    shapes = set()
    reward = trainer.reward_functions.functions[0]
    trainer.reward_functions.functions[0] = lambda images, prompts: shapes.add(images.shape) or reward(images, prompts)
    before = trained_weights(trainer)
    trainer.train()
    assert {tuple(shape[-2:]) for shape in shapes} == {(16, 16), (32, 16), (16, 24)}
    assert logged(trainer, "replay_error") == [0.0] and 0 < logged(trainer, "branch_distance")[0] < 1
    assert any(not torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())
    metrics = trainer.evaluate(trainer.train_dataset)
    expected = [
        brightness(
            trainer.generate([prompt], [derive_seed(42, n, 0, 3)], {k: [v[n]] for k, v in columns.items()}), None
        )
        for n, prompt in enumerate(PROMPTS[:4])
    ]
    assert metrics["eval_reward"] == pytest.approx(torch.cat(expected).mean().item(), abs=1e-6)
    with pytest.raises(DifferentSizesError, match=r"sizes \(height, width\), such as \(16, 16\) and \(32, 16\)"):
        trainer.generate(PROMPTS[:2], [0, 1], {name: values[:2] for name, values in columns.items()})
    trainer.comparison = trainer.compare()
    trainer.comparison.complete()
    assert "The model card has no images: " in caplog.text
    trainer.create_model_card()


def test_metrics_of_batches_are_those_of_the_whole(make_trainer):
    metrics = make_trainer().metrics
    endpoints = torch.randn(12, 2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    for batches in ([endpoints], endpoints.split(4), endpoints.split(1), endpoints.split([1, 11])):
        metrics.add_branches(batches, None)
    for name in ("branch_rms", "branch_distance"):
        assert all(torch.equal(value, metrics.values[name][0]) for value in metrics.values[name][1:])


# Images ---------------------------------------------------------------------------------------------------------------


def kontext(make_config, **options):
    call = {"max_area": 256, "_auto_resize": False, "max_sequence_length": 8}
    return make_config(pipeline_columns=["image"], pipeline_kwargs=call, per_device_prompt_batch_size=1, **options)


# In the first row RGBA passes for latents, of which the tiny VAE has four channels too.
@pytest.mark.parametrize("modes", [("L", "RGBA", "P", "1"), ("P", "LA", "L", "RGBA"), ("LA", "1", "RGB", "P")], ids=str)
def test_images_of_other_modes_are_converted_as_diffusers_does(train, make_config, modes):
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    others = [PILImage.fromarray(pixels).convert(mode) for pixels, mode in zip(noise, modes)]
    config = lambda **options: kontext(make_config, **options)
    weights = []
    for pictures in (others, [picture.convert("RGB") for picture in others]):
        trainer = train({"image": images(*pictures)}, flux_kontext.build(), config=config)
        trainer.train()
        assert logged(trainer, "replay_error") == [0.0]
        weights.append(trained_weights(trainer))
        weights[-1]["images"] = trainer.generate(PROMPTS[:4], range(4), {"image": pictures})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_damaged_image_that_nothing_uses_is_not_read(train):
    good = PILImage.new("RGB", (16, 16))
    for column in (images(good, None, None, None), images(None, None, None, None)):
        trainer = train({"photo": column, "label": [1, 2, 3, 4]})
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
        trainer.comparison = trainer.compare()
        trainer.comparison.complete()
        trainer.create_model_card()


def test_a_damaged_image_that_is_used_is_named(train, make_config):
    colour = PILImage.new("RGB", (16, 16), "red")
    column = images(colour, colour, None, colour)

    def seen(images, prompts, photo):
        assert all(isinstance(each, PILImage.Image) for each in photo)
        return brightness(images, prompts)

    message = "Row 2 of train_dataset cannot be read: its column '{}' is damaged or missing .*leave the row out"
    with pytest.raises(ValueError, match=message.format("photo")):
        train({"photo": column}, reward_fn=seen).train()
    with pytest.raises(ValueError, match=message.format("photo")):
        train({"photo": column}, reward_fn=lambda images, **columns: brightness(images, None)).train()
    config = lambda **options: kontext(make_config, **options)
    with pytest.raises(ValueError, match=message.format("image")):
        train({"image": column}, flux_kontext.build(), config=config).train()


def test_the_rows_of_a_failing_batch_are_named(train):
    trainer = train({"height": [16, 16, 64, 16], "width": [16] * 4}, **SIZES)  # 32 is the most of its transformer
    with pytest.raises(ValueError) as raised:
        trainer.train()
    assert "Raised by the rows [2] of the train_dataset." in raised.value.__notes__


def test_sizes_of_rows_are_checked_before_the_run(train):
    with pytest.raises(ValueError, match="height=17 is not a multiple of"):
        train({"height": [16, 16, 17, 16], "width": [16] * 4}, **SIZES)


def test_rows_are_read_as_the_dataset_has_them():
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "label": [1, 2], "photo": images(None, None)})
    dataset = dataset.cast_column("photo", Image())
    assert read_rows(dataset, [1, 0], ["prompt", "label"]) == {"prompt": ["b", "a"], "label": [2, 1]}


# Formats and seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{"type": "numpy"}, {"type": "torch"}, {"columns": ["prompt", "label"]}])
def test_a_formatted_dataset_trains_to_the_same_weights(make_config, form):
    seen = []

    def labelled(images, prompts, label, **columns):
        seen.append((prompts, label, sorted(columns)))
        return redness(images, prompts)

    weights, calls = [], []
    for options in ({}, form):
        dataset = Dataset.from_dict({"prompt": PROMPTS, "label": range(6)}).with_format(**options)
        trainer = UnplannedTrainer(
            make_config(num_rollouts=1), tiny_pipelines.sd3(), labelled, train_dataset=dataset, eval_dataset=dataset
        )
        trainer.train()
        trainer.evaluate()
        trainer.evaluate(dataset)
        weights.append(trained_weights(trainer))
        calls.append(list(seen))
        seen.clear()
    assert repr(calls[0]) == repr(calls[1])
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_columns_of_a_format_without_prompts_are_refused(make_config):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "label": range(6)}).with_format(columns=["label"])
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt' but label"):
        FDFOTrainer(make_config(), tiny_pipelines.sd3(), redness, train_dataset=dataset)


@pytest.mark.parametrize("whole", [np.arange, lambda n: torch.arange(n), lambda n: list(np.arange(n, dtype=np.uint8))])
def test_whole_numbers_of_any_library_are_seeds(make_trainer, whole):
    trainer = make_trainer()
    assert torch.equal(trainer.generate(PROMPTS[:3], whole(3)), trainer.generate(PROMPTS[:3], [0, 1, 2]))
    one, two = whole(3)[1:]
    assert derive_seed(one, two) == derive_seed(1, 2)


def test_whole_numbers_of_numpy_are_steps(make_trainer):
    trainer = make_trainer()
    images = trainer.generate(PROMPTS[:1], [0], num_inference_steps=np.int64(3))
    assert torch.equal(images, trainer.generate(PROMPTS[:1], [0], num_inference_steps=3))


def test_fractions_are_no_seeds(make_trainer):
    with pytest.raises(TypeError, match="float"):
        derive_seed(1.0)
    with pytest.raises(ValueError, match=r"seeds=\[0.5\]: give a list of ints"):
        make_trainer().generate(["a"], [0.5])


def test_a_reward_that_is_a_module_reads_the_columns_that_it_takes():
    """Its call takes anything and passes it on; a column that nothing takes may be damaged, or hold large images."""

    class Score(torch.nn.Module):
        def forward(self, images, prompts, style):
            return images.flatten(1).mean(dim=1)

    dataset = Dataset.from_dict({"prompt": PROMPTS, "style": PROMPTS, "image": PROMPTS})
    assert needed_columns(dataset, [RewardFunctions([Score()])], ["prompt"]) == ["prompt", "style"]


def test_a_class_method_is_a_reward():
    class Scores:
        scale = 2.0

        @classmethod
        def brightness(cls, images):
            return cls.scale * images.flatten(1).mean(dim=1)

    functions = RewardFunctions([Scores.brightness])
    assert functions.describe() == {"brightness": "1"}
    assert functions(torch.ones(2, 3, 4, 4), ["a", "b"], None, {}).tolist() == [[2.0], [2.0]]
