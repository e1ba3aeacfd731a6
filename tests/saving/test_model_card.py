"""Model cards without a Hub; the tests that need a Hub are in test_hub.py."""

import ast
import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from forward_runs import make_forward  # noqa: F401
from huggingface_hub import ModelCard
from peft import LoKrConfig
from PIL import Image
from tiny_runs import PROMPTS, redness
from transformers import SchedulerType

from trl_fdfo import AWMTrainer, DiffusionNFTTrainer, RAMTrainer, shapes
from trl_fdfo.comparison import Comparison
from trl_fdfo.media import Media, Outputs
from trl_fdfo.pipeline.loading import load_pipeline
from trl_fdfo.reporting.clips import read_wav
from trl_fdfo.saving.hub import PushError
from trl_fdfo.saving.model_card import (
    PACKAGED_TEMPLATE,
    CardRecord,
    Paper,
    PipelineRecord,
    SampleRecord,
    TrainingRecord,
    check_template,
    usage_snippet,
    write_model_card,
)


PAPER = Paper("A Title: Whole", ["Doe, Jane", "Roe, Richard"], "2001.00001", 2020, "doe2020title")
PIPELINE = PipelineRecord("StableDiffusion3Pipeline", torch.bfloat16, {"height": 16, "latents": torch.zeros(1)})
LOGS = [{"reward": 0.1 * n, "epoch": n} for n in range(3)]
TRAINING = TrainingRecord(
    rewards=[("redness", 1.0), ("constant", 0.5)],
    hyperparameters={"churn": 0.2, "beta": None, "lr_scheduler_type": SchedulerType.LINEAR},
    num_prompts=1234,
    first_prompt="a cat",
    rollouts=2000,
    images=16000,
    log_history=LOGS,
    seconds=5400.0,
)
VIDEOS = Outputs(("images", "videos"))
VIDEOS_WITH_SOUND = Outputs(("images", "videos", "audio"), frame_rate=8.0, sampling_rate=100)
SOUNDS = Outputs(("audio",), sampling_rate=100)
RECORD = CardRecord("Algorithm", PAPER, "me/my-lora", "diffusers", PIPELINE, TRAINING)


def constant(images, prompts):
    return [2.0] * len(images)


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def table(text, head):
    """Return the cells of the table whose head begins with `head`."""
    lines = text[text.index(f"| {head} |") if head else text.index("| |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|--")]


# Records without a trainer --------------------------------------------------------------------------------------------


def written(folder, **changes) -> ModelCard:
    write_model_card(replace(RECORD, **changes), folder)
    return card_of(folder)


def test_a_card_of_a_training_without_samples(tmp_path):
    card = written(tmp_path / "new" / "folder")
    data = card.data.to_dict()
    assert data["tags"] == ["text-to-image", "diffusers", "trl", "algorithm", "lora"]
    assert not {"base_model", "base_model_relation", "datasets", "license", "widget"} & data.keys()
    assert card.text.lstrip().startswith("# my-lora\n\nLoRA weights for a `StableDiffusion3Pipeline`, post-trained")
    assert "with Algorithm ([A Title: Whole](https://arxiv.org/abs/2001.00001)), a method" in card.text
    assert "to raise `redness` and `constant`." in card.text and "## Results" not in card.text
    assert "trained with `height=16`: other" in card.text, "a tensor is no literal"
    assert "2,000 rollouts, 16,000 images, of 1,234 prompts from a list of its own, in 90 min." in card.text
    assert table(card.text, "reward | weight")[1:] == [["`redness`", "1"], ["`constant`", "0.5"]]
    assert table(card.text, "hyperparameter")[1:] == [["`churn`", "0.2"], ["`lr_scheduler_type`", "linear"]]
    assert [name for name, _ in table(card.text, "framework")[1:3]] == ["trl_fdfo", "torch"]
    assert card.text.endswith(f"```bibtex\n{PAPER.bibtex}\n```\n")
    assert Image.open(tmp_path / "new" / "folder" / "reward_curve.png").width > 500


