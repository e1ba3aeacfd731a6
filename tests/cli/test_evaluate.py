import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import tiny_vlms
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from tiny_clip import save_clip
from tiny_pipelines import flux_kontext

from trl_fdfo import shapes
from trl_fdfo.cli import evaluate as command
from trl_fdfo.cli import recipes
from trl_fdfo.evaluation.diversity import load_diversity


SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"  # for a launcher
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PROMPTS = ["a cat", "two dogs", "the sea", "red", "a box"]
REWARDS = """
def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2))


def of_animals(images, animal):  # a column of the prompts
    return [image.mean() if n else None for image, n in zip(images, animal)]


async def answered(images):
    return images.mean(dim=(1, 2, 3)).tolist()


class Judge:
    pairwise = True

    def __call__(self, images):
        return [0.0] * len(images)
"""


def evaluate(*arguments: str) -> None:
    command.main([str(argument) for argument in arguments])


def results(folder: str = "evaluation") -> dict:
    return json.loads(Path(folder, "results.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON


@pytest.fixture
def trained(make_trainer, tmp_path, monkeypatch):
    """A pipeline in `model/`, an adapter in both formats in `both/`, a stronger one in PEFT's in `strong/`, prompts."""
    monkeypatch.chdir(tmp_path)
    tiny_pipelines.sd3().save_pretrained("model")
    trainer = make_trainer(num_rollouts=2, learning_rate=0.05, output_dir="both", num_inference_steps=5)
    trainer.train()
    trainer.save_model()
    Path("strong").mkdir()
    for file in (*PEFT_FILES, "generation_config.json"):
        shutil.copy(Path("both", file), "strong")
    config = json.loads(Path("both", PEFT_FILES[0]).read_text())
    Path("strong", PEFT_FILES[0]).write_text(json.dumps({**config, "lora_alpha": 4 * config["lora_alpha"]}))
    rows = [f"{prompt},{int(prompt in ('a cat', 'two dogs', 'a box'))}" for prompt in PROMPTS]
    Path("prompts.csv").write_text("\n".join(["prompt,animal", *rows]))
    Path("my_rewards_for_evaluate.py").write_text(REWARDS)
    return trainer


ARGUMENTS = (
    *("--model", "model", "--adapter", "both", "--adapter", "strong", "--prompts", "prompts.csv"),
    *("--reward", "my_rewards_for_evaluate:redness", "--reward", "my_rewards_for_evaluate:of_animals"),
    *("--diversity", "pixels", "--images_per_prompt", "3", "--first_seed", "7", "--batch_size", "2"),
)


def sampled_by_hand(adapter: str | None) -> torch.Tensor:
    """What diffusers makes of the prompts, one image at a time: [P, S, 3, H, W]."""
    pipeline = StableDiffusion3Pipeline.from_pretrained("model", text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    options = json.loads(Path("both", "generation_config.json").read_text())
    images = [
        pipeline(prompt, generator=torch.Generator().manual_seed(7 + 3 * n + s), output_type="pt", **options).images
        for n, prompt in enumerate(PROMPTS)
        for s in range(3)
    ]
    return torch.cat(images).unflatten(0, (5, 3))


def test_an_edit_is_evaluated_with_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flux_kontext.build().save_pretrained("model")
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(f"{name}.png")
    rows = [{"prompt": "a cat", "image": f"{name}.png"} for name in ("red", "blue")]
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("my_rewards_of_edits.py").write_text(
        "def closeness(images, image):\n    return [each.getpixel((0, 0))[0] for each in image]\n"
    )
    evaluate(
        *("--model", "model", "--prompts", "edits.jsonl", "--pipeline_columns", "image", "--diversity", "pixels"),
        *("--reward", "my_rewards_of_edits:closeness", "--images_per_prompt", 2, "--num_inference_steps", 2),
        *("--pipeline_kwargs", '{"max_area": 256, "_auto_resize": false, "max_sequence_length": 8}'),
    )
    assert results()["per_prompt"]["base"]["closeness"] == [255, 0]
    assert results()["estimates"]["base"]["pixel_distance"]["mean"] > 0


def test_table_against_a_direct_computation(trained, capsys):
    evaluate(*ARGUMENTS)
    found = results()
    by_hand = {}
    for name, adapter in (("base", None), ("both", "both")):
        images = sampled_by_hand(adapter)
        by_hand[name] = {
            "redness": (images[:, :, 0] - images[:, :, 1:].mean(dim=2)).mean(dim=(1, 2, 3)).double().numpy(),
            "of_animals": images.mean(dim=(1, 2, 3, 4)).double().numpy()[[0, 1, 4]],
            "pixel_distance": load_diversity("pixels")(images).double().numpy(),
        }
        assert found["estimates"][name].keys() == by_hand[name].keys()
        for metric, values in by_hand[name].items():
            estimate = found["estimates"][name][metric]
            assert estimate["num_prompts"] == len(values)
            assert estimate["mean"] == pytest.approx(values.mean(), abs=1e-5)
            error = np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))
            assert estimate["standard_error"] == pytest.approx(error, abs=1e-5)
    for metric, values in by_hand["both"].items():
        difference, estimate = values - by_hand["base"][metric], found["differences"]["both"][metric]
        assert estimate["mean"] == pytest.approx(difference.mean(), abs=1e-5)
        assert estimate["standard_error"] == pytest.approx(difference.std(ddof=1) / len(difference) ** 0.5, abs=1e-5)
    per_prompt = [found["per_prompt"][name]["redness"] for name in ("base", "both", "strong")]
    assert min(np.ptp(values) for values in zip(*per_prompt)) > 1e-4, "each is a model of its own"
    assert found["per_prompt"]["base"]["of_animals"][2:4] == [None, None]
    assert found["per_prompt"]["both"]["redness"] == pytest.approx(by_hand["both"]["redness"], abs=1e-5)

    printed = capsys.readouterr().out
    header, _, *rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        *("base", "both", "both - base", "strong", "strong - base"),
    ]
    assert [row.split("|")[1].strip() for row in rows] == ["redness", "of_animals", "pixel_distance"]
    assert "over 5 prompts, 3 images each" in printed

    settings = found["settings"]
    assert settings["prompts"] == PROMPTS and settings["call_options"]["num_inference_steps"] == 5
    assert settings["first_seed"] == 7 and settings["adapter"] == ["both", "strong"]
    assert settings["versions"].keys() >= {"trl_fdfo", "torch", "diffusers"} and settings["dtype"] == "torch.float32"
    # Five prompts, of each three rows of three images of 256 pixels.
    page = Image.open("evaluation/grid.png")
    assert page.width > 3 * 256 and page.height > 15 * 256


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(trained, tmp_path, warm_python):
    save_clip("clip")
    arguments = (
        *(*ARGUMENTS, "--reward", "my_rewards_for_evaluate:answered", "--reward", "clip(model='clip')"),
        *("--diversity", "clip(model='clip', batch_size=2)", "--output", "evaluation"),
    )
    environment = {**os.environ, **warm_python.environment, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    errors, files = {}, {}
    for processes in (1, 2):
        launcher = (warm_python.path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
        command = [*launcher, SCRIPT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("| redness ") == 1
        errors[processes] = done.stderr
        files[processes] = {file: Path("evaluation", file).read_bytes() for file in ("results.json", "grid.png")}
        shutil.rmtree("evaluation")
    # Each of two had its share: the bar of the first counts to three of the five prompts. It may vanish before its end.
    assert "/5 [" in errors[1] and "/3 [" in errors[2] and "/5 [" not in errors[2]
    assert files[1] == files[2]
    assert {"answered", "CLIPScore", "clip_distance"} < json.loads(files[2]["results.json"])["estimates"]["both"].keys()


def test_the_packaged_pipeline_on_its_captions(tmp_path):
    evaluate(
        # Without --diversity: that of pixels, which needs no model.
        *("--model", "shapes", "--reward", "trl_fdfo.shapes:strict", "--grid_prompts", 2),
        *(
            "--images_per_prompt",
            2,
            "--num_inference_steps",
            2,
            "--guidance_scale",
            1,
            "--output",
            tmp_path / "a" / "b",
        ),
    )
    found = results(tmp_path / "a" / "b")
    assert found["settings"]["prompts"] == shapes.captions() and found["differences"] == {}
    assert found["estimates"]["base"]["strict"]["num_prompts"] == 54


def test_the_recipe_of_the_papers_metrics(trained, monkeypatch, capsys):
    """All of it, with folders here of the names on the Hub, which hold tiny stand-ins; DreamSim is a module of its signatures."""
    shutil.copytree("model", "stabilityai/stable-diffusion-3.5-medium")
    shutil.copytree("both", "someone/adapter")
    for name in (
        *("openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        *("adams-story/HPSv2-hf", "yuvalkirstain/PickScore_v1"),
    ):
        save_clip(name)
    Path("Qwen/Qwen2.5-VL-7B-Instruct").mkdir(parents=True)
    tiny_vlms.qwen2_5_vl(Path("Qwen/Qwen2.5-VL-7B-Instruct"))
    Path("zhwang/HPDv2/benchmark").mkdir(parents=True)
    for style in ("anime", "concept-art", "paintings", "photo"):
        Path(f"zhwang/HPDv2/benchmark/{style}.json").write_text(json.dumps([f"one in {style}"]))
    model = SimpleNamespace(embed=lambda images: images.mean(dim=(2, 3)))
    pixels = lambda picture: torch.tensor(list(picture.getdata())).float().T.reshape(1, 3, *picture.size) / 255
    stand_in = SimpleNamespace(dreamsim=lambda **options: (model, pixels), __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "dreamsim", stand_in)
    monkeypatch.setenv("TORCH_HOME", "torch")
    # Smaller and shorter than the recipe says.
    reduced = {"images_per_prompt": 2, "num_inference_steps": 3, "height": 16, "width": 32}
    flags = [str(part) for name, value in reduced.items() for part in (f"--{name}", value)]
    evaluate("--config", "evaluate_paper", "--adapter", "someone/adapter", *flags)
    found, asked = results("outputs/evaluate_paper"), yaml.safe_load(recipes.find("evaluate_paper").read_text())
    metrics = ["HPSv2", "CLIPScore", "CLIPHScore", "PickScore", "VLMScore_alignment", "dreamsim_distance"]
    assert found["estimates"].keys() == {"base", "someone/adapter"}
    assert all(list(each) == metrics for each in found["estimates"].values())
    assert all(each["num_prompts"] == 4 for each in found["estimates"]["someone/adapter"].values())
    # These, and not those that the adapter was trained with.
    given = {
        name: reduced.get(name, asked[name]) for name in ("num_inference_steps", "guidance_scale", "height", "width")
    }
    assert found["settings"]["call_options"] == {**given, "max_sequence_length": 128}
    assert json.loads(Path("both", "generation_config.json").read_text())["num_inference_steps"] == 5
    assert "over 4 prompts, 2 images each" in capsys.readouterr().out


def test_means_by_a_column(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = shapes.captions()[:3]
    rows = zip(prompts, ("colors", "position", "colors"))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p, "tag": tag}) for p, tag in rows))
    evaluate(
        *("--model", "shapes", "--prompts", "prompts.jsonl", "--reward", "trl_fdfo.shapes:reward", "--by", "tag"),
        *("--diversity", "pixels", "--images_per_prompt", 2, "--num_inference_steps", 1, "--guidance_scale", 1),
    )
    values, estimates = results()["per_prompt"]["base"], results()["estimates"]["base"]
    assert list(estimates) == ["reward", "reward, colors", "reward, position", "pixel_distance"]
    first, second, third = values["reward"]
    assert values["reward, colors"] == [first, None, third] and values["reward, position"] == [None, second, None]
    assert estimates["reward, colors"]["mean"] == pytest.approx((first + third) / 2)
    assert estimates["reward, position"]["num_prompts"] == 1 and "| reward, colors " in capsys.readouterr().out


def test_settings_in_a_file(trained):
    Path("settings.yaml").write_text(
        "model: model\nprompts: prompts.csv\nreward: my_rewards_for_evaluate:redness\nadapter: both\ndiversity: pixels\n"
    )
    evaluate("--config", "settings.yaml", "--images_per_prompt", 2)
    assert results()["estimates"]["both"].keys() == {"redness", "pixel_distance"}
    assert results()["settings"]["prompts"] == PROMPTS and results()["settings"]["adapter"] == ["both"]


def test_what_is_done_is_written_before_the_next_model(trained, monkeypatch):
    Path("failing_for_evaluate.py").write_text(
        "calls = []\n\n\ndef reward(images):\n    calls.append(1)\n    if len(calls) > 3:\n"
        "        raise ConnectionError('no server')\n    return images.mean(dim=(1, 2, 3))\n"
    )
    with pytest.raises(ConnectionError):
        evaluate(
            *("--model", "model", "--adapter", "both", "--prompts", *PROMPTS[:2], "--diversity", "pixels"),
            *("--reward", "failing_for_evaluate:reward", "--images_per_prompt", 2),
        )
    assert results()["estimates"].keys() == {"base"}
    with pytest.raises(ValueError, match="output='evaluation' has the results.json of an earlier evaluation: take ano"):
        evaluate("--model", "model", "--reward", "failing_for_evaluate:reward")
    kept = results()
    with pytest.raises(ConnectionError):
        evaluate(
            *("--model", "model", "--prompts", "a cat", "--diversity", "pixels", "--overwrite"),
            *("--reward", "failing_for_evaluate:reward", "--images_per_prompt", 2),
        )
    assert results() == kept and [path.name for path in Path("evaluation").glob(".*")] == []


def test_options_of_rewards_are_not_written_down(trained):
    Path("secret_for_evaluate.py").write_text(
        "class Reward:\n    def __init__(self, api_key):\n        self._api_key = api_key\n\n"
        "    def __call__(self, images):\n        return [1.0] * len(images)\n"
    )
    evaluate(
        *("--model", "model", "--prompts", "a cat", "--diversity", "pixels", "--images_per_prompt", 2),
        *("--num_inference_steps", 1, "--height", 16, "--width", 16),
        *("--reward", "secret_for_evaluate:Reward(api_key='sk-1234')"),
    )
    assert "sk-1234" not in Path("evaluation", "results.json").read_text()
    assert results()["settings"]["reward"] == ["secret_for_evaluate:Reward"]
    assert results()["estimates"]["base"]["Reward"] == {"mean": 1.0, "standard_error": None, "num_prompts": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images_per_prompt", "1"), r"images_per_prompt=1 must be at least 2: diversity is a distance"),
        (("--first_seed", "-1"), r"first_seed=-1 must be at least 0"),
        (("--batch_size", "0"), r"batch_size=0 must be at least 1"),
        (("--prompts", " "), r"has ' ' as the prompt of row 0"),
        (("--prompts", "away.txt"), r"^prompts='away.txt': there is no such file"),
        (("--adapter", "empty"), r"adapter='empty' has neither pytorch_lora_weights"),
        (("--adapter", "one", "--adapter", "one"), r"adapter='one' was given more than once"),
        (("--adapter", "base"), r"adapter='base' is what the model without an adapter is called: .*\./base"),
        (("--adapter", "one", "--adapter", "two"), r"one and two were trained with other height: say"),
        (("--reward", "pickscor"), r"reward 'pickscor' is neither one of pickscore"),
        (("--reward", "my_rewards_for_evaluate:of_animals"), r"needs the argument 'animal', and prompts has no such"),
        (("--reward", "my_rewards_for_evaluate:Judge"), r"'Judge' compares the images of a prompt with each other"),
        (("--by", "tag"), r"by='tag' is no column of the prompts: they have prompt"),
        (("--diversity", "clips"), r"diversity 'clips' is neither one of clip, dreamsim, pixels"),
        (("--output", "a_file"), r"File exists: 'a_file'"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards_for_evaluate.py").write_text(REWARDS)
    Path("a_file").touch()
    Path("empty").mkdir()
    for folder, height in (("one", 16), ("two", 32), ("base", 16)):
        Path(folder).mkdir()
        Path(folder, DIFFUSERS_FILE).touch()
        Path(folder, "generation_config.json").write_text(json.dumps({"height": height, "width": 16}))
    defaults = {"--prompts": "a cat", "--reward": "my_rewards_for_evaluate:redness", "--diversity": "pixels"}
    defaults = [part for item in defaults.items() if item[0] not in arguments for part in item]
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=message):
        evaluate("--model", "no-such-model", *defaults, *arguments)


def test_an_adapter_for_another_model_is_told_before_sampling(trained, monkeypatch, capsys):
    config = json.loads(Path("strong", PEFT_FILES[0]).read_text())
    Path("strong", PEFT_FILES[0]).write_text(json.dumps({**config, "target_modules": ["none_of_these"]}))
    with pytest.raises(ValueError, match="none_of_these"):
        evaluate(*ARGUMENTS)
    assert "base:" not in capsys.readouterr().err and not list(Path("evaluation").iterdir())


def test_help_lists_the_rewards(capsys):
    with pytest.raises(SystemExit):
        evaluate("--help")
    printed = capsys.readouterr().out
    assert "module:callable" in printed and "pickscore" in printed and "--images_per_prompt" in printed
