"""
Writes the configs of published pipelines, without weights, for plans on a machine that cannot download them:

    python benchmarks/published_configs.py configs
    trl-fdfo plan --gpu h100 --config sd35_80gb \
        --model configs/stabilityai/stable-diffusion-3.5-medium \
        --dataset_name trl_fdfo/training/prompts.txt --dataset_prompt_column prompt

The modules have the published sizes. The tokenizers are tiny, with the published longest lengths: a plan needs numbers of
tokens, not their names.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import tiny_pipelines
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_pipelines.qwen_image import PROMPT_TEMPLATE, qwen_tokenizer
from tiny_pipelines.sana import gemma_tokenizer
from transformers import (
    CLIPTextConfig,
    Gemma3Config,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    T5Config,
    UMT5Config,
)

from benchmarks.gpu_sd35 import MEDIUM


CLIP_L, CLIP_G = MEDIUM.clips
# A VAE of 16 latent channels and a factor of 8, as Stable Diffusion 3 and FLUX.1 have it.
VAE = {
    **MEDIUM.vae,
    "down_block_types": 4 * ["DownEncoderBlock2D"],
    "up_block_types": 4 * ["UpDecoderBlock2D"],
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Qwen2.5-VL-7B-Instruct.
QWEN_VL = Qwen2_5_VLConfig(
    text_config={
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    },
    vision_config={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
)
# Gemma-3-12b-it.
GEMMA_3 = Gemma3Config(
    text_config={
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    vision_config={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
)


def clip_config(numbers: dict[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(**numbers, projection_dim=numbers["hidden_size"])


def clip_tokenizer() -> PreTrainedTokenizerBase:
    return _up_to(tiny_pipelines.clip_tokenizer(), 77)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    return _up_to(tiny_pipelines.t5_tokenizer(), 512)


def _up_to(tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedTokenizerBase:
    tokenizer.model_max_length = length
    return tokenizer


T5_XXL = T5Config(**MEDIUM.t5, feed_forward_proj="gated-gelu", dropout_rate=0.0)
UMT5_XXL = UMT5Config(**{**MEDIUM.t5, "vocab_size": 256384}, feed_forward_proj="gated-gelu", dropout_rate=0.0)
# Of a pipeline itself: from which noise level on Wan 2.2 calls its other transformer.
OPTIONS = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": {"boundary_ratio": 0.875}}


def flux(
    guidance_embeds: bool, scheduler: FlowMatchEulerDiscreteScheduler
) -> tuple[str, dict[str, tuple[str, str, Any]]]:
    """FLUX.1: dev gets its guidance as an embedding, schnell has none."""
    return (
        "FluxPipeline",
        {
            "transformer": ("diffusers", "FluxTransformer2DModel", {"guidance_embeds": guidance_embeds}),
            "vae": ("diffusers", "AutoencoderKL", {**VAE, "shift_factor": 0.1159, "scaling_factor": 0.3611}),
            "text_encoder": ("transformers", "CLIPTextModel", clip_config(CLIP_L)),
            "text_encoder_2": ("transformers", "T5EncoderModel", T5_XXL),
            "tokenizer": ("transformers", "CLIPTokenizer", clip_tokenizer()),
            "tokenizer_2": ("transformers", "T5Tokenizer", t5_tokenizer()),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler", scheduler),
        },
    )


# By model: class of the pipeline, and of each part the class with its config, its tokenizer or its scheduler. What is not
# said is the default of the class, which is the published number.
PIPELINES: dict[str, tuple[str, dict[str, tuple[str, str, Any]]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("diffusers", "SD3Transformer2DModel", MEDIUM.transformer),
            "vae": ("diffusers", "AutoencoderKL", {**VAE, "shift_factor": 0.0609, "scaling_factor": 1.5305}),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection", clip_config(CLIP_L)),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", clip_config(CLIP_G)),
            "text_encoder_3": ("transformers", "T5EncoderModel", T5_XXL),
            "tokenizer": ("transformers", "CLIPTokenizer", clip_tokenizer()),
            "tokenizer_2": ("transformers", "CLIPTokenizer", clip_tokenizer()),
            "tokenizer_3": ("transformers", "T5Tokenizer", t5_tokenizer()),
            "scheduler": (
                "diffusers",
                "FlowMatchEulerDiscreteScheduler",
                FlowMatchEulerDiscreteScheduler(shift=3.0),
            ),
        },
    ),
    "black-forest-labs/FLUX.1-dev": flux(True, FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)),
    "black-forest-labs/FLUX.1-schnell": flux(False, FlowMatchEulerDiscreteScheduler()),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (
        "WanPipeline",
        {
            "transformer": ("diffusers", "WanTransformer3DModel", {}),
            "transformer_2": ("diffusers", "WanTransformer3DModel", {}),
            "vae": ("diffusers", "AutoencoderKLWan", {}),
            "text_encoder": ("transformers", "UMT5EncoderModel", UMT5_XXL),
            "tokenizer": ("transformers", "T5Tokenizer", t5_tokenizer()),
            "scheduler": (
                "diffusers",
                "UniPCMultistepScheduler",
                UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            ),
        },
    ),
    "Lightricks/LTX-2": (
        "LTX2Pipeline",
        {
            "transformer": ("diffusers", "LTX2VideoTransformer3DModel", {"rope_type": "split"}),
            "connectors": ("ltx2", "LTX2TextConnectors", {"rope_type": "split"}),
            "vae": (
                "diffusers",
                "AutoencoderKLLTX2Video",
                {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
            ),
            "audio_vae": ("diffusers", "AutoencoderKLLTX2Audio", {}),
            "vocoder": ("ltx2", "LTX2Vocoder", {}),
            "text_encoder": ("transformers", "Gemma3ForConditionalGeneration", GEMMA_3),
            "tokenizer": ("transformers", "GemmaTokenizer", _up_to(gemma_tokenizer(), 1024)),
            "scheduler": (
                "diffusers",
                "FlowMatchEulerDiscreteScheduler",
                FlowMatchEulerDiscreteScheduler(
                    use_dynamic_shifting=True,
                    base_shift=0.95,
                    max_shift=2.05,
                    base_image_seq_len=1024,
                    max_image_seq_len=4096,
                    shift_terminal=0.1,
                ),
            ),
        },
    ),
    "Qwen/Qwen-Image": (
        "QwenImagePipeline",
        {
            "transformer": ("diffusers", "QwenImageTransformer2DModel", {}),
            "vae": ("diffusers", "AutoencoderKLQwenImage", {}),
            "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration", QWEN_VL),
            "tokenizer": ("transformers", "Qwen2Tokenizer", qwen_tokenizer(PROMPT_TEMPLATE)),
            "scheduler": (
                "diffusers",
                "FlowMatchEulerDiscreteScheduler",
                FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
            ),
        },
    ),
}


def write_configs(model: str, folder: Path) -> Path:
    """
    Write the configs and tokenizers of a model of `PIPELINES` to `folder / model`, in diffusers' layout.

    Returns:
        `Path`: That folder.
    """
    pipeline_class, parts = PIPELINES[model]
    folder = folder / model
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, part_class, part) in parts.items():
        if isinstance(part, dict):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps({"_class_name": part_class, **part}, indent=2))
        else:
            part.save_pretrained(folder / name)
    index = {"_class_name": pipeline_class, **OPTIONS.get(model, {})} | {name: part[:2] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the folders are written")
    folder = parser.parse_args(args).folder
    for model in PIPELINES:
        print(write_configs(model, folder))


if __name__ == "__main__":
    main()