def test_bibtex():
    assert PAPER.bibtex == (
        "@misc{doe2020title,\n"
        "  title         = {A Title: Whole},\n"
        "  author        = {Doe, Jane and Roe, Richard},\n"
        "  year          = {2020},\n"
        "  eprint        = {2001.00001},\n"
        "  archivePrefix = {arXiv},\n"
        "  url           = {https://arxiv.org/abs/2001.00001}\n"
        "}"
    )


@pytest.mark.parametrize(
    ("pipeline", "task"),
    [
        ({"columns": ["image"]}, "image-to-image"),
        ({"columns": ["image"], "outputs": VIDEOS}, "image-to-video"),
        ({"columns": ["image", "video"], "outputs": VIDEOS}, "video-to-video"),
        ({"columns": ["image"], "outputs": SOUNDS}, "text-to-audio"),
        ({"outputs": VIDEOS}, "text-to-video"),
        ({"outputs": VIDEOS_WITH_SOUND}, "text-to-video"),
        ({"outputs": SOUNDS}, "text-to-audio"),
    ],
)
def test_the_task_follows_from_the_pipeline(tmp_path, pipeline, task):
    assert written(tmp_path, pipeline=replace(PIPELINE, **pipeline)).data.pipeline_tag == task


@pytest.mark.parametrize(
    ("weights", "aim"),
    [
        ({"a": 1.0, "b": 0.5, "c": 2.0}, "to raise `a`, `b` and `c`."),
        ({"ocr": 1.0, "length": -0.5}, "to raise `ocr`, and to lower `length`."),
        ({"length": -0.5, "logged": 0.0}, "to lower `length`."),
    ],
)
def test_a_reward_with_a_negative_weight_is_lowered(tmp_path, weights, aim):
    text = written(tmp_path, training=replace(TRAINING, rewards=list(weights.items()))).text
    assert f"reinforcement learning for flow-matching models, {aim}\n" in text


def test_base_model_and_prompts(tmp_path):
    from_hub = replace(PIPELINE, hub_id="me/base")
    card = written(tmp_path, pipeline=from_hub, dataset_name="me/prompts", license="mit")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == ("me/base", "adapter", "mit")
    assert card.data.datasets == "me/prompts"
    assert "prompts from [me/prompts](https://huggingface.co/datasets/me/prompts)" in card.text
    options = {"base_model": "you/base", "license": "mit", "tags": "mine", "model_name": "Mine"}
    card = written(tmp_path, pipeline=from_hub, adapter=None, **options)
    assert (card.data.base_model, card.data.base_model_relation) == ("you/base", "finetune")
    assert card.data.tags[-2:] == ["algorithm", "mine"] and "# Mine\n\nA fine-tuned version of [you/base]" in card.text
    card = written(tmp_path, training=replace(TRAINING, prompt_file="words.txt"))
    assert "prompts from `words.txt`" in card.text


