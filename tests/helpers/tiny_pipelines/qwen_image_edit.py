"""QwenImageEditPipeline and QwenImageEditPlusPipeline: a conditioning image, read by the text encoder and the VAE."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

from .family import Family
from .qwen_image import LargePixels, qwen_text_encoder, qwen_tokenizer, qwen_transformer


CALLS = {
    "plain": {"height": 128, "width": 128, "true_cfg_scale": 1.0},
    "guided": {"height": 128, "width": 128, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
}

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\nPicture : <|vision_start|><|image_pad|><|vision_end|>"
)


def images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), color) for color in ["red", "green", "blue", "white", "black"][:count]]


class Processor(Qwen2VLProcessor):
    """Without a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def components() -> dict:
    tokenizer = qwen_tokenizer(PROMPT_TEMPLATE)
    # As many pixels as there are in 2 x 2 tokens.
    image_processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        # The pipelines scale every conditioning image to a megapixel: 16 x 16 tokens, of 2 x 2 latents.
        "vae": LargePixels(size=16),
        "text_encoder": qwen_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "processor": Processor(image_processor, tokenizer),
        "transformer": qwen_transformer(),
    }


def build(seed: int = 0) -> QwenImageEditPipeline:
    """128 x 128 images, latents packed into 4 tokens of 16 channels, and 256 tokens of the conditioning image."""
    torch.manual_seed(seed)
    pipeline = QwenImageEditPipeline(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_plus(seed: int = 0) -> QwenImageEditPlusPipeline:
    """Several conditioning images, all for the one prompt that a call takes."""
    torch.manual_seed(seed)
    pipeline = QwenImageEditPlusPipeline(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Qwen-Image-Edit": Family(build, CALLS, images),
    "Qwen-Image-Edit Plus": Family(build_plus, CALLS, images),
}
