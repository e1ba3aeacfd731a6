"""ImageReward (arXiv 2304.05977): human preference, by a BLIP that reads the prompt while it looks at the image."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
)

from .learned_reward import LearnedReward, load_pretrained
from .pixel_values import pixel_values
from .weights import linear_layers, load_weights, torch_dtype


# Published with the model: they standardize its scores to mean 0 and standard deviation 1.
MEAN = 0.16717362830052426
STD = 1.0333394966054072

MAX_LENGTH = 35  # tokens of a prompt

# Names in the checkpoint, which come from BLIP's own code, and their names in `transformers`; replaced in this order.
NAMES = {
    "blip.text_encoder.": "text.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.visual_encoder.": "vision.",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}
# The score needs neither the projections of the training nor the indices 0, 1, 2, ... of the positions.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward(LearnedReward):
    """
    ImageReward (arXiv 2304.05977), human preference: about -2 to 2 around 0, higher is better.

    BLIP's text encoder reads the prompt, up to 35 tokens, with cross-attention to the image. Linear layers map its
    first token to a number.

    Args:
        model (`str`): The published checkpoint: a file `ImageReward.pt`, or a Hub id or folder with this file.
        processor (`str`): Hub id or folder of the tokenizer of BERT (uncased).
        dtype (`str` or `torch.dtype`): Type of the encoders, such as `"bfloat16"`; float32 tells images apart best.
        device, batch_size, offload, frames: As in [`LearnedReward`].

    Raises:
        OSError: The checkpoint or the tokenizer does not exist.
        ValueError: The weights in the checkpoint are not exactly those of ImageReward, or the tokenizer is not BERT's.
    """

    differentiable = True
    # ViT-L/16 and BERT-base with cross-attention. The checkpoint lacks the number of heads and the eps.
    vision_config: ClassVar[dict[str, Any]] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    text_config: ClassVar[dict[str, Any]] = {
        "vocab_size": 30524,  # BERT's 30,522, then BLIP's [DEC] and [ENC], which a score does not use
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
    }

    def __init__(
        self,
        model: str = "zai-org/ImageReward",
        processor: str = "google-bert/bert-base-uncased",
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
        frames: str = "mean",
    ):
        size = self.vision_config["image_size"]
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        self.tokenizer = load_pretrained(BertTokenizer, processor)
        # transformers makes an empty tokenizer, without an error, of a folder that has none.
        missing = self.text_config["vocab_size"] - len(self.tokenizer)
        if not 0 <= missing <= 2:
            raise ValueError(
                f"The tokenizer of processor='{processor}' has {len(self.tokenizer)} tokens, but ImageReward has "
                f"{self.text_config['vocab_size']}: use google-bert/bert-base-uncased."
            )
        blip = self._load(model, torch_dtype(dtype))
        super().__init__(blip, device=device, batch_size=batch_size, offload=offload, frames=frames)

    def score(self, images: Sequence[Image.Image] | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        vision, text = self.model["vision"], self.model["text"]
        pixels = pixel_values(self.image_processor, images).to(vision.device, vision.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(text.device)
        hidden = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=vision(pixels).last_hidden_state,
        ).last_hidden_state
        return (self.model["head"](hidden[:, 0].float()).squeeze(-1) - MEAN) / STD

    def _load(self, model: str, dtype: torch.dtype) -> nn.ModuleDict:
        """Load the two encoders in `dtype`, and the layers behind them in float32."""
        weights = load_weights(model, "ImageReward.pt")
        layers = {name: weights.pop(name) for name in list(weights) if name.startswith("mlp.")}
        head = linear_layers(layers, self.text_config["hidden_size"], source=model)
        # The initial weights are replaced: they take neither memory nor random numbers of the run.
        with torch.random.fork_rng(devices=[]), init_empty_weights():
            vision = BlipVisionModel(BlipVisionConfig(**self.vision_config))
            text = BlipTextModel(BlipTextConfig(**self.text_config), add_pooling_layer=False)
        blip = nn.ModuleDict({"vision": vision, "text": text})
        renamed = {}
        for name, tensor in weights.items():
            if not name.startswith(UNUSED):
                for old, new in NAMES.items():
                    name = name.replace(old, new)
                renamed[name] = tensor
        try:
            blip.load_state_dict(renamed, assign=True)
        except RuntimeError as error:
            raise ValueError(f"'{model}' does not have the weights of ImageReward. {error}") from error
        blip.to(dtype)
        blip["head"] = head
        return blip
