"""
Trains a tiny SD3 with DeepSpeed or FSDP2, and writes the results that test_engines.py compares:

    accelerate launch --config_file ... tests/helpers/engine_run.py FOLDER

test_engines.py has put models into FOLDER. Process 0 writes its results there. On GPUs, or with the argument
`bfloat16` after FOLDER, the program trains in bfloat16, and only once. If it is given a Python file with arguments
instead, it runs that file.
"""

import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import distributed_run
import tiny_runs
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch.distributed.tensor import DTensor

from trl_fdfo import FDFOTrainer
from trl_fdfo.rewards.clip_score import CLIPScore
from trl_fdfo.rewards.vlm_score import VLMScore
from trl_fdfo.saving.sharded_weights import trained_parameters


GPU = torch.cuda.is_available()
ENGINE = {
    "use_cpu": False,
    "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ and not GPU else None,
    **distributed_run.SAMPLING,
    **distributed_run.SHORT,
}
CHANGED = {"learning_rate": 1e-3, "adam_beta2": 0.9, "adam_epsilon": 1e-3}
WITHOUT_ADAPTER = {"use_peft": False, "beta": 0.0, "learning_rate": 1e-3, "num_rollouts": 1}


def scores(folder: Path) -> list[float]:
    """Scores of a CLIP and a VLM reward that are loaded now."""
    images = [Image.linear_gradient("L").rotate(angle).resize((64, 64)).convert("RGB") for angle in (0, 90, 200)]
    rewards = [CLIPScore(str(folder / "clip")), VLMScore(str(folder / "vlm"))]
    return torch.cat([reward(images, tiny_runs.PROMPTS[:3]) for reward in rewards]).tolist()


def elements(model: torch.nn.Module) -> list[int]:
    """How many numbers of the weights each process holds."""
    trained_parameters(model)  # shards the weights again that FSDP2 has left whole
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, sum(weight.numel() for weight in weights))
    return counts


def interrupted(images, prompts, trainer_state):
    """Redness that sends SIGTERM to process 1 alone, in the second rollout."""
    if trainer_state.epoch and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return tiny_runs.redness(images, prompts)


def main(folder: Path, bfloat16: bool) -> None:
    results = {}
    # Accelerate takes `use_cpu` for "neither DeepSpeed nor FSDP", and a CPU computes in bfloat16 with it alone.
    options = {**ENGINE, "use_cpu": bfloat16 and not GPU}
    if bfloat16:
        options["bf16"] = True

    def make_pipeline() -> StableDiffusion3Pipeline:
        # Users load models after the config, and ZeRO-3 begins for transformers with the config.
        if "scores after the config" not in results:
            results["scores after the config"] = scores(folder)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not GPU:
            # Accelerate enables FSDP on GPUs only, although FSDP runs on CPUs too.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        return StableDiffusion3Pipeline.from_pretrained(
            folder / "pipeline", text_encoder_3=None, tokenizer_3=None, torch_dtype=dtype
        )

    trainer = distributed_run.build(str(folder / "out"), make_pipeline, trainer_class=FDFOTrainer, **options)
    results["images before"] = trainer.generate(tiny_runs.PROMPTS[:5], range(5))
    results["run"] = distributed_run.finished(trainer)
    if dist.is_initialized():
        results["elements"] = elements(trainer.model)
    results["scores after the run"] = scores(folder)
    trainer, results["resumed"] = distributed_run.run(
        str(folder / "resumed"), str(folder / "out" / "checkpoint-2"), make_pipeline=make_pipeline, **options
    )
    if not bfloat16:
        results |= on_cpus(folder, make_pipeline)
    if trainer.is_world_process_zero():
        torch.save(results, folder / "results.pt")


def on_cpus(folder: Path, make_pipeline: Callable) -> dict:
    results = {}
    changed, _ = distributed_run.run(
        str(folder / "changed"),
        str(folder / "out" / "checkpoint-2"),
        make_pipeline=make_pipeline,
        resume_with_changed_options=True,
        **{**ENGINE, **CHANGED},
    )
    results["changed"] = {
        "logged": [log["learning_rate"] for log in changed.state.log_history if "learning_rate" in log],
        "groups": [[group["lr"], group["betas"][1], group["eps"]] for group in changed.optimizer.param_groups],
    }
    _, results["sparse"] = distributed_run.run(
        str(folder / "sparse"), make_pipeline=make_pipeline, **{**ENGINE, **distributed_run.SPARSE}
    )
    _, results["without adapter"] = distributed_run.run(
        str(folder / "without_adapter"), make_pipeline=make_pipeline, **ENGINE, **WITHOUT_ADAPTER
    )
    try:
        distributed_run.build(str(folder / "refused"), lambda: make_pipeline().to(torch.bfloat16), **ENGINE)
    except ValueError as error:
        results["refused"] = str(error)
    try:
        distributed_run.run(
            str(folder / "interrupted"),
            make_pipeline=make_pipeline,
            reward=interrupted,
            save_on_signal=True,
            save_strategy="no",
            **ENGINE,
        )
    except SystemExit as end:
        results["exit"] = end.code
    return results


if __name__ == "__main__":
    if not GPU and importlib.util.find_spec("deepspeed"):
        import deepspeed

        # Otherwise DeepSpeed compiles its shared-memory communication for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if sys.argv[1].endswith(".py"):
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main(Path(sys.argv[1]), bfloat16=GPU or "bfloat16" in sys.argv[2:])
    distributed_run.finish()
