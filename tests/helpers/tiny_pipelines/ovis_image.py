"""OvisImagePipeline: Qwen 3 prompts whose system prompt is cut off by its number of tokens; true guidance."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
from transformers import Qwen3Model

from . import vae
from .family import Family
from .qwen_image import qwen_tokenizer
from .z_image import CHAT_TEMPLATE, qwen3_config


SIZE = {"height": 16, "width": 16, "max_sequence_length": 40}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 5.0, "negative_prompt": "bad"},
}

SYSTEM_PROMPT = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the objects "
    "and background: "
)


def build(seed: int = 0) -> OvisImagePipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels; the noise levels shift with the resolution."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(f"<|im_start|>user\n{SYSTEM_PROMPT}assistant\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    transformer = OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=Qwen3Model(qwen3_config(len(tokenizer))),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Ovis-Image": Family(build, CALLS),
}
