"""HunyuanVideo: a Llama that describes the video and CLIP; from text, from an image, and SkyReels, which continues an image."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from tokenizers import processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from . import clip_encoder, clip_tokenizer
from .conditioned import image
from .family import Family


SMALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
CALLS = {
    "plain": {**SMALL, "guidance_scale": 6.0},  # an input of the transformer (distilled)
    "guided": {**SMALL, "guidance_scale": 6.0, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
}
# The four frames of the image itself are cut off. The pipeline looks for the end of its template behind the prompt.
IMAGE = {**SMALL, "num_frames": 9, "max_sequence_length": 48}
CALLS_IMAGE = {"plain": {**IMAGE, "guidance_scale": 1.0}}
CALLS_IMAGE_GUIDED = {"guided": {**IMAGE, "true_cfg_scale": 3.0, "negative_prompt": "bad"}}
CALLS_REPLACED = {"plain": {**IMAGE, "num_frames": 5, "guidance_scale": 6.0}}
CALLS_SKYREELS = {
    "plain": {**SMALL, "true_cfg_scale": 1.0},
    "guided": {**SMALL, "true_cfg_scale": 6.0, "negative_prompt": "bad"},
}
# A section has two frames of latents; the frame of the image is added in the end.
FRAMEPACK = {**SMALL, "latent_window_size": 2}
CALLS_FRAMEPACK = {
    "plain": {**FRAMEPACK, "guidance_scale": 6.0},
    "guided": {**FRAMEPACK, "guidance_scale": 6.0, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
    "forwards": {**FRAMEPACK, "guidance_scale": 6.0, "sampling_type": "vanilla"},
}
CALLS_SECTIONS = {"two sections": {**FRAMEPACK, "num_frames": 9, "guidance_scale": 6.0}}


def llama_tokenizer(template: str) -> Qwen2Tokenizer:
    """Each word of `template` is one token, as in the real tokenizer: the pipelines cut their template off by tokens."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<pad>"]
    tokenizer = Qwen2Tokenizer(extra_special_tokens=special, pad_token="<pad>", bos_token="<|begin_of_text|>")
    tokenizer = tokenizer.train_new_from_iterator([template], vocab_size=1000, show_progress=False)
    bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    tokenizer.padding_side = "right"
    return tokenizer


def llama_config(tokenizer: Qwen2Tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,  # the pipelines skip the last two
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": None,
    }


def long_clip_tokenizer() -> CLIPTokenizer:
    """With the length of CLIP's own, which the pipelines insist on."""
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=["HunyuanVideoDownBlock3D"] * 3,
        up_block_types=["HunyuanVideoUpBlock3D"] * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (2, 2, 4),
}


def components(template: str = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE["template"], **transformer) -> dict:
    tokenizer, tokenizer_2 = llama_tokenizer(template), long_clip_tokenizer()
    return {
        "text_encoder": LlamaModel(LlamaConfig(**llama_config(tokenizer))),
        "tokenizer": tokenizer,
        "transformer": HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **transformer}),
        "vae": hunyuan_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": clip_encoder(tokenizer_2, CLIPTextModel),
        "tokenizer_2": tokenizer_2,
    }


def build(seed: int = 0) -> HunyuanVideoPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels."""
    torch.manual_seed(seed)
    pipeline = HunyuanVideoPipeline(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def llava(tokenizer: Qwen2Tokenizer) -> LlavaForConditionalGeneration:
    """Sees an image as 24 x 24 tokens, which is what the pipeline makes room for."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 24,
        "patch_size": 1,
        "initializer_range": 0.5,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **llama_config(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)


def build_image(seed: int = 0, **transformer) -> HunyuanVideoImageToVideoPipeline:
    """The transformer gets latents, the image's latents and a mask: 4 + 4 + 1 channels."""
    torch.manual_seed(seed)
    transformer = {"in_channels": 9, "image_condition_type": "latent_concat", "guidance_embeds": False, **transformer}
    parts = components(pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE["template"], **transformer)
    parts["text_encoder"] = llava(parts["tokenizer"])
    parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    pipeline = HunyuanVideoImageToVideoPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_replaced(seed: int = 0) -> HunyuanVideoImageToVideoPipeline:
    """The first frame of the latents is the image, and the scheduler gets the others."""
    return build_image(seed, in_channels=4, image_condition_type="token_replace", guidance_embeds=True)


def build_skyreels(seed: int = 0) -> HunyuanSkyreelsImageToVideoPipeline:
    """The transformer gets latents and the image's latents: 4 + 4 channels."""
    torch.manual_seed(seed)
    pipeline = HunyuanSkyreelsImageToVideoPipeline(**components(in_channels=8))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_framepack(seed: int = 0) -> HunyuanVideoFramepackPipeline:
    """The transformer also gets the image and the sections before, in three resolutions."""
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    transformer = HunyuanVideoFramepackTransformer3DModel(
        **TRANSFORMER, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )
    pipeline = HunyuanVideoFramepackPipeline(
        **{**components(), "transformer": transformer},
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
    )
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "HunyuanVideo": Family(build, CALLS),
    "SkyReels image to video": Family(build_skyreels, CALLS_SKYREELS, image),
    "FramePack video of one section": Family(build_framepack, CALLS_FRAMEPACK, image),
    "HunyuanVideo image to video": Family(build_image, CALLS_IMAGE, image),
    "HunyuanVideo image to video, first frame replaced": Family(build_replaced, CALLS_REPLACED, image),
    # The pipeline has one black image for all negative prompts: such a call makes one video.
    "HunyuanVideo image to video, guided": Family(build_image, CALLS_IMAGE_GUIDED, image),
}
REFUSED = {
    # A sampling loop for each section.
    "FramePack video": Family(
        build_framepack,
        CALLS_SECTIONS,
        image,
        reason="a video of several sections is sampled section by section; one section is exact",
        error="more steps than",
    ),
}
