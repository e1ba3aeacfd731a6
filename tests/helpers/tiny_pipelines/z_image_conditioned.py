"""Z-Image with images: image to image, inpainting, ControlNets that share layers with the transformer, and Omni."""

import torch
from diffusers import (
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImageTransformer2DModel,
)
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from . import z_image
from .conditioned import control_image, image, image_and_mask, pictures, wake
from .family import Family


PLAIN = z_image.CALLS["plain"]
GUIDED = z_image.CALLS["guided"]
# 7 steps, of which the last 4 are taken.
LATE = {"strength": 0.5, "num_inference_steps": 7}
CALLS = {
    "strength 0.5": {**PLAIN, **LATE},
    "guided": {**GUIDED, **LATE},
    "strength 1": {**PLAIN, "strength": 1.0},
}


def control_image_and_mask(count: int) -> dict[str, list]:
    return {**image_and_mask(count), **control_image(count)}


def larger_image(count: int) -> dict[str, list]:
    """The smallest that Omni takes."""
    return {"image": [picture.resize((64, 64)) for picture in pictures(count)]}


def _with_parts_of_z_image(pipeline_class: type, **parts):
    """16 x 16 images, latents of 8 x 8 with 4 channels."""
    pipeline = pipeline_class(**{**z_image.build().components, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def img2img() -> ZImageImg2ImgPipeline:
    return _with_parts_of_z_image(ZImageImg2ImgPipeline)


def inpaint() -> ZImageInpaintPipeline:
    return _with_parts_of_z_image(ZImageInpaintPipeline)


def _net(control_in_dim: int, **config) -> ZImageControlNetModel:
    torch.manual_seed(1)
    net = ZImageControlNetModel(
        control_layers_places=[0],
        control_in_dim=control_in_dim,
        dim=16,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        **config,
    )
    wake(net)
    # Its constructor does not set it, and its forward pass reads it where gradients are on.
    net.gradient_checkpointing = False
    return net


def controlnet() -> ZImageControlNetPipeline:
    """The first released ControlNet: the embedders and refiners of the transformer are its own too."""
    return _with_parts_of_z_image(ZImageControlNetPipeline, controlnet=_net(4))


def controlnet_inpaint() -> ZImageControlNetInpaintPipeline:
    """The second: it also gets the mask and the masked image, of 1 + 4 channels, and refines the control image."""
    return _with_parts_of_z_image(
        ZImageControlNetInpaintPipeline,
        controlnet=_net(9, control_refiner_layers_places=[0], add_control_noise_refiner="control_noise_refiner"),
    )


def omni(**parts) -> ZImageOmniPipeline:
    """Without an image, by the transformer of Z-Image, which knows no SigLIP."""
    siglip = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=16, num_patches=4
    )
    torch.manual_seed(1)
    return _with_parts_of_z_image(
        ZImageOmniPipeline,
        siglip=Siglip2VisionModel(siglip),
        siglip_processor=Siglip2ImageProcessorPil(max_num_patches=4),
        **parts,
    )


def omni_with_image() -> ZImageOmniPipeline:
    """Images that it is given are 256 clean tokens of the VAE and 4 of SigLIP, beside the 16 noisy ones."""
    torch.manual_seed(2)
    config = z_image.build().transformer.config
    return omni(transformer=ZImageTransformer2DModel.from_config(config, siglip_feat_dim=16, axes_lens=[256, 32, 32]))


FAMILIES = {
    "Z-Image image to image": Family(img2img, CALLS, image),
    "Z-Image inpainting": Family(inpaint, CALLS, image_and_mask),
    "Z-Image ControlNet": Family(controlnet, {"plain": PLAIN, "guided": GUIDED}, control_image),
    "Z-Image ControlNet inpainting": Family(
        controlnet_inpaint, {"plain": PLAIN, "guided": GUIDED}, control_image_and_mask
    ),
    "Z-Image Omni": Family(omni, {"plain": PLAIN, "guided": GUIDED}),
    "Z-Image Omni with an image": Family(omni_with_image, {"plain": PLAIN, "guided": GUIDED}, larger_image),
}
