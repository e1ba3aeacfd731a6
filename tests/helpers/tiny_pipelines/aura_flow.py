"""AuraFlow: UMT5 prompts, joint and single blocks."""

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from . import t5_tokenizer, vae
from .family import Family


CALLS = {
    "plain": {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
    "guided": {
        "height": 16,
        "width": 16,
        "guidance_scale": 3.5,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    },
}


def umt5_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config)


def build(seed: int = 0) -> AuraFlowPipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5_encoder(tokenizer),
        vae=vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "AuraFlow": Family(build, CALLS),
}
