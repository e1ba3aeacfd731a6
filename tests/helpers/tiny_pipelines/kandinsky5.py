"""Kandinsky 5: Qwen2.5-VL and CLIP prompts, channels last, text padded to the longest prompt of a batch without a mask."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextModel, Qwen2VLImageProcessor

from . import clip_encoder, clip_tokenizer, vae
from .conditioned import pictures
from .family import Family
from .qwen_image import qwen_text_encoder, qwen_tokenizer
from .qwen_image_edit import Processor


SIZE = {"height": 32, "width": 32, "max_sequence_length": 32}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 3.5, "negative_prompt": "bad"},
}

PROMPT_TEMPLATE = (
    "<|im_start|>system\nYou are a prompt engineer. Describe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
PROMPT_TEMPLATE_EDIT = (
    "<|im_start|>system\nYou are a prompt engineer. Based on the provided source image (first image) and target image "
    "(second image), create an interesting text prompt that can be used together with the source image to create the "
    "target image:<|im_end|><|im_start|>user<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
)


def images(count: int) -> list:
    """The text encoder gets them at half their size, which must not be less than one of its patches."""
    return [picture.resize((64, 64)) for picture in pictures(count)]


def wake(module: torch.nn.Module, std: float = 0.2) -> None:
    """Some layers of a new transformer are zero, and so is what depends on them."""
    for name, parameter in module.named_parameters():
        if not parameter.any() and not name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=std)


def components(template: str, **transformer_options) -> dict:
    tokenizer, tokenizer_2 = qwen_tokenizer(template), clip_tokenizer()
    tokenizer_2.model_max_length = 77
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        **transformer_options,
    )
    wake(transformer)
    return {
        "transformer": transformer,
        "vae": vae(blocks=4),
        "text_encoder": qwen_text_encoder(tokenizer),
        "tokenizer": Processor(
            Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56}), tokenizer
        ),
        "text_encoder_2": clip_encoder(tokenizer_2, CLIPTextModel),
        "tokenizer_2": tokenizer_2,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def build(seed: int = 0) -> Kandinsky5T2IPipeline:
    """32 x 32 images, latents of 4 x 4 with 4 channels; the pipeline scales every size to one of its own."""
    torch.manual_seed(seed)
    pipeline = Kandinsky5T2IPipeline(**components(PROMPT_TEMPLATE))
    pipeline.resolutions = [(32, 32)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_edit(seed: int = 0) -> Kandinsky5I2IPipeline:
    """The transformer gets latents, those of the image to be edited and a mask: 4 + 4 + 1 channels."""
    torch.manual_seed(seed)
    pipeline = Kandinsky5I2IPipeline(**components(PROMPT_TEMPLATE_EDIT, visual_cond=True))
    pipeline.resolutions = [(32, 32)]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Kandinsky 5": Family(build, CALLS),
    "Kandinsky 5 image to image": Family(build_edit, CALLS, images),
}
