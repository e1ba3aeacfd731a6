"""Qwen-Image with images: image to image, inpainting, ControlNets, layers."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImageMultiControlNetModel,
    QwenImageTransformer2DModel,
)
from PIL import Image

from . import qwen_image, qwen_image_edit
from .conditioned import control_image, image, image_and_mask, masks, pictures, wake
from .family import Family
from .qwen_image import LargePixels


PLAIN = qwen_image.CALLS["plain"]
GUIDED = qwen_image.CALLS["guided"]
# 7 steps, of which the last 4 are taken.
LATE = {"strength": 0.5, "num_inference_steps": 7}
CALLS = {
    "strength 0.5": {**PLAIN, **LATE},
    "guided": {**GUIDED, **LATE},
    "strength 1": {**PLAIN, "strength": 1.0},
}
# The pipeline takes no size: it makes a megapixel.
CALLS_EDIT_INPAINT = {
    "strength 0.5": {"true_cfg_scale": 1.0, **LATE},
    "guided": {"true_cfg_scale": 3.0, "negative_prompt": "bad", "strength": 1.0},
}
CALLS_CONTROLNET = {
    "plain": PLAIN,
    "guided": GUIDED,
    "at the start": {**PLAIN, "control_guidance_end": 0.5},
}
CALLS_CONTROLNETS = {"plain": {**PLAIN, "controlnet_conditioning_scale": [0.5, 1.0]}}
CALLS_CONTROLNET_INPAINT = {"plain": PLAIN, "guided": GUIDED}
SHARED_LAYERED = {"layers": 2, "resolution": 640}
CALLS_LAYERED = {
    "plain": {**SHARED_LAYERED, "true_cfg_scale": 1.0},
    "guided": {**SHARED_LAYERED, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
    "normalized": {**SHARED_LAYERED, "true_cfg_scale": 3.0, "negative_prompt": "bad", "cfg_normalize": True},
}


def control_image_and_mask(count: int) -> dict[str, list]:
    return {"control_image": pictures(count), "control_mask": masks(count)}


def control_images(count: int) -> dict[str, list]:
    """Two for each prompt."""
    return {"control_image": [[picture, picture.rotate(90)] for picture in pictures(count)]}


def transparent_image(count: int) -> dict[str, list[Image.Image]]:
    return {"image": [picture.convert("RGBA") for picture in pictures(count)]}


def _with_parts_of(pipeline, pipeline_class: type, **parts):
    """16 x 16 images, latents packed into 16 tokens of 16 channels."""
    pipeline = pipeline_class(**{**pipeline.components, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def img2img() -> QwenImageImg2ImgPipeline:
    return _with_parts_of(qwen_image.build(), QwenImageImg2ImgPipeline)


def inpaint() -> QwenImageInpaintPipeline:
    return _with_parts_of(qwen_image.build(), QwenImageInpaintPipeline)


def edit_inpaint() -> QwenImageEditInpaintPipeline:
    """1024 x 1024 images, latents packed into 16 tokens, and as many tokens of the image to be edited."""
    return _with_parts_of(qwen_image_edit.build(), QwenImageEditInpaintPipeline, vae=LargePixels())


def _net(extra_condition_channels: int = 0) -> QwenImageControlNetModel:
    torch.manual_seed(1)
    config = {
        name: value
        for name, value in qwen_image.qwen_transformer().config.items()
        if name not in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    }
    net = QwenImageControlNetModel.from_config(
        {**config, "num_layers": 1, "extra_condition_channels": extra_condition_channels}
    )
    wake(net)
    return net


def controlnet() -> QwenImageControlNetPipeline:
    return _with_parts_of(qwen_image.build(), QwenImageControlNetPipeline, controlnet=_net())


def controlnets() -> QwenImageControlNetPipeline:
    """One ControlNet for several control images of a prompt."""
    return _with_parts_of(
        qwen_image.build(), QwenImageControlNetPipeline, controlnet=QwenImageMultiControlNetModel([_net()])
    )


def controlnet_inpaint() -> QwenImageControlNetInpaintPipeline:
    """The ControlNet also gets the mask, of 1 channel, packed like the latents into 4."""
    return _with_parts_of(qwen_image.build(), QwenImageControlNetInpaintPipeline, controlnet=_net(4))


def layered() -> QwenImageLayeredPipeline:
    """2 layers and the whole of 640 x 640 pixels with transparency, each 5 x 5 tokens."""
    torch.manual_seed(0)
    parts = qwen_image_edit.components()
    transformer = QwenImageTransformer2DModel.from_config(
        parts["transformer"].config, in_channels=32, out_channels=8, use_additional_t_cond=True, use_layer3d_rope=True
    )
    pipeline = QwenImageLayeredPipeline(
        **{
            **parts,
            "transformer": transformer,
            # As many latent channels as colours would be taken for latents.
            "vae": LargePixels(input_channels=4, z_dim=8),
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        }
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Qwen-Image image to image": Family(img2img, CALLS, image),
    "Qwen-Image inpainting": Family(inpaint, CALLS, image_and_mask),
    "Qwen-Image-Edit inpainting": Family(edit_inpaint, CALLS_EDIT_INPAINT, image_and_mask),
    "Qwen-Image ControlNet": Family(controlnet, CALLS_CONTROLNET, control_image),
    "Qwen-Image ControlNet with two images": Family(controlnets, CALLS_CONTROLNETS, control_images),
    "Qwen-Image ControlNet inpainting": Family(controlnet_inpaint, CALLS_CONTROLNET_INPAINT, control_image_and_mask),
    "Qwen-Image layered": Family(layered, CALLS_LAYERED, transparent_image),
}
