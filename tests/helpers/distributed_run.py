"""
Trains a tiny SD3 in several processes, and writes the results that test_distributed.py compares:

    torchrun --nproc_per_node 2 tests/helpers/distributed_run.py FOLDER

test_distributed.py has put a pipeline and the run of one process into FOLDER. Process 0 writes its results there. The
same two processes do everything, because starting them takes longest.
"""

import asyncio
import gc
import importlib.util
import os
import sys
from datetime import timedelta
from math import prod
from pathlib import Path

import pytest
import tiny_pipelines
import tiny_runs
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback

from trl_fdfo import DiffusionNFTTrainer, FDFOTrainer, FlowGRPOTrainer
from trl_fdfo.saving.sharded_weights import trained_parameters, whole_values
from trl_fdfo.training.rollout_alarms import SIGNS
from trl_fdfo.training.trainer import RolloutTrainer


# The several processes sample larger batches than the single one, and read prompt embeddings from the disk.
SAMPLING = {"per_device_sampling_batch_size": 4, "cache_prompt_embeds": True}
# An evaluation inside a run takes as long as a rollout. One run shows them; all are evaluated when they have ended.
NO_EVALUATIONS = {"eval_strategy": "no"}
# Nor does a run show more for going over each batch twice, but those that are compared with it.
SHORT = {"num_iterations": 1, **NO_EVALUATIONS}


def brightness(images):
    return images.mean(dim=(1, 2, 3))


def sparse(images, prompts):
    """Redness of some prompts; the images of all others tie."""
    return tiny_runs.redness(images, prompts).where(
        torch.tensor([prompt in tiny_runs.PROMPTS[:2] for prompt in prompts]), 0
    )


# Rewards that often tie. With `beta` no update would be left out.
SPARSE = {
    "reward": sparse,
    "num_candidates": 3,
    "scale_rewards": "batch",
    "per_device_prompt_batch_size": 1,
    "beta": 0.0,
    **SHORT,
}

# Draws prompts by what the images of both processes have tied.
INFORMATIVE = {"reward": sparse, "prompt_sampling": "informative", "num_rollouts": 3, **NO_EVALUATIONS}

# Of an algorithm that noises endpoints; its policy that samples follows the trained one slowly.
FORWARD = {"trainer_class": DiffusionNFTTrainer, "old_policy_decay_rate": 0.3, **SHORT}
# The weights of the frozen layers, in torchao's 8 bits.
QUANTIZED = {"quantization": "int8", **SHORT}


