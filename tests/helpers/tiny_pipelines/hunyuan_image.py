"""HunyuanImage 2.1: guidance is a component of the pipeline; the distilled model also knows where its step ends."""

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from .conditioned import image
from .family import Family
from .qwen_image import PROMPT_TEMPLATE, qwen_text_encoder, qwen_tokenizer


SIZE = {"height": 16, "width": 16}
# The second text encoder reads what is quoted.
CALLS = {"guided": {**SIZE, "negative_prompt": 'the word "bad"'}}
CALLS_DISTILLED = {"plain": {**SIZE, "distilled_guidance_scale": 3.25}}

PROMPT_TEMPLATE_REFINER = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\n"
)


def byt5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config)


def build(seed: int = 0, distilled: bool = False, guider=None) -> HunyuanImagePipeline:
    """16 x 16 images, latents of 4 x 4 with 4 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(PROMPT_TEMPLATE)
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=16,
        scaling_factor=0.75,
    )
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=24,
        rope_axes_dim=(4, 4),
        guidance_embeds=distilled,
        use_meanflow=distilled,
    )
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0 if distilled else 5.0),
        vae=vae,
        text_encoder=qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=byt5_encoder(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=transformer,
        guider=guider,
    )
    pipeline.tokenizer_max_length = 8
    pipeline.tokenizer_2_max_length = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_guided() -> HunyuanImagePipeline:
    """The released guidance without its momentum; from step 2 on it projects."""
    return build(
        guider=AdaptiveProjectedMixGuidance(
            adaptive_projected_guidance_momentum=None, adaptive_projected_guidance_start_step=2
        )
    )


def build_distilled() -> HunyuanImagePipeline:
    return build(distilled=True)


def build_refiner(seed: int = 0) -> HunyuanImageRefinerPipeline:
    """16 x 16 images, latents of one frame of 4 x 4 with 8 channels, beside those of a noisy image to be refined."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(PROMPT_TEMPLATE_REFINER)
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    transformer = HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=16,
        rope_axes_dim=(4, 2, 2),
        guidance_embeds=True,
    )
    pipeline = HunyuanImageRefinerPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=vae,
        text_encoder=qwen_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.tokenizer_max_length = 32
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "HunyuanImage 2.1": Family(build_guided, CALLS),
    "HunyuanImage 2.1 distilled": Family(build_distilled, CALLS_DISTILLED),
    "HunyuanImage 2.1 refiner": Family(build_refiner, CALLS_DISTILLED, image),
}