def test_snippets():
    assert usage_snippet(replace(RECORD, base_model="me/base")) == (
        "import torch\n"
        "from diffusers import StableDiffusion3Pipeline\n\n"
        "pipeline = StableDiffusion3Pipeline.from_pretrained(\n"
        '    "me/base",\n'
        "    dtype=torch.bfloat16,\n"
        ")\n"
        'pipeline.load_lora_weights("me/my-lora")\n'
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        'image = pipeline("a cat", height=16).images[0]\n'
        'image.save("image.png")'
    )
    by_peft = usage_snippet(replace(RECORD, base_model="me/base", adapter="peft"))
    assert 'PeftModel.from_pretrained(pipeline.transformer, "me/my-lora")' in by_peft and "load_lora" not in by_peft
    several = replace(PIPELINE, transformers=["transformer", "transformer_2"])
    by_peft = usage_snippet(replace(RECORD, pipeline=several, adapter="peft"))
    assert "from trl_fdfo.pipeline.trained import trained_module\n" in by_peft
    assert 'PeftModel.from_pretrained(trained_module(pipeline), "me/my-lora")' in by_peft
    whole = usage_snippet(replace(RECORD, adapter=None, base_model="me/base"))
    assert '    "me/my-lora",\n' in whole and "me/base" not in whole and "peft" not in whole
    for changes, base in (({}, "path/to/the/pipeline"), ({"folder": "own"}, "own"), ({"hub_id": "me/base"}, "me/base")):
        assert f'"{base}",' in usage_snippet(replace(RECORD, pipeline=replace(PIPELINE, **changes)))
    own = replace(PIPELINE, class_name="OwnPipeline", columns=["image"], outputs=VIDEOS, absent=["text_encoder_3"])
    own = usage_snippet(replace(RECORD, pipeline=own))
    assert "= DiffusionPipeline.from_pretrained(" in own and "    text_encoder_3=None," in own
    branch = replace(RECORD, base_model="me/base", revision="run2")
    assert 'pipeline.load_lora_weights("me/my-lora", revision="run2")\n' in usage_snippet(branch)
    of_second = replace(branch, pipeline=replace(PIPELINE, adapted=["transformer_2"]))
    assert 'prefix="transformer", revision="run2")\n' in usage_snippet(of_second)
    assert '(pipeline.transformer, "me/my-lora", revision="run2")' in usage_snippet(replace(branch, adapter="peft"))
    assert '    "me/my-lora", revision="run2",\n' in usage_snippet(replace(branch, adapter=None))
    packaged = usage_snippet(replace(RECORD, pipeline=replace(PIPELINE, packaged="a/b"), base_model="me/base"))
    assert "files(" not in packaged and '"me/base",' in packaged
    assert 'video = pipeline("a cat", image=load_image("image.png"), height=16).frames[0]' in own
    sound = usage_snippet(replace(RECORD, pipeline=replace(PIPELINE, outputs=SOUNDS)))
    assert sound.startswith("import torch\nimport soundfile\nfrom diffusers import")
    assert sound.endswith(
        'audio = pipeline("a cat", height=16).audios[0]\n'
        'soundfile.write("audio.wav", audio.T.float().cpu().numpy(), 100)'
    )
    both = usage_snippet(replace(RECORD, pipeline=replace(PIPELINE, outputs=VIDEOS_WITH_SOUND)))
    assert 'made = pipeline("a cat", height=16)\nvideo, audio = made.frames[0], made.audio[0]\nexport_to_video(' in both


def test_values_that_are_missing(tmp_path):
    images = {name: torch.rand(2, 1, 3, 16, 16) for name in ("before", "between", "after")}
    results = {"before": {"reward": float("nan")}, "after": {"reward": 0.12345, "own": 7.0}}
    samples = SampleRecord(["never seen", "nor this"], images, results, held_out=False, diversity="pixel_distance")
    card = written(tmp_path, samples=samples)
    assert table(card.text, "") == [["", "before", "after"], ["reward", "", "0.123"], ["own", "", "7"]]
    assert "Means over 2 images per column" in card.text and "it was trained on." in card.text
    assert "`pixel_distance`" not in card.text and "](before_after.png)" in card.text
    # Samples before training alone are no result.
    card = written(tmp_path / "early", samples=replace(samples, images={"before": images["before"]}))
    assert "## Results" not in card.text and "widget" not in card.data.to_dict()
    assert 'pipeline("never seen", height=16)' in card.text


def test_results_on_the_prompts_that_chose_the_weights_say_so(tmp_path):
    images = {name: torch.rand(2, 1, 3, 16, 16) for name in ("before", "after")}
    results = {name: {"reward": 1.0} for name in images}
    samples = SampleRecord(["a", "b"], images, results, held_out=True, diversity="pixel_distance")
    card = written(tmp_path, samples=samples, training=replace(TRAINING, best=(230, "eval_control")))
    assert "of prompts that were held out of training and by which these weights were chosen." in card.text
    assert "in 90 min. These are the weights after rollout 230, the best by `eval_control`.\n" in card.text
    assert "chosen" not in written(tmp_path, samples=samples).text


def test_the_middle_frame_stands_for_a_video(tmp_path):
    videos = torch.rand(1, 1, 5, 3, 16, 16)
    samples = SampleRecord(["a"], {"after": videos}, {}, held_out=True, diversity="pixel_distance")
    card = written(tmp_path, samples=samples, pipeline=replace(PIPELINE, outputs=VIDEOS))
    shown = torch.tensor(list(Image.open(tmp_path / "images" / "0.png").getdata())).reshape(16, 16, 3)
    assert torch.equal(shown, (videos[0, 0, 2].permute(1, 2, 0) * 255).round().long())
    assert [sample["text"] for sample in card.data.widget] == ["a"] and "before_after" not in card.text
    # The widget plays it.
    [url] = [sample["output"]["url"] for sample in card.data.widget]
    assert url in ("images/0.webp", "images/0.mp4") and (tmp_path / url).stat().st_size > 100


