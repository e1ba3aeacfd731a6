"""Mochi: noise levels that rise, from noise at 0 to the video at 1, and a velocity towards the video."""

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from . import t5_encoder, t5_tokenizer
from .family import Family


SMALL = {"height": 16, "width": 16, "num_frames": 7, "max_sequence_length": 16}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {**SMALL, "guidance_scale": 4.5, "negative_prompt": "bad"},
}


def build(seed: int = 0) -> MochiPipeline:
    """Videos of 7 frames of 16 x 16, latents of 2 frames of 4 x 4 with 12 channels, on which the pipeline insists."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=16,
        max_sequence_length=16,
    )
    torch.nn.init.normal_(transformer.pos_frequencies)
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32),
            decoder_block_out_channels=(32, 32, 32),
            layers_per_block=(1, 1, 1, 1),
            temporal_expansions=(2, 3),
            spatial_expansions=(2, 2),
            add_attention_block=(False, False, False, False),
        ),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The scheduler's time is inverted.
FAMILIES = {
    "Mochi (video)": Family(build, CALLS),
}
