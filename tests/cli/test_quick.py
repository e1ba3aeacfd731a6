"""The first look at options agrees with the real classes, which decide."""

import argparse
import dataclasses
import math

import pytest

import trl_fdfo
from trl_fdfo.cli import quick, recipes
from trl_fdfo.cli.algorithms import ALGORITHMS
from trl_fdfo.cli.arguments import Parser, RunArguments
from trl_fdfo.planning.without_weights import planned
from trl_fdfo.rewards.by_name import REWARDS


CONFIGS = [name.replace("Trainer", "Config") for name in ALGORITHMS.values()]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_plan", [False, True])
def test_sections_have_every_option_once(name, is_plan):
    real = getattr(trl_fdfo, name)
    real = planned(real) if is_plan else real
    sections = quick.sections(quick.config_class(name, is_plan))
    found = [field for section in sections for field in dataclasses.fields(section)]
    assert sorted(field.name for field in found) == sorted(
        field.name for field in dataclasses.fields(real) if field.init
    )
    defaults = {field.name: field.default for field in dataclasses.fields(real)}
    own = {field.name for section in sections[:-1] for field in dataclasses.fields(section)}
    for field in found:
        if field.name in own:
            help_text = field.metadata["help"]
            is_idle = field.name in real.idle_options
            assert help_text == argparse.SUPPRESS if is_idle else len(help_text) > 20, field.name
            assert field.default == defaults[field.name], field.name


def test_sections_are_in_the_order_of_the_docstrings():
    headings = [section._argument_group_name for section in quick.sections(quick.config_class("FDFOConfig"))]
    assert headings[:4] == ["Step 1: paired rollouts", "Steps 3 and 4: update", "Data", "Rollouts"]
    assert headings[-1] == quick.INHERITED


def test_help_shows_our_options_first_and_the_others_on_request():
    config = quick.config_class("FDFOConfig")
    short, long = (
        Parser([RunArguments, *quick.sections(config, show_inherited)]).format_help()
        for show_inherited in (False, True)
    )
    for text in (short, long):
        assert (
            text.index("--reward ") < text.index("--churn ") < text.index("--num_rollouts ") < text.index("--lora_r ")
        )
    assert "--adam_beta1" not in short and "--save_strategy" not in short
    assert long.index("--lora_r ") < long.index("--adam_beta1")
    assert len(short.splitlines()) < 450


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_rollouts": 0},
        {"learning_rate": math.nan},
        {"timestep_fraction": 2.0},
        {"prompts_per_rollout": 7, "per_device_prompt_batch_size": 2},
        {"optimizer_steps_per_rollout": 1001},
        {"save_steps": 3},
        {"gradient_accumulation_steps": 3},
        {"pipeline_kwargs": "{a"},
        {"output_dir": " "},
    ],
    ids=str,
)
def test_a_mistake_has_the_same_words(name, options):
    with pytest.raises(ValueError) as real:
        getattr(trl_fdfo, name)(use_cpu=True, **options)
    with pytest.raises(ValueError) as quickly:
        quick.check(quick.config_class(name), {"use_cpu": True, **options})
    assert str(quickly.value) == str(real.value)


def test_the_number_of_processes_counts():
    config = quick.config_class("FDFOConfig")
    options = {"prompts_per_rollout": 12, "per_device_prompt_batch_size": 2}
    quick.check(config, options, processes=3)
    with pytest.raises(ValueError, match="cannot be split evenly over 4 process"):
        quick.check(config, options, processes=4)


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "evaluate_paper"])
def test_recipes_have_no_mistake(name):
    config = quick.config_class("FlowGRPOConfig" if "flow_grpo" in name else "FDFOConfig")
    script, *sections = Parser([RunArguments, *quick.sections(config)]).parse_args_and_config(["--config", name])
    quick.check(config, {name: value for each in sections for name, value in vars(each).items()})
    quick.check_rewards(script.reward)


def test_what_options_do_not_decide_passes(tmp_path):
    quick.check(quick.config_class("FDFOConfig"), {"lr_scheduler_type": "of another version", "bf16": True})
    quick.check_prompts("someone/prompts", "prompt")
    (tmp_path / "prompts.csv").write_text("caption\na cat\n")
    quick.check_prompts(str(tmp_path / "prompts.csv"), "prompt")
    with pytest.raises(ValueError, match="is a file of another kind than .txt"):
        (tmp_path / "prompts.doc").touch()
        quick.check_prompts(str(tmp_path / "prompts.doc"), "prompt")


def test_a_stand_in_decides_nothing():
    stand_in = quick.StandIn("torch.cuda")
    for use in (lambda: stand_in.is_available(), lambda: bool(stand_in), lambda: isinstance(1, stand_in)):
        with pytest.raises(quick.Undecided, match="torch.cuda"):
            use()
    with pytest.raises(quick.Undecided):
        stand_in == 3  # noqa: B015
    assert stand_in.logger.warning("not shown") is None


def test_a_module_that_stand_ins_do_not_suffice_for_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs").mkdir()
    (tmp_path / "needs" / "__init__.py").write_text(
        "import torch\n\nassert isinstance(torch.nn.Module, type)\nfound = 3\n"
    )
    with pytest.raises(AssertionError):
        quick.load("needs")
    assert quick.load_or_import("needs").found == 3


def test_rewards_are_the_packaged_ones():
    assert quick.load("trl_fdfo.rewards.by_name").REWARDS.keys() == REWARDS.keys()
    quick.check_rewards(["pickscore", "pickscore(offload=True)", "trl_fdfo.shapes:reward"])
    quick.check_rewards(["my_module:reward"], has_modules=False)
    with pytest.raises(ValueError, match="unexpected keyword argument 'offloads'"):
        quick.check_rewards(["pickscore(offloads=True)"])
