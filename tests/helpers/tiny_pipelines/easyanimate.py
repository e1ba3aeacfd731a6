"""EasyAnimate: prompts by Qwen2-VL and a VAE of its own; from text, with a control video, and filling in a video."""

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimateControlPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from .family import Family
from .hunyuan_video15 import CHAT_TEMPLATE, text_encoder
from .qwen_image import qwen_tokenizer


SMALL = {"height": 16, "width": 16, "num_frames": 5}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {**SMALL, "guidance_scale": 5.0, "negative_prompt": "bad"},
    "rescaled": {**SMALL, "guidance_scale": 5.0, "negative_prompt": "bad", "guidance_rescale": 0.7},
}
# 7 steps, of which the last 4 are taken.
CALLS_INPAINT = {**CALLS, "strength 0.5": {**CALLS["plain"], "strength": 0.5, "num_inference_steps": 8}}


def videos(count: int) -> torch.Tensor:
    """Videos of 5 frames of 16 x 16, shape [count, 3, 5, 16, 16], in [0, 1]."""
    frames = torch.linspace(0, 1, 5)[:, None, None].expand(5, 16, 16)
    return torch.stack([torch.stack([frames, frames.flip(0), torch.full_like(frames, n / 4)]) for n in range(count)])


def control_video(count: int) -> dict:
    return {"control_video": list(videos(count)[:, None])}


def video_and_mask(count: int) -> dict:
    """The right half is to be painted."""
    mask = torch.zeros(1, 1, 5, 16, 16)
    mask[..., 8:] = 255
    return {"video": list(videos(count)[:, None]), "mask_video": [mask] * count}


def _build(pipeline_class: type, in_channels: int, seed: int):
    torch.manual_seed(seed)
    # What the chat template adds to a prompt of one word.
    tokenizer = qwen_tokenizer("user\nassistant\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    pipeline = pipeline_class(
        vae=AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=[8, 8, 8],
            down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
            up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"],
            layers_per_block=1,
            norm_num_groups=4,
        ),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=in_channels,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=2,
            time_embed_dim=16,
            text_embed_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(seed: int = 0) -> EasyAnimatePipeline:
    """Videos of 5 frames of 16 x 16, latents of 3 frames of 4 x 4 with 4 channels."""
    return _build(EasyAnimatePipeline, 4, seed)


def build_control(seed: int = 0) -> EasyAnimateControlPipeline:
    """The transformer gets latents, those of the control video and those of a reference: 4 + 4 + 4 channels."""
    return _build(EasyAnimateControlPipeline, 12, seed)


def build_inpaint(seed: int = 0) -> EasyAnimateInpaintPipeline:
    """The transformer gets latents, a mask and the masked video: 4 + 1 + 4 channels."""
    pipeline = _build(EasyAnimateInpaintPipeline, 9, seed)
    pipeline.vae.register_to_config(cache_mag_vae=True)  # the class has no such argument, and the pipeline asks for it
    # With it on, the pipeline takes one generator for all of a batch.
    pipeline.transformer.register_to_config(add_noise_in_inpaint_model=False)
    return pipeline


FAMILIES = {
    "EasyAnimate (video)": Family(build, CALLS),
    # Videos are one tensor for all samples of a call, which the pipeline does not repeat.
    "EasyAnimate video inpainting": Family(build_inpaint, CALLS_INPAINT, video_and_mask),
}
REFUSED = {
    # Its call passes an argument to `encode_prompt` that it does not take.
    "EasyAnimate control video": Family(
        build_control,
        CALLS,
        control_video,
        reason="diffusers: its call passes `text_encoder_index` to its own `encode_prompt`, which does not take it",
        error="text_encoder_index",
    ),
}
