"""A new algorithm is one folder: tests/helpers/reinforce.py trains, evaluates, resumes, plans and makes a card."""

import re
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import trained_weights
from datasets import Dataset
from reinforce import ReinforceConfig, ReinforceTrainer
from tiny_runs import PROMPTS, redness
from transformers import TrainingArguments

from trl_fdfo.planning.without_weights import planned
from trl_fdfo.training.algorithm import Algorithm
from trl_fdfo.training.surrogate import SurrogateLoss


OPTIONS = {
    "num_rollouts": 4,
    "prompts_per_rollout": 4,
    "num_inference_steps": 4,
    "optimizer_steps_per_rollout": 2,
    "height": 16,
    "width": 16,
    "pipeline_kwargs": {"max_sequence_length": 8},
    "learning_rate": 1e-3,
    "lora_r": 4,
    "save_strategy": "epoch",
    "eval_strategy": "epoch",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def make(tmp_path):
    def make(trainer_class=ReinforceTrainer, **options):
        config = ReinforceConfig(**{"output_dir": str(tmp_path / "out"), **OPTIONS, **options})
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        return trainer_class(config, tiny_pipelines.sd3(), redness, prompts, eval_dataset=prompts.select(range(2)))

    return make


def test_its_loss_is_its_formula(make):
    trainer = make(num_rollouts=1, save_strategy="no", eval_strategy="no")
    buffer = trainer._roll_out(0)
    batch, level = buffer.steps[0][0]
    x_t, velocity = batch.sampled.x_t[level], batch.sampled.velocities[level]
    endpoint, advantage = batch.targets
    assert advantage.unflatten(0, (2, 2)).sum(dim=1).abs().max() < 1e-6 and advantage.abs().max() > 0
    expected = [
        a * ((v - (x - x_0) / trainer.sigmas[level]) ** 2).mean()
        for a, v, x, x_0 in zip(advantage, velocity, x_t, endpoint)
    ]
    loss, ratio = trainer.loss(velocity, velocity, batch, level)
    torch.testing.assert_close(loss, torch.stack(expected))
    assert torch.equal(ratio, torch.ones(4))


def test_it_trains_evaluates_plans_and_makes_a_card(make, tmp_path, capsys):
    trainer = make()
    before = trained_weights(trainer)
    trainer.train()
    # The text stream of SD3's last block reaches the output only through its keys and values.
    unused = "transformer_blocks.1.attn.add_q_proj"
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(weight, before[name]) == (unused in name and "lora_B" in name), name
    assert sum("eval_reward" in log for log in trainer.state.log_history) == 4
    assert "REINFORCE on StableDiffusion3Pipeline" in capsys.readouterr().out
    trainer.save_model()
    card = Path(tmp_path, "out", "README.md").read_text()
    assert "Simple Statistical Gradient-Following Algorithms" in card and "| `churn` | 0.2 |" in card


def test_it_resumes_to_the_bit(make, tmp_path):
    whole = make(output_dir=str(tmp_path / "whole"))
    whole.train()
    begun = make()
    begun.train()
    last = Path(begun.args.output_dir, "checkpoint-8")
    assert last.is_dir()
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for name, weight in trained_weights(resumed).items():
        assert torch.equal(weight, trained_weights(whole)[name])


def test_its_checkpoints_are_no_other_algorithms(make, make_trainer):
    make(num_rollouts=1, eval_strategy="no").train()
    with pytest.raises(ValueError, match="algorithm: 'REINFORCE' -> 'FDFO'"):
        make_trainer(churn=0.2).train(resume_from_checkpoint=True)


def no_gradient(self, velocity, old_velocity, batch, level):
    return SurrogateLoss(*torch.zeros(2, len(velocity)).unbind())


MISTAKES = {
    "algorithm=None: it must be the name of the algorithm": {"algorithm": None},
    "paper='w92': it must be a `Paper`": {"paper": "w92"},
    "config_class=<class 'transformers.training_args.TrainingArguments'>": {"config_class": TrainingArguments},
    "scheduler_class=None: it must be a subclass of `RolloutScheduler`": {"scheduler_class": None},
    "hyperparameters='churn': it must be a tuple": {"hyperparameters": "churn"},
    "has 'chum' among its hyperparameters, and ReinforceConfig has no such option": {"hyperparameters": ("chum",)},
    "does not implement loss": {"loss": Algorithm.loss},
    "initial_seeds returned a list of 3": {"initial_seeds": lambda *_: [1, 2, 3]},
    "initial_seeds returned a list of 2 (0.5, 1)": {"initial_seeds": lambda *_: [0.5, 1]},
    "initial_seeds returned a list of 2 (-1, 1)": {"initial_seeds": lambda *_: [-1, 1]},
    "noise_amounts returned 0.2: it must return finite floats >= 0 as a tensor of shape [T + 1] = [5]": {
        "noise_amounts": lambda *_: 0.2
    },
    "noise_amounts returned a float32 tensor [0.0, 0.0, 0.0, 0.0] of shape [4]": {
        "noise_amounts": lambda *_: torch.zeros(4)
    },
    "noise_amounts returned a float32 tensor [nan,": {"noise_amounts": lambda *_: torch.full([5], torch.nan)},
    "trained_levels returned a list of 4 (1, 2, 3, 4): it must return K = 4 ints in [0, T) = [0, 4)": {
        "trained_levels": lambda *_: [1, 2, 3, 4]
    },
    "trained_levels returned a list of 1 (0)": {"trained_levels": lambda *_: [0]},
    "targets returned a float32 tensor [0.0, 0.0] of shape [2]: it must return a tuple of tensors": {
        "targets": lambda *_: torch.zeros(2)
    },
    "targets returned a tuple of 1 (a float32 tensor": {"targets": lambda *_: (torch.zeros(1, 2),)},
    "loss returned a float32 tensor 0.0 of shape []: it must return a `SurrogateLoss`": {
        "loss": lambda *_: torch.zeros(())
    },
    "its loss must be computed from `velocity` with gradients, and has none": {"loss": no_gradient},
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_in_it_is_told_with_its_name(make, words):
    class MistakenTrainer(ReinforceTrainer):
        pass

    for name, value in MISTAKES[words].items():
        setattr(MistakenTrainer, name, value)
    is_of_class = any(word in words for word in ("=", "hyperparameters", "implement")) and "returned" not in words
    is_of_rollout = words.startswith(("targets", "loss", "its loss"))
    with pytest.raises(TypeError if is_of_class else ValueError, match=f"^MistakenTrainer.*{re.escape(words)}"):
        trainer = make(MistakenTrainer)
        assert is_of_rollout
        trainer.train()


def test_beta_needs_its_distance(make):
    with pytest.raises(ValueError, match=r"beta=0.1 weighs the `base_distance` of ReinforceTrainer, which does not"):
        make(beta=0.1)


def test_its_plan_needs_no_weights(tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    for weights in (tmp_path / "pipeline").rglob("*.safetensors"):
        weights.unlink()
    config = planned(ReinforceConfig)(output_dir=str(tmp_path), **OPTIONS)
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    plan = str(ReinforceTrainer.plan(config, tmp_path / "pipeline", ["tiny_runs:redness"], prompts))
    assert plan.startswith("REINFORCE on StableDiffusion3Pipeline") and "trajectories" in plan
