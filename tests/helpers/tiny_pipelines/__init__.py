"""Real diffusers pipelines at tiny size with random weights, built from configs without a download."""

import string

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


LETTERS = string.ascii_lowercase + string.digits


def clip_tokenizer() -> CLIPTokenizer:
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=16)


def t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer([(token, -1.0) for token in tokens], extra_ids=0, model_max_length=16)


def clip_encoder(tokenizer: CLIPTokenizer, model_class=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config)


def vae(latent_channels: int = 4, blocks: int = 2) -> AutoencoderKL:
    """8 latents per 16 pixels: a factor of 2, and of 2 more for each further block."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )


def sd3(with_t5: bool = False, seed: int = 0) -> StableDiffusion3Pipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels."""
    torch.manual_seed(seed)
    tokenizers = [clip_tokenizer(), clip_tokenizer()]
    tokenizer_3 = t5_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_encoder(tokenizers[0]),
        tokenizer=tokenizers[0],
        text_encoder_2=clip_encoder(tokenizers[1]),
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_encoder(tokenizer_3) if with_t5 else None,
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """16 x 16 images, latents packed into 16 tokens of 16 channels; the noise levels shift with the resolution."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_encoder(tokenizer, CLIPTextModel),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
