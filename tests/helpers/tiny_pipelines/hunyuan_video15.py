"""HunyuanVideo 1.5: its guidance is a component of the pipeline; from text, and from an image whose size it takes."""

import inspect

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import t5_encoder
from .conditioned import image
from .family import Family
from .qwen_image import qwen_tokenizer


CALLS = {"guided": {"height": 16, "width": 16, "num_frames": 5, "negative_prompt": "bad"}}
CALLS_DISTILLED = {"plain": {"height": 16, "width": 16, "num_frames": 5}}
# The pipeline takes the size of the image.
CALLS_IMAGE = {"guided": {"num_frames": 5, "negative_prompt": "bad"}}
CALLS_IMAGE_DISTILLED = {"plain": {"num_frames": 5}}

SYSTEM_MESSAGE = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,  # the pipelines skip the last two
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2_5_VLTextModel(config)


def components(guidance_scale: float = 6.0, **transformer) -> dict:
    tokenizer = qwen_tokenizer(SYSTEM_MESSAGE + "\nsystem\nuser\n")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer_2 = ByT5Tokenizer()
    return {
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=1.0,
            text_embed_dim=16,
            text_embed_2_dim=32,
            image_embed_dim=16,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            **transformer,
        ),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": t5_encoder(tokenizer_2),
        "tokenizer_2": tokenizer_2,
        "guider": ClassifierFreeGuidance(guidance_scale=guidance_scale),
    }


def _ready(pipeline):
    # Of 1000, 256 and 729 tokens most would be padding.
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length, pipeline.vision_num_semantic_tokens = 24, 8, 4
    # The attention mask of the VAE fits no batch of several videos.
    pipeline.vae.enable_slicing()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(seed: int = 0, guidance_scale: float = 6.0) -> HunyuanVideo15Pipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels, and those of no image: 4 + 4 + 1."""
    torch.manual_seed(seed)
    return _ready(HunyuanVideo15Pipeline(**components(guidance_scale)))


def build_image(
    seed: int = 0, guidance_scale: float = 6.0, use_meanflow: bool = False
) -> HunyuanVideo15ImageToVideoPipeline:
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        image_encoder=SiglipVisionModel(config),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        **components(guidance_scale, use_meanflow=use_meanflow),
    )
    return _ready(pipeline)


def build_distilled() -> HunyuanVideo15Pipeline:
    return build(guidance_scale=1.0)


def build_image_distilled() -> HunyuanVideo15ImageToVideoPipeline:
    """The transformer also gets the noise level that the step leads to."""
    return build_image(guidance_scale=1.0, use_meanflow=True)


FAMILIES = {
    "HunyuanVideo 1.5": Family(build, CALLS),
    "HunyuanVideo 1.5, guidance-distilled": Family(build_distilled, CALLS_DISTILLED),
    "HunyuanVideo 1.5 image to video": Family(build_image, CALLS_IMAGE, image),
    "HunyuanVideo 1.5 image to video, step-distilled": Family(build_image_distilled, CALLS_IMAGE_DISTILLED, image),
}
