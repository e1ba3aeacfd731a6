"""
Trains tiny pipelines for two optimizer steps in several processes, and writes what test_pipelines.py looks at:

    torchrun --nproc_per_node 2 tests/helpers/families_run.py FOLDER NAME ...
"""

import gc
import json
import sys
from pathlib import Path

import tiny_runs  # first: it sets the environment before torch is imported
import torch
import torch.distributed as dist
from datasets import Dataset
from tiny_pipelines.families import FAMILIES, columns_of, first_call

from trl_fdfo import FDFOConfig


OPTIONS_OF_CALL = ("height", "width", "guidance_scale")


def strength(images=None, audio=None):
    made = audio if images is None else images
    return made.abs().flatten(1).mean(dim=1)


def train(name: str, folder: Path) -> dict:
    call = {**first_call(name)}
    call.pop("num_inference_steps", None)  # the trainer finds it
    columns = {column: 2 * values[:1] for column, values in columns_of(name, 1).items()}
    # A dataset has no tensors: one for all prompts.
    call |= {column: values[0] for column, values in columns.items() if isinstance(values[0], torch.Tensor)}
    columns = {column: values for column, values in columns.items() if column not in call}
    config = FDFOConfig(
        output_dir=str(folder / "out"),
        num_rollouts=1,
        prompts_per_rollout=4,
        per_device_prompt_batch_size=1,
        num_inference_steps=2,
        optimizer_steps_per_rollout=2,
        pipeline_kwargs={option: value for option, value in call.items() if option not in OPTIONS_OF_CALL},
        pipeline_columns=list(columns) or None,
        churn=0.2,
        learning_rate=1e-4,
        lora_r=2,
        logging_images_steps=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        log_level="error",
        **{
            **dict.fromkeys(OPTIONS_OF_CALL),
            **{option: value for option, value in call.items() if option in OPTIONS_OF_CALL},
        },
    )
    prompts = Dataset.from_dict({"prompt": list(FAMILIES[name].prompts[:2]), **columns})
    trainer = tiny_runs.UnplannedTrainer(config, FAMILIES[name].build(), strength, prompts)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved, spread = 0.0, 0.0
    for parameter_name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            moved = max(moved, (parameter - before[parameter_name]).abs().max().item())
            highest, lowest = parameter.detach().clone(), parameter.detach().clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX)
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
            spread = max(spread, (highest - lowest).abs().max().item())
    [log] = [log for log in trainer.state.log_history if "replay_error" in log]
    return {
        "processes": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "steps": trainer.state.global_step,
        "replay_error": log["replay_error"],
        "moved": moved,
        "spread": spread,
        "finds_unused": trainer.model_wrapped.find_unused_parameters,
    }


def main(folder: Path, names: list[str]) -> None:
    results = {}
    gc.collect()
    gc.freeze()  # each family has imported modules of its own
    for name in names:
        results[name] = train(name, folder)
        gc.collect()
    if dist.get_rank() == 0:
        (folder / "families.json").write_text(json.dumps(results, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
