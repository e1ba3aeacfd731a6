"""Kandinsky 5: latents with the channels last, into which it writes each step; from text, and from an image."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextModel, Qwen2VLImageProcessor

from . import clip_encoder
from .conditioned import image
from .family import Family
from .hunyuan_video import hunyuan_vae, long_clip_tokenizer
from .qwen_image import qwen_text_encoder, qwen_tokenizer
from .qwen_image_edit import Processor


SMALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 24}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {**SMALL, "guidance_scale": 5.0, "negative_prompt": "bad"},
}
# The pipeline normalises the first four frames of the latents by the others.
CALLS_IMAGE = {name: {**call, "num_frames": 17} for name, call in CALLS.items()}


def _build(pipeline_class: type, seed: int):
    torch.manual_seed(seed)
    tokenizer_2 = long_clip_tokenizer()
    pipeline = pipeline_class(
        transformer=Kandinsky5Transformer3DModel(
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
            visual_cond=True,
        ),
        vae=hunyuan_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_encoder(tokenizer_2, CLIPTextModel),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    for parameter in pipeline.transformer.parameters():
        # New modulations are zero, and so nothing but the latents themselves had a say.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    tokenizer = qwen_tokenizer(pipeline.prompt_template + " cat dog")
    pipeline.register_modules(
        text_encoder=qwen_text_encoder(tokenizer), tokenizer=Processor(Qwen2VLImageProcessor(), tokenizer)
    )
    # Three words of the template are two tokens each for the real tokenizer.
    pipeline.prompt_template_encode_start_idx -= 3
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(seed: int = 0) -> Kandinsky5T2VPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels, and those of no image: 4 + 4 + 1."""
    return _build(Kandinsky5T2VPipeline, seed)


def build_image(seed: int = 0) -> Kandinsky5I2VPipeline:
    """The first frame of the latents is the image, and the scheduler gets the others."""
    return _build(Kandinsky5I2VPipeline, seed)


# They pass offsets of the prompts' tokens, and keep some layers in float32.
FAMILIES = {
    "Kandinsky 5 (video)": Family(build, CALLS),
    "Kandinsky 5 image to video": Family(build_image, CALLS_IMAGE, image),
}
