"""CogView4: GLM prompts padded on the left, conditioned on sizes, given both timesteps and noise levels."""

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from . import LETTERS, vae
from .family import Family


CALLS = {
    "plain": {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
    "guided": {
        "height": 16,
        "width": 16,
        "guidance_scale": 5.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    },
}


def glm_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<|endoftext|>", "[gMASK]", "<sop>", "<unk>", " ", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 1), ("<sop>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
    )


def glm_encoder(tokenizer: PreTrainedTokenizerFast) -> GlmModel:
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GlmModel(config)


def build(seed: int = 0) -> CogView4Pipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels; the noise levels shift with the resolution."""
    torch.manual_seed(seed)
    tokenizer = glm_tokenizer()
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    pipeline = CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=glm_encoder(tokenizer),
        vae=vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "CogView 4": Family(build, CALLS),
}
