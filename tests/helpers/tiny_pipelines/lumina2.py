"""Lumina Image 2.0: Gemma 2 prompts with a system prompt, time runs from noise to image, one sign flip."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from . import vae
from .family import Family
from .sana import gemma_encoder, gemma_tokenizer


SHARED = {"height": 32, "width": 32, "max_sequence_length": 40, "system_prompt": "paint"}
CALLS = {
    "plain": {**SHARED, "guidance_scale": 1.0},
    "guided": {**SHARED, "guidance_scale": 4.0, "negative_prompt": "blurry"},
    "unnormalized": {**SHARED, "guidance_scale": 4.0, "negative_prompt": "blurry", "cfg_normalization": False},
    # Guidance in the first half of the steps only: it depends on the step index and on the number of steps.
    "truncated": {**SHARED, "guidance_scale": 4.0, "negative_prompt": "blurry", "cfg_trunc_ratio": 0.5},
}


def build(seed: int = 0) -> Lumina2Pipeline:
    """8 x 8 images, latents of 4 x 4: the pipeline is asked for 32 x 32 and assumes a VAE that reduces by 8."""
    torch.manual_seed(seed)
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 8, 8),
        cap_feat_dim=16,
    )
    pipeline = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(),
        text_encoder=gemma_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Lumina 2": Family(build, CALLS),
}
