"""A config as a value: copies, `dataclasses.replace`, assignments, and files that it is written to."""

import copy
import dataclasses
import inspect
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser
from transformers.trainer_utils import SchedulerType

import trl_fdfo
from trl_fdfo import FDFOConfig, FlowGRPOConfig
from trl_fdfo.training.config import option, with_help


def make(**options):
    return FDFOConfig(**{"output_dir": "/data/runs/a", "report_to": [], "use_cpu": True, **options})


GIVEN = {"dataset_name": "/data/prompts.txt", "adapter": "/data/lora", "hub_token": "hf_secret", "num_rollouts": 7}


def spawned(config, queue):
    queue.put((config.output_dir, config.dataset_name, config.hub_token, config.num_train_epochs))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_is_the_same(copied):
    config = make(**GIVEN)
    twin = copied(config)
    for field in dataclasses.fields(config):
        assert getattr(twin, field.name) == getattr(config, field.name), field.name
    assert (twin.output_dir, twin.dataset_name, twin.hub_token) == ("/data/runs/a", "/data/prompts.txt", "hf_secret")
    twin.num_rollouts = 9
    assert twin.num_train_epochs == 9 and config.num_train_epochs == 7


def test_a_spawned_process_gets_all_of_it():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=spawned, args=(make(**GIVEN), queue))
    process.start()
    assert queue.get(timeout=120) == ("/data/runs/a", "/data/prompts.txt", "hf_secret", 7)
    process.join()


def test_nothing_private_is_written(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "secret_folder" / "out"), hub_token="hf_secret", num_rollouts=1)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret" and trainer.args.output_dir.startswith(str(tmp_path))
    written = Path(trainer.args.output_dir, "training_args.bin")
    for secret in ("hf_secret", "secret_folder", str(tmp_path)):
        assert secret.encode() not in written.read_bytes()
        assert secret not in str(trainer.args.to_dict())
    loaded = torch.load(written, weights_only=False)
    assert (
        loaded.output_dir == "out" and loaded.num_rollouts == 1 and loaded.learning_rate == trainer.args.learning_rate
    )


OTHER_VALUES = {
    "num_rollouts": 50,
    "prompts_per_rollout": 8,
    "per_device_prompt_batch_size": 4,
    "num_generations": 3,
    "num_inference_steps": 10,
    "optimizer_steps_per_rollout": 2,
    "num_iterations": 3,
    "timestep_fraction": 0.25,
    "use_peft": False,
    "eval_diversity": "pixels",
    "save_steps": 8,
    "churn_schedule": "interval",
    "timestep_selection": "first",
    "learning_rate": 1e-3,
    "ema_decay": 0.5,
    "seed": 3,
    "save_strategy": "epoch",
    "per_device_sampling_batch_size": 6,
    "fp16": False,
}


def comparable(config):
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    options["accelerator_config"] = str(options["accelerator_config"])
    derived = ("num_trained_levels", "num_rollout_batches", "steps_per_rollout")
    return options | {name: getattr(config, name) for name in derived}


@pytest.mark.parametrize("config_class", [FDFOConfig, FlowGRPOConfig])
@pytest.mark.parametrize("name", OTHER_VALUES)
def test_replaced_and_assigned_options_take_full_effect(name, config_class):
    value = OTHER_VALUES[name]
    if name in ("churn_schedule", "timestep_selection") and config_class is FlowGRPOConfig:
        return
    settings = {"output_dir": "a", "report_to": [], "use_cpu": True, "timestep_fraction": 0.5}
    expected = comparable(config_class(**(settings | {name: value})))
    config = config_class(**settings)
    assert comparable(dataclasses.replace(config, **{name: value})) == expected
    if name in config_class._own_options():
        setattr(config, name, value)
        assert comparable(config) == expected