def test_sounds_are_played_and_their_spectrograms_compared(tmp_path):
    audio = torch.rand(2, 3, 1, 400)
    samples = SampleRecord(["a", "b"], {"before": audio, "after": audio}, {}, held_out=True, diversity="pixel_distance")
    card = written(tmp_path, samples=samples, pipeline=replace(PIPELINE, outputs=SOUNDS))
    assert [sample["output"]["url"] for sample in card.data.widget] == ["images/0.wav", "images/1.wav"]
    assert "](before_after.png)" in card.text
    torch.testing.assert_close(read_wav(tmp_path / "images" / "1.wav"), audio[1, 0], rtol=0, atol=1e-4)
    # Videos with their sound: the video is played, and its middle frames are compared.
    both = Media(torch.rand(2, 3, 5, 3, 16, 16), audio)
    samples = replace(samples, images={"before": both, "after": both})
    card = written(tmp_path, samples=samples, pipeline=replace(PIPELINE, outputs=VIDEOS_WITH_SOUND))
    assert all(sample["output"]["url"].endswith((".webp", ".mp4")) for sample in card.data.widget)
    # A rate that is not known: the picture alone.
    samples = replace(samples, images={"after": audio})
    card = written(tmp_path / "more", samples=samples, pipeline=replace(PIPELINE, outputs=Outputs(("audio",))))
    assert card.data.widget[0]["output"]["url"] == "images/0.png"


def test_own_template(tmp_path):
    template = tmp_path / "mine.md"
    template.write_text("---\n{{ card_data }}\n---\nMine: {{ model_name }}, {{ rewards[0][0] }}, {{ algorithm }}\n")
    assert written(tmp_path, template=template).text.strip() == "Mine: my-lora, redness, Algorithm"


def test_template_documents_every_variable():
    text = PACKAGED_TEMPLATE.read_text(encoding="utf-8")
    documented = set(re.findall(r"\b[a-z_]+\b", text[: text.index("-#}")]))
    import jinja2.meta

    used = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))
    assert used <= documented and len(used) > 15


def test_records_of_pipelines(tmp_path):
    pipeline = tiny_pipelines.sd3()
    of = lambda: PipelineRecord.of(pipeline, {"height": 16}, ["image"])
    expected = PipelineRecord(
        "StableDiffusion3Pipeline", torch.float32, {"height": 16}, ["image"], Outputs(), of().absent
    )
    assert of() == expected and "text_encoder_3" in of().absent and "image_encoder" not in of().absent
    pipeline.register_to_config(_name_or_path="me/base")
    assert (of().hub_id, of().folder) == ("me/base", None)
    pipeline.register_to_config(_name_or_path=str(tmp_path))
    assert (of().hub_id, of().folder) == (None, tmp_path.name)
    assert PipelineRecord.of(pipeline, {}, outputs=VIDEOS).outputs == VIDEOS


# Through a trainer ----------------------------------------------------------------------------------------------------


def test_every_saved_result_has_a_card(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "out" / "README.md").exists()
    card = card_of(tmp_path / "elsewhere")
    assert card.data.library_name == "diffusers" and "lora" in card.data.tags
    # A pipeline that was made here has no name, and nobody took samples.
    assert not {"base_model", "widget"} & card.data.to_dict().keys() and "## Results" not in card.text
    assert 'from_pretrained(\n    "path/to/the/pipeline",' in card.text
    assert "![Mean reward of each rollout](reward_curve.png)" in card.text
    assert Image.open(tmp_path / "elsewhere" / "reward_curve.png").width > 500
    assert "2 rollouts, 16 images, of 6 prompts from a list of its own" in card.text
    hyperparameters = dict(table(card.text, "hyperparameter")[1:])
    assert hyperparameters["`lora_r`"] == "4" and hyperparameters["`churn`"] == "0.2"


