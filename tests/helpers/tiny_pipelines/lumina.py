"""Lumina-Next: Gemma prompts in a cross attention, guidance of the first three channels only, one sign flip."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline

from . import vae
from .family import Family
from .kandinsky5 import wake
from .sana import gemma_encoder, gemma_tokenizer


SIZE = {"height": 64, "width": 64, "max_sequence_length": 24, "clean_caption": False}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 4.0, "negative_prompt": "bad"},
    # Larger images than the model's own: the positions are scaled in another way in the first steps.
    "scaled": {**SIZE, "guidance_scale": 4.0, "negative_prompt": "bad", "scaling_watershed": 0.3},
}


def build(seed: int = 0) -> LuminaPipeline:
    """16 x 16 images, latents of 8 x 8: the pipeline is asked for 64 x 64 and assumes a VAE that reduces by 8."""
    torch.manual_seed(seed)
    tokenizer = gemma_tokenizer()
    transformer = LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    wake(transformer)
    pipeline = LuminaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=gemma_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Lumina-Next": Family(build, CALLS),
}
