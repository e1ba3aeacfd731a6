import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from read_sheet import panels
from tiny_pipelines import wan_video

from trl_fdfo.cli import generate as command
from trl_fdfo.reporting import sheets
from trl_fdfo.reporting.sheets import GAP, MARGIN, picture, save_sheet


PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def generate(*arguments: str) -> None:
    command.main([str(argument) for argument in arguments])


@pytest.fixture
def trained(make_trainer, tmp_path, monkeypatch):
    """A pipeline in `base/`, an adapter in `both/`, and that in either format alone in `peft/` and `diffusers/`."""
    monkeypatch.chdir(tmp_path)
    tiny_pipelines.sd3().save_pretrained("base")
    trainer = make_trainer(num_rollouts=2, learning_rate=0.05, output_dir="both", num_inference_steps=5)
    trainer.train()
    trainer.save_model()
    for folder, files in (("peft", PEFT_FILES), ("diffusers", (DIFFUSERS_FILE,))):
        Path(folder).mkdir()
        for file in (*files, "generation_config.json"):
            shutil.copy(Path("both", file), folder)
    return trainer


def test_a_page_of_the_base_and_an_adapter_in_either_format(trained, capsys):
    generate(
        *("--model", "base", "--adapter", "peft", "--adapter", "diffusers", "--prompts", "a cat", "two dogs"),
        *("--seeds", 2, "--output", "pages/grid.png"),
    )
    assert "base, peft, diffusers, with {'num_inference_steps': 5" in capsys.readouterr().out
    rows = panels("pages/grid.png", rows=6, columns=2)
    for n, prompt in enumerate(("a cat", "two dogs")):
        base, peft, diffusers = rows[3 * n : 3 * n + 3]
        own = [np.asarray(picture(image)) for image in trained.generate([prompt] * 2, [0, 1])]
        with torch.no_grad(), trained.model.disable_adapter():
            before = [np.asarray(picture(image)) for image in trained.generate([prompt] * 2, [0, 1])]
        for seed in range(2):
            assert np.abs(peft[seed].astype(int) - own[seed]).max() <= 1, "the trainer's own images"
            assert np.abs(base[seed].astype(int) - before[seed]).max() <= 1
            assert (peft[seed] == diffusers[seed]).all()
            assert np.abs(peft[seed].astype(int) - base[seed]).max() > 3
        assert (base[0] != base[1]).any()


def test_an_adapter_is_gone_when_the_next_one_is_shown(trained):
    shutil.copytree("peft", "stronger")
    config = json.loads(Path("peft", PEFT_FILES[0]).read_text())
    Path("stronger", PEFT_FILES[0]).write_text(json.dumps({**config, "lora_alpha": 4 * config["lora_alpha"]}))
    generate(*("--model", "base", "--adapter", "stronger", "--adapter", "peft", "--prompts", "a cat", "--seeds", 1))
    _, [stronger], [after_it] = panels("grid.png", rows=3, columns=1)
    generate(*("--model", "base", "--adapter", "peft", "--prompts", "a cat", "--seeds", 1))
    _, [alone] = panels("grid.png", rows=2, columns=1)
    assert (after_it == alone).all() and (stronger != alone).any()


def test_options_given_replace_those_of_the_adapter(trained, capsys, monkeypatch):
    settings = ("--num_inference_steps", 2, "--guidance_scale", 3, "--pipeline_kwargs", '{"negative_prompt": "blue"}')
    Path("prompts.txt").write_text("a cat\n\ntwo dogs\n")
    saved = []
    monkeypatch.setattr(sheets, "save_sheet", lambda page, path: saved.append(page.height) or save_sheet(page, path))
    generate("--model", "base", "--adapter", "both", "--prompts", "prompts.txt", "--seeds", 1, *settings)
    assert len(saved) == 2 and saved[0] < saved[1], "the page is written after each model"
    assert panels("grid.png", rows=4, columns=1)
    printed = capsys.readouterr().out
    expected = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "max_sequence_length": 8}
    assert printed.strip().endswith(f"with {expected | {'negative_prompt': 'blue'}}")