def test_a_card_names_the_kind_of_its_adapter_and_the_one_it_began_with(make_trainer, tmp_path):
    first = make_trainer(peft_config=LoKrConfig(r=4, target_modules=["to_q"]), output_dir=str(tmp_path / "first"))
    first.save_model()
    card = card_of(tmp_path / "first")
    assert "\n\nLoKr weights for a `StableDiffusion3Pipeline`" in card.text and "went on from" not in card.text
    assert "lokr" in card.data.tags and "lora" not in card.data.tags
    make_trainer(adapter=str(tmp_path / "first")).save_model()
    card = card_of(tmp_path / "out")
    assert "LoKr weights" in card.text and "`redness`. The training went on from the adapter `first`.\n" in card.text


@pytest.mark.parametrize(
    ("trainer_class", "has"),
    [
        (AWMTrainer, {"epsilon", "beta"}),
        (DiffusionNFTTrainer, {"nft_beta", "beta"}),
        (RAMTrainer, {"reward_multiplier"}),
    ],
)
def test_a_card_lists_what_its_algorithm_uses(make_forward, tmp_path, trainer_class, has):  # noqa: F811
    make_forward(trainer_class).save_model(str(tmp_path / "out"))
    listed = {row[0].strip("`") for row in table(card_of(tmp_path / "out").text, "hyperparameter")[1:]}
    assert listed & {"epsilon", "beta", "nft_beta", "reward_multiplier"} == has


def test_results_pictures_and_samples(make_trainer, tmp_path):
    held_out = Dataset.from_dict({"prompt": ["never seen", "nor this"]})
    rewards = [redness, constant]
    trainer = make_trainer(
        reward_fn=rewards, reward_weights=[1.0, 0.5], eval_dataset=held_out, eval_reward_fn=constant, learning_rate=1e-2
    )
    comparison = trainer.comparison = Comparison(trainer, metrics=lambda images, prompts: {"own": float(len(images))})
    comparison.sample("before")
    comparison.sample("before, guidance 3", guidance_scale=3.0)
    trainer.train()
    comparison.complete()
    trainer.create_model_card(tags="mine", license="mit", base_model="me/base", dataset_name="me/prompts")
    card = card_of(tmp_path / "out")
    assert card.data.license == "mit" and card.data.base_model == "me/base" and card.data.datasets == "me/prompts"
    assert "mine" in card.data.tags and "fdfo" in card.data.tags
    head, *rows = table(card.text, "")
    assert head == ["", "before", "before, guidance 3", "after"]
    rows = {name: values for name, *values in rows}
    expected = {
        "reward",
        "rewards/redness/mean",
        "rewards/constant/mean",
        "controls/constant/mean",
        "own",
        "pixel_distance",
    }
    assert set(rows) == expected
    for name, values in comparison.results.items():
        column = head.index(name) - 1
        assert all(float(rows[metric][column]) == pytest.approx(value, rel=0.01) for metric, value in values.items())
    assert rows["controls/constant/mean"] == ["2", "2", "2"] and rows["own"] == ["4", "4", "4"]
    assert len({result["reward"] for result in comparison.results.values()}) == 3
    assert float(rows["reward"][2]) == pytest.approx(float(rows["rewards/redness/mean"][2]) + 1, abs=0.01)
    assert "Means over 4 images per column" in card.text and "held out of training" in card.text
    assert table(card.text, "reward | weight")[1:] == [["`redness`", "1"], ["`constant`", "0.5"]]
    assert [sample["text"] for sample in card.data.widget] == ["never seen", "nor this"]
    # The picture has the pixels of the sample.
    shown = torch.tensor(list(Image.open(tmp_path / "out" / "images" / "1.png").getdata())).reshape(16, 16, 3)
    assert torch.equal(shown, (comparison.images["after"][1, 0].permute(1, 2, 0) * 255).round().long())
    assert "](before_after.png)" in card.text and Image.open(tmp_path / "out" / "before_after.png").width > 300


