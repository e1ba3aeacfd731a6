"""Motif-Video: prompts by the encoder of T5Gemma 2, guidance as a component; from text, and from an image."""

import torch
from diffusers import (
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from transformers import SiglipImageProcessor, T5Gemma2Encoder, T5Gemma2EncoderConfig, T5Tokenizer

from . import t5_tokenizer
from .conditioned import image
from .family import Family


SMALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
CALLS = {"guided": {**SMALL, "negative_prompt": "bad"}}
CALLS_UNGUIDED = {"plain": SMALL}


def text_encoder(tokenizer: T5Tokenizer) -> T5Gemma2Encoder:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "dropout_rate": 0.0,
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def _build(pipeline_class: type, seed: int, guidance_scale: float):
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    pipeline = pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.1, 0.2, -0.2],
            latents_std=[1.0, 1.5, 2.0, 0.5],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            text_embed_dim=16,
            image_embed_dim=16,
            rope_axes_dim=(2, 2, 4),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        guider=ClassifierFreeGuidance(guidance_scale=guidance_scale),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(seed: int = 0) -> MotifVideoPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels, and those of no image: 4 + 4 + 1."""
    return _build(MotifVideoPipeline, seed, 5.0)


def build_image(seed: int = 0) -> MotifVideoImage2VideoPipeline:
    return _build(MotifVideoImage2VideoPipeline, seed, 5.0)


def build_unguided(seed: int = 0) -> MotifVideoPipeline:
    return _build(MotifVideoPipeline, seed, 1.0)


FAMILIES = {
    "Motif-Video": Family(build, CALLS),
    "Motif-Video without guidance": Family(build_unguided, CALLS_UNGUIDED),
    # A call makes one video: for several, the pipeline repeats the mask twice, or the image not at all.
    "Motif-Video image to video": Family(build_image, CALLS, image),
}
