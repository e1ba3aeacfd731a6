"""What a result says of itself, without a Hub; test_hub.py has what needs one."""

import math
import re
import zipfile

import pytest
import tiny_pipelines
import torch
from conftest import PROMPTS, redness
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image

from trl_fdfo.comparison import Comparison
from trl_fdfo.model_card import PACKAGED_TEMPLATE, check_template, usage_snippet
from trl_fdfo.pipeline_flow import load_pipeline


def constant(images, prompts):
    return [2.0] * len(images)


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def table(text, head):
    """Cells of the table whose head begins with `head`."""
    lines = text[text.index(f"| {head} |") if head else text.index("| |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|--")]


def test_every_saved_result_has_a_card(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "out" / "README.md").exists()
    card = card_of(tmp_path / "elsewhere")
    assert card.data.library_name == "diffusers" and "lora" in card.data.tags
    # Nothing was sampled for it, and a pipeline from nowhere has no name.
    assert not {"base_model", "widget"} & card.data.to_dict().keys() and "## Results" not in card.text
    assert 'from_pretrained(\n    "path/to/the/pipeline",' in card.text
    assert "![Mean reward of each rollout](reward_curve.png)" in card.text
    assert Image.open(tmp_path / "elsewhere" / "reward_curve.png").width > 500
    assert "2 rollouts, 16 images, of 6 prompts from a list of its own" in card.text
    hyperparameters = dict(table(card.text, "hyperparameter")[1:])
    assert hyperparameters["`lora_r`"] == "4" and hyperparameters["`churn`"] == "0.2"


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
    # The picture is the sample itself, in its shape.
    shown = torch.tensor(list(Image.open(tmp_path / "out" / "images" / "1.png").getdata())).reshape(16, 16, 3)
    assert torch.equal(shown, (comparison.images["after"][1, 0].permute(1, 2, 0) * 255).round().long())
    assert "](before_after.png)" in card.text and Image.open(tmp_path / "out" / "before_after.png").width > 300


def test_missing_samples_are_made_from_the_disabled_adapter(make_trainer):
    trainer = make_trainer(learning_rate=1e-2)
    untrained = make_trainer().generate(PROMPTS[:1], [1_000_000])
    trainer.train()
    comparison = trainer.comparison = Comparison(trainer)
    comparison.complete()
    assert list(comparison.images) == ["before", "after"]
    assert comparison.images["before"].shape == (6, 2, 3, 16, 16)
    # Seeds follow each other; another batch size rounds otherwise.
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
    snippet = usage_snippet(trainer, "out", "pipeline")
    assert "text_encoder_3=None" in snippet and "image_encoder" not in snippet
    assert re.search(r"\```python\n(.*?)\n```", card_of(tmp_path / "out").text, flags=re.DOTALL).group(1) == snippet
    namespace = {}
    torch.manual_seed(3)
    exec(snippet, namespace)
    torch.manual_seed(3)
    image = trainer.pipeline(prompts[0], **trainer.flow.call_kwargs).images[0]
    assert list(image.getdata()) == list(namespace["image"].getdata())
    # A local folder is no Hub id.
    assert "base_model" not in card_of(tmp_path / "out").data.to_dict()


def test_own_template(make_trainer, tmp_path):
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
    refused("nothing", r"mine.md' has no \{\{ card_data \}\}")
    with pytest.raises(ValueError, match="none.md' cannot be read"):
        check_template(str(tmp_path / "none.md"))


def test_template_documents_every_variable():
    text = PACKAGED_TEMPLATE.read_text(encoding="utf-8")
    documented = set(re.findall(r"\b[a-z_]+\b", text[: text.index("-#}")]))
    import jinja2.meta

    used = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))
    assert used <= documented and len(used) > 15


def test_values_that_are_missing(make_trainer, tmp_path):
    trainer = make_trainer(reward_fn=lambda images: [None] * len(images), num_rollouts=1)
    trainer.comparison = Comparison(trainer, images_per_prompt=1)
    trainer.comparison.complete()
    assert math.isnan(trainer.comparison.results["after"]["reward"])
    trainer.create_model_card()
    assert table(card_of(tmp_path / "out").text, "")[1:] == [["reward", "", ""]]


@pytest.mark.slow
def test_wheel_has_the_template(tmp_path):
    import subprocess
    import sys

    root = PACKAGED_TEMPLATE.parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, root]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no wheel can be built here: hatchling cannot be installed")
    (wheel,) = tmp_path.glob("*.whl")
    assert "trl_fdfo/model_card.md" in zipfile.ZipFile(wheel).namelist()
