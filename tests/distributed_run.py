"""
Trains a tiny SD3 for two rollouts, or for the second alone from a checkpoint, and writes what test_distributed.py
compares:

    torchrun --nproc_per_node 2 tests/distributed_run.py FILE [CHECKPOINT]
"""

import gc
import os
import sys

import conftest
import tiny_pipelines
import torch
import torch.distributed as dist
from datasets import Dataset

from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.sharding import trained_parameters, whole_values


# Several processes sample more at a time than the one that they are compared with, from embeddings on disk.
SAMPLING = {"per_device_sampling_batch_size": 4, "cache_prompt_embeds": True}


def brightness(images):
    return images.mean(dim=(1, 2, 3))


def build(output_dir: str, make_pipeline=tiny_pipelines.sd3, reward=conftest.redness, **options) -> FDFOTrainer:
    """A trainer whose global settings, and batch per process, do not depend on the number of processes."""
    defaults = {
        "output_dir": output_dir,
        "num_rollouts": 2,
        "prompts_per_rollout": 8,
        "per_device_prompt_batch_size": 2,
        "num_inference_steps": 4,
        # Three levels and two steps: the units of a batch are not the same in every step.
        "timestep_fraction": 0.75,
        "optimizer_steps_per_rollout": 2,
        "num_iterations": 2,
        "height": 16,
        "width": 16,
        "pipeline_kwargs": {"max_sequence_length": 8},
        "churn": 0.2,
        # Of the order of the adapter's gradients: a wrong batch would show.
        "adam_epsilon": 1e-4,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "ema_decay": 0.5,
        "lora_r": 4,
        "eval_strategy": "epoch",
        "eval_diversity": "pixels",
        "images_per_eval_prompt": 3,
        "report_to": [],
        "save_strategy": "epoch",
        "use_cpu": True,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "disable_tqdm": True,
    }
    return FDFOTrainer(
        FDFOConfig(**{**defaults, **options}),
        make_pipeline(),
        reward,
        train_dataset=Dataset.from_dict({"prompt": conftest.PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": conftest.PROMPTS[:5]}),
        eval_reward_fn=brightness,
    )


def run(output_dir: str, checkpoint: str | None = None, **options) -> tuple[FDFOTrainer, dict]:
    """The trainer after its run, and what it ended with."""
    trainer = build(output_dir, **options)
    return trainer, finished(trainer, checkpoint)


def finished(trainer: FDFOTrainer, checkpoint: str | None = None) -> dict:
    """What a trainer ends with, once it has run."""
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trained = trained_parameters(trainer.model)
    return {
        "weights": dict(zip(trained, whole_values(trained.values()))),
        "images": trainer.generate(conftest.PROMPTS[:5], range(5)),
        "eval_reward": metrics["eval_reward"],
        "evaluations": [
            {name: value for name, value in log.items() if name != "eval_runtime"}
            for log in trainer.state.log_history
            if "eval_reward" in log
        ],
        "rewards": [log["reward"] for log in trainer.state.log_history if "reward" in log],
        "processes": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def finish() -> None:
    if dist.is_initialized():
        # The wrapped model holds on to the process group, whose threads must end before the interpreter does.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    trainer, result = run(sys.argv[1] + ".out", *sys.argv[2:], **SAMPLING)
    if trainer.is_world_process_zero():
        torch.save(result, sys.argv[1])
    del trainer
    finish()