def test_numbers_of_numpy_are_pythons():
    numbers = {
        "seed": np.int64(3),
        "learning_rate": np.float32(0.5),
        "use_peft": np.bool_(False),
        "save_steps": np.int32(8),
    }
    config = make(
        **numbers, reward_weights=[np.float32(2.0)], churn_schedule="prior", churn_kwargs={"spread": np.float64(1)}
    )
    config.num_rollouts = np.int64(7)
    given = {name: getattr(config, name) for name in [*numbers, "num_rollouts"]}
    assert given == {"seed": 3, "learning_rate": 0.5, "use_peft": False, "save_steps": 8, "num_rollouts": 7}
    assert [type(value) for value in given.values()] == [int, float, bool, int, int]
    assert type(config.reward_weights[0]) is float and type(config.churn_kwargs["spread"]) is float
    with pytest.raises(ValueError, match="num_rollouts=2.5 is a float; it must be int"):
        make(num_rollouts=np.float64(2.5))


def test_a_new_attribute_that_is_no_misspelt_option_is_kept():
    config = make()
    config.hf_deepspeed_config, config._own, config.note = 1, 2, 3  # the first is Trainer's
    assert (config.hf_deepspeed_config, config._own, config.note) == (1, 2, 3)


def test_replace_keeps_what_was_given():
    config = make(logging_steps=4, save_steps=8, lr_scheduler_type="cosine", churn_schedule="prior", churn_kwargs={})
    config = dataclasses.replace(config, optimizer_steps_per_rollout=2, num_rollouts=5)
    assert (config.logging_steps, config.save_steps, config.num_train_epochs) == (4, 8, 5)
    assert config.lr_scheduler_type == SchedulerType.COSINE and config.logging_images_steps == 20


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epsilon", -1, "epsilon=-1 must be > 0"),
        ("prompts_per_rollout", 7, "prompts_per_rollout=7 cannot be split evenly"),
        ("gradient_accumulation_steps", 1, "gradient_accumulation_steps=1 cannot be set: it follows"),
        ("churn_schedule", "linear", "churn_schedule='linear' is not one of"),
        # Inherited options.
        ("max_steps", 1, "max_steps=1"),
        ("auto_find_batch_size", True, "auto_find_batch_size"),
        ("neftune_noise_alpha", 1.0, "neftune_noise_alpha"),
        ("adam_beta1", 5.0, "adam_beta1=5.0"),
        ("save_total_limit", 0, "save_total_limit=0"),
    ],
)
def test_a_wrong_assignment_is_refused_and_changes_nothing(name, value, message):
    config = make()
    before = comparable(config)
    with pytest.raises(ValueError, match=message):
        setattr(config, name, value)
    assert comparable(config) == before


def test_an_assignment_to_an_inherited_option_takes_full_effect():
    config = make(eval_strategy="steps")
    config.load_best_model_at_end = True
    assert config.metric_for_best_model == "eval_reward"


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 3), ("optim", "sgd"), ("max_grad_norm", 0.5), ("max_steps", 1), ("output_dir", "elsewhere")],
)
def test_an_inherited_option_is_held_by_the_trainer(make_trainer, name, value):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=f"{name}={value!r} comes too late"):
        setattr(trainer.args, name, value)
    trainer.args.hub_model_id = "me/model"  # where a result goes may change
    assert trainer.args.hub_model_id == "me/model"


@pytest.mark.parametrize(
    "docstring", [None, "Options.", "Options.\n\n    Parameters:\n        other (`int`):\n            Text.\n"]
)
def test_an_option_without_a_paragraph_is_refused_by_name(docstring):
    with pytest.raises(TypeError, match="`temperature` has no paragraph in the docstring of Config"):
        with_help(type("Config", (), {"__doc__": docstring, "temperature": option(1.0)}))


