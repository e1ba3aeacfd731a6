import argparse
import sys
from contextlib import nullcontext

import pytest
import torch

from trl_fdfo import FDFOConfig
from trl_fdfo.cli import train
from trl_fdfo.cli.arguments import Parser, RepeatableFlag, RunArguments
from trl_fdfo.cli.quick import reward_table
from trl_fdfo.rewards import VLMServer
from trl_fdfo.rewards.by_name import REWARDS, check_object, load_reward, reward_without_weights


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def plain(images):\n    return [0.0] * len(images)\n\n\n"
        "def made(scale):\n    return lambda images: [scale] * len(images)\n\n\n"
        "class Judge:\n    def __init__(self, strict=False):\n        self.strict = strict\n\n"
        "    def __call__(self, images):\n        return [0.0] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)


def test_names_options_and_paths(my_rewards):
    assert load_reward("jpeg_compressibility").quality == 95
    assert load_reward(" jpeg_compressibility( quality = 30 ) ").quality == 30
    server = load_reward("vlm_server(url=['http://one/v1', 'http://two/v1'], timeout=5.0)")
    assert isinstance(server, VLMServer)
    assert load_reward("my_rewards:plain").__name__ == "plain"
    assert load_reward("my_rewards:made(scale=-2.5)")([1, 2]) == [-2.5, -2.5]
    # A class is constructed, with or without parentheses.
    assert load_reward("my_rewards:Judge").strict is False
    assert load_reward("my_rewards:Judge(strict=True)").strict is True


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pickscor", r"reward 'pickscor' is neither one of pickscore, .*vlm_server.*, nor of the form module:callable"),
        ("missing_module:reward", r"there is no module 'missing_module'"),
        ("my_rewards:", r"is not of the form module:callable"),
        ("my_rewards:other", r"module 'my_rewards' has no 'other'"),
        (
            "jpeg_compressibility(size=3)",
            r"got an unexpected keyword argument 'size'. It takes \(quality: int = 95, frames: str = 'mean'\)",
        ),
        ("jpeg_compressibility(30)", r"cannot read its options \(options have names\)"),
        ("jpeg_compressibility(quality=95", r"cannot read its options"),
        ("jpeg_compressibility(quality=__import__('os'))", r"cannot read its options"),
        ("vlm_server", r"missing a required argument: 'url'"),
        ("my_rewards:made()", r"missing a required argument: 'scale'"),
    ],
)
def test_bad_specs_say_what_there_is(my_rewards, spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_what_a_module_raises_is_told_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dividing.py").write_text("\n1 / 0\n")
    (tmp_path / "needing.py").write_text("import json, library_that_is_not_there\n")
    with pytest.raises(
        ValueError, match=r"'dividing' cannot be imported: .*dividing.py, line 2, ZeroDivisionError: div"
    ):
        load_reward("dividing:reward")
    with pytest.raises(
        ValueError, match=r"'needing' cannot be imported: .*line 1, ModuleNotFoundError: No module named"
    ):
        load_reward("needing:reward")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def reward(images): ...", "reward", None),
        ("from json import loads as reward", "reward", None),
        ("reward = other = len", "other", None),
        ("from json import *", "reward", None),  # which may have it
        ("def __getattr__(name): ...", "reward", None),
        ("raise SystemExit  # nothing is run", "reward", "module 'mine' has no 'reward'"),
        ("def redness(images): ...", "rednes", "has no 'rednes'. Did you mean 'redness'?"),
        ("\ndef reward(:", "reward", "module 'mine' is no Python: .*mine.py, line 2: invalid syntax"),
    ],
)
def test_a_module_is_looked_into_without_an_import(tmp_path, monkeypatch, source, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_object(f"mine:{name}", "reward")
    assert "mine" not in sys.modules


def test_a_module_is_found_without_an_import(my_rewards):
    check_object("trl_fdfo.shapes:reward", "reward")
    check_object("xml.etree.ElementTree:parse", "reward")
    with pytest.raises(
        ValueError, match=r"no module 'my_rewards.py' on .*Name it without a folder or .py: my_rewards:a"
    ):
        check_object("my_rewards.py:a", "reward")


def test_flag_is_repeatable_and_replaces_the_default():
    def parse(*args, default=("a",)):
        parser = argparse.ArgumentParser()
        parser.add_argument("--reward", nargs="+", action=RepeatableFlag, default=list(default))
        return parser.parse_args(args).reward

    assert parse() == ["a"]
    assert parse("--reward", "b") == ["b"]
    assert parse("--reward", "b", "--reward", "c", "d") == ["b", "c", "d"]
    assert parse("--reward", "a", "--reward", "a") == ["a", "a"]


def test_table_has_a_line_for_each_reward():
    lines = reward_table().splitlines()
    for name in REWARDS:
        (line,) = [line for line in lines if line.split()[0] == name]
        assert 20 < len(line) < 130 and line.endswith(".")


def test_script_prints_the_table_and_takes_the_flags(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert reward_table() in capsys.readouterr().out
    parser = Parser((RunArguments, FDFOConfig))
    arguments, config = parser.parse_args_and_config(
        [
            *("--config", "combined", "--use_cpu", "true", "--report_to", "none"),
            *("--reward", "pickscore", "--reward", "my_module:my_reward", "--reward_weights", "1.0", "2.0"),
        ]
    )
    assert arguments.reward == ["pickscore", "my_module:my_reward"] and config.reward_weights == [1.0, 2.0]


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        ("pickscore(dtype='bfloat16', offload=True)", 986_109_441),
        ("hpsv2", 986_109_441),
        ("clip", 427_616_513),
        ("clip_h", 986_109_441),
    ],
)
def test_rewards_of_a_plan_have_the_published_size(spec, parameters):
    reward = reward_without_weights(spec)
    weights = list(reward.model.parameters())
    assert all(weight.is_meta for weight in weights) and sum(weight.numel() for weight in weights) == parameters
    assert reward.offload is ("offload" in spec)
    assert reward.model.dtype == (torch.bfloat16 if "bfloat16" in spec else torch.float32)
    assert {name: tuple(tensor.shape) for name, tensor in reward.planned_call().items()} == {
        "pixel_values": (16, 3, 224, 224),
        "input_ids": (16, 77),
    }