def test_prompts_that_are_trained_on_are_not_held_out(make_trainer, caplog):
    with_seen = Dataset.from_dict({"prompt": ["never seen", PROMPTS[0]]})
    trainer = make_trainer(eval_dataset=with_seen)
    assert "1 of the 2 prompts of the eval_dataset are trained on too" in caplog.text
    assert not trainer.compare().held_out and trainer.compare(num_prompts=1).held_out


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"reward": 1.0}, "metrics has a result 'reward', and so has another of reward: rename it"),
        (
            {"pixel_distance": 1.0},
            "diversity has a result 'pixel_distance', and so has another of reward, pixel_distance",
        ),
        ({"own": "1"}, "metrics has '1' as its result 'own', which is not a number"),
        ({"own": torch.zeros(2)}, r"as its result 'own', which is not a number"),
        (1.0, "metrics returned 1.0: it must return a dict of floats"),
    ],
)
def test_metrics_that_are_no_numbers_or_hide_others_are_refused(make_trainer, returned, message):
    comparison = make_trainer().compare(num_prompts=1, metrics=lambda images, prompts: returned)
    with pytest.raises(ValueError, match=message):
        comparison.sample("before")
    assert comparison.results == {}


def test_a_comparison_of_another_trainer_is_refused(make_trainer):
    trainer = make_trainer()
    with pytest.raises(
        ValueError, match="samples the model of another trainer, which the model card of this one would"
    ):
        trainer.comparison = make_trainer().compare()
    assert trainer.comparison is None


def test_a_measure_of_diversity_needs_no_name(make_trainer):
    class Spread:
        def __call__(self, images):
            return images.std(dim=1).flatten(1).mean(dim=1)

    comparison = make_trainer().compare(num_prompts=1, diversity=Spread())
    comparison.sample("before")
    assert comparison.results["before"]["Spread"] > 0


def test_missing_samples_are_made_from_the_disabled_adapter(make_trainer):
    trainer = make_trainer(learning_rate=1e-2)
    untrained = make_trainer().generate(PROMPTS[:1], [1_000_000])
    trainer.train()
    comparison = trainer.comparison = Comparison(trainer)
    comparison.complete()
    assert list(comparison.images) == ["before", "after"]
    assert comparison.images["before"].shape == (6, 2, 3, 16, 16)
    # The first seed is 1,000,000. The tolerance is for another batch size, which rounds differently.
    assert torch.allclose(comparison.images["before"][0, 0], untrained[0], atol=1e-4)
    assert (comparison.images["after"] - comparison.images["before"]).abs().max() > 1e-3
    after = comparison.images["after"]
    comparison.complete()
    assert comparison.images["after"] is after  # nothing has been trained since
    trainer.train()
    comparison.complete()
    assert comparison.images["after"] is not after


def test_card_without_rewards_where_they_fail(make_trainer, caplog, tmp_path):
    def fails_later(images, trainer_state):
        if trainer_state.global_step == 4:
            raise ConnectionError("no server")
        return images.mean(dim=(1, 2, 3))

    trainer = make_trainer(reward_fn=fails_later)
    trainer.train()
    trainer.comparison = Comparison(trainer)
    trainer.comparison.complete()
    trainer.create_model_card()
    assert "have no rewards in the model card" in caplog.text and "no server" in caplog.text
    text = card_of(tmp_path / "out").text
    assert "before_after.png" in text and "## Results" not in text


