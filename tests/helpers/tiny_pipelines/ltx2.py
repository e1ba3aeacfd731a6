"""LTX-2: one transformer denoises a video and its sound, each with a scheduler of its own."""

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from .family import Family
from .sana import gemma_encoder, gemma_tokenizer


SHARED = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
UNGUIDED = {
    **{f"{stream}{name}": 1.0 for stream in ("", "audio_") for name in ("guidance_scale", "modality_scale")},
    **{f"{stream}{name}": 0.0 for stream in ("", "audio_") for name in ("stg_scale", "guidance_rescale")},
}
CALLS = {
    "plain": {**SHARED, **UNGUIDED},
    "guided": {
        **SHARED,
        **UNGUIDED,
        "guidance_scale": 3.0,
        "audio_guidance_scale": 7.0,
        "guidance_rescale": 0.7,
        "negative_prompt": "blurry",
    },
    # The defaults of the call: four predictions in each step.
    "all guidance": {**SHARED, "spatio_temporal_guidance_blocks": [0], "negative_prompt": "blurry"},
}


def video_vae() -> AutoencoderKLLTX2Video:
    """4 x 4 latents per 32 x 32 pixels, 3 latent frames for 5: a factor of 8 in space and of 2 in time."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(16,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(True,),
        upsample_factor=(1,),
        decoder_causal=False,
    )
    vae.latents_mean = torch.tensor([0.1, -0.1, 0.2, -0.2])
    vae.latents_std = torch.tensor([1.0, 1.5, 2.0, 0.5])
    return vae


def audio_vae() -> AutoencoderKLLTX2Audio:
    """Latents of 4 channels with 2 of the 8 mel bins, 25 in a second."""
    vae = AutoencoderKLLTX2Audio(
        base_channels=8,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        resolution=32,
        latent_channels=4,
        mel_bins=8,
    )
    vae.latents_mean = torch.linspace(-0.2, 0.2, 8)
    vae.latents_std = torch.linspace(0.5, 1.5, 8)
    return vae


def components(**transformer_options) -> dict:
    tokenizer = gemma_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        "vae": video_vae(),
        "audio_vae": audio_vae(),
        "text_encoder": gemma_encoder(tokenizer),
        "tokenizer": tokenizer,
        "connectors": LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=3,  # the embeddings and the two layers
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=8,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=8,
            connector_rope_base_seq_len=16,
            rope_type="split",
        ),
        "transformer": LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            vae_scale_factors=(2, 8, 8),
            base_height=32,
            base_width=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            caption_channels=16,
            rope_type="split",
            **transformer_options,
        ),
        "vocoder": LTX2Vocoder(
            in_channels=2 * 8,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
        ),
    }


def build(seed: int = 0) -> LTX2Pipeline:
    """Videos of 5 frames of 32 x 32, latents of 48 tokens of 4 channels; 5 latents of sound with 8 channels."""
    torch.manual_seed(seed)
    pipeline = LTX2Pipeline(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "LTX-2 (video and audio)": Family(build, CALLS),
}
