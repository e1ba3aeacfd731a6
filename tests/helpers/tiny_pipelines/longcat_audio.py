"""LongCat-AudioDiT: waveforms from UMT5 prompts; its time runs from noise, 0, to sound, 1."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
)

from . import t5_tokenizer
from .aura_flow import umt5_encoder
from .family import Family


SHARED = {"audio_duration_s": 0.5}
CALLS = {
    "plain": {**SHARED, "guidance_scale": 1.0},
    "guided": {**SHARED, "guidance_scale": 4.0},
    "guided away": {**SHARED, "guidance_scale": 4.0, "negative_prompt": "noise"},
}


def build(seed: int = 0) -> LongCatAudioDiTPipeline:
    """Mono waveforms of 80 samples, 10 latents of 4 channels."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = LongCatAudioDiTTransformer(dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=32, latent_dim=4)
    for parameter in transformer.parameters():
        # The last layers of a new one are zero, and what scales by the prompt and the noise level is too.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    pipeline = LongCatAudioDiTPipeline(
        vae=LongCatAudioDiTVae(
            channels=8,
            c_mults=[1, 2],
            strides=[2, 4],
            latent_dim=4,
            encoder_latent_dim=8,
            downsampling_ratio=8,
            sample_rate=160,
        ),
        text_encoder=umt5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "LongCat-AudioDiT (audio)": Family(build, CALLS),
}
