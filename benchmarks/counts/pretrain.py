"""
Rebuilds the pipeline of the world "counts", from the packaged one of `trl_fdfo.shapes`:

    python benchmarks/counts/pretrain.py --output benchmarks/counts/pipeline

VAE and transformer begin with the packaged weights, the text encoders, whose words are others, with random ones. Many
captions carry a wrong count word on purpose, so that RL post-training has something to repair. 550 CPU seconds on one core of
a busy AMD EPYC server; then, with 10 steps, 0.194 of 480 images are exact:

    | one  | two  | three | four | five | rendered captions after the VAE |
    |------|------|-------|------|------|---------------------------------|
    | 0.19 | 0.25 | 0.25  | 0.21 | 0.07 | 0.998                           |
"""

import argparse
import random
import time

import torch

from benchmarks.counts import world
from examples.shapes.pretrain import build_pipeline, encode_dataset, train_flow, train_vae
from trl_fdfo import shapes


def with_wrong_count(prompt: str) -> str:
    """The caption with another count word."""
    count, *rest = world.ATTRIBUTES[prompt]
    return random.choice([other for other, (n, *its) in world.ATTRIBUTES.items() if its == rest and n != count])


@torch.no_grad()
def reconstructed(vae: torch.nn.Module) -> float:
    """The share of rendered captions that are exact after the VAE has encoded and decoded them: the ceiling of RL."""
    prompts = world.captions() * 20
    latents = vae.encode(world.render(prompts) * 2 - 1).latent_dist.mode()
    return world.reward((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), prompts).mean().item()


def evaluate(pipeline, seed: int = 1000, steps: int = 10) -> dict[str, float]:
    """`world.metrics` of 8 images per caption."""
    prompts = world.captions() * 8
    images = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return world.metrics(images, prompts)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(world.PIPELINE_FOLDER), help="folder to save the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--flow-steps", type=int, default=3500)
    parser.add_argument("--dataset-size", type=int, default=20000, help="rendered images the flow is trained on")
    parser.add_argument("--wrong-counts", type=float, default=0.6, help="share of captions with a wrong count word")
    args = parser.parse_args(args)

    start = time.time()
    print(args, flush=True)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    packaged, pipeline = shapes.load_pipeline(), build_pipeline(world.captions())
    pipeline.vae.load_state_dict(packaged.vae.state_dict())
    pipeline.transformer.load_state_dict(packaged.transformer.state_dict())

    train_vae(pipeline.vae, args.vae_steps, world)
    print(f"exact after the VAE: {reconstructed(pipeline.vae):.3f}", flush=True)
    latents, prompts = encode_dataset(pipeline.vae, args.dataset_size, world)
    train_flow(pipeline, latents, prompts, args.flow_steps, args.wrong_counts, world, with_wrong_count)

    pipeline.to(torch.float16).save_pretrained(args.output)
    pipeline.to(torch.float32)  # evaluated as it will be loaded: float16 weights, float32 arithmetic
    for name, value in evaluate(pipeline).items():
        print(f"  {name:12s} {value:.3f}")
    print(f"{time.time() - start:.0f} s, {time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
