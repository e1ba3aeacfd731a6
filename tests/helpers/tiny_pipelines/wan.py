"""Wan: text to video with UMT5 prompts; 2.1 has one transformer, 2.2 another one for the low noise levels."""

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from . import t5_tokenizer
from .aura_flow import umt5_encoder
from .family import Family


SHARED = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
CALLS = {
    "plain": {**SHARED, "guidance_scale": 1.0},
    "guided": {**SHARED, "guidance_scale": 5.0, "negative_prompt": "blurry"},
}
CALLS_TWO_TRANSFORMERS = {
    **CALLS,
    "two_scales": {**CALLS["guided"], "guidance_scale_2": 3.0},
}


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.1, 0.2, -0.2],
        latents_std=[1.0, 1.5, 2.0, 0.5],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def build(seed: int = 0, **kwargs) -> WanPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5_encoder(tokenizer),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(),
        **kwargs,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_two_transformers(seed: int = 0) -> WanPipeline:
    """Wan 2.2: of 4 steps the first is the first transformer's, the other three are the second one's."""
    torch.manual_seed(seed + 1)
    return build(seed, transformer_2=transformer(), boundary_ratio=0.875)


def usual_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


FAMILIES = {
    "Wan 2.2 A14B (video)": Family(build_two_transformers, CALLS_TWO_TRANSFORMERS),
    "Wan (video)": Family(build, CALLS),
}
