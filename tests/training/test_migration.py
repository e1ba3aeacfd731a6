"""Names of other trainers: what is said about them, and docs/migration.md, which shows all of them."""

import inspect
import itertools
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import trl
from transformers import Trainer, TrainingArguments

from trl_fdfo import FDFOConfig, FDFOTrainer, FlowGRPOConfig
from trl_fdfo.cli.arguments import RunArguments
from trl_fdfo.training.migration import ARGUMENTS, OPTIONS_OF, arguments_of, unknown_arguments, unknown_options


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "migration.md"
GROUPS = {
    "GRPOConfig": "Options of TRL's `GRPOConfig`",
    "ModelConfig and ScriptArguments": "Options of TRL's `ModelConfig` and `ScriptArguments`",
    "DDPOConfig": "Options of TRL's `DDPOConfig` (before TRL 1.0)",
    "ConfigDicts": "Options of Flow-GRPO's `config/*.py`",
    "Flow-Factory": "Options of Flow-Factory's YAML files",
    "TrainingArguments of transformers 4": "Options of `TrainingArguments` (transformers 4)",
}
FDFO, FLOW_GRPO = ({field.name for field in fields(c)} for c in (FDFOConfig, FlowGRPOConfig))
SCRIPT = {field.name for field in fields(RunArguments)}


def names_of(config_class) -> set[str]:
    return {field.name for field in fields(config_class)}


@pytest.mark.parametrize("config_class", [trl.GRPOConfig, trl.ModelConfig, trl.ScriptArguments, TrainingArguments])
def test_every_option_of_trl_has_an_answer(config_class):
    answered = set(itertools.chain(*OPTIONS_OF.values()))
    assert names_of(config_class) - FDFO - answered == set()


@pytest.mark.parametrize("trainer", [trl.GRPOTrainer, Trainer])
def test_every_argument_of_their_trainers_has_an_answer(trainer):
    theirs = set(inspect.signature(trainer.__init__).parameters) - {"self"}
    assert theirs - arguments_of(FDFOTrainer) - ARGUMENTS.keys() == set()


