"""Ideogram 4: 13 layers of Qwen3-VL, a transformer for the conditional prediction and another for the unconditional one."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from transformers import Qwen3VLModel

from .family import Family
from .flux2_klein import flux2_vae
from .krea2 import qwen3_vl_config
from .nucleus import CHAT_TEMPLATE
from .qwen_image import qwen_tokenizer


SIZE = {"height": 16, "width": 16, "max_sequence_length": 32}
CALLS = {
    "guided": {**SIZE, "guidance_scale": 7.0, "guidance_schedule": None},
    # Both transformers are called, and the unconditional one has no say.
    "plain": {**SIZE, "guidance_scale": 1.0, "guidance_schedule": None},
    "scheduled": {**SIZE, "num_inference_steps": 4, "guidance_schedule": [7.0, 7.0, 7.0, 3.0]},
}


def transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        intermediate_size=16,
        adaln_dim=16,
        llm_features_dim=13 * 16,
        mrope_section=(2, 1, 1),
    )


def build(seed: int = 0) -> Ideogram4Pipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("<|im_start|>user\nassistant\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    pipeline = Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        # The pipeline has the numbers of the layers that it reads in its code: the last is 35.
        text_encoder=Qwen3VLModel(qwen3_vl_config(tokenizer, layers=36)),
        tokenizer=tokenizer,
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# It has a second transformer, which is called for each step.
FAMILIES = {
    "Ideogram 4": Family(build, CALLS),
}