def build(
    output_dir: str,
    make_pipeline=tiny_pipelines.sd3,
    reward=tiny_runs.redness,
    trainer_class=tiny_runs.UnplannedTrainer,
    **options,
) -> RolloutTrainer:
    """A trainer whose global settings and batch size per process do not depend on the number of processes."""
    is_fdfo = issubclass(trainer_class, FDFOTrainer)
    defaults = {
        "output_dir": output_dir,
        "num_rollouts": 2,
        "prompts_per_rollout": 8,
        "per_device_prompt_batch_size": 2,
        "num_inference_steps": 4,
        # Three levels over two steps: each step trains other levels of a batch.
        "timestep_fraction": 0.75,
        "optimizer_steps_per_rollout": 2,
        "num_iterations": 2,
        "height": 16,
        "width": 16,
        "pipeline_kwargs": {"max_sequence_length": 8},
        "num_generations": 2,
        **({"churn": 0.2} if is_fdfo else {}),
        # As large as the adapter's gradients, so that a wrong batch changes the step.
        "adam_epsilon": 1e-4,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "ema_decay": 0.5,
        "lora_r": 4,
        "eval_strategy": "epoch",
        "eval_diversity": "pixels",
        "images_per_eval_prompt": 3,
        "report_to": [],
        "logging_images_steps": 0,
        "save_strategy": "epoch",
        "use_cpu": True,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "disable_tqdm": True,
    }
    return trainer_class(
        trainer_class.config_class(**{**defaults, **options}),
        make_pipeline(),
        reward,
        train_dataset=Dataset.from_dict({"prompt": tiny_runs.PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": tiny_runs.PROMPTS[:5]}),
        eval_reward_fn=brightness,
    )


def run(output_dir: str, checkpoint: str | None = None, **options) -> tuple[RolloutTrainer, dict]:
    """Build and train: the trainer and its results."""
    trainer = build(output_dir, **options)
    return trainer, finished(trainer, checkpoint)


def finished(trainer: RolloutTrainer, checkpoint: str | None = None) -> dict:
    """Train, evaluate, save and generate: the results."""
    trainer.train(resume_from_checkpoint=checkpoint)
    # A plan frees it, in each process.
    assert trainer._rehearsal is None or isinstance(trainer, tiny_runs.UnplannedTrainer)
    metrics = trainer.evaluate()
    trainer.save_model()
    trained = trained_parameters(trainer.model)
    return {
        "weights": dict(zip(trained, whole_values(trained.values()))),
        # Each of two processes samples two batches, of 4 and of 2 images.
        "images": trainer.generate(2 * tiny_runs.PROMPTS[:5], range(10)),
        "eval_reward": metrics["eval_reward"],
        "evaluations": [
            {name: value for name, value in log.items() if name != "eval_runtime"}
            for log in trainer.state.log_history
            if "eval_reward" in log
        ],
        "rewards": [log["reward"] for log in trainer.state.log_history if "reward" in log],
        "left_out": [
            log["frac_updates_left_out"] for log in trainer.state.log_history if "frac_updates_left_out" in log
        ],
        "signs": [log[sign.metric] for log in trainer.state.log_history if "reward" in log for sign in SIGNS],
        "processes": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def assert_same(found: dict, expected: dict) -> None:
    """Fail unless two runs have the same weights, images and rewards, up to rounding."""
    assert found["weights"].keys() == expected["weights"].keys()
    moved = 0.0
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)
        moved = max(moved, weight.abs().max().item() if "lora_B" in name else 0.0)
    assert moved > 1e-3, "nothing was trained, and the comparison is empty"
    torch.testing.assert_close(found["images"], expected["images"], rtol=0, atol=1e-4)
    assert found["eval_reward"] == pytest.approx(expected["eval_reward"], abs=1e-5)
    assert found["rewards"] == pytest.approx(expected["rewards"], abs=1e-5)
    assert found["signs"] == pytest.approx(expected["signs"], abs=1e-5)


def finish() -> None:
    if dist.is_initialized():
        # The wrapped model holds on to the process group, whose threads must end before the interpreter does.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


class Traffic(TrainerCallback):
    """Records every collective of gloo: its name, and how many numbers each process puts in."""

    def __init__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.profile.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.profile.stop()

    def collectives(self) -> list[tuple[str, int]]:
        # Of 100,000 recorded operations: `self.profile.events()` takes ten seconds to make objects of them.
        events = [event for event in self.profile.profiler.kineto_results.events() if event.name().startswith("gloo:")]
        return [(event.name(), sum(prod(shape) for shape in event.shapes())) for event in events]


def measure_traffic(folder: Path) -> dict:
    """Numbers that pass between the processes in two rollouts, and numbers that one process records."""
    traffic = Traffic()
    trainer = build(str(folder / "traffic"), save_strategy="no", **SHORT)
    trainer.add_callback(traffic)
    trainer.train()
    tuples = [(batch.sampled, level) for step in trainer._buffer.steps for batch, level in step]
    return {
        "collectives": traffic.collectives(),
        "recorded": sum(batch.x_t[level].numel() + batch.velocities[level].numel() for batch, level in tuples),
        "trained": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        "steps": trainer.state.global_step,
    }


def advantages(folder: Path, **options) -> torch.Tensor:
    """Advantages of all images of a rollout by Flow-GRPO, over the standard deviation of the rewards of all processes."""
    options |= {
        "trainer_class": FlowGRPOTrainer,
        "advantage_std": "batch",
        "timestep_fraction": 1.0,
        "num_noisy_steps": 2,
    }
    trainer = build(str(folder), epsilon=0.01, **options, **NO_EVALUATIONS)
    buffer = trainer._roll_out(0)
    batches = {batch.number: batch for step in buffer.steps for batch, _ in step}
    return trainer.accelerator.gather(torch.cat([batches[number].targets[0] for number in sorted(batches)]))


def informative(folder: Path) -> dict:
    """The results of a run that draws informative prompts, and how often each prompt has tied since it did not."""
    trainer, results = run(str(folder / "informative"), **INFORMATIVE)
    return results | {"ties": trainer.informative_prompts.ties.tolist()}


TIMEOUT = 5  # seconds of a collective, in `wait_for_a_slow_reward`


async def slow_on_one_process(images, prompts):
    """Redness, for which process 1 takes longer than a collective may."""
    if dist.get_rank() == 1:
        await asyncio.sleep(1.5 * TIMEOUT)
    return tiny_runs.redness(images, prompts)


def wait_for_a_slow_reward(folder: Path) -> list[float]:
    """Rewards of a rollout whose images are scored at once, later by one process."""
    options = {"num_rollouts": 1, "per_device_sampling_batch_size": 4, "save_strategy": "no", **SHORT}
    group = dist.group.WORLD
    group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=TIMEOUT))
    trainer = build(str(folder / "slow"), reward=slow_on_one_process, **options)
    trainer.train()
    return [log["reward"] for log in trainer.state.log_history if "reward" in log]


def main(folder: Path) -> None:
    results = {}
    _, results["two"] = run(str(folder / "two"), trainer_class=FDFOTrainer, **SAMPLING)
    options = {**SAMPLING, **NO_EVALUATIONS}
    _, results["more"] = run(str(folder / "more"), str(folder / "one" / "checkpoint-4"), **options)
    _, results["sparse"] = run(str(folder / "sparse"), **SPARSE)
    results["informative"] = informative(folder)
    _, results["forward"] = run(str(folder / "forward"), **SAMPLING, **FORWARD)
    results["advantages"] = advantages(folder / "advantages", **SAMPLING)
    results["traffic"] = measure_traffic(folder)
    results["slow reward"] = wait_for_a_slow_reward(folder)
    if importlib.util.find_spec("torchao"):
        pipeline = lambda: str(folder / "pipeline")
        _, results["quantized"] = run(str(folder / "quantized"), make_pipeline=pipeline, **QUANTIZED)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
