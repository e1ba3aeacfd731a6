"""A CLAP of a few thousand random weights that hears a second at 8 kHz, with a tokenizer of bytes."""

import torch
from tiny_clip import vary
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


RATE = 8000  # in hertz
WINDOW = RATE  # values that it hears


def clap_processor() -> ClapProcessor:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(bytes_to_unicode().values())]
    tokenizer = RobertaTokenizer({token: i for i, token in enumerate(tokens)}, [])
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=125,
        max_length_s=1,
        fft_window_size=256,
        frequency_max=4000,
        truncation="rand_trunc",
    )
    return ClapProcessor(extractor, tokenizer)


def clap_model() -> ClapModel:
    torch.manual_seed(0)
    tokenizer = clap_processor().tokenizer
    config = ClapConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "projection_dim": 12,
        },
        audio_config={
            "num_mel_bins": 16,
            "spec_size": 64,
            "window_size": 4,
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "num_hidden_layers": 2,
            "projection_dim": 12,
        },
        projection_dim=12,
    )
    return vary(ClapModel(config))


def save_clap(folder) -> None:
    """Save the model with its tokenizer and feature extractor."""
    clap_model().save_pretrained(folder)
    clap_processor().save_pretrained(folder)
