"""Pipelines that are given images: filling, control images, inpainting, variations, ControlNets; and perturbed attention."""

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    CogView4ControlPipeline,
    CogView4Transformer2DModel,
    Flux2KleinInpaintPipeline,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
)
from PIL import Image

from . import chroma, cogview4, flux, flux2_klein, flux_kontext, sd3, vae
from .family import Family


SMALL = {"height": 16, "width": 16, "max_sequence_length": 8}
# 7 steps, of which the last 4 are taken.
LATE = {**SMALL, "strength": 0.5, "num_inference_steps": 7}
CALLS = {
    "fill": {"plain": {**SMALL, "guidance_scale": 30.0}},
    "control": {"plain": {**SMALL, "guidance_scale": 10.0}},
    "inpaint": {"strength 1": {**SMALL, "strength": 1.0}, "strength 0.5": LATE},
    "img2img": {"strength 0.5": LATE, "strength 1": {**SMALL, "strength": 1.0}},
    "controlnet": {"plain": SMALL},
    "sd3_inpaint": {"strength 1": {**SMALL, "strength": 1.0, "guidance_scale": 1.0}, "guided": LATE},
    "sd3_img2img": {"guided": LATE, "plain": {**SMALL, "strength": 1.0, "guidance_scale": 1.0}},
    "sd3_controlnet": {"plain": {**SMALL, "guidance_scale": 1.0}, "guided": {**SMALL, "guidance_scale": 4.0}},
    "sd3_pag": {"plain": {**SMALL, "guidance_scale": 1.0}, "guided": {**SMALL, "guidance_scale": 4.0}},
    "kontext_inpaint": {
        "strength 1": {**flux_kontext.CALLS["plain"], "strength": 1.0},
        "guided, strength 0.5": {**flux_kontext.CALLS["guided"], "strength": 0.5, "num_inference_steps": 7},
    },
    "klein_inpaint": {
        "strength 1": {**flux2_klein.CALLS["plain"], "strength": 1.0},
        "guided, strength 0.5": {**flux2_klein.CALLS["guided"], "strength": 0.5, "num_inference_steps": 7},
    },
    "sd3_pag_img2img": {
        "guided": LATE,
        "perturbed": {**LATE, "guidance_scale": 1.0},
        "not perturbed": {**SMALL, "strength": 1.0, "pag_scale": 0.0},
    },
    "chroma": {
        "strength 1": {**chroma.CALLS["plain"], "strength": 1.0},
        "guided, strength 0.5": {**chroma.CALLS["guided"], "strength": 0.5, "num_inference_steps": 7},
    },
}


def pictures(count: int) -> list[Image.Image]:
    """Pictures of two halves."""
    images = [Image.new("RGB", (16, 16), color) for color in ["red", "green", "blue", "white", "black"][:count]]
    for image in images:
        image.paste("yellow", (0, 0, 16, 8))
    return images


def other_pictures(count: int) -> list[Image.Image]:
    return [image.transpose(Image.Transpose.ROTATE_90) for image in pictures(count)]


def masks(count: int) -> list[Image.Image]:
    """The right half is to be painted; the boundary is soft."""
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    mask.paste(128, (6, 0, 8, 16))
    return [mask] * count


def image_and_mask(count: int) -> dict[str, list]:
    return {"image": pictures(count), "mask_image": masks(count)}


def image(count: int) -> dict[str, list]:
    return {"image": pictures(count)}


def control_image(count: int) -> dict[str, list]:
    return {"control_image": pictures(count)}


def image_and_control_image(count: int) -> dict[str, list]:
    return {**image(count), "control_image": other_pictures(count)}


def image_mask_and_control_image(count: int) -> dict[str, list]:
    return {**image_and_mask(count), "control_image": other_pictures(count)}


def image_mask_and_reference(count: int) -> dict[str, list]:
    return {**image_and_mask(count), "image_reference": other_pictures(count)}


def control_image_and_mask(count: int) -> dict[str, list]:
    return {"control_image": pictures(count), "control_mask": masks(count)}


def _flux(pipeline_class: type, channels: int = 16, **parts):
    parts = {**_without_image_encoder(flux()), **parts}
    if channels != 16:
        torch.manual_seed(0)
        parts["transformer"] = FluxTransformer2DModel.from_config(
            parts["transformer"].config, in_channels=channels, out_channels=16
        )
    return _quiet(pipeline_class(**parts))


def _sd3(pipeline_class: type, **parts):
    return _quiet(pipeline_class(**{**_without_image_encoder(sd3()), **parts}))


def _without_image_encoder(pipeline) -> dict:
    return {
        name: part for name, part in pipeline.components.items() if name not in ("image_encoder", "feature_extractor")
    }


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fill():
    """The transformer gets latents, the masked image and the mask: 16 + 16 + 2 x 2 x 4 channels."""
    return _flux(FluxFillPipeline, 16 + 16 + 16)


def control():
    return _flux(FluxControlPipeline, 32)


def inpaint():
    return _flux(FluxInpaintPipeline)


def img2img():
    return _flux(FluxImg2ImgPipeline)


def control_img2img():
    return _flux(FluxControlImg2ImgPipeline, 32)


def control_inpaint():
    return _flux(FluxControlInpaintPipeline, 32)


