"""QwenImage21Pipeline: text and images in one sequence, transparent images, and keys and values that are kept."""

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from .conditioned import image
from .family import Family
from .qwen_image import qwen_tokenizer


SHARED = {"height": 64, "width": 64, "output_resolution": 32}
CALLS = {
    "plain": SHARED,
    "guided": {**SHARED, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


class Processor(Qwen3VLProcessor):
    """Without a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def processor() -> Processor:
    tokenizer = qwen_tokenizer("<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n")
    image_processor = Qwen2VLImageProcessor(
        size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32}, patch_size=16, merge_size=2
    )
    return Processor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def text_encoder(tokenizer) -> Qwen3VLForConditionalGeneration:
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.5,
    }
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in [
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        ]
    }
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text_config, vision_config=vision_config, **ids))


def build(seed: int = 0) -> QwenImage21Pipeline:
    """64 x 64 images, latents of 4 x 4 tokens of 8 channels, and 2 x 2 tokens of the image that it is given."""
    torch.manual_seed(seed)
    parts = processor()
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1, -0.1, 0.2, 0.0] * 2,
        latents_std=[1.5, 2.0, 1.0, 0.5] * 2,
    )
    transformer = QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    # So that the layers have a say beside the residual stream.
    torch.nn.init.normal_(transformer.modulation[1].weight, std=0.5)
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=vae,
        text_encoder=text_encoder(parts.tokenizer),
        processor=parts,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Qwen-Image 2.1": Family(build, CALLS),
    "Qwen-Image 2.1 with an image": Family(build, CALLS, image),
}
