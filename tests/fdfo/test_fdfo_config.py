import copy
import inspect
import os
import re
from dataclasses import dataclass, fields, replace

import pytest
import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import TrlParser

from trl_fdfo import FDFOConfig, FlowGRPOConfig
from trl_fdfo.training.config import RolloutConfig


def paper(**options):
    return FDFOConfig(**{"output_dir": "unused", "report_to": [], "use_cpu": True, **options})


def test_defaults_are_the_setting_of_the_paper():
    config = paper()
    assert (config.prompts_per_rollout, config.num_generations, config.optimizer_steps_per_rollout) == (432, 2, 4)
    assert (config.num_inference_steps, config.guidance_scale, config.height, config.width) == (40, 1.0, 512, 512)
    assert (config.churn, config.churn_schedule, config.epsilon, config.beta) == (0.0025, "constant", 0.03, 0.0)
    assert (config.learning_rate, config.weight_decay, config.lr_scheduler_type) == (3e-5, 1e-4, "constant")
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (config.lora_r, config.lora_alpha, config.use_peft) == (32, 64, True)


def test_derived_numbers():
    config = paper(timestep_fraction=0.25, num_iterations=3, num_rollouts=7, per_device_prompt_batch_size=4)
    assert config.num_trained_levels == 10
    assert config.num_rollout_batches == 108
    assert config.gradient_accumulation_steps == 108 * 10 // 4
    assert config.steps_per_rollout == 12
    assert config.num_train_epochs == 7
    assert config.logging_steps == 12 and config.save_steps == 120
    assert config.per_device_train_batch_size == 8


def test_every_option_is_documented_and_has_help():
    inherited = {field.name for field in fields(TrainingArguments)}
    for config_class, least in ((RolloutConfig, 25), (FDFOConfig, 5), (FlowGRPOConfig, 1)):
        own = [field for field in fields(config_class) if field.name in config_class.__annotations__]
        assert len(own) > least
        for field in own:
            assert field.metadata["help"] and isinstance(field.metadata["changes_result"], bool), field.name
            assert field.name in inherited or field.name in documented(config_class), field.name


def documented(config_class):
    # Python 3.13 takes the indentation out of a docstring.
    docstrings = [inspect.cleandoc(each.__doc__) for each in config_class.__mro__[:2]]
    return re.findall(r"^    (\w+) \(`", "\n".join(docstrings), re.MULTILINE)


def test_the_command_line_takes_every_option():
    arguments = ["--output_dir", "out", "--use_cpu", "true", "--churn_schedule", "interval", "--stop_on_alarm", "false"]
    (config,) = TrlParser(FDFOConfig).parse_args_and_config([*arguments, "--churn_kwargs", '{"width": 0.3}'])
    assert config.churn_shape() == {"location": 1.0, "location_std": 1.5, "width": 0.3, "spread": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"churn_kwargs": {"width": 0.3}}, "churn_kwargs has width=0.3, and churn_schedule='constant' takes none"),
        ({"churn_schedule": "prior", "churn_kwargs": {"width": 1}}, "churn_schedule='prior' takes spread"),
        ({"churn_schedule": "prior", "churn_kwargs": {"spread": True}}, "spread=True: it must be a finite number"),
        ({"churn_schedule": "prior", "churn_kwargs": "{"}, "churn_kwargs='{' is not valid JSON"),
        ({"churn_schedule": "prior", "churn_kwargs": "[1]"}, "must be a dict of the shape of the churn schedule"),
    ],
)
def test_the_shape_of_the_churn_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        paper(**options)


@pytest.mark.parametrize(("fraction", "steps"), [(1.0, 40), (0.9, 4), (0.1, 1)])
def test_to_select_all_levels_is_refused(fraction, steps):
    message = f"timestep_selection='first' selects nothing: timestep_fraction={fraction} trains all of the num_inference_steps={steps}"
    with pytest.raises(ValueError, match=message):
        paper(timestep_selection="first", timestep_fraction=fraction, num_inference_steps=steps)


PUBLISHED = {
    "constant": (0.0025, {}),
    "interval": (1.0, {"location": 1.0, "location_std": 1.5, "width": 0.25, "spread": 0.0}),
    "prior": (0.1, {"spread": 1.0}),
}