def test_every_answer_names_something():
    for name, here in itertools.chain(*(group.items() for group in OPTIONS_OF.values())):
        assert set(here.names) <= FDFO | FLOW_GRPO | SCRIPT, name
        assert here.names or here.note, name
        assert name not in FDFO | FLOW_GRPO, f"{name} is an option: nobody would be told"
    for name, here in ARGUMENTS.items():
        assert set(here.names) <= arguments_of(FDFOTrainer) and (here.names or here.note), name
        assert name not in arguments_of(FDFOTrainer), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rollout": 3}, "FDFOConfig has no option num_rollout=3. Did you mean `num_rollouts`"),
        ({"lora_rank": 8}, "`lora_r`"),
        ({"foo": 1}, "FDFOConfig has no option foo=1.$"),
        # TRL's GRPOConfig
        ({"max_completion_length": 256}, "max_completion_length=256. There is no .*: an image is not sampled token by"),
        ({"generation_kwargs": {}}, "`generation_kwargs` is `pipeline_kwargs` here"),
        ({"log_completions": True}, "`log_completions` is `logging_images_steps` here"),
        # DDPOConfig
        ({"sample_num_steps": 40}, "sample_num_steps=40. `sample_num_steps` is `num_inference_steps` here"),
        ({"sample_batch_size": 8}, "`per_device_sampling_batch_size` or .* here: both counted in prompts"),
        ({"train_batch_size": 8}, "`per_device_prompt_batch_size` here: counted in prompts"),
        ({"train_learning_rate": 1e-4}, "`train_learning_rate` is `learning_rate` here"),
        ({"per_prompt_stat_tracking": True}, "There is no .*: rewards are always compared within a prompt"),
        # Flow-GRPO's, by their own names and by those of a ConfigDict
        ({"num_image_per_prompt": 24}, "`num_image_per_prompt` is `num_generations` here"),
        ({"sample.num_steps": 10}, "`sample.num_steps` is `num_inference_steps` here"),
        ({"config.train.clip_range": 1e-4}, "`config.train.clip_range` is `epsilon` here"),
        ({"noise_level": 0.7}, "`noise_level` is `churn` here"),
        ({"sde_window_size": 2}, "There is no `sde_window_size`: an option of the algorithm"),
        # What belongs elsewhere
        ({"evaluation_strategy": "steps"}, "`evaluation_strategy` is `eval_strategy` here"),
        ({"train_dataset": 1}, "There is no `train_dataset`: it is an argument of the trainer"),
        ({"reward_funcs": 1}, "There is no `reward_funcs`: the trainer takes `reward_fn`"),
        ({"top_p": 1, "num_rolouts": 2}, "has no option top_p=1, num_rolouts=2. There is no .* For `num_rolouts`, did"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_option_is_explained(options, message):
    with pytest.raises(TypeError, match=message):
        FDFOConfig(output_dir="unused", **options)


def test_an_error_names_the_class_that_was_called():
    @dataclass
    class Mine(FlowGRPOConfig):
        temperature: float = 1.0

    elsewhere = "FlowGRPOConfig has no option churn=0.1. There is no `churn`: it is an option of FDFOConfig.$"
    with pytest.raises(TypeError, match=elsewhere):
        FlowGRPOConfig(output_dir="unused", churn=0.1)
    with pytest.raises(TypeError, match="no `timestep_selection`: it is an option of FDFOConfig.$"):
        FlowGRPOConfig(output_dir="unused", timestep_selection="first")
    config = FlowGRPOConfig(output_dir="unused", use_cpu=True, report_to=[])
    with pytest.raises(AttributeError, match="There is no `churn`: it is an option of FDFOConfig.$"):
        config.churn = 0.1
    with pytest.raises(TypeError, match="FDFOConfig has no option beta.x=1. Did you mean `beta`?"):
        FDFOConfig(output_dir="unused", **{"beta.x": 1})
    with pytest.raises(TypeError, match="There is no `nft_beta`: it is an option of DiffusionNFTConfig.$"):
        FDFOConfig(output_dir="unused", nft_beta=1.0)
    with pytest.raises(TypeError, match="Mine has no option sde_window_size=2. .* is `num_noisy_steps` here"):
        Mine(output_dir="unused", sde_window_size=2)
    assert Mine(output_dir="unused", use_cpu=True, report_to=[], temperature=0.5).temperature == 0.5


def test_an_unknown_argument_is_explained():
    explained = lambda *given: unknown_arguments("FDFOTrainer", given, arguments_of(FDFOTrainer), FDFO)
    assert explained("config", "pipeline", "peft_config") is None
    assert explained("model", "args", "reward_funcs") == (
        "FDFOTrainer has no argument model, args, reward_funcs. `model` is `pipeline` here: a pipeline of diffusers, or its "
        "Hub id or path. `args` is `config` here. `reward_funcs` is `reward_fn` here: a callable, or a list of them."
    )
    assert "There is no `processing_class`: the pipeline has its tokenizers." in explained("processing_class")
    assert "There is no `num_rollouts`: it is an option of the config." in explained("num_rollouts")
    assert explained("reward_function").endswith("`reward_fn` here: a callable, or a list of them.")
    assert explained("evaluation_dataset").endswith("Did you mean `eval_dataset` or `train_dataset`?")


def test_a_subclass_takes_its_own_arguments_and_those_that_it_passes_on():
    class Mine(FDFOTrainer):
        def __init__(self, *args, strength=1.0, **kwargs):
            super().__init__(*args, **kwargs)

    assert arguments_of(Mine) == arguments_of(FDFOTrainer) | {"strength"}
    assert unknown_options("Mine", {"a": 1}, ["a"], {}) is None


def rows(group) -> str:
    """Rows of a table; names with the same answer share one."""
    answers = {}
    for name, here in group.items():
        answers.setdefault(here, []).append(f"`{name}`")
    lines = []
    for here, names in answers.items():
        owner = lambda name: " (`FlowGRPOConfig`)" if name in FLOW_GRPO - FDFO else " (`FDFOConfig`)"
        one_sided = (FDFO | FLOW_GRPO) - (FDFO & FLOW_GRPO)
        shown = " or ".join(f"`{name}`{owner(name) if name in one_sided else ''}" for name in here.names) or "none"
        lines.append(f"| {', '.join(names)} | {shown}{': ' if here.note else ''}{here.note} |")
    return "\n".join(["| there | here |", "|---|---|", *lines])


def test_docs_show_the_tables():
    """Rewrites the tables of docs/migration.md, and fails if they were others."""
    before = PAGE.read_text(encoding="utf-8")
    head, marker, _ = re.split(r"(<!-- Below here .* -->\n)", before)
    sections = [("Arguments of trainers", ARGUMENTS), *((GROUPS[name], group) for name, group in OPTIONS_OF.items())]
    text = head + marker + "".join(f"\n## {title}\n\n{rows(group)}\n" for title, group in sections)
    PAGE.write_text(text, encoding="utf-8")
    assert text == before, "docs/migration.md has been rewritten: commit it"


def test_the_trainer_tells_the_names_of_others():
    with pytest.raises(
        TypeError, match="FDFOTrainer has no argument model, args, reward_funcs. .model. is .pipeline. here"
    ):
        FDFOTrainer(model="x", args=1, reward_funcs=2)
