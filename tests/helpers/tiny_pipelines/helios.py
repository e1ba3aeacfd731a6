"""Helios: videos in chunks, each of which sees the latents of the chunks before it in three sizes of patches."""

import torch
from diffusers import (
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)

from . import wan
from .conditioned import image
from .family import Family
from .ftfy_stand_in import allow_without_ftfy


allow_without_ftfy(HeliosPipeline, HeliosPyramidPipeline)

# One chunk: 2 latent frames, which are 5 frames.
SMALL = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_latent_frames_per_chunk": 2,
    "history_sizes": [4, 2, 1],
    "max_sequence_length": 16,
}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {**SMALL, "guidance_scale": 5.0, "negative_prompt": "blurry"},
}
# The noise of the images is drawn by `torch.rand`, which takes no list of generators.
IMAGE_CALLS = {name: {**call, "add_noise_to_image_latents": False} for name, call in CALLS.items()}
PYRAMID = {**CALLS["plain"], "pyramid_num_inference_steps_list": [2, 2]}


def _helios(pipeline_class: type, scheduler: HeliosScheduler, **kwargs):
    own = {name: part for name, part in wan.build().components.items() if part is not None}
    torch.manual_seed(0)
    own["scheduler"] = scheduler
    own["transformer"] = HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_dim=(8, 4, 4),
    )
    pipeline = pipeline_class(**own, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build() -> HeliosPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels."""
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True, time_shift_type="linear")
    return _helios(HeliosPipeline, scheduler)


def pyramid() -> HeliosPyramidPipeline:
    scheduler = HeliosScheduler(stages=2, stage_range=[0, 0.5, 1])
    return _helios(HeliosPyramidPipeline, scheduler)


FAMILIES = {
    "Helios (video)": Family(build, CALLS),
    "Helios image to video": Family(build, IMAGE_CALLS, image),
}
# Its stages sample at growing resolutions, each with noise levels from near 1 on, and add new noise between them; so its call
# has no number of steps.
REFUSED = {
    "Helios Pyramid (video)": Family(
        pyramid,
        {"plain": PYRAMID},
        reason="stages of growing size, each with a schedule and new noise of its own",
        error="does not take num_inference_steps",
    ),
}