def test_the_packaged_pipeline_needs_no_settings(tmp_path):
    generate("--model", "shapes", "--prompts", "a red circle on a white background", "--output", tmp_path / "grid.png")
    page = Image.open(tmp_path / "grid.png")
    assert page.width == 3 * 256 + 2 * GAP + 2 * MARGIN


def test_videos_are_made_of_images_and_are_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wan_video.small_image_to_video().save_pretrained("base")
    Image.new("RGB", (16, 16), "red").save("red.png")
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "a cat", "image": "red.png"}))
    call = {"num_frames": 5, "max_sequence_length": 16, "height": 16, "width": 16}
    settings = ("--num_inference_steps", 2, "--guidance_scale", 1, "--pipeline_kwargs", json.dumps(call))
    options = ("--model", "base", *settings)
    with pytest.raises(ValueError, match="It needs image: give a column of that name in `pipeline_columns`"):
        generate(*options, "--prompts", "prompts.jsonl")
    images = ("--prompts", "prompts.jsonl", "--pipeline_columns", "image")
    generate(*options, *images, "--seeds", 2)
    assert Image.open("grid.png").width > 300
    [video, _] = sorted(Path().glob("grid_0_0_*.*"))
    assert video.stem == "grid_0_0_0" and video.suffix in (".mp4", ".webp")
    with pytest.raises(ValueError, match="has no column 'last_image', which `pipeline_columns` passes"):
        generate(*options, *images, "last_image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", " "), r"has ' ' as the prompt of row 0"),
        (("--prompts", "away.txt"), r"^prompts='away.txt': there is no such file"),
        (("--prompts", "a", "--seeds", "0"), r"seeds=0 must be at least 1"),
        (("--prompts", "a", "--output", "grid.doc"), r"output='grid.doc' does not end in a format of pictures"),
        (
            ("--prompts", "a", "--output", "grid.mpg"),
            r"output='grid.mpg' does not end in a format of pictures that can",
        ),
        (("--prompts", "a", "--adapter", "empty"), r"adapter='empty' has neither pytorch_lora_weights"),
        (("--prompts", "a", "--adapter", "./away"), r"adapter='./away' is no folder or file here, and was not"),
        (("--prompts", "a", "--adapter", "away/adapter"), r"adapter='away/adapter' is no folder or file here, and"),
        (("--prompts", "a", "--pipeline_kwargs", "{"), r"pipeline_kwargs='{' is not valid JSON"),
        (("--prompts", "a", "--pipeline_kwargs", "3"), r"pipeline_kwargs=3 must be a dict of arguments"),
        (
            ("--prompts", "a", "--pipeline_kwargs", '{"output_type": "pil"}'),
            r"output_type='pil', which the trainer sets",
        ),
        (("--prompts", "a", "--num_inference_steps", "0"), r"num_inference_steps=0 must be at least 1"),
        (
            ("--prompts", "a", "--adapter", "one", "--adapter", "two"),
            r"one and two were trained with other height: say",
        ),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for folder, height in (("one", 16), ("two", 32)):
        Path(folder).mkdir()
        Path(folder, DIFFUSERS_FILE).touch()
        Path(folder, "generation_config.json").write_text(json.dumps({"height": height, "width": 16}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate("--model", "no-such-model", *arguments)


def test_what_a_pipeline_or_an_adapter_is_not_made_for(trained):
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline does not take strength in its call"):
        generate("--model", "base", "--prompts", "a", "--pipeline_kwargs", '{"strength": 1}')
    config = json.loads(Path("peft", PEFT_FILES[0]).read_text())
    Path("peft", PEFT_FILES[0]).write_text(json.dumps({**config, "target_modules": ["none_of_these"]}))
    with pytest.raises(ValueError, match="none_of_these"):
        generate("--model", "base", "--adapter", "peft", "--prompts", "a")
