"""Nucleus-Image: a mixture of experts that choose their tokens, a velocity of the opposite sign."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
)
from diffusers.pipelines.nucleusmoe_image.pipeline_nucleusmoe_image import DEFAULT_SYSTEM_PROMPT
from transformers import Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration

from .family import Family
from .kandinsky5 import wake
from .krea2 import qwen3_vl_config
from .qwen_image import qwen_tokenizer, qwen_vae
from .qwen_image_edit import Processor


SIZE = {"height": 16, "width": 16, "max_sequence_length": 96, "return_index": -2}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 4.0, "negative_prompt": "bad"},
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def build(seed: int = 0) -> NucleusMoEImagePipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels; the second layer has experts."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(DEFAULT_SYSTEM_PROMPT + "system\nuser\nassistant\n")
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, parameter in transformer.named_parameters():
        if "experts" in name:  # a new transformer has whatever was in memory
            torch.nn.init.normal_(parameter, std=0.2)
    wake(transformer)
    pipeline = NucleusMoEImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer)),
        processor=Processor(Qwen2VLImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Nucleus-Image": Family(build, CALLS),
}