def of_a_run(config):
    """What trackers get of a run: all values, in plain numbers."""
    config = copy.copy(config)
    config.hold()
    return config.to_dict()


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_a_schedule_alone_has_the_published_churn(schedule):
    assigned = paper()
    assigned.churn_schedule = schedule
    (parsed,) = TrlParser(FDFOConfig).parse_args_and_config(
        ["--output_dir", "out", "--use_cpu", "true", "--churn_schedule", schedule]
    )
    for config in (paper(churn_schedule=schedule), replace(paper(), churn_schedule=schedule), assigned, parsed):
        assert (config.churn, config.churn_shape()) == PUBLISHED[schedule]
        assert of_a_run(config)["churn"] == config.result_options()["churn"] == PUBLISHED[schedule][0]
    # A schedule that is left again leaves nothing behind.
    assert replace(config, churn_schedule="constant").churn == 0.0025


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_a_churn_that_is_given_is_kept(schedule):
    config = replace(paper(churn=0.2), churn_schedule=schedule)
    assert config.churn == 0.2 and replace(config, num_rollouts=3).churn == 0.2


def test_a_fraction_that_follows_is_computed_anew_too():
    config = replace(paper(save_steps=0.1, save_strategy="no"), save_steps=0.2)
    assert config.eval_steps == 0.2 and type(of_a_run(config)["eval_steps"]) is float
    assert config.to_dict()["eval_steps"] is None  # so that a config that is made of it computes it anew


def test_an_old_name_says_the_new_one():
    with pytest.raises(TypeError, match=r'churn_width=0.3. `churn_width` is `churn_kwargs=\{"width": ...\}` here'):
        paper(churn_schedule="interval", churn_width=0.3)


def test_the_fingerprint_has_the_names_of_earlier_checkpoints():
    given = {"location": 0.5, "location_std": 2.0, "width": 0.3, "spread": 0.1}
    options = paper(churn_schedule="interval", churn=0.5, churn_kwargs=given).result_options()
    assert {name: value for name, value in options.items() if name.startswith("churn")} == {
        "churn_schedule": "interval",
        "churn": 0.5,
        **{f"churn_{name}": value for name, value in given.items()},
    }
    assert "logging_steps" not in options and "stop_on_alarm" not in options and options["epsilon"] == 0.03


def test_an_option_of_ones_own_changes_the_result():
    @dataclass
    class Mine(FDFOConfig):
        temperature: float = 0.5

    assert Mine(output_dir="unused", report_to=[], use_cpu=True).result_options()["temperature"] == 0.5


def test_what_the_batch_errors_name_does_work():
    for options in [
        {"prompts_per_rollout": 428, "per_device_prompt_batch_size": 4},
        {"prompts_per_rollout": 432, "per_device_prompt_batch_size": 4},
        *(
            {"prompts_per_rollout": prompts, "num_inference_steps": 5, "optimizer_steps_per_rollout": steps}
            for prompts, steps in [(6, 3), (6, 5), (8, 4), (16, 4)]
        ),
    ]:
        assert paper(**options).gradient_accumulation_steps >= 1


@pytest.mark.parametrize(
    ("announced", "options", "precision"),
    [
        ("bf16", {}, "bf16"),
        ("fp16", {}, "fp16"),
        ("bf16", {"bf16": False}, "no"),
        ("bf16", {"fp16": True}, "fp16"),
        ("fp16", {"bf16": True}, "bf16"),
    ],
)
def test_the_launchers_precision_is_that_of_the_options(monkeypatch, announced, options, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", announced)
    config = paper(**options)
    assert config.mixed_precision == precision
    assert config.mixed_precision_dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    assert (config.bf16, config.fp16) == (precision == "bf16", precision == "fp16")
    assert config.result_options()["bf16"] == (precision == "bf16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == announced


def test_a_precision_of_the_launcher_that_no_run_has_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision=fp8, and a run computes in bf16, fp16 or float32"):
        paper()
    assert paper(bf16=False).mixed_precision == "no"


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="this machine has bfloat16")
def test_bf16_is_resolved_where_unset():
    assert not paper().bf16
    assert paper(bf16=True).bf16 is True


def test_pipeline_kwargs_from_the_command_line():
    assert paper(pipeline_kwargs='{"max_sequence_length": 128}').pipeline_kwargs == {"max_sequence_length": 128}


def test_save_steps_matter_only_where_they_are_used():
    assert paper(save_strategy="epoch", save_steps=3).save_steps == 3


def test_best_model_is_by_reward():
    config = paper(load_best_model_at_end=True, save_strategy="epoch", eval_strategy="epoch")
    assert config.metric_for_best_model == "eval_reward" and config.greater_is_better


def test_one_process_takes_one_gpu():
    assert paper(use_cpu=False).n_gpu == (1 if torch.cuda.is_available() else 0)
