"""
Measures the peak memory of a mid-size model by option, and the bytes that a rollout keeps per process on 1 to 4
processes.

    python benchmarks/memory.py            # about ten minutes on two cores

The model is an SD3 pipeline with random weights in float32: a transformer of 93 M parameters, text encoders of 43 M and
a VAE that decodes 256 px images. On a GPU the figures are the GPU's memory. On a CPU they are the memory of the whole
process above its imports, and options that move parts to the host's memory are left out, because they change nothing
there. Each run is a process of its own with one rollout and its updates.
"""

import argparse
import json
import os
import tempfile
from typing import Any

import tiny_pipelines
import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PrinterCallback

from benchmarks.common import PROMPTS, QUIET, PeakMemory, brightness, run_python, sd3_transformer, sd3_vae
from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.training.buffer import RolloutBuffer


BASELINE = {
    "prompts_per_rollout": 4,
    "per_device_prompt_batch_size": 4,
    "num_inference_steps": 2,
    "optimizer_steps_per_rollout": 2,
    "height": 256,
    "width": 256,
    "pipeline_kwargs": {"max_sequence_length": 16},
    "churn": 0.1,
    **QUIET,
}
WHOLE = {"use_peft": False, "learning_rate": 1e-5}
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "per_device_prompt_batch_size: 1": {"per_device_prompt_batch_size": 1},
    "the same, 4 sampled at a time": {"per_device_prompt_batch_size": 1, "per_device_sampling_batch_size": 4},
    "timestep_fraction: 0.5, 1 update": {"timestep_fraction": 0.5, "optimizer_steps_per_rollout": 1},
    "quantization: int8": {"quantization": "int8"},
    "the same, gradient_checkpointing": {"quantization": "int8", "gradient_checkpointing": True},
    "vae_slicing": {"vae_slicing": True},
    "vae_tiling": {"vae_tiling": True},
    "use_peft: false": WHOLE,
    "use_peft: false, adamw_bnb_8bit": {**WHOLE, "optim": "adamw_bnb_8bit"},
}
# These options move parts from a GPU's memory to the host's.
MOVED = {
    "quantization: nf4": {"quantization": "nf4"},
    "offload_components": {"offload_components": True},
    "offload_trajectories": {"offload_trajectories": True},
    "cache_prompt_embeds": {"cache_prompt_embeds": True},
}
PHASES = ("loaded", "sampling", "training")


def save_pipeline(folder: str) -> None:
    torch.manual_seed(0)
    pipeline = tiny_pipelines.sd3()
    transformer = sd3_transformer(
        num_layers=10, num_attention_heads=8, joint_attention_dim=768, pooled_projection_dim=2 * 768
    )
    config = pipeline.text_encoder.config.to_dict()
    config |= {"hidden_size": 384, "intermediate_size": 1536, "projection_dim": 768, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 6}
    # Together they are as wide as the transformer's inputs.
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**config)) for _ in range(2)]
    vae = sd3_vae(
        (32, 64, 64, 64), latent_channels=4, norm_num_groups=8, sample_size=128, shift_factor=0.1, scaling_factor=1.5
    )
    pipeline.register_modules(transformer=transformer, text_encoder=encoders[0], text_encoder_2=encoders[1], vae=vae)
    pipeline.save_pretrained(folder)


def measure(folder: str, options: dict[str, Any]) -> dict[str, float]:
    """Peaks of each phase of a run in this process, in GiB."""
    memory = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    peaks = {}

    class Measured(FDFOTrainer):
        def _roll_out(self, rollout: int) -> RolloutBuffer:
            peaks["loaded"] = memory.read() / 2**30
            memory.reset()
            buffer = super()._roll_out(rollout)
            peaks["sampling"] = memory.read() / 2**30
            memory.reset()
            return buffer

    config = FDFOConfig(
        output_dir=f"{folder}/out",
        **{**BASELINE, **options},
        num_rollouts=1,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Measured(config, folder, brightness, PROMPTS)
    trainer.pop_callback(PrinterCallback)
    memory.reset()  # the rehearsal is over
    trainer.train()
    return peaks | {"training": memory.read() / 2**30}


def recorded_bytes(buffer: RolloutBuffer) -> int:
    """Bytes that a rollout keeps in this process."""
    storages = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta":
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for batch in {id(batch): batch for step in buffer.steps for batch, _ in step}.values():
        recursively_apply(count, [batch.sampled.x_t, batch.sampled.velocities, batch.sampled.remembered])
        recursively_apply(count, [batch.sampled.x_s, batch.targets])
    return sum(storages.values())


def measure_trajectories() -> None:
    """Runs as one of several processes, and prints the most bytes that a process keeps."""
    config = FDFOConfig(
        output_dir=tempfile.mkdtemp(),
        num_rollouts=1,
        prompts_per_rollout=8 * int(os.environ["WORLD_SIZE"]),
        per_device_prompt_batch_size=2,
        num_inference_steps=8,
        height=16,
        width=16,
        pipeline_kwargs={"max_sequence_length": 8},
        churn=0.1,
        use_cpu=True,
        ddp_backend="gloo",
        **QUIET,
    )
    trainer = FDFOTrainer(config, tiny_pipelines.sd3(), brightness, PROMPTS)
    trainer.train()
    sizes = [None] * trainer.args.world_size
    dist.all_gather_object(sizes, recorded_bytes(trainer._buffer))
    if trainer.is_world_process_zero():
        print(json.dumps(max(sizes)))
    del trainer
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the name of the one run
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--trajectories", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trajectories:
        measure_trajectories()
    elif arguments.row is not None:
        print(json.dumps(measure(arguments.folder, {**ROWS, **MOVED}[arguments.row])))
    else:
        compare()


def compare() -> None:
    rows = {**ROWS, **MOVED} if torch.cuda.is_available() else ROWS
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, of the process, above its imports"
    print(f"peak memory in GiB ({device}; torch {torch.__version__})")
    print(f"{'option':36}" + "".join(f"{phase:>10}" for phase in PHASES))
    with tempfile.TemporaryDirectory() as folder:
        save_pipeline(folder)
        for name in rows:
            peaks = run_python([__file__, "--row", name, "--folder", folder])
            shown = peaks if isinstance(peaks, str) else "".join(f"{peaks[phase]:10.2f}" for phase in PHASES)
            print(f"{name:36}{shown}", flush=True)
    print("\nwhat a rollout of 8 prompts per process leaves behind, bytes per process")
    for processes in range(1, 5):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        kept = run_python([*launch, __file__, "--trajectories"])
        print(f"{processes:3} processes {kept if isinstance(kept, str) else f'{kept:>12,}'}", flush=True)


if __name__ == "__main__":
    main()
