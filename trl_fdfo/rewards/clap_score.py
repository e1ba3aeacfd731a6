"""CLAP score: the agreement of audio with its prompt, by LAION's CLAP (arXiv 2211.06687)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, normalize, pad
from transformers import ClapModel, ClapProcessor

from ..media import over_frames
from .learned_reward import LearnedReward, load_pretrained
from .weights import torch_dtype


class CLAPScore(LearnedReward):
    """
    CLAP score (arXiv 2211.06687), agreement of audio with its prompt: -1 to 1, higher is better.

    The score is the cosine of the two embeddings.

    Audio is mixed to one channel, resampled to the model's rate, and cut into equal parts that the model hears whole, of at
    most ten seconds: a long sound scores the mean over its parts. The published feature extractor would take a random part.
    Papers differ in the CLAP model and in how they cut, and so do their numbers.

    Args:
        model (`str`): Hub id or folder of a [`~transformers.ClapModel`].
        processor (`str`, *optional*): Hub id or folder of its feature extractor and tokenizer. Default: `model`.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. Embeddings are compared in float32.
        device, batch_size, offload: As in [`LearnedReward`].
        frames (`str`): `"mean"` or `"min"` over the parts of a long sound.

    Raises:
        OSError: The model or the processor does not exist.
        ValueError: The tokenizer does not belong to the model.
    """

    image_type = "pt"

    def __init__(
        self,
        model: str = "laion/clap-htsat-unfused",
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
        frames: str = "mean",
    ):
        dtype = torch_dtype(dtype)
        self.processor = load_pretrained(ClapProcessor, processor or model)
        clap = load_pretrained(ClapModel, model, dtype=torch.float32)
        # transformers makes an empty tokenizer, without an error, of a folder that has none.
        if len(self.processor.tokenizer) != clap.config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer of '{processor or model}' has {len(self.processor.tokenizer)} tokens, but the model '{model}' "
                f"has {clap.config.text_config.vocab_size}: give the model's own as `processor`."
            )
        super().__init__(clap.to(dtype), device=device, batch_size=batch_size, offload=offload, frames=frames)

    def __call__(self, audio: Tensor, prompts: Sequence[str], sampling_rate: int) -> Tensor:
        """Score N sounds [N, C, L], of `sampling_rate` values per second, by their prompts: float32 on the CPU, shape [N]."""
        extractor = self.processor.feature_extractor
        sounds = resample(audio.detach().float().mean(dim=1), sampling_rate, extractor.sampling_rate).cpu()
        count = -(-sounds.shape[-1] // extractor.nb_max_samples)
        parts = [part.numpy() for sound in sounds for part in sound.tensor_split(count)]
        heard = self.in_batches(self.embed_audio, parts)
        read = self.in_batches(self.embed_prompts, list(prompts)).repeat_interleave(count, dim=0)
        return over_frames((heard * read).sum(dim=-1), [count] * len(sounds), self.frames)

    def embed_audio(self, sounds: Sequence) -> Tensor:
        """Embeddings of length 1 of sounds [L], arrays at the model's rate: float32, shape [batch, width]."""
        extractor = self.processor.feature_extractor
        inputs = extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="pt")
        # None of them is longer than the model hears; the extractor would call a random one so.
        longer = torch.zeros(len(sounds), 1, dtype=torch.bool, device=self.model.device)
        features = inputs["input_features"].to(self.model.device, self.model.dtype)
        embedded = self.model.get_audio_features(input_features=features, is_longer=longer)
        return normalize(embedded.pooler_output.float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of length 1: float32, shape [batch, width]."""
        # RoBERTa counts positions from behind the padding token.
        text = self.model.config.text_config
        longest = text.max_position_embeddings - text.pad_token_id - 1
        tokens = self.processor.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        tokens = tokens.to(self.model.device)
        embedded = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return normalize(embedded.pooler_output.float(), dim=-1)


_LOBES = 16  # of the sinc on each side: more are sharper, and slower


def resample(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """
    Audio [N, L] at another rate, in hertz: [N, ceil(L new_rate / rate)]. What the lower rate cannot hold is filtered out.

    The value at a new place is sum_n x[n] c sinc(c (n - place)) w(c (n - place)), with places counted in old values, c the
    cut-off as a part of the old Nyquist frequency, a little below that of the lower rate, and w Hann's window.
    """
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    if old == new:
        return audio
    cutoff = 0.97 * min(1.0, new / old)
    reach = math.ceil(_LOBES / cutoff)
    # The places of `new` values repeat after `old` values: a filter for each of them, which moves on by `old`.
    places = torch.arange(new, dtype=torch.float64)[:, None] * old / new
    offsets = cutoff * (torch.arange(-reach, old + reach, dtype=torch.float64) - places)
    window = (torch.pi / 2 * offsets / _LOBES).cos().square() * (offsets.abs() < _LOBES)
    filters = (cutoff * offsets.sinc() * window).to(audio)
    length = -(-audio.shape[-1] * new // old)
    padded = pad(audio, (reach, reach + old))
    return conv1d(padded[:, None], filters[:, None], stride=old).transpose(1, 2).flatten(1)[:, :length]
