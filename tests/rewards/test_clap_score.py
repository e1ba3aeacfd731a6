"""CLAP score by a tiny random CLAP, loaded from a folder."""

import pytest
import torch
from tiny_clap import RATE, WINDOW, clap_model, clap_processor, save_clap
from transformers import TrainerState

from trl_fdfo.media import Outputs
from trl_fdfo.rewards import CLAPScore, RewardFunctions
from trl_fdfo.rewards.clap_score import resample


PROMPTS = ["a dog", "rain on a roof", "a bell", "x" * 100]


def tones(length: int, rate: int = RATE) -> torch.Tensor:
    """Four sounds [4, 1, length] of one frequency each."""
    time = torch.arange(length) / rate
    return torch.stack([torch.sin(2 * torch.pi * hertz * time) for hertz in (200, 700, 1500, 3000)])[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    save_clap(folder)
    return str(folder)


@torch.no_grad()
def expected(sounds: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """By a forward pass on one sound, at the model's rate and no longer than it hears, and one prompt."""
    model, processor = clap_model(), clap_processor()
    values = []
    for sound, prompt in zip(sounds, prompts):
        heard = processor.feature_extractor(sound.mean(dim=0).numpy(), sampling_rate=RATE, return_tensors="pt")
        tokens = processor.tokenizer(prompt, truncation=True, max_length=30, return_tensors="pt")
        outputs = model(input_ids=tokens["input_ids"], input_features=heard["input_features"])
        values.append((outputs.audio_embeds * outputs.text_embeds).sum())
    return torch.stack(values)


def test_score_is_the_cosine_of_one_forward_pass(folder):
    sounds = torch.cat([tones(5000), tones(5000).flip(0) / 2], dim=1)  # two channels
    scores = CLAPScore(folder, device="cpu", batch_size=3)(sounds, PROMPTS, RATE)
    assert scores.dtype == torch.float32 and scores.abs().max() <= 1
    torch.testing.assert_close(scores, expected(sounds, PROMPTS), rtol=0, atol=1e-5)
    assert (scores[:, None] - scores).abs().fill_diagonal_(1).min() > 1e-3


def test_a_long_sound_scores_the_mean_or_the_minimum_over_its_parts(folder):
    long = tones(2 * WINDOW + 2) * torch.linspace(0, 1, 2 * WINDOW + 2)
    parts = torch.stack([expected(part, PROMPTS) for part in long.tensor_split(3, dim=-1)])
    for frames, values in (("mean", parts.mean(dim=0)), ("min", parts.amin(dim=0))):
        reward = CLAPScore(folder, device="cpu", frames=frames)
        scores = reward(long, PROMPTS, RATE)
        torch.testing.assert_close(scores, values, rtol=0, atol=1e-5)
        assert torch.equal(scores, reward(long, PROMPTS, RATE))  # nothing is cropped at random


def test_a_sound_is_the_same_at_any_rate(folder):
    functions = RewardFunctions(CLAPScore(folder, device="cpu"))
    scores = []
    for rate in (RATE, 12000, 44100):
        functions.expect(Outputs(("audio",), sampling_rate=rate))
        scores.append(functions(tones(rate, rate), PROMPTS, TrainerState(), {})[:, 0])
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="'CLAPScore' scores audio, and the pipeline makes images"):
        functions.expect(Outputs(("images",)))
    with pytest.raises(ValueError, match="'CLAPScore' needs 'sampling_rate'"):
        functions.expect(Outputs(("audio",)))


@pytest.mark.parametrize(("rate", "new_rate"), [(8000, 12000), (44100, 48000), (48000, 16000), (16000, 16000)])
def test_resampling_keeps_what_both_rates_hold(rate, new_rate):
    tone, new_tone = (torch.sin(2 * torch.pi * 1000 * torch.arange(each) / each) for each in (rate, new_rate))
    resampled = resample(tone[None], rate, new_rate)
    assert resampled.shape == (1, new_rate)
    inner = slice(new_rate // 10, -new_rate // 10)  # the sound begins and ends all at once
    torch.testing.assert_close(resampled[0, inner], new_tone[inner], rtol=0, atol=1e-3)
    # 9 kHz is beyond what 16 kHz can hold, and would be heard as 7 kHz.
    high = torch.sin(2 * torch.pi * 9000 * torch.arange(48000) / 48000)
    assert resample(high[None], 48000, 16000)[:, 2000:-2000].abs().max() < 3e-3


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    processor = clap_processor()
    processor.tokenizer.add_tokens(["more"])
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="has 262 tokens, but the model .* has 261: give the model's own as `processor`"
    ):
        CLAPScore(folder, str(tmp_path))
