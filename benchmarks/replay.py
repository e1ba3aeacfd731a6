"""
What a replay costs beyond the transformer itself, for each family of pipelines:

    python benchmarks/replay.py

Tiny pipelines are replayed at the middle one of 40 steps, and the time that their transformer takes is subtracted: what
is left (the pipeline's own Python, the steps that are passed through, the scheduler) hardly depends on the size of the
model. It is set against a forward pass of the real model on one micro-batch: 2 x parameters x tokens FLOPs, with the
parameters of its published configuration, 4 images of 1,024 tokens and a GPU's rate. A training step is three of them.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_pipelines import FAMILIES, columns_of, first_call, num_prompts

from trl_fdfo.algorithm import constant_churn
from trl_fdfo.pipeline_flow import PipelineFlow


STEPS, LEVEL = 40, 20
# Where the defaults of the class are not the published model.
PUBLISHED = {
    "Stable Diffusion 3": {  # 3.5 Medium
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "FLUX.2 Klein": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "HiDream": {
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 16,
        "num_single_layers": 32,
        "caption_channels": [4096, 4096],
        "llama_layers": [*range(32), *[31] * 16],
    },
    "CogView 4": {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128},
}
TOKENS = 4 * 1024  # 4 images of 512 x 512 pixels, 16 pixels to a token


def replay_overhead(name: str, repeats: int) -> float:
    """Median seconds of a replay without its transformer calls."""
    family = FAMILIES[name]
    flow = PipelineFlow(family.build(), num_generations=2, num_inference_steps=STEPS, **first_call(name))
    columns = columns_of(name, count := num_prompts(name))
    sigmas = flow.rehearse(["a cat"], {column: values[:1] for column, values in columns.items()}).sigmas
    prompts = ["a cat", "two dogs"][:count]
    seeds, noise_seeds = range(count), range(2 * count)
    batch = flow.rollout(prompts, constant_churn(sigmas, 0.1), seeds, noise_seeds, [LEVEL], columns)
    model, inside = flow.model, []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        output = model(*args, **kwargs)
        inside.append(time.perf_counter() - start)
        return output

    flow.model = timed
    seconds = []
    for _ in range(repeats + 3):
        inside.clear()
        start = time.perf_counter()
        flow.velocity(batch, LEVEL)
        seconds.append(time.perf_counter() - start - sum(inside))
    return statistics.median(seconds[3:])


def published_parameters(name: str) -> int:
    """Parameters of the real transformer, built without memory for them."""
    transformer_class = type(FAMILIES[name].build().transformer)
    with torch.device("meta"):
        transformer = transformer_class(**PUBLISHED.get(name, {}))
    return sum(parameter.numel() for parameter in transformer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tflops", type=float, default=400.0, help="sustained rate of the GPU, in 10^12 FLOP/s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one of {os.cpu_count()} cores, torch {torch.__version__}; GPU taken to do {args.tflops:g} TFLOP/s")
    print(f"{'family':22} {'overhead':>9} {'parameters':>11} {'its forward':>12} {'percent':>8}")
    for name in FAMILIES:
        overhead = replay_overhead(name, args.repeats)
        parameters = published_parameters(name)
        forward = 2 * parameters * TOKENS / (args.tflops * 1e12)
        print(
            f"{name:22} {1e3 * overhead:6.1f} ms {parameters / 1e9:9.1f} B {1e3 * forward:9.0f} ms "
            f"{100 * overhead / forward:7.1f}%"
        )


if __name__ == "__main__":
    main()