def _flux_controlnet(pipeline_class: type):
    torch.manual_seed(1)
    config = {**flux().transformer.config, "num_layers": 1, "num_single_layers": 1}
    net = FluxControlNetModel.from_config(config)
    wake(net)
    return _flux(pipeline_class, controlnet=net)


def controlnet():
    return _flux_controlnet(FluxControlNetPipeline)


def controlnet_img2img():
    return _flux_controlnet(FluxControlNetImg2ImgPipeline)


def controlnet_inpaint():
    return _flux_controlnet(FluxControlNetInpaintPipeline)


def kontext_inpaint():
    return _flux(FluxKontextInpaintPipeline)


def klein_inpaint():
    return _quiet(Flux2KleinInpaintPipeline(**flux2_klein.build().components))


def sd3_inpaint():
    """The pipeline insists on latents of 16 channels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_config(sd3().transformer.config, in_channels=16, out_channels=16)
    return _sd3(StableDiffusion3InpaintPipeline, transformer=transformer, vae=vae(16))


def sd3_img2img():
    return _sd3(StableDiffusion3Img2ImgPipeline)


def sd3_controlnet():
    torch.manual_seed(1)
    net = SD3ControlNetModel.from_config({**sd3().transformer.config, "num_layers": 1})
    wake(net)
    return _sd3(StableDiffusion3ControlNetPipeline, controlnet=net)


def sd3_controlnet_inpaint():
    """The ControlNet gets the latents of the masked image, and the mask as one more channel."""
    torch.manual_seed(1)
    config = {**sd3().transformer.config, "num_layers": 1, "extra_conditioning_channels": 1}
    net = SD3ControlNetModel.from_config(config)
    wake(net)
    return _sd3(StableDiffusion3ControlNetInpaintingPipeline, controlnet=net)


def sd3_pag():
    return _sd3(StableDiffusion3PAGPipeline, pag_applied_layers=["blocks.0"])


def sd3_pag_img2img():
    return _sd3(StableDiffusion3PAGImg2ImgPipeline, pag_applied_layers=["blocks.0"])


def chroma_img2img():
    return _quiet(ChromaImg2ImgPipeline(**chroma.build().components))


def chroma_inpaint():
    """The pipeline asks the config of the transformer for `guidance_embeds`, which the transformer does not have."""
    parts = chroma.build().components
    parts["transformer"].register_to_config(guidance_embeds=False)
    return _quiet(ChromaInpaintPipeline(**parts))


def cogview4_control():
    """The transformer gets latents and those of the control image: 4 + 4 channels."""
    parts = cogview4.build().components
    torch.manual_seed(0)
    parts["transformer"] = CogView4Transformer2DModel.from_config(parts["transformer"].config, in_channels=8)
    return _quiet(CogView4ControlPipeline(**parts))


def wake(controlnet: torch.nn.Module) -> None:
    """A new ControlNet has no effect: its last layers are zero."""
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


FAMILIES = {
    "FLUX.1 Fill": Family(fill, CALLS["fill"], image_and_mask),
    "FLUX.1 Control": Family(control, CALLS["control"], control_image),
    "FLUX.1 ControlNet": Family(controlnet, CALLS["controlnet"], control_image),
    "FLUX.1 Control image to image": Family(control_img2img, CALLS["img2img"], image_and_control_image),
    "FLUX.1 Control inpainting": Family(control_inpaint, CALLS["inpaint"], image_mask_and_control_image),
    "FLUX.1 ControlNet image to image": Family(controlnet_img2img, CALLS["img2img"], image_and_control_image),
    "FLUX.1 ControlNet inpainting": Family(controlnet_inpaint, CALLS["inpaint"], image_mask_and_control_image),
    "FLUX.1 Kontext inpainting": Family(kontext_inpaint, CALLS["kontext_inpaint"], image_and_mask),
    "FLUX.1 Kontext inpainting with a reference": Family(
        kontext_inpaint, CALLS["kontext_inpaint"], image_mask_and_reference
    ),
    "FLUX.2 Klein inpainting": Family(klein_inpaint, CALLS["klein_inpaint"], image_and_mask),
    "FLUX.2 Klein inpainting with a reference": Family(klein_inpaint, CALLS["klein_inpaint"], image_mask_and_reference),
    "FLUX.1 inpainting": Family(inpaint, CALLS["inpaint"], image_and_mask),
    "FLUX.1 image to image": Family(img2img, CALLS["img2img"], image),
    "Stable Diffusion 3 inpainting": Family(sd3_inpaint, CALLS["sd3_inpaint"], image_and_mask),
    "Stable Diffusion 3 image to image": Family(sd3_img2img, CALLS["sd3_img2img"], image),
    "Stable Diffusion 3 ControlNet": Family(sd3_controlnet, CALLS["sd3_controlnet"], control_image),
    "Stable Diffusion 3 ControlNet inpainting": Family(
        sd3_controlnet_inpaint, CALLS["sd3_controlnet"], control_image_and_mask
    ),
    "Stable Diffusion 3 perturbed attention": Family(sd3_pag, CALLS["sd3_pag"]),
    "Stable Diffusion 3 perturbed attention, image to image": Family(sd3_pag_img2img, CALLS["sd3_pag_img2img"], image),
    "Chroma image to image": Family(chroma_img2img, CALLS["chroma"], image),
    "Chroma inpainting": Family(chroma_inpaint, CALLS["chroma"], image_and_mask),
    "CogView 4 Control": Family(cogview4_control, cogview4.CALLS, control_image),
}
