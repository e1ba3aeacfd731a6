"""
A run with random options trains, or is refused when it is constructed. Nothing fails later.

Each run of the suite draws the same examples. To draw a thousand others:

    HYPOTHESIS_EXAMPLES=1000 pytest tests/training/test_properties.py
"""

import collections
import os
import tempfile

import hypothesis.strategies as st
import pytest
import tiny_pipelines
import torch
from conftest import trained_weights
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from tiny_runs import PROMPTS, UnplannedTrainer, redness

from trl_fdfo import FDFOConfig, FDFOTrainer


EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", 0))

# Each value is right by itself. Several together may still be refused, if batches cannot be split evenly for example.
OPTIONS = {
    "prompts_per_rollout": st.integers(1, 6),
    "per_device_prompt_batch_size": st.integers(1, 3),
    "num_generations": st.integers(2, 3),
    "num_inference_steps": st.integers(1, 4),
    "timestep_fraction": st.floats(0.01, 1.0),
    "timestep_selection": st.sampled_from(["stratified", "first"]),
    "optimizer_steps_per_rollout": st.integers(1, 4),
    "num_iterations": st.integers(1, 2),
    "churn": st.floats(1e-3, 1.0),
    "churn_schedule": st.sampled_from(["constant", "interval", "prior"]),
    "churn_kwargs": st.none()
    | st.fixed_dictionaries(
        {}, optional={"location": st.floats(-5, 5), "location_std": st.floats(0, 5), "width": st.floats(0.01, 5)}
    )
    | st.fixed_dictionaries({"spread": st.floats(0, 1)}),
    "epsilon": st.floats(1e-4, 10.0),
    "beta": st.just(0.0) | st.floats(0.0, 10.0),
    "guidance_scale": st.none() | st.floats(0.0, 8.0),
    "height": st.none() | st.sampled_from([4, 8, 16]),
    "pipeline_kwargs": st.sampled_from(
        [None, {"max_sequence_length": 4}, {"negative_prompt": "blue"}, {"sigmas": [1.0, 0.6]}]
    ),
    "use_peft": st.booleans(),
    "lora_r": st.integers(1, 8),
    "lora_target_modules": st.none() | st.just(["to_q", "to_out.0"]),
    "ema_decay": st.none() | st.floats(0.0, 0.999),
    "reward_weights": st.sampled_from([None, [1.0], [-2.0], [0.01]]),
    "gradient_checkpointing": st.booleans(),
    "bf16": st.booleans(),
    "learning_rate": st.floats(1e-5, 1e-2),
    "lr_scheduler_type": st.sampled_from(
        ["constant", "linear", "cosine", "constant_with_warmup", "inverse_sqrt", "polynomial", "reduce_lr_on_plateau"]
    ),
    "warmup_steps": st.sampled_from([0, 1, 0.5]),
    "optim": st.sampled_from(["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"]),
    "weight_decay": st.floats(0.0, 0.1),
    "max_grad_norm": st.just(0.0) | st.floats(1e-3, 10.0),
    "seed": st.integers(0, 2**32 - 1),
    "save_strategy": st.sampled_from(["no", "steps", "epoch", "best"]),
    "save_steps": st.integers(1, 4) | st.just(0.5),
    "save_total_limit": st.none() | st.integers(1, 2),
    "save_only_model": st.booleans(),
    "eval_strategy": st.sampled_from(["no", "steps", "epoch"]),
    "eval_steps": st.integers(1, 4) | st.just(0.5),
    "eval_on_start": st.booleans(),
    "num_eval_prompts": st.none() | st.integers(1, 5),
    "images_per_eval_prompt": st.none() | st.integers(1, 3),
    "eval_diversity": st.none() | st.just("pixels"),
    "alarm_diversity_drop": st.none() | st.floats(0.01, 0.9),
    "stop_on_alarm": st.just(False) | st.booleans(),
    "load_best_model_at_end": st.booleans(),
    "metric_for_best_model": st.sampled_from(
        [None, "reward", "eval_reward", "rewards/redness/mean", "eval_control", "eval_diversity"]
    ),
    "logging_strategy": st.sampled_from(["no", "steps", "epoch"]),
    "logging_steps": st.integers(1, 4) | st.just(0.5),
    "logging_first_step": st.booleans(),
}

