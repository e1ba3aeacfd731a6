"""Kandinsky 6: one transformer denoises a video and its sound, each with a scheduler of its own; also from an image."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioVAE
from diffusers.models.autoencoders.mmaudio_vocoder import MMAudioVocoder
from diffusers.pipelines.kandinsky6.pipeline_kandinsky6_ti2va import _PROMPT_TEMPLATE
from PIL import Image
from transformers import CLIPTextModel, Qwen2VLImageProcessor

from . import clip_encoder, clip_tokenizer
from .conditioned import pictures
from .family import Family
from .qwen_image import qwen_text_encoder, qwen_tokenizer
from .qwen_image_edit import Processor


SHARED = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
CALLS = {
    "plain": {**SHARED, "guidance_scale": 1.0},
    "guided": {**SHARED, "guidance_scale": 5.0, "negative_prompt": "blurry"},
}
CALLS_SILENT = {name: {**call, "sample_audio": False} for name, call in CALLS.items()}


def image(count: int) -> dict[str, list[Image.Image]]:
    return {"image": pictures(count)}


def build(seed: int = 0) -> Kandinsky6TI2VAPipeline:
    """Videos of 5 frames of 16 x 16, latents of 2 frames of 4 x 4 with 4 channels; 11 latents of sound with 4 channels."""
    torch.manual_seed(seed)
    # The pipeline cuts the template's 129 tokens off. The tokenizer that knows all its words makes less of them.
    tokenizer = qwen_tokenizer(_PROMPT_TEMPLATE.replace("engineer", ""))
    tokenizer_2 = clip_tokenizer()
    tokenizer_2.model_max_length = 77
    pipeline = Kandinsky6TI2VAPipeline(
        transformer=Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=16,
            ff_dim=16,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 2, 2),
            in_audio_dim=4,
            out_audio_dim=4,
            visual_token_type_num_embeddings=2,
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=["HunyuanVideoDownBlock3D"] * 3,
            up_block_types=["HunyuanVideoUpBlock3D"] * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        text_encoder=qwen_text_encoder(tokenizer),
        tokenizer=Processor(Qwen2VLImageProcessor(), tokenizer),
        text_encoder_2=clip_encoder(tokenizer_2, CLIPTextModel),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        # 50 latents of sound in a second.
        audio_vae=MMAudioVAE(
            mel_bins=8,
            latent_channels=4,
            hidden_channels=8,
            layers_per_block=1,
            sample_rate=1600,
            n_fft=64,
            hop_length=16,
        ),
        vocoder=MMAudioVocoder(
            num_mels=8,
            upsample_initial_channel=8,
            upsample_rates=(4, 4),
            upsample_kernel_sizes=(8, 8),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Kandinsky 6 (video and audio)": Family(build, CALLS),
    "Kandinsky 6 with an image (video and audio)": Family(build, CALLS, image),
    "Kandinsky 6 without sound (video)": Family(build, CALLS_SILENT),
}
