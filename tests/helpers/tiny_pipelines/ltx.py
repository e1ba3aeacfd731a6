"""LTX-Video: packed latents, noise levels that shift with the length; from text, and from an image, its first frame."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXI2VLongMultiPromptPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from . import t5_encoder, t5_tokenizer
from .conditioned import image
from .family import Family


SMALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 1.0},
    "guided": {**SMALL, "guidance_scale": 3.0, "negative_prompt": "bad"},
    "rescaled": {**SMALL, "guidance_scale": 3.0, "negative_prompt": "bad", "guidance_rescale": 0.7},
}
# The decoder takes a last step of its own.
DECODED = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
CALLS_DENOISING_DECODER = {name: {**call, **DECODED} for name, call in CALLS.items() if name != "rescaled"}


def ltx_vae(timestep_conditioning: bool = False) -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
        patch_size=1,
    )
    vae.latents_mean.copy_(torch.tensor([0.1, -0.1, 0.2, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 2.0, 1.0, 0.5]))
    return vae


def components(**vae) -> dict:
    tokenizer = t5_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        "vae": ltx_vae(**vae),
        "text_encoder": t5_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=32,
        ),
    }


def _build(pipeline_class: type, seed: int, **vae):
    torch.manual_seed(seed)
    pipeline = pipeline_class(**components(**vae))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(seed: int = 0) -> LTXPipeline:
    """Videos of 9 frames of 32 x 32, latents of 2 frames of 4 x 4, packed into 32 tokens of 4 channels."""
    return _build(LTXPipeline, seed)


def build_denoising_decoder(seed: int = 0) -> LTXPipeline:
    return _build(LTXPipeline, seed, timestep_conditioning=True)


def build_image(seed: int = 0) -> LTXImageToVideoPipeline:
    """The transformer gets a timestep for each token, and the scheduler all frames but the first."""
    return _build(LTXImageToVideoPipeline, seed)


def build_condition(seed: int = 0) -> LTXConditionPipeline:
    """The transformer and the scheduler get a timestep for each token, and the image gets new noise in each step."""
    pipeline = _build(LTXConditionPipeline, seed, timestep_conditioning=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipeline


def build_long(seed: int = 0) -> LTXI2VLongMultiPromptPipeline:
    pipeline = _build(LTXI2VLongMultiPromptPipeline, seed, timestep_conditioning=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    return pipeline


FAMILIES = {
    "LTX-Video": Family(build, CALLS),
    "LTX-Video with a denoising decoder": Family(build_denoising_decoder, CALLS_DENOISING_DECODER),
    "LTX-Video image to video": Family(build_image, CALLS, image),
    "LTX-Video with conditions": Family(build_condition, CALLS_DENOISING_DECODER, image),
}
REFUSED = {
    # One video per call, window by window, from noise that the loop draws itself.
    "LTX-Video long": Family(
        build_long,
        {"plain": {**SMALL, "guidance_scale": 1.0}},
        reason="one video per call, window by window, from noise that the loop draws itself",
        error="in 3 steps of a schedule of 4",
    ),
}
