"""Bria 3.2 with T5 prompts, and Bria Fibo: each layer of its transformer gets a layer of SmolLM3."""

import json

import torch
from diffusers import (
    BriaFiboEditPipeline,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from . import t5_encoder, t5_tokenizer, vae
from .conditioned import image, pictures
from .family import PROMPTS, Family
from .hidream import llama_tokenizer
from .wan import wan_vae


SIZE = {"height": 16, "width": 16, "max_sequence_length": 24}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 5.0, "negative_prompt": "bad"},
    # The clipped entries of a velocity have no gradient.
    "clipped": {**SIZE, "guidance_scale": 5.0, "clip_value": 0.5},
}
SIZE_FIBO = {"height": 64, "width": 64, "max_sequence_length": 32}
CALLS_FIBO = {
    "plain": {**SIZE_FIBO, "guidance_scale": 1.0},
    "guided": {**SIZE_FIBO, "guidance_scale": 5.0},
}
# The pipeline insists on JSON.
EDITS = [json.dumps({"edit_instruction": prompt}) for prompt in PROMPTS]
CALLS_PATCHED = {"guided": {**CALLS_FIBO["guided"], "negative_prompt": "bad", "do_patching": True}}


def image_and_mask(count: int) -> dict[str, list]:
    """The right half is to be painted."""
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    return {"image": pictures(count), "mask": [mask] * count}


def build(seed: int = 0) -> BriaPipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 2, 2],
    )
    pipeline = BriaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def smollm3_encoder() -> SmolLM3ForCausalLM:
    """The pipelines have the number of one token in their code: the vocabulary is as large as the real one."""
    config = SmolLM3Config(
        vocab_size=128001,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return SmolLM3ForCausalLM(config)


def fibo_components(in_channels: int = 4) -> dict:
    tokenizer = llama_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    transformer = BriaFiboTransformer2DModel(
        in_channels=in_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 2, 2],
        text_encoder_dim=16,
    )
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": wan_vae(),
        "text_encoder": smollm3_encoder(),
        "tokenizer": tokenizer,
    }


def build_fibo(seed: int = 0, in_channels: int = 4) -> BriaFiboPipeline:
    """
    16 x 16 images, latents of 4 x 4 with 4 channels: the pipeline is asked for 64 x 64 and assumes a VAE that reduces by 16.
    """
    torch.manual_seed(seed)
    pipeline = BriaFiboPipeline(**fibo_components(in_channels))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_fibo_patched() -> BriaFiboPipeline:
    """Its transformer gets patches of 2 x 2 latents."""
    return build_fibo(in_channels=16)


def build_fibo_edit(seed: int = 0) -> BriaFiboEditPipeline:
    """Each image that is given is scaled to a multiple of 16: 4 x 4 latents for 16 x 16 pixels."""
    torch.manual_seed(seed)
    pipeline = BriaFiboEditPipeline(**fibo_components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Bria 3.2": Family(build, CALLS),
    "Bria Fibo": Family(build_fibo, CALLS_FIBO),
    "Bria Fibo in patches": Family(build_fibo_patched, CALLS_PATCHED),
    "Bria Fibo Edit": Family(build_fibo_edit, CALLS_FIBO, image, EDITS),
    "Bria Fibo Edit with a mask": Family(build_fibo_edit, CALLS_FIBO, image_and_mask, EDITS),
}
