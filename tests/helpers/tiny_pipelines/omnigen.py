"""OmniGen: one transformer reads the prompt and paints; each call is guided."""

from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenPipeline, OmniGenTransformer2DModel
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

from . import vae
from .family import Family
from .hidream import llama_tokenizer


CALLS = {"guided": {"height": 32, "width": 32, "guidance_scale": 2.5}}

# Images that are given to it need torchvision; text does not.
_nothing = dict.fromkeys(("Compose", "Lambda", "ToTensor", "Normalize"), lambda *args, **kwargs: None)
vars(processor_omnigen).setdefault("transforms", SimpleNamespace(**_nothing))
vars(pipeline_omnigen).setdefault("OmniGenMultiModalProcessor", processor_omnigen.OmniGenMultiModalProcessor)


def one_prompt(count: int) -> dict:
    """No images, but a call has one prompt: the transformer gives all prompts of a batch the positions of the first."""
    return {}


def build(seed: int = 0) -> OmniGenPipeline:
    """32 x 32 images, latents of 4 x 4 with 4 channels: a factor of 8, which is in the pipeline's code."""
    torch.manual_seed(seed)
    tokenizer = llama_tokenizer()
    transformer = OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        num_layers=1,
        pad_token_id=0,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        original_max_position_embeddings=256,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=16,
    )
    pipeline = OmniGenPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae(blocks=4),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# It has no encode_prompt. Its released scheduler counts the noise level from 0 to 1, which `invert_sigmas` says.
FAMILIES = {
    "OmniGen": Family(build, CALLS, one_prompt),
}
