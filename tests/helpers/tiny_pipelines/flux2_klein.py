"""Flux2KleinPipeline: true guidance against an empty prompt; every conditioning image of a call is for all prompts."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from transformers import Qwen3ForCausalLM

from .family import Family
from .qwen_image import qwen_tokenizer
from .z_image import CHAT_TEMPLATE, qwen3_config


SIZE = {"height": 16, "width": 16, "max_sequence_length": 24, "text_encoder_out_layers": (1, 2)}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 3.0},
}


def images(count: int) -> list[Image.Image]:
    """Conditioning images of 64 x 64, the smallest that the pipeline takes."""
    return [Image.new("RGB", (64, 64), color) for color in ["red", "green", "blue", "white", "black"][:count]]


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    # With small weights in its blocks the text has hardly a say.
    for name, weight in transformer.named_parameters():
        if weight.ndim > 1 and ("blocks" in name or "modulation" in name or "context" in name):
            torch.nn.init.normal_(weight, std=0.3)
    return transformer


def build(seed: int = 0) -> Flux2KleinPipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels, and 256 tokens for each conditioning image."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("<|im_start|>user\nassistant\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(qwen3_config(len(tokenizer))),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_kv() -> Flux2KleinKVPipeline:
    """Distilled, without guidance; the first step computes the keys and values of the conditioning image for all steps."""
    pipeline = Flux2KleinKVPipeline(**build().components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "FLUX.2 Klein": Family(build, CALLS),
    "FLUX.2 Klein KV": Family(build_kv, {"plain": SIZE}),
    "FLUX.2 Klein KV with an image": Family(build_kv, {"plain": SIZE}, images),
}
