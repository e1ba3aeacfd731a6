"""QwenImagePipeline: true guidance whose result is scaled to the norm of the conditional prediction."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from .family import Family


CALLS = {
    "plain": {"height": 16, "width": 16, "true_cfg_scale": 1.0},
    "guided": {"height": 16, "width": 16, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
}

PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)


def qwen_tokenizer(text: str) -> Qwen2Tokenizer:
    """Each word of `text` is one token, as in the real tokenizer: pipelines cut their template off by tokens."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(extra_special_tokens=special)
    return tokenizer.train_new_from_iterator([text], vocab_size=1000, show_progress=False)


def qwen_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "initializer_range": 0.5,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.5, 2.0, 1.0, 0.5],
    )


class LargePixels(AutoencoderKLQwenImage):
    """
    For pipelines whose images are large whatever they are asked for: each pixel of its own is a square of equal pixels, whose
    side is `size`, a power of 2.
    """

    def __init__(self, size: int = 64, input_channels: int = 3, z_dim: int = 4):
        super().__init__(
            base_dim=4,
            z_dim=z_dim,
            input_channels=input_channels,
            dim_mult=[1, 1],
            num_res_blocks=0,
            # Read by the pipelines: images are 2 ** len() times as large as latents.
            temperal_downsample=[False] * size.bit_length(),
            latents_mean=[0.1, -0.1, 0.2, 0.0] * (z_dim // 4),
            latents_std=[1.5, 2.0, 1.0, 0.5] * (z_dim // 4),
        )
        self.size = size

    def encode(self, x, return_dict=True):
        return super().encode(x[..., :: self.size, :: self.size], return_dict=return_dict)

    def decode(self, z, return_dict=True):
        image = super().decode(z, return_dict=False)[0]
        image = image.repeat_interleave(self.size, dim=-1).repeat_interleave(self.size, dim=-2)
        return DecoderOutput(sample=image) if return_dict else (image,)


def qwen_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )


def build(seed: int = 0) -> QwenImagePipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(PROMPT_TEMPLATE)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=qwen_vae(),
        text_encoder=qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=qwen_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Qwen-Image": Family(build, CALLS),
}
