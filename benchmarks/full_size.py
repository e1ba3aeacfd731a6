"""
Takes pipelines of their published size through a run on the CPU: set-up, a rollout, an update, saving, loading in
diffusers, and resuming for a second rollout.

    python benchmarks/full_size.py                          # 8 GiB of memory; estimated at half an hour on two idle cores
    python benchmarks/full_size.py --families tiny          # a rehearsal on a tiny model: measures nothing

The transformer and the VAE have the published configs, and random weights in bfloat16. A prompt's embedding has the
published shape, and comes from text encoders of one thin layer. A run has one prompt, two images, two steps and one
trained level, at 128 x 128 pixels. The reward is free.

Each run is a process of its own. Its memory is the most that the process has at once above its imports; beside it is
the plan's figure, which was worked out before the run. Other programs on the machine change the times, not the memory.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from tiny_pipelines.sana import gemma_encoder, gemma_tokenizer
from transformers import Gemma2Config, Gemma2Model

from benchmarks.common import PROMPTS, QUIET, PeakMemory, run_python, sd3_vae, timed_trainer
from benchmarks.gpu_sd35 import DTYPE, MEDIUM, TINY, build_pipeline, building
from trl_fdfo import FDFOConfig


CPU = torch.device("cpu")
STEPS = 2
# A plan is to be no further from the measured peak than this.
TOLERANCE = 0.1


def stable_diffusion(pixels: int) -> DiffusionPipeline:
    return build_pipeline(dataclasses.replace(MEDIUM, pixels=pixels), CPU)


# From config.json of transformer/ in Alpha-VLLM/Lumina-Image-2.0.
LUMINA = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "hidden_size": 2304,
    "num_layers": 26,
    "num_refiner_layers": 2,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "axes_dim_rope": (32, 32, 32),
    "axes_lens": (300, 512, 512),
    "cap_feat_dim": 2304,
}


def lumina(pixels: int) -> DiffusionPipeline:
    """Lumina-Image 2.0, whose VAE is that of FLUX.1."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    config = gemma_encoder(tokenizer).config.to_dict()
    with building(CPU):
        return Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(**LUMINA),
            vae=sd3_vae(**MEDIUM.vae, shift_factor=0.1159, scaling_factor=0.3611),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            text_encoder=Gemma2Model(Gemma2Config(**config | {"hidden_size": LUMINA["cap_feat_dim"]})).to(DTYPE),
            tokenizer=tokenizer,
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """How a pipeline is built for a size in pixels, and the arguments of its call beside the size."""

    title: str
    build: Callable[[int], DiffusionPipeline]
    call: dict[str, Any]


FAMILIES = {
    "sd35": Family("Stable Diffusion 3.5 Medium", stable_diffusion, {"max_sequence_length": MEDIUM.t5_tokens}),
    "lumina2": Family("Lumina-Image 2.0", lumina, {"max_sequence_length": 64}),
    "tiny": Family("a tiny SD3", lambda pixels: build_pipeline(TINY, CPU), {"max_sequence_length": TINY.t5_tokens}),
}
DEFAULT_FAMILIES = ["sd35", "lumina2"]


def make_config(family: Family, pixels: int, folder: Path, rollouts: int) -> FDFOConfig:
    return FDFOConfig(
        output_dir=str(folder / "out"),
        num_rollouts=rollouts,
        prompts_per_rollout=1,
        per_device_prompt_batch_size=1,
        optimizer_steps_per_rollout=1,
        num_inference_steps=STEPS,
        timestep_fraction=1 / STEPS,
        height=pixels,
        width=pixels,
        guidance_scale=1.0,
        pipeline_kwargs=family.call,
        # As in gpu_sd35.py: rounding to bfloat16 must not hide the churn.
        churn=0.05,
        learning_rate=1e-3,  # so large that one step shows in an image
        bf16=True,
        use_cpu=True,
        **{**QUIET, "save_strategy": "epoch"},
    )


# The three processes of a family ------------------------------------------------------------------------------------------


