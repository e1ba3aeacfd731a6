"""SANA-WM: a video from an image, a prompt and the path of a camera."""

import functools

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)
from diffusers.models.transformers import transformer_sana_wm

from .conditioned import image
from .family import Family
from .sana import gemma_encoder, gemma_tokenizer


@functools.wraps(transformer_sana_wm.create_grid)
def _create_grid(*args, dtype=torch.float32, **kwargs):
    return _own_create_grid(*args, **kwargs).to(dtype)


# On the CPU diffusers refuses a grid of pixels in another dtype than float32.
_own_create_grid, transformer_sana_wm.create_grid = transformer_sana_wm.create_grid, _create_grid


SMALL = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "action": "w-8",
    "intrinsics": [16.0, 16.0, 8.0, 8.0],
    "max_sequence_length": 16,
    "chi_prompt": ["prompt "],
}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {**SMALL, "guidance_scale": 5.0, "negative_prompt": "blurry"},
}


def build() -> SanaWMPipeline:
    """Videos of 9 frames of 64 x 64, latents of 2 frames of 2 x 2 with 4 channels; the first frame is the image."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    transformer = SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=16,
        mlp_ratio=1.0,
    )
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = SanaWMPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# One prompt, one sample and no batch axis in what it returns; `scheduler.step` gets a timestep for each token.
FAMILIES = {
    "SANA-WM (video)": Family(build, CALLS, image),
}