def test_help_is_read_at_any_indentation():
    """Python 3.13 takes the common indentation away."""

    class Config:
        """
        Options.

        Parameters:
            temperature (`float`, defaults to `1.0`):
                How much
                100% is.
        """

        temperature = option(1.0)

    for docstring in (Config.__doc__, inspect.cleandoc(Config.__doc__)):
        made = with_help(type("Config", (), {"__doc__": docstring, "temperature": option(1.0)}))
        assert made.temperature.metadata["help"] == "How much 100%% is."


def test_an_assignment_after_the_trainer_is_refused(make_trainer):
    trainer = make_trainer()
    with pytest.raises(
        ValueError, match=r"num_rollouts=3 comes too late.*dataclasses.replace\(config, num_rollouts=3\)"
    ):
        trainer.args.num_rollouts = 3
    trainer.args.eval_on_start = False  # Trainer's own, which its callbacks set
    assert dataclasses.replace(trainer.args, num_rollouts=3).num_train_epochs == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 3}, "num_train_epochs=3 cannot be set: .* is 100 here. Set num_rollouts"),
        ({"per_device_train_batch_size": 8}, "is 4 here. Set per_device_prompt_batch_size or num_generations.$"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1 cannot be set: .* is 2160 here"),
    ],
)
def test_the_defaults_of_trainer_are_refused_like_other_values(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    assert make(num_train_epochs=100, gradient_accumulation_steps=2160, per_device_train_batch_size=4)


def test_evaluations_sample_as_many_at_a_time_as_they_are_told(make_trainer):
    sizes = []
    trainer = make_trainer(per_device_eval_batch_size=3)
    generate = trainer.flow.generate
    trainer.flow.generate = lambda prompts, *args, **kwargs: (
        sizes.append(len(prompts)) or generate(prompts, *args, **kwargs)
    )
    trainer.generate(["a cat"] * 7, range(7))
    assert sizes == [3, 3, 1] and make_trainer().args.per_device_eval_batch_size == 4


def test_evaluations_sample_as_many_at_a_time_as_rollouts(make_config):
    config = make_config(per_device_prompt_batch_size=1, per_device_sampling_batch_size=4, num_candidates=6)
    assert config.per_device_train_batch_size == 2 and config.per_device_eval_batch_size == 24


def test_a_call_samples_at_most_the_prompts_of_the_process(make_config):
    config = make_config(prompts_per_rollout=4, per_device_prompt_batch_size=2, per_device_sampling_batch_size=64)
    assert config.prompts_per_call == 4 and config.per_device_eval_batch_size == 4 * 2
    assert dataclasses.replace(config, prompts_per_rollout=16).prompts_per_call == 16
    config.prompts_per_rollout = 128
    assert config.prompts_per_call == 64 and config.per_device_eval_batch_size == 64 * 2
    config.per_device_sampling_batch_size = 8
    assert config.prompts_per_call == 8


@pytest.mark.parametrize(
    "config_class", [getattr(trl_fdfo, name) for name in trl_fdfo.__all__ if name.endswith("Config")]
)
def test_the_parser_of_transformers_reads_it(config_class):
    parser = HfArgumentParser(config_class)
    arguments = ["--output_dir", "out", "--report_to", "none", "--use_cpu", "--beta", "0.0", "--lora_r", "3"]
    (config,) = parser.parse_args_into_dataclasses(arguments)
    assert (config.lora_r, config.beta) == (3, 0.0)
    (again,) = parser.parse_dict(config.to_dict(), allow_extra_keys=True)
    assert comparable(again) == comparable(config)


def test_a_config_is_read_from_its_own_json():
    config = make(**GIVEN, pipeline_kwargs={"max_sequence_length": 8, "negative_prompt": "/data/x"})
    again = FDFOConfig(**json.loads(config.to_json_string()))
    config.hub_token = None  # the one thing that is not written
    assert comparable(again) == comparable(config)
    again.num_rollouts = 9  # what follows from others was not given
    assert again.num_train_epochs == 9
    assert (again.output_dir, again.adapter) == ("/data/runs/a", "/data/lora")