def run(family: Family, pixels: int, folder: Path, resume: bool) -> dict[str, Any]:
    """A run of one rollout; or the run resumed for its second. Sizes in bytes, times in seconds."""
    memory, seconds = PeakMemory(CPU), {}
    start = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal start
        seconds[part] = time.perf_counter() - start
        start = time.perf_counter()

    pipeline = family.build(pixels)
    lap("building")
    memory.reset()
    trainer = timed_trainer(make_config(family, pixels, folder, 1 + resume), pipeline, memory, planned=True)
    lap("set-up")
    set_up_peak = memory.read()
    plan = trainer.run_plan()
    lap("plan")
    trainer.train(resume_from_checkpoint=resume)
    seconds["sampling"], seconds["training"] = trainer.phases.sampling[-1], trainer.phases.training[-1]
    seconds["loading and saving of a checkpoint" if resume else "saving of a checkpoint"] = (
        time.perf_counter() - start - seconds["sampling"] - seconds["training"]
    )
    start = time.perf_counter()
    trainer.save_model()
    lap("saving")
    if not resume:
        images = trainer.generate(PROMPTS["prompt"][:1], [0])
        lap("an image")
        torch.save(images, folder / "images.pt")
    (sampling, training), phases = plan.peaks(), trainer.phases
    logs = trainer.state.log_history
    return {
        "seconds": seconds,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "rollouts": sum("replay_error" in log for log in logs),
        "replay_error": max(log["replay_error"] for log in logs if "replay_error" in log),
        "files": {file.name: file.stat().st_size for file in (folder / "out").glob("*.safetensors")},
        "set_up_peak": set_up_peak,
        "peaks": {
            "sampling": (phases.sampling_peak, sampling),
            "training": (phases.training_peak, training),
            "run with its set-up": (max(set_up_peak, phases.sampling_peak, phases.training_peak), plan.peak()),
        },
    }


def load(family: Family, pixels: int, folder: Path) -> dict[str, Any]:
    """Diffusers loads the adapter into a new pipeline. Differences from the trainer's own image, and of the base model."""
    pipeline = family.build(pixels)
    pipeline.set_progress_bar_config(disable=True)
    expected = torch.load(folder / "images.pt", weights_only=True)

    def difference() -> float:
        size = {"height": pixels, "width": pixels, "num_inference_steps": STEPS, "guidance_scale": 1.0}
        generator = torch.Generator().manual_seed(0)
        images = pipeline(PROMPTS["prompt"][0], generator=generator, output_type="pt", **size, **family.call).images
        return (images.float() - expected).square().mean().sqrt().item()

    base = difference()
    start = time.perf_counter()
    pipeline.load_lora_weights(folder / "out")
    return {"seconds": time.perf_counter() - start, "base": base, "adapter": difference()}


PARTS = {
    "run": lambda *arguments: run(*arguments, resume=False),
    "loaded in diffusers": load,
    "resumed run": lambda *arguments: run(*arguments, resume=True),
}


# Reporting ------------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[str]:
    """Lines of the results of one process."""
    if "peaks" not in result:
        return [
            f"  loading of the adapter {result['seconds']:.1f} s",
            f"  rms difference of an image from the trainer's: {result['adapter']:.2g} with the adapter, "
            f"{result['base']:.2g} without",
        ]
    lines = [f"  {result['parameters'] / 1e6:,.0f} M parameters, of which {result['trained']:,} trained"]
    lines.append(f"  {'peak memory, GiB':24}{'measured':>10}{'plan':>10}{'plan is off by':>16}")
    for part, (measured, planned) in result["peaks"].items():
        off = planned / measured - 1
        remark = "" if abs(off) <= TOLERANCE else "   more than a tenth"
        lines.append(f"  {part:24}{measured / 2**30:10.2f}{planned / 2**30:10.2f}{off:16.1%}{remark}")
    lines.append(f"  {'set-up alone':24}{result['set_up_peak'] / 2**30:10.2f}")
    lines.append("  seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in result["seconds"].items()))
    lines.append("  files: " + ", ".join(f"{name} {size:,} bytes" for name, size in result["files"].items()))
    lines.append(f"  largest replay error of {result['rollouts']} rollout(s): {result['replay_error']:.2g}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=DEFAULT_FAMILIES)
    parser.add_argument("--pixels", type=int, default=128, help="height and width of the images")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the one part of this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    if args.part is not None:
        print(json.dumps(PARTS[args.part](FAMILIES[args.families[0]], args.pixels, args.folder)))
        return
    cores = len(os.sched_getaffinity(0))
    print(
        f"{cores} cores, torch {torch.__version__}; {STEPS} images and steps of {args.pixels} px, bfloat16", flush=True
    )
    for name in args.families:
        print(f"\n{FAMILIES[name].title}", flush=True)
        pixels = TINY.pixels if name == "tiny" else args.pixels
        with tempfile.TemporaryDirectory() as folder:
            common = [__file__, "--families", name, "--pixels", str(pixels), "--folder", folder]
            for part in PARTS:
                print(f" {part}", flush=True)
                result = run_python([*common, "--part", part], threads=cores)
                if isinstance(result, str):  # the next parts need its files
                    print(f"  failed: {result}")
                    break
                print("\n".join(report(result)), flush=True)


if __name__ == "__main__":
    main()
