import json
import runpy
from pathlib import Path

import pytest
import tiny_pipelines
from PIL import Image

from trl_fdfo import shapes
from trl_fdfo.cli.main import main


EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: str) -> None:
    main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_quickstart_script_writes_what_it_promises(tmp_path, capsys):
    run(
        *("train", "--config", "shapes", "--output_dir", tmp_path, "--num_rollouts", 2),
        *("--prompts_per_rollout", 12, "--per_device_prompt_batch_size", 4, "--images_per_report_prompt", 2),
    )
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["train_seconds"] > 0
    for name in ("before", "before, guidance 1.5", "after"):
        classes = {f"strict_accuracy/{c}" for c in (*shapes.SHAPES, *shapes.COLORS, *shapes.BACKGROUNDS)}
        assert classes < report[name].keys() and "diversity/pixels" in report[name]
        assert 0 < report[name]["strict_accuracy"] < 1 and 0 < report[name]["reward"] < 1
    # The same seeds: what two small updates changed is little, and it is not nothing.
    assert 0 < abs(report["after"]["reward"] - report["before"]["reward"]) < 0.1
    for picture in ("before_after.png", "reward_curve.png"):
        assert Image.open(tmp_path / picture).width > 500
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed and "strict_accuracy/cross" in printed
    # The adapter in the format of either library, for the packaged pipeline.
    assert (tmp_path / "adapter_config.json").is_file()
    shapes.load_pipeline().load_lora_weights(str(tmp_path))


def test_script_on_a_pipeline_by_path_with_a_reward_of_ones_own(tmp_path, monkeypatch):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "mine_for_test.py").write_text("def reward(images, label):\n    return [float(n) for n in label]\n")
    (tmp_path / "prompts.csv").write_text("prompt,label\na cat,1\ntwo dogs,3\n")
    monkeypatch.chdir(tmp_path)
    run(
        *("train", "--model", "pipeline", "--reward", "mine_for_test:reward", "--dataset_name", "prompts.csv"),
        *("--output_dir", "out", "--num_rollouts", 1, "--prompts_per_rollout", 2, "--num_inference_steps", 4),
        *("--height", 16, "--width", 16, "--pipeline_kwargs", '{"max_sequence_length": 8}', "--use_cpu", "true"),
        *("--num_report_prompts", 2, "--images_per_report_prompt", 1, "--report_to", "none"),
    )
    report = json.loads(Path("out/results.json").read_text())
    assert report["before"] == report["after"] == {"reward": 2.0}


@pytest.mark.parametrize("given", ["command line", "file"])
def test_script_trains_with_the_baseline(tmp_path, capsys, given):
    options = ("--model", "shapes", "--reward", "trl_fdfo.shapes:reward", "--height", 32, "--width", 32)
    options += ("--num_rollouts", 1, "--prompts_per_rollout", 2, "--num_generations", 2, "--num_inference_steps", 3)
    options += (
        "--optimizer_steps_per_rollout",
        1,
        "--pipeline_kwargs",
        '{"max_sequence_length": 0}',
        "--use_cpu",
        "true",
    )
    options += ("--num_report_prompts", 1, "--images_per_report_prompt", 1, "--report_to", "none")
    options += ("--output_dir", tmp_path / "out")
    algorithm = ("--algorithm", "flow_grpo", "--noise_level", 0.5)
    if given == "file":
        (tmp_path / "recipe.yaml").write_text("algorithm: flow_grpo\nnoise_level: 0.5\n")
        algorithm = ("--config", tmp_path / "recipe.yaml")
    run("train", *options, *algorithm, "--plan")
    assert capsys.readouterr().out.startswith("Flow-GRPO on StableDiffusion3Pipeline")
    run("train", *options, *algorithm)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arxiv.org/abs/2505.05470" in card and "2603.12893" not in card and "- flow-grpo" in card
    assert "| `noise_level` | 0.5 |" in card and "churn" not in card
    assert "```bibtex\n@misc{liu2025flowgrpo" in card and card.endswith("}\n```\n")


@pytest.mark.slow
def test_pretraining_script_builds_a_pipeline_that_loads(tmp_path, capsys):
    pretrain = runpy.run_path(str(EXAMPLES / "shapes" / "pretrain.py"))["main"]
    pretrain(["--output", str(tmp_path), "--vae-steps", "5", "--flow-steps", "5", "--dataset-size", "500"])
    assert "strict_accuracy" in capsys.readouterr().out
    from trl_fdfo.pipeline.loading import load_pipeline

    rebuilt, packaged = load_pipeline(tmp_path), shapes.load_pipeline()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        shape = lambda pipeline, name=name: {n: p.shape for n, p in getattr(pipeline, name).named_parameters()}
        assert shape(rebuilt) == shape(packaged), name


RECIPE_OF_SIZES = """
model: shapes
reward: [jpeg_compressibility]
dataset_name: prompts.csv
pipeline_columns: [height, width]
height: null
width: null
num_rollouts: 1
prompts_per_rollout: 2
per_device_prompt_batch_size: 1
num_inference_steps: 2
optimizer_steps_per_rollout: 1
num_report_prompts: 2
images_per_report_prompt: 1
use_cpu: true
report_to: [none]
save_strategy: "no"
"""


def test_rows_of_different_sizes_train_from_the_command_line(tmp_path, caplog):
    (tmp_path / "prompts.csv").write_text("prompt,height,width\na red circle,16,16\na red circle,32,32\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE_OF_SIZES)
    run("train", "--config", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "out")
    assert "There are no images of before the run: The images of these rows have different sizes" in caplog.text
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results.keys() == {"train_seconds", "best_rollout", "call_options"} and results["best_rollout"] is None
