"""Krea 2: hidden states of several layers of Qwen3-VL, and guidance that adds to the conditional prediction."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from .family import Family
from .qwen_image import PROMPT_TEMPLATE, qwen_tokenizer, qwen_vae


SIZE = {"height": 16, "width": 16, "max_sequence_length": 16}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 0.0},
    "guided": {**SIZE, "guidance_scale": 4.5, "negative_prompt": "bad"},
}


def qwen3_vl_config(tokenizer, layers: int = 3) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.5,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def build(seed: int = 0, distilled: bool = False) -> Krea2Pipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(PROMPT_TEMPLATE + "<|im_end|>\n<|im_start|>assistant\n")
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(qwen3_vl_config(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 3),
        is_distilled=distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_distilled() -> Krea2Pipeline:
    """The shift of its noise levels does not depend on the size of the images."""
    return build(distilled=True)


FAMILIES = {
    "Krea 2": Family(build, CALLS),
    "Krea 2 distilled": Family(build_distilled, {"plain": CALLS["plain"]}),
}
