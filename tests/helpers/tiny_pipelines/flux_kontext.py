"""FluxKontextPipeline: the latents of a conditioning image follow the latents; embedded and true guidance."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPTextModel

from . import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, vae
from .family import Family


# By default the pipeline scales the image (`max_area`) and the conditioning image (`_auto_resize`) to a megapixel.
SIZE = {"height": 16, "width": 16, "max_area": 16 * 16, "_auto_resize": False, "max_sequence_length": 8}
CALLS = {
    # The guidance scale is an input of the transformer (distilled): no second prediction.
    "plain": {**SIZE, "guidance_scale": 2.5},
    "guided": {**SIZE, "guidance_scale": 2.5, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
}


def images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), color) for color in ["red", "green", "blue", "white", "black"][:count]]


def build(seed: int = 0) -> FluxKontextPipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels, and 16 tokens of the conditioning image."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_encoder(tokenizer, CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "FLUX.1 Kontext": Family(build, CALLS, images),
}
