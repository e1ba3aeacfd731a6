"""A CLIP of a few thousand random weights, with a tokenizer of single letters."""

import string

import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


SIZE = 32  # width and height in pixels of the images that it sees
WIDTH = 12  # of its embeddings
LETTERS = string.ascii_lowercase


def clip_tokenizer() -> CLIPTokenizer:
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [])


def clip_model() -> CLIPModel:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 77,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**layers, "image_size": SIZE, "patch_size": 8},
        projection_dim=WIDTH,
        logit_scale_init_value=4.6052,
    )
    return vary(CLIPModel(config))


def vary(model: nn.Module) -> nn.Module:
    """Give a model large weights. With the usual ones its output hardly depends on its input."""
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save_clip(folder) -> None:
    """Save the model with its tokenizer and image processor."""
    clip_model().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=crop).save_pretrained(folder)
