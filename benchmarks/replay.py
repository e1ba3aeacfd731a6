"""
Measures what a replay costs beyond the transformer itself, for each family of pipelines:

    python benchmarks/replay.py

Tiny pipelines replay the middle one of 40 steps, and the time of their transformer is subtracted. It is the time that
one core works, which hardly depends on what else the machine does. The rest (the pipeline's own Python, the steps
that are passed through, the scheduler) hardly depends on the size of the model. It is compared with a forward pass of
the real model on one micro-batch: 2 x parameters x tokens FLOPs, with the parameters of its published config, 4
images of 1,024 tokens and a GPU's rate. A training step is three forward passes.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny_pipelines
import torch

from trl_fdfo.algorithm import constant_churn
from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.pipeline.flow import PipelineFlow


STEPS, LEVEL = 40, 20
TOKENS = 4 * 1024  # 4 images of 512 x 512 pixels, 16 pixels to a token


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        build (`Callable`): Builds a tiny pipeline of the family.
        call (`dict`): Arguments of its call.
        images (`Callable`, *optional*): Makes a number of input images, for a pipeline that edits images.
        published (`dict`): Numbers of the published transformer where they differ from the defaults of its class.
    """

    build: Callable
    call: dict[str, Any]
    images: Callable | None = None
    published: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, build: str = "build", with_images: bool = False, **published: Any) -> "Family":
        """The family of a module of `tiny_pipelines`, with the first of its calls."""
        module = importlib.import_module(f"tiny_pipelines.{name}")
        call = next(iter(module.CALLS.values()))
        return cls(getattr(module, build), call, module.images if with_images else None, published)


SMALL = {"height": 16, "width": 16, "max_sequence_length": 8}
MEDIUM = {  # Stable Diffusion 3.5 Medium
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "caption_channels": [4096, 4096],
    "llama_layers": [*range(32), *[31] * 16],
}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
FAMILIES = {
    "Stable Diffusion 3": Family(
        lambda: tiny_pipelines.sd3(with_t5=True), {**SMALL, "guidance_scale": 1.0}, published=MEDIUM
    ),
    "FLUX.1": Family(tiny_pipelines.flux, {**SMALL, "guidance_scale": 3.5}),
    "FLUX.1 Kontext": Family.of("flux_kontext", with_images=True),
    "FLUX.2": Family.of("flux2"),
    "FLUX.2 with an image": Family.of("flux2", with_images=True),
    "FLUX.2 Klein": Family.of("flux2_klein", **KLEIN),
    "Qwen-Image": Family.of("qwen_image"),
    "Qwen-Image-Edit": Family.of("qwen_image_edit", with_images=True),
    "Qwen-Image-Edit Plus": Family.of("qwen_image_edit", "build_plus", with_images=True),
    "Sana": Family.of("sana"),
    "AuraFlow": Family.of("aura_flow"),
    "Lumina 2": Family.of("lumina2"),
    "Z-Image": Family.of("z_image"),
    "HiDream": Family.of("hidream", **HIDREAM),
    "Chroma": Family.of("chroma"),
    "CogView 4": Family.of("cogview4", num_layers=28, num_attention_heads=32, attention_head_dim=128),
    "Wan (video)": Family.of("wan"),
}


def replay_overhead(family: Family, repeats: int) -> float:
    """Median seconds of a replay without its transformer calls."""
    flow = PipelineFlow(
        family.build(), num_generations=2, num_inference_steps=STEPS, scheduler_class=ChurnScheduler, **family.call
    )
    # A call with input images takes one prompt.
    prompts = ["a cat", "two dogs"] if family.images is None else ["a cat"]
    columns = {} if family.images is None else {"image": family.images(1)}
    sigmas = flow.rehearse(prompts[:1], columns).sigmas
    seeds, noise_seeds = range(len(prompts)), range(2 * len(prompts))
    batch = flow.rollout(prompts, constant_churn(sigmas, 0.1), seeds, noise_seeds, [LEVEL], columns)
    model, inside = flow.model, []

    def timed(*args, **kwargs):
        start = time.process_time()
        output = model(*args, **kwargs)
        inside.append(time.process_time() - start)
        return output

    flow.model = timed
    seconds = []
    for _ in range(repeats + 3):
        inside.clear()
        start = time.process_time()
        flow.velocity(batch, LEVEL)
        seconds.append(time.process_time() - start - sum(inside))
    return statistics.median(seconds[3:])


def published_parameters(family: Family) -> int:
    """Parameters of the real transformer, which is built without memory."""
    transformer_class = type(family.build().transformer)
    with torch.device("meta"):
        transformer = transformer_class(**family.published)
    return sum(parameter.numel() for parameter in transformer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained rate of the GPU, in 10^12 FLOP/s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one of {os.cpu_count()} cores, torch {torch.__version__}; GPU taken to do {args.tflops:g} TFLOP/s")
    print(f"{'family':22} {'overhead':>9} {'parameters':>11} {'its forward':>12} {'percent':>8}")
    for name, family in FAMILIES.items():
        overhead = replay_overhead(family, args.repeats)
        parameters = published_parameters(family)
        forward = 2 * parameters * TOKENS / (args.tflops * 1e12)
        print(
            f"{name:22} {1e3 * overhead:6.1f} ms {parameters / 1e9:9.1f} B {1e3 * forward:9.0f} ms "
            f"{100 * overhead / forward:7.1f}%"
        )


if __name__ == "__main__":
    main()
