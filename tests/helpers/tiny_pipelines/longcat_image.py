"""
LongCatImagePipeline and LongCatImageEditPipeline: Qwen 2.5 VL prompts whose template is cut off by tokens; guidance whose
result is scaled to the norm of the conditional prediction. The second pipeline scales its image to a megapixel.
"""

import copy

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image.system_messages import SYSTEM_PROMPT_EN
from PIL import Image
from transformers import Qwen2VLImageProcessor

from . import vae
from .family import Family
from .qwen_image import qwen_text_encoder, qwen_tokenizer
from .qwen_image_edit import Processor


# The text encoder writes prompts anew, which is on by default.
SIZE = {"height": 16, "width": 16, "enable_prompt_rewrite": False}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 4.5, "negative_prompt": "bad"},
    "not normalized": {**SIZE, "guidance_scale": 4.5, "enable_cfg_renorm": False},
    "rewritten prompts": {**SIZE, "guidance_scale": 1.0, "enable_prompt_rewrite": True},
}
CALLS_EDIT = {
    "plain": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 4.5, "negative_prompt": "bad"},
}

# The template of the prompts; the instruction to write them anew is as long as it is.
TEXT = (
    "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image content, "
    "suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), color) for color in ["red", "green", "blue", "white", "black"][:count]]


def megapixel_vae() -> AutoencoderKL:
    """A factor of 32, and as little work as there can be in images of a megapixel."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 6,
        up_block_types=["UpDecoderBlock2D"] * 6,
        block_out_channels=(4,) * 6,  # fewer make much of the rounding of latents
        layers_per_block=0,
        latent_channels=16,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )


def components() -> dict:
    tokenizer = qwen_tokenizer(TEXT + SYSTEM_PROMPT_EN)
    writer = copy.deepcopy(tokenizer)
    writer.padding_side = "left"
    # As many pixels as there are in 2 x 2 tokens.
    image_processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    transformer = LongCatImageTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[2, 2, 4],
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        # The pipelines insist on latents of 16 channels.
        "vae": vae(16),
        "text_encoder": qwen_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "text_processor": Processor(image_processor, writer, chat_template=CHAT_TEMPLATE),
        "transformer": transformer,
    }


def build(seed: int = 0) -> LongCatImagePipeline:
    """16 x 16 images, latents packed into 16 tokens of 64 channels."""
    torch.manual_seed(seed)
    pipeline = LongCatImagePipeline(**components())
    # As long as the longest prompt of the tests, not 512.
    pipeline.tokenizer_max_length = 24
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_edit(seed: int = 0) -> LongCatImageEditPipeline:
    """1024 x 1024 images, latents packed into 16 x 16 tokens of 64 channels, and as many tokens of the given image."""
    torch.manual_seed(seed)
    pipeline = LongCatImageEditPipeline(**{**components(), "vae": megapixel_vae()})
    pipeline.tokenizer_max_length = 24
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "LongCat-Image": Family(build, CALLS),
    "LongCat-Image-Edit": Family(build_edit, CALLS_EDIT, images),
}
