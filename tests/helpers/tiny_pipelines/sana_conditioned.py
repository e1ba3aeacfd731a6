"""Sana with a ControlNet and with perturbed attention; Sana Sprint, which is no flow."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from . import sana
from .conditioned import control_image, image, wake
from .family import Family


CALLS_PAG = {**sana.CALLS, "adaptive": {**sana.CALLS["guided"], "pag_scale": 3.0, "pag_adaptive_scale": 0.002}}
SPRINT = {**sana.CALLS["plain"], "guidance_scale": 4.5}
# More than 2 steps go with no time between them.
CALLS_SPRINT = {"2 steps": {**SPRINT, "num_inference_steps": 2}, "plain": {**SPRINT, "intermediate_timesteps": None}}
CALLS_SPRINT_IMG2IMG = {"strength 0.5": {**SPRINT, "intermediate_timesteps": None, "strength": 0.5}}


def _with_parts_of_sana(pipeline_class: type, **parts):
    """32 x 32 images, latents of 4 x 4 with 4 channels."""
    pipeline = pipeline_class(**{**sana.build().components, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def controlnet() -> SanaControlNetPipeline:
    torch.manual_seed(1)
    net = SanaControlNetModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
    )
    wake(net)
    return _with_parts_of_sana(SanaControlNetPipeline, controlnet=net)


def pag() -> SanaPAGPipeline:
    return _with_parts_of_sana(
        SanaPAGPipeline, pag_applied_layers="transformer_blocks.0", scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )


def _sprint(pipeline_class: type):
    torch.manual_seed(0)
    config = sana.build().transformer.config
    return _with_parts_of_sana(
        pipeline_class,
        transformer=SanaTransformer2DModel.from_config(
            config, guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0
        ),
        scheduler=SCMScheduler(),
    )


def sprint() -> SanaSprintPipeline:
    return _sprint(SanaSprintPipeline)


def sprint_img2img() -> SanaSprintImg2ImgPipeline:
    return _sprint(SanaSprintImg2ImgPipeline)


FAMILIES = {
    "Sana ControlNet": Family(controlnet, sana.CALLS, control_image),
    "Sana perturbed attention": Family(pag, CALLS_PAG),
}
# Consistency models on arcs of a circle: a step takes the predicted image, and adds noise of its own to it.
REFUSED = {
    "Sana Sprint": Family(
        sprint,
        CALLS_SPRINT,
        reason="no flow but a consistency model: each step predicts x_0 and adds new noise",
        error="SCMScheduler is not a flow-matching",
    ),
    "Sana Sprint image to image": Family(
        sprint_img2img,
        CALLS_SPRINT_IMG2IMG,
        image,
        reason="no flow but a consistency model: each step predicts x_0 and adds new noise",
        error="SCMScheduler is not a flow-matching",
    ),
}
