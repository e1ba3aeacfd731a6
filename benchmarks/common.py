"""Parts that several benchmarks share: options, prompts and a reward, models of any size, and a timed trainer."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel
from transformers import PrinterCallback, TrainerCallback

from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.planning.plan import RunPlan
from trl_fdfo.training.buffer import RolloutBuffer


# A run with these options writes no files and shows no progress.
QUIET = {"save_strategy": "no", "report_to": [], "logging_images_steps": 0, "disable_tqdm": True}
# Options of a run on the packaged pipeline.
PACKAGED = {**QUIET, "height": 32, "width": 32, "pipeline_kwargs": {"max_sequence_length": 0}, "use_cpu": True}
PROMPTS = Dataset.from_dict({"prompt": [f"cliff {n}" for n in range(16)]})


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A reward that costs nothing."""
    return images.mean(dim=(1, 2, 3))


def sd3_transformer(
    num_layers: int, num_attention_heads: int, joint_attention_dim: int, pooled_projection_dim: int
) -> SD3Transformer2DModel:
    """An SD3 transformer for latents of 4 channels, with random weights."""
    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=num_layers,
        attention_head_dim=64,
        num_attention_heads=num_attention_heads,
        joint_attention_dim=joint_attention_dim,
        caption_projection_dim=64 * num_attention_heads,
        pooled_projection_dim=pooled_projection_dim,
        out_channels=4,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )


def sd3_vae(block_out_channels: tuple[int, ...], **numbers: Any) -> AutoencoderKL:
    """A VAE as Stable Diffusion 3 has one, with random weights."""
    blocks = len(block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=block_out_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **numbers,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable, device: torch.device, repeats: int = 10, warm_up: int = 3) -> float:
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def run_python(arguments: list[str], threads: int = 1) -> Any:
    """The JSON in the last line of a Python program's output; the last line of its errors if it fails."""
    # The allocator returns freed memory to the system at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100]
    return json.loads(done.stdout.splitlines()[-1])


class PeakMemory:
    """Peak memory since `reset` in bytes: of the GPU, or of the process above what it had at construction on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = 0 if device.type == "cuda" else psutil.Process().memory_info().rss

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 - self.start


class Phases(TrainerCallback):
    """Seconds of sampling and of training in each rollout, and with `memory` the peak of each phase in bytes."""

    def __init__(self, device: torch.device, memory: PeakMemory | None = None):
        self.device, self.memory = device, memory
        self.sampling: list[float] = []
        self.training: list[float] = []
        self.sampling_peak = self.training_peak = 0

    def begin(self) -> None:
        synchronize(self.device)
        if self.memory is not None:
            self.memory.reset()
        self.start = time.perf_counter()

    def end(self) -> tuple[float, int]:
        synchronize(self.device)
        return time.perf_counter() - self.start, self.memory.read() if self.memory is not None else 0

    def on_step_end(self, args, state, control, **kwargs):
        # The trainer's own log, which comes between this and the end of the epoch, begins a new peak.
        if self.memory is not None:
            self.training_peak = max(self.training_peak, self.memory.read())

    def on_epoch_end(self, args, state, control, **kwargs):
        self.training.append(self.end()[0])


class TimedTrainer(FDFOTrainer):
    """A trainer that fills its `phases`."""

    phases: Phases
    planned: bool

    def run_plan(self) -> RunPlan | str:
        if self.planned:
            return super().run_plan()
        self._rehearsal = None  # the plan would free it
        return "Not worked out: that takes seconds, in each row."

    def _roll_out(self, rollout: int) -> RolloutBuffer:
        self.phases.begin()
        buffer = super()._roll_out(rollout)
        seconds, peak = self.phases.end()
        self.phases.sampling.append(seconds)
        self.phases.sampling_peak = max(self.phases.sampling_peak, peak)
        self.phases.begin()  # training, until the end of the epoch
        return buffer


def timed_trainer(
    config: FDFOConfig, pipeline: DiffusionPipeline | str, memory: PeakMemory | None = None, planned: bool = False
) -> TimedTrainer:
    """A trainer with a reward that costs nothing. It works out its plan if that is to be compared with its peaks."""
    trainer = TimedTrainer(config, pipeline, brightness, PROMPTS)
    trainer.phases, trainer.planned = Phases(config.device, memory), planned
    trainer.add_callback(trainer.phases)
    trainer.pop_callback(PrinterCallback)
    return trainer
