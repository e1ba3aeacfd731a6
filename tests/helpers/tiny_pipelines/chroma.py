"""Chroma: T5 prompts with a mask that keeps one padding token, packed latents, modulations from one small network."""

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from . import t5_encoder, t5_tokenizer, vae
from .family import Family


CALLS = {
    "plain": {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
    "guided": {
        "height": 16,
        "width": 16,
        "guidance_scale": 5.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    },
}


def build(seed: int = 0) -> ChromaPipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels; the noise levels shift with the resolution."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Chroma": Family(build, CALLS),
}
