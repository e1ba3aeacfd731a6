"""PRX: T5Gemma prompts, cross attention beside self attention, and an autoencoder or pixels."""

from types import SimpleNamespace

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
)
from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel
from transformers import Qwen3VLModel
from transformers.models.t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from . import vae
from .family import Family
from .kandinsky5 import wake
from .krea2 import qwen3_vl_config
from .qwen_image import qwen_tokenizer
from .sana import gemma_tokenizer


SIZE = {"height": 16, "width": 16, "use_resolution_binning": False}
for module in (pipeline_prx, pipeline_prx_pixel):  # they clean prompts with ftfy, installed or not
    vars(module).setdefault("ftfy", SimpleNamespace(fix_text=str))
CALLS = {"plain": {**SIZE, "guidance_scale": 1.0}}
CALLS_GUIDED = {"guided": {**SIZE, "guidance_scale": 4.0, "negative_prompt": "bad"}}


def t5gemma_encoder(vocab_size: int) -> T5GemmaEncoder:
    config = T5GemmaModuleConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["full_attention"],
        dropout_rate=0.0,
    )
    return T5GemmaEncoder(config)


def transformer(**options) -> PRXTransformer2DModel:
    model = PRXTransformer2DModel(
        patch_size=2, context_in_dim=16, hidden_size=16, num_heads=2, depth=1, axes_dim=[4, 4], **options
    )
    wake(model)
    return model


def build(seed: int = 0) -> PRXPipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels."""
    torch.manual_seed(seed)
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 24
    pipeline = PRXPipeline(
        transformer=transformer(in_channels=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=t5gemma_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        vae=vae(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_pixel(seed: int = 0) -> PRXPixelPipeline:
    """16 x 16 images without an autoencoder. The model predicts the image, and the noise has a standard deviation of 2."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("a")
    pipeline = PRXPixelPipeline(
        transformer=transformer(in_channels=3, bottleneck_size=8, resolution_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen3VLModel(qwen3_vl_config(tokenizer)),
        tokenizer=tokenizer,
        prompt_max_tokens=24,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "PRX": Family(build, CALLS),
    # The timestep of a guided call has two entries, whatever the number of samples: it works for one sample at a time.
    "PRX guided": Family(build, CALLS_GUIDED),
    # It has no vae, and returns `pt` as it samples them, in [-1, 1].
    "PRX Pixel": Family(build_pixel, CALLS),
}
