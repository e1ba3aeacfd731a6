"""ACE-Step 1.5: music from a prompt and lyrics, both read by Qwen 3."""

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.ace_step.pipeline_ace_step import SFT_GEN_PROMPT
from transformers import Qwen3Config, Qwen3Model

from .family import Family
from .qwen_image import qwen_tokenizer


SHARED = {"audio_duration": 0.8}
CALLS = {
    "plain": {**SHARED, "guidance_scale": 1.0},
    "shift 1": {**SHARED, "guidance_scale": 1.0, "shift": 1.0, "bpm": 120},
}
# The guidance carries momentum from step to step.
CALLS_WITH_MOMENTUM = {
    "guided": {**SHARED, "guidance_scale": 7.0},
    "guided in some steps": {**SHARED, "guidance_scale": 7.0, "cfg_interval_start": 0.05, "cfg_interval_end": 0.5},
}


def lyrics(count: int) -> dict[str, list[str]]:
    """One for each prompt: the pipeline does not repeat them, not even its default."""
    return {"lyrics": ["la la", "do re mi", "", "oh", "na na na"][:count]}


WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 4,
}


def text_encoder(vocab_size: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
    )
    return Qwen3Model(config)


def audio_vae() -> AutoencoderOobleck:
    """A latent of 4 channels for 8 samples in stereo, of 80 in a second."""
    return AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        sampling_rate=80,
    )


def build(seed: int = 0) -> AceStepPipeline:
    """Waveforms of 64 samples in stereo, 8 latents of 4 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(SFT_GEN_PROMPT)
    condition_encoder = AceStepConditionEncoder(
        **WIDTHS,
        text_hidden_dim=16,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    torch.nn.init.normal_(condition_encoder.silence_latent, std=0.3)
    pipeline = AceStepPipeline(
        vae=audio_vae(),
        text_encoder=text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        # A layer with a sliding window and one without.
        transformer=AceStepTransformer1DModel(
            **WIDTHS, num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4
        ),
        condition_encoder=condition_encoder,
        # The transformer takes noise levels in [0, 1] as timesteps, and the pipeline shifts them itself.
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "ACE-Step (audio)": Family(build, CALLS, lyrics),
    "ACE-Step with momentum (audio)": Family(build, CALLS_WITH_MOMENTUM, lyrics),
}
