"""JoyImage-Edit: the images to be edited are frames, or further tokens, of the latents that the scheduler steps."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
)
from diffusers.pipelines.joyimage import image_processor
from transformers import Qwen3VLForConditionalGeneration

from .bria_fibo2 import qwen3_vl_processor
from .conditioned import image, pictures
from .family import Family
from .kandinsky5 import wake
from .krea2 import qwen3_vl_config
from .qwen_image import qwen_tokenizer
from .wan import wan_vae


SIZE = {"height": 32, "width": 32}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 4.0, "negative_prompt": "bad"},
}

PROMPT_TEMPLATE = (
    "<|im_start|>system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
)


def lists_of_images(count: int) -> dict[str, list]:
    return {"images": [[picture] for picture in pictures(count)]}


def components(transformer_class: type) -> dict:
    tokenizer = qwen_tokenizer(PROMPT_TEMPLATE)
    transformer = transformer_class(
        in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 2, 2]
    )
    wake(transformer)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=4.0),
        "vae": wan_vae(),
        "text_encoder": Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": transformer,
        "processor": qwen3_vl_processor(tokenizer),
    }


def small_images(vae_scale_factor: int) -> image_processor.JoyImageEditImageProcessor:
    """The pipelines scale every size to one of a table."""
    image_processor.BUCKETS[32] = [(32, 32)]
    return image_processor.JoyImageEditImageProcessor(vae_scale_factor=vae_scale_factor, basesize=32)


def build(seed: int = 0) -> JoyImageEditPipeline:
    """32 x 32 images, latents of 8 x 8 with 4 channels, behind those of the image to be edited."""
    torch.manual_seed(seed)
    pipeline = JoyImageEditPipeline(**components(JoyImageEditTransformer3DModel))
    pipeline.vae_image_processor = small_images(4)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_plus(seed: int = 0) -> JoyImageEditPlusPipeline:
    """32 x 32 images, latents in 16 patches of 2 x 2 with 4 channels, before those of the images to be edited."""
    torch.manual_seed(seed)
    pipeline = JoyImageEditPlusPipeline(**components(JoyImageEditPlusTransformer3DModel))
    pipeline.image_processor = small_images(4)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "JoyImage": Family(build, CALLS),
    "JoyImage-Edit": Family(build, CALLS, image),
    "JoyImage-Edit Plus": Family(build_plus, CALLS, lists_of_images),
}
