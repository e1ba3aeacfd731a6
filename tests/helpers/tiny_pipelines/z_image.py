"""ZImagePipeline: latents in fp32 whatever the model's dtype, lists of samples, and a velocity of the opposite sign."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from . import vae
from .family import Family
from .qwen_image import qwen_tokenizer


SIZE = {"height": 16, "width": 16, "max_sequence_length": 24}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 0.0},
    "guided": {**SIZE, "guidance_scale": 3.0, "negative_prompt": "bad"},
    "normalized": {**SIZE, "guidance_scale": 3.0, "cfg_normalization": True},
    "truncated": {**SIZE, "guidance_scale": 3.0, "cfg_truncation": 0.5},
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def qwen3_config(vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
    )


def build(seed: int = 0) -> ZImagePipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels; image and text are padded to 32 tokens each."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("<|im_start|>user\nassistant\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 16, 16],
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=Qwen3Model(qwen3_config(len(tokenizer))),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Z-Image": Family(build, CALLS),
}
