"""Sana: Gemma 2 prompts, linear attention, deep compression autoencoder."""

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from . import LETTERS
from .family import Family


CALLS = {
    "plain": {
        "height": 32,
        "width": 32,
        "guidance_scale": 1.0,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
    "guided": {
        "height": 32,
        "width": 32,
        "guidance_scale": 4.5,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
        "complex_human_instruction": ["be vivid", "prompt "],
        "use_resolution_binning": False,
    },
}


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer({token: i for i, token in enumerate(tokens)})


def gemma_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2Model(config)


def build(seed: int = 0) -> SanaPipeline:
    """32 x 32 images, latents of 4 x 4 with 4 channels."""
    torch.manual_seed(seed)
    tokenizer = gemma_tokenizer()
    blocks = {
        "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8, 8, 16),
        "layers_per_block": (1, 1, 1, 1),
        "qkv_multiscales": ((), (), (), (5,)),
    }
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        scaling_factor=0.5,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()},
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
    )
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def usual_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


FAMILIES = {
    "Sana": Family(build, CALLS),
}
