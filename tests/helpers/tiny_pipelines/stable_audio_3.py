"""Stable Audio 3: waveforms of a given duration, from T5Gemma prompts."""

import torch
from diffusers import (
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    StableAudio3AudioToAudioPipeline,
    StableAudio3DiTModel,
    StableAudio3InpaintPipeline,
    StableAudio3Pipeline,
)
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from transformers import GemmaTokenizer, T5GemmaConfig, T5GemmaEncoderModel

from .family import Family
from .sana import gemma_tokenizer


SHARED = {"duration": 0.125}
CALLS = {
    "plain": {**SHARED, "guidance_scale": 1.0},
    "guided": {**SHARED, "guidance_scale": 4.0, "negative_prompt": "noise"},
    # Latents beyond the end, which are cut off.
    "padded": {**SHARED, "guidance_scale": 1.0, "silence_padding_duration": 0.0625},
}
WAVEFORM = torch.linspace(-40, 40, 256).sin().view(1, 2, 128)
CALLS_INPAINT = {"plain": {**SHARED, "audio": WAVEFORM, "mask_start_seconds": 0.03, "mask_end_seconds": 0.08}}
CALLS_AUDIO_TO_AUDIO = {
    # The waveform has no say.
    "noise level 1": {**SHARED, "audio": WAVEFORM, "init_noise_level": 1.0},
    # From the default of `logsnr_min` on, the second noise level would be above the first.
    "noise level 0.7": {**SHARED, "audio": WAVEFORM, "init_noise_level": 0.7, "logsnr_min": -2.0},
}
CALLS_RISING = {"noise level 0.7": {**SHARED, "audio": WAVEFORM, "init_noise_level": 0.7}}


def t5gemma_encoder(tokenizer: GemmaTokenizer) -> T5GemmaEncoderModel:
    part = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return T5GemmaEncoderModel(
        T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False, vocab_size=len(tokenizer))
    )


def audio_vae() -> AutoencoderSAME:
    """A latent of 4 channels for 16 samples in stereo, of 1024 in a second."""
    vae = AutoencoderSAME(
        patch_size=4,
        encoder_channels=16,
        encoder_c_mults=(1,),
        encoder_strides=(4,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        dim_heads=8,
        sampling_rate=1024,
    )
    _wake(vae)
    return vae


def components() -> dict:
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 16
    transformer = StableAudio3DiTModel(
        io_channels=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    _wake(transformer)
    return {
        "vae": audio_vae(),
        "text_encoder": t5gemma_encoder(tokenizer),
        "tokenizer": tokenizer,
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16),
        "transformer": transformer,
        # The transformer takes noise levels in [0, 1] as timesteps.
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    }


def _wake(module: torch.nn.Module) -> None:
    """New residual branches have no effect: their last layers are zero."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)


def _build(pipeline_class: type, seed: int = 0):
    torch.manual_seed(seed)
    pipeline = pipeline_class(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(seed: int = 0) -> StableAudio3Pipeline:
    """Waveforms of 128 samples in stereo, 8 latents of 4 channels."""
    return _build(StableAudio3Pipeline, seed)


def inpaint() -> StableAudio3InpaintPipeline:
    return _build(StableAudio3InpaintPipeline)


def audio_to_audio() -> StableAudio3AudioToAudioPipeline:
    return _build(StableAudio3AudioToAudioPipeline)


FAMILIES = {
    "Stable Audio 3 (audio)": Family(build, CALLS),
    "Stable Audio 3 inpainting (audio)": Family(inpaint, CALLS_INPAINT),
    "Stable Audio 3 audio to audio (audio)": Family(audio_to_audio, CALLS_AUDIO_TO_AUDIO),
}
REFUSED = {
    "Stable Audio 3 audio to audio (audio), rising levels": Family(
        audio_to_audio,
        CALLS_RISING,
        reason="below noise level 1, its second noise level is above its first unless `logsnr_min` is about -2",
        error="must fall from step to step",
    ),
}
