"""Sana-Video: linear attention, prompts of Gemma 2, the VAE of Wan; image to video keeps its first latent frame."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from . import wan
from .conditioned import image
from .family import Family
from .sana import gemma_encoder, gemma_tokenizer


SMALL = {
    "height": 32,
    "width": 32,
    "frames": 5,
    "max_sequence_length": 16,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {
        **SMALL,
        "guidance_scale": 6.0,
        "negative_prompt": "blurry",
        "complex_human_instruction": ["be vivid", "prompt "],
    },
}


def _sana(pipeline_class: type):
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
    )
    # The layer that looks at other frames has no effect in a new model.
    torch.nn.init.normal_(transformer.transformer_blocks[0].ff.conv_temp.weight, std=0.3)
    pipeline = pipeline_class(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer),
        vae=wan.build().vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build() -> SanaVideoPipeline:
    """Videos of 5 frames of 32 x 32, latents of 2 frames of 8 x 8 with 4 channels."""
    return _sana(SanaVideoPipeline)


def image_to_video() -> SanaImageToVideoPipeline:
    """Each token has a timestep; that of the first frame is 0, and the scheduler gets the other frames."""
    return _sana(SanaImageToVideoPipeline)


FAMILIES = {
    "Sana-Video (video)": Family(build, CALLS),
    "Sana-Video image to video": Family(image_to_video, CALLS, image),
}