def test_snippet_loads_a_local_base_and_makes_the_same_image(make_trainer, tmp_path, monkeypatch):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    prompts = ['say "hi"\nin two lines', "b", "é | x", "d"]
    trainer = make_trainer(load_pipeline("pipeline"), prompts=prompts, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    snippet = re.search(r"\```python\n(.*?)\n```", card_of(tmp_path / "out").text, flags=re.DOTALL).group(1)
    assert "text_encoder_3=None" in snippet and "image_encoder" not in snippet
    namespace = {}
    torch.manual_seed(3)
    exec(snippet, namespace)
    torch.manual_seed(3)
    # The snippet takes a GPU if there is one, which draws other noise.
    image = trainer.pipeline.to(namespace["pipeline"].device)(prompts[0], **trainer.flow.call_kwargs).images[0]
    assert list(image.getdata()) == list(namespace["image"].getdata())
    # A local folder has no Hub id.
    assert "base_model" not in card_of(tmp_path / "out").data.to_dict()
    assert "`pipeline` is the folder of the base model" in card_of(tmp_path / "out").text


def test_snippet_of_the_packaged_pipeline_and_a_folder_below_runs(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"height": 32, "width": 32, "pipeline_kwargs": {"max_sequence_length": 0}}
    trainer = make_trainer(shapes.load_pipeline(), output_dir="runs/mine", prompts=shapes.captions()[:6], **options)
    trainer.save_model()
    text = card_of(tmp_path / "runs" / "mine").text
    snippet = re.search(r"\```python\n(.*?)\n```", text, flags=re.DOTALL).group(1)
    assert 'files("trl_fdfo") / "shapes/pipeline"' in snippet and 'load_lora_weights("runs/mine")' in snippet
    exec(snippet, {})
    assert Image.open("image.png").size == (32, 32)
    assert "folder of the base model" not in text


def test_results_of_few_images_say_so(make_trainer, tmp_path):
    trainer = make_trainer()
    own = lambda images, prompts: {"own": float("nan")}
    comparison = trainer.comparison = trainer.compare(num_prompts=1, images_per_prompt=1, metrics=own)
    comparison.sample("before")
    comparison.sample("after")
    head, reward, own, few = comparison.table().splitlines()
    assert head.split() == ["before", "after"] and reward.split()[0] == "reward" and own.split() == ["own", "-", "-"]
    assert few == "Means of one image say nothing: take more prompts, or more images of each."
    comparison.write(
        tmp_path, train_seconds=1.5, call_options={"sigmas": torch.tensor([1.0, 0.5]), "guidance_scale": 2.0}
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["call_options"] == {"sigmas": "tensor([1.0000, 0.5000])", "guidance_scale": 2.0}
    assert results["train_seconds"] == 1.5 and results["before"]["own"] is None and "reward" in results["after"]
    trainer.create_model_card()
    assert "that it was trained on: too few to mean anything." in card_of(tmp_path / "out").text
    enough = trainer.compare(num_prompts=4, images_per_prompt=4)
    enough.sample("before")
    assert "say nothing" not in enough.table()


def test_the_end_of_a_run_says_where_the_result_is(make_trainer, tmp_path, capsys):
    trainer = make_trainer()
    trainer.save_model()
    folder = tmp_path / "out"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"The result is in {folder}/",
        f'  load     pipeline.load_lora_weights("{folder}")',
        "  look at  README.md",
    ]


def test_own_template_of_a_trainer(make_trainer, tmp_path):
    template = tmp_path / "mine.md"
    template.write_text("---\n{{ card_data }}\n---\nMine: {{ model_name }}, {{ rewards[0][0] }}\n")
    trainer = make_trainer(model_card_template=str(template))
    trainer.save_model()
    assert card_of(tmp_path / "out").text.strip() == "Mine: out, redness"


def test_bad_template_is_refused_before_training(make_trainer, tmp_path):
    def refused(text, message):
        (tmp_path / "mine.md").write_text(text)
        with pytest.raises(ValueError, match=message):
            make_trainer(model_card_template=str(tmp_path / "mine.md"))

    refused("{{ card_data }} {% if x %}", "mine.md' cannot be read as a jinja2 template: .*endif")
    refused("{{ card_data }} {{ results.reward }}", "mine.md' makes no card of a small run .UndefinedError: ")
    refused("{{ card_data }} {{ rollouts / 2 }}", "mine.md' makes no card of a small run .TypeError: ")
    refused("nothing", r"mine.md' has no \{\{ card_data \}\}")
    with pytest.raises(ValueError, match="none.md' cannot be read"):
        check_template(str(tmp_path / "none.md"))


def test_a_template_that_fails_after_training_costs_no_card(make_trainer, tmp_path, caplog):
    (tmp_path / "mine.md").write_text(
        "---\n{{ card_data }}\n---\n{% if reward_curve %}{{ nothing.there }}{% endif %}\n"
    )
    trainer = make_trainer(model_card_template=str(tmp_path / "mine.md"), num_rollouts=2)
    trainer.train()
    trainer.save_model()
    assert "mine.md' makes no card of this run (UndefinedError: 'nothing' is undefined)" in caplog.text
    assert "## " in card_of(tmp_path / "out").text


def test_a_run_that_goes_on_with_fewer_rewards_has_its_card(make_trainer, tmp_path):
    options = {"save_strategy": "epoch", "resume_with_changed_options": True}
    make_trainer(reward_fn=[redness, constant], num_rollouts=1, **options).train()
    resumed = make_trainer(num_rollouts=2, **options)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert table(card_of(tmp_path / "out").text, "reward | weight")[1:] == [["`redness`", "1"]]
    assert Image.open(tmp_path / "out" / "reward_curve.png").height == 900


def test_a_checkpoint_whose_card_cannot_be_written_does_not_end_the_run(make_trainer, tmp_path, caplog):
    trainer = make_trainer(num_rollouts=1, save_strategy="epoch", push_to_hub=True, hub_model_id="me/my-lora")
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "Training goes on, and this push has no new model card (IsADirectoryError: " in caplog.text
    assert "Training goes on, but a push failed. OfflineModeIsEnabled: " in caplog.text


def test_a_failed_push_to_a_branch_is_repeated_to_that_branch(make_trainer, tmp_path):
    trainer = make_trainer(hub_model_id="me/my-lora", hub_revision="main-run")
    with pytest.raises(PushError, match="OfflineModeIsEnabled") as error:
        trainer.push_to_hub(revision="run2", private=True)
    assert "`trainer.push_to_hub(revision='run2', private=True)`, or hf upload me/my-lora " in str(error.value)
    assert str(error.value).endswith(" --private --revision=run2")
    assert 'load_lora_weights("me/my-lora", revision="run2")' in card_of(tmp_path / "out").text
    with pytest.raises(PushError, match=r"`trainer.push_to_hub\(\)`, or hf upload .* --revision=main-run$"):
        trainer.push_to_hub()


@pytest.mark.slow
def test_wheel_has_the_template(tmp_path):
    import subprocess
    import sys

    root = PACKAGED_TEMPLATE.parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, root]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no wheel can be built here: hatchling cannot be installed")
    (wheel,) = tmp_path.glob("*.whl")
    assert "trl_fdfo/saving/model_card.md" in zipfile.ZipFile(wheel).namelist()


