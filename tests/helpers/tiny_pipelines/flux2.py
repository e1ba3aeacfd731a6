"""Flux2Pipeline: embedded guidance only; every conditioning image of a call is for all its prompts."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from .family import Family
from .flux2_klein import flux2_transformer, flux2_vae, images
from .qwen_image import qwen_tokenizer


__all__ = ["CALLS", "build", "images"]

CALLS = {
    # The guidance scale is an input of the transformer (distilled): no second prediction.
    "plain": {
        "height": 16,
        "width": 16,
        "guidance_scale": 2.5,
        "max_sequence_length": 64,
        "text_encoder_out_layers": (1, 2),
    }
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>"
    "{% endfor %}"
)


def text_encoder(vocab_size: int, hidden_size: int = 16) -> Mistral3ForConditionalGeneration:
    text_config = {
        "model_type": "mistral",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
    }
    vision_config = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text_config, vision_config=vision_config))


def build(seed: int = 0) -> Flux2Pipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels, and 256 tokens for each conditioning image."""
    torch.manual_seed(seed)
    # The released processor needs torchvision; the pipeline only applies its chat template.
    tokenizer = qwen_tokenizer(SYSTEM_MESSAGE)
    tokenizer.chat_template = CHAT_TEMPLATE
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "FLUX.2": Family(build, CALLS),
    "FLUX.2 with an image": Family(build, CALLS, images),
}
