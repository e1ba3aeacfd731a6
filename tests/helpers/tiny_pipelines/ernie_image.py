"""ERNIE-Image: a list of prompts' hidden states, which the pipeline pads, and latents that its call draws itself."""

import torch
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from .family import Family
from .flux2 import text_encoder
from .flux2_klein import flux2_vae
from .kandinsky5 import wake
from .qwen_image import qwen_tokenizer


SIZE = {"height": 16, "width": 16}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 4.0, "negative_prompt": "bad"},
}


def build(seed: int = 0) -> ErnieImagePipeline:
    """16 x 16 images, latents of 4 x 4 with 16 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("a")
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=24,
        rope_axes_dim=(4, 2, 2),
    )
    wake(transformer)
    pipeline = ErnieImagePipeline(
        transformer=transformer,
        vae=flux2_vae(),
        text_encoder=text_encoder(len(tokenizer), hidden_size=24).model,
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# It has no prepare_latents.
FAMILIES = {
    "ERNIE-Image": Family(build, CALLS),
}