# Each value is wrong by itself.
BAD_VALUES = {
    "prompts_per_rollout": [0, -1, 2.5],
    "per_device_prompt_batch_size": [0, "2"],
    "num_generations": [1, 0],
    "num_inference_steps": [0, 1.5],
    "timestep_fraction": [0.0, 1.5, float("nan")],
    "timestep_selection": ["last", None],
    "optimizer_steps_per_rollout": [0, 1000],
    "num_iterations": [0, True],
    "churn": [0.0, -0.1, float("inf"), 1e30, 1e300],
    "churn_schedule": ["linear"],
    "churn_kwargs": [{"spread": 0.1}, "{"],
    "epsilon": [0.0, -0.03, None],
    "beta": [-1.0],
    "guidance_scale": ["4", float("nan")],
    "height": [0, 30],
    "pipeline_kwargs": [{"steps": 3}, {"sigmas": [1.0, 0.8, 0.6, 0.4, 0.2, 0.1]}, "[", {"latents": None}],
    "use_peft": ["no"],
    "lora_r": [0],
    "lora_target_modules": [["to_x"], "to_q"],
    "ema_decay": [1.0, -0.1],
    "reward_weights": [[0.0], [], [1.0, 1.0]],
    "learning_rate": ["1e-3", float("inf"), 0.0, -1.0],
    "lr_scheduler_type": ["exponential", "cosine_with_min_lr", "warmup_stable_decay"],
    "warmup_steps": [-1],
    "optim": ["adam_w"],
    "weight_decay": [float("nan"), -1.0],
    "adam_beta1": [1.5, "0.9"],
    "max_grad_norm": [-1.0, None],
    "seed": [-1, 2**32],
    "save_strategy": ["rollout"],
    "save_steps": [5],
    "eval_strategy": ["rollout"],
    "metric_for_best_model": ["loss"],
    "num_eval_prompts": [0, -1, 2.5],
    "images_per_eval_prompt": [0, "2"],
    "eval_diversity": ["variety", 3],
    "alarm_control_drop": [0.0, float("nan")],
    "alarm_diversity_drop": [-0.1, 1.5],
    "logging_steps": [0, "a"],
    "max_steps": [3],
    "num_train_epochs": [5],
}
ONE_BAD_VALUE = [{name: value} for name, values in BAD_VALUES.items() for value in values]


@st.composite
def runs(draw):
    """Options of a run, and True if it has an `eval_dataset`."""
    options = draw(st.fixed_dictionaries({}, optional=OPTIONS))
    return options | draw(st.just({}) | st.just({}) | st.sampled_from(ONE_BAD_VALUE)), draw(st.booleans())


def outcome(options: dict, has_eval_dataset: bool) -> str:
    """Construct and train a run. Returns `"trained"` or `"refused"`, and fails for every other outcome."""
    defaults = {
        "num_rollouts": 2,
        "prompts_per_rollout": 2,
        "per_device_prompt_batch_size": 1,
        "num_inference_steps": 2,
        "optimizer_steps_per_rollout": 1,
        "height": 16,
        "width": 16,
        "churn": 0.2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            # A plan takes longer than a run: half of them make one.
            trainer = (UnplannedTrainer if has_eval_dataset else FDFOTrainer)(
                FDFOConfig(**{**defaults, "output_dir": folder, **options}),
                tiny_pipelines.sd3(),
                redness,
                train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
                eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}) if has_eval_dataset else None,
            )
        except ValueError as error:
            assert len(str(error)) > 20, error
            return "refused"
        before = trained_weights(trainer)
        trainer.train()
        after = trained_weights(trainer)
    rollouts = 1 if any(log.get("eval_alarm") for log in trainer.state.log_history) else 2
    assert trainer.state.global_step >= rollouts * trainer.args.steps_per_rollout
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(log["replay_error"] == 0 for log in trainer.state.log_history if "replay_error" in log)
    return "trained"


@pytest.mark.parametrize("options", ONE_BAD_VALUE, ids=str)
def test_a_bad_value_is_refused_by_itself(options):
    # Some options are read only if the run evaluates, or saves by steps.
    used = {"eval_strategy": "epoch"} if options.keys() & {"metric_for_best_model", "eval_diversity"} else {}
    used |= {"save_strategy": "steps", "optimizer_steps_per_rollout": 2} if "save_steps" in options else {}
    assert outcome({**used, **options}, has_eval_dataset=True) == "refused"


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_a_run_trains_or_is_refused_when_it_is_constructed():
    outcomes = collections.Counter()

    @settings(
        max_examples=EXAMPLES or 80,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(runs())
    def check(run):
        outcomes[outcome(*run)] += 1

    check()
    # The examples must be enough of both kinds.
    assert outcomes["trained"] >= 15 and outcomes["refused"] >= 15, outcomes