# Backticks and pipes --------------------------------------------------------------------------------------------------


def fenced_code(text) -> list[str]:
    """Contents of the fenced blocks of a Markdown text, by CommonMark's rule for fences of backticks."""
    blocks, fence = [], None
    for line in text.splitlines():
        ticks = re.match(r" {0,3}(`{3,})([^`]*)$", line)
        if fence is None and ticks:
            fence, block = ticks[1], []
        elif fence is not None and ticks and len(ticks[1]) >= len(fence) and not ticks[2].strip():
            blocks.append("\n".join(block))
            fence = None
        elif fence is not None:
            block.append(line)
    assert fence is None
    return blocks


@pytest.mark.parametrize("prompt", ["plain", "```", "a ```python cat```", "`````\n```", "one ` tick"])
def test_backticks_of_a_prompt_are_inside_the_code(tmp_path, prompt):
    record = replace(
        RECORD,
        training=replace(TRAINING, first_prompt=prompt, rewards=[("a`b", 1.0), ("c|d", 2.0)]),
        pipeline=replace(PIPELINE, call_kwargs={"negative_prompt": "``` bad", "height": 16}),
    )
    write_model_card(record, tmp_path)
    text = card_of(tmp_path).text
    assert fenced_code(text) == [usage_snippet(record), PAPER.bibtex]
    assert ast.parse(fenced_code(text)[0])
    cells = [line.count("|") - line.count("\\|") for line in text[text.index("| reward |") :].splitlines()[:4]]
    assert cells == [3, 3, 3, 3]


def test_the_card_shows_literals_alone(tmp_path):
    call = {
        "height": 16,
        "attention_kwargs": {"scale": torch.ones(1)},
        "steps": [print],
        "sigmas": np.array([1.0, 0.5]),
    }
    card = written(tmp_path, pipeline=replace(PIPELINE, call_kwargs={**call, "callback": print}))
    assert "trained with `height=16`, `sigmas=[1.0, 0.5]`: other" in card.text
    assert 'pipeline("a cat", height=16, sigmas=[1.0, 0.5])' in card.text
