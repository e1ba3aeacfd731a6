"""
Measures what mixed precision costs in accuracy, with a GPU's mixed precision emulated on a CPU:

    OMP_NUM_THREADS=1 python benchmarks/precision.py

A tiny pipeline in 16 bits and the same pipeline in float32 sample pairs of images from the same noise, as the paper does
(40 steps, churn 0.0025): in the transformer's own dtype, as a run does, and under autocast, in bfloat16 and in float16.
The table shows the relative rms difference from float32:

- half difference: of the final latents of the two images of a prompt,
- reward difference: of the rewards of these two images,
- gradient: of the adapter, in the first optimizer step.

A difference between two images is small beside the images, so that it loses what the images would hardly miss. All
samples and all prompts count.
"""

import copy
import itertools

import tiny_pipelines
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging
from torch import Tensor

from trl_fdfo.algorithm import constant_churn, finite_difference, surrogate_loss
from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.pipeline.flow import PipelineFlow
from trl_fdfo.pipeline.lora import add_adapter, default_lora_config
from trl_fdfo.pipeline.own_dtype import run_in_own_dtype
from trl_fdfo.planning.cost import Precision


STEPS, CHURN, BRANCHES, EPSILON = 40, 0.0025, 2, 0.03
GUIDANCE_SCALES = {"not guided": 1.0, "guidance 2": 2.0, "guidance 4.5": 4.5}
# Most that tests/pipeline/test_precision.py lets them be: in bfloat16 without guidance, which adds up w and 1 - w times the
# rounding of a velocity, in float16 with any.
LIMITS = {"half difference": 3e-3, "reward difference": 6e-3, "gradient": 1e-2}


def brightness_of_a_corner(images: Tensor) -> Tensor:
    """A smooth reward of about 1, which is not blind to single pixels as a mean over all of them would be."""
    height, width = images.shape[-2:]
    weights = torch.linspace(0, 1, height)[:, None] * torch.linspace(0, 1, width)
    return (images * weights).mean(dim=(1, 2, 3))


def measure(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], guidance_scale: float, autocast: bool = False
) -> list[Tensor]:
    """The half differences of a rollout, its reward differences and its gradient, in the dtype of the pipeline."""
    pipeline = copy.deepcopy(pipeline)
    transformer = pipeline.transformer.requires_grad_(False)
    torch.manual_seed(0)
    model = add_adapter(pipeline, default_lora_config(4, 8, None, transformer))
    dtype = transformer.dtype
    precision = Precision("cuda", dtype if autocast else None)
    if not autocast:
        run_in_own_dtype(model)
    flow = PipelineFlow(
        pipeline,
        num_generations=BRANCHES,
        scheduler_class=ChurnScheduler,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        height=16,
        width=16,
        max_sequence_length=8,
    )

    def model_as_trained(*args, **kwargs):
        with precision.kernel_context(), precision.autocast_context():
            return model(*args, **kwargs)

    flow.model = model_as_trained
    levels = range(0, STEPS, 5)
    loss_scale = 2.0**16 if dtype == torch.float16 else 1.0  # as a gradient scaler starts
    batch = flow.rollout(
        prompts,
        constant_churn(flow.rehearse(prompts[:1]).sigmas, CHURN),
        seeds=range(len(prompts)),
        noise_seeds=range(100, 100 + BRANCHES * len(prompts)),
        levels=levels,
    )
    rewards = brightness_of_a_corner(batch.images).unflatten(0, (-1, BRANCHES))
    endpoints = batch.endpoints.float()
    direction, reward_difference = finite_difference(endpoints, rewards)
    for level in levels:
        velocity = flow.velocity(batch, level)
        assert torch.equal(velocity, batch.velocities[level]), "the replay is not exact"
        loss = surrogate_loss(
            velocity.float(),
            batch.velocities[level].float(),
            direction.flatten(0, 1),
            reward_difference.flatten(),
            EPSILON,
        ).loss
        (loss_scale * loss.mean()).backward()
    gradient = torch.cat([p.grad.flatten() / loss_scale for p in model.parameters() if p.grad is not None])
    return [endpoints - endpoints.mean(dim=1, keepdim=True), reward_difference, gradient]


def errors(
    guidance_scale: float, num_prompts: int = 16, dtype: torch.dtype = torch.bfloat16, autocast: bool = False
) -> dict[str, float]:
    """Relative rms errors of 16 bits."""
    pipeline = tiny_pipelines.sd3().to(dtype)
    prompts = [f"cliff {n}" for n in range(num_prompts)]
    # The weights are the same.
    exact = measure(copy.deepcopy(pipeline).to(torch.float32), prompts, guidance_scale)
    mixed = measure(pipeline, prompts, guidance_scale, autocast)
    names = ("half difference", "reward difference", "gradient")
    return {name: ((b - a).norm() / a.norm()).item() for name, a, b in zip(names, exact, mixed)}


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # of casts, which are meant
    print(f"{'relative error':36}", *(f"{name:>20}" for name in LIMITS))
    for dtype, autocast in itertools.product((torch.bfloat16, torch.float16), (False, True)):
        for name, scale in GUIDANCE_SCALES.items():
            row = errors(scale, dtype=dtype, autocast=autocast)
            title = f"{name}, {str(dtype).removeprefix('torch.')}{' by autocast' if autocast else ''}"
            print(title.ljust(36), *(f"{value:20.1e}" for value in row.values()))


if __name__ == "__main__":
    main()