def test_rewards_of_a_plan_that_are_not_known_or_have_no_model():
    for spec in ("pickscore(model='folder')", "my_module:reward", "vlm"):
        assert reward_without_weights(spec) is None
    assert reward_without_weights("vlm_server(url='http://localhost:8000/v1')").urls == ["http://localhost:8000/v1"]
    with pytest.raises(ValueError, match="unexpected keyword argument 'no_such'. It takes"):
        reward_without_weights("pickscore(no_such=1)")


@pytest.mark.parametrize(
    ("recipe", "rewards", "weights"),
    [
        ("pickscore", ["pickscore"], None),
        ("vlm_alignment", ["vlm"], None),
        ("combined", ["pickscore", "vlm"], [1.0, 0.1]),
    ],
)
def test_recipes_of_the_paper(recipe, rewards, weights):
    parser = Parser((RunArguments, FDFOConfig))
    # No GPU here: all but its precision.
    arguments, config = parser.parse_args_and_config(["--config", recipe, "--use_cpu", "true", "--report_to", "none"])
    assert arguments.model == "stabilityai/stable-diffusion-3.5-medium"
    assert arguments.reward == rewards and config.reward_weights == weights
    assert set(rewards) <= REWARDS.keys()
    # The paper's setting (section 5 and appendix), which is also the default.
    paper = {
        "prompts_per_rollout": 432,
        "num_generations": 2,
        "num_inference_steps": 40,
        "guidance_scale": 1.0,
        "height": 512,
        "width": 512,
        "churn": 0.0025,
        "churn_schedule": "constant",
        "optimizer_steps_per_rollout": 4,
        "epsilon": 0.03,
        "learning_rate": 3e-5,
        "weight_decay": 1e-4,
        "lora_r": 32,
        "lora_alpha": 64,
    }
    assert {name: getattr(config, name) for name in paper} == paper
    assert config.pipeline_kwargs == {"max_sequence_length": 128}
