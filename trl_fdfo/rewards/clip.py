"""What the rewards that embed with CLIP share."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .learned_reward import LearnedReward, load_pretrained
from .weights import torch_dtype


class CLIPReward(LearnedReward):
    """
    A reward that embeds images, and prompts up to CLIP's 77 tokens, with a [`~transformers.CLIPModel`].

    Images are prepared with PIL, whether torchvision is installed or not, as the two do not resize alike. What is not
    square is cropped to the square in its middle.

    Args:
        model (`str`): The model: an id of the Hub or a folder.
        processor (`str`, *optional*): Where its image processor and tokenizer are. Default: where the model is.
        dtype (`str` or `torch.dtype`): Type of the model. Embeddings are compared in float32, whatever it is.
        options: The others of [`LearnedReward`].

    Raises:
        OSError: There is no such model or processor.
        ValueError: The tokenizer is not that of the model.
    """

    def __init__(
        self, model: str, processor: str | None = None, *, dtype: str | torch.dtype = "float32", **options: Any
    ):
        dtype = torch_dtype(dtype)
        processor = processor or model
        self.image_processor = load_pretrained(CLIPImageProcessorPil, processor)
        self.tokenizer = load_pretrained(CLIPTokenizer, processor)
        clip = load_pretrained(CLIPModel, model, dtype=torch.float32)
        # A folder without a tokenizer gives one that knows no words, without an error.
        if len(self.tokenizer) != clip.config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer of '{processor}' has {len(self.tokenizer)} tokens, but the model '{model}' has "
                f"{clip.config.text_config.vocab_size}: give `processor`, where the tokenizer of the model is."
            )
        # Taken before the cast, as bfloat16 would make 98.9 of a scale of 100.
        self.logit_scale = clip.logit_scale.exp().item()
        super().__init__(clip.to(dtype), **options)

    def cosine(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Cosine of the angle between each image and its prompt, float32, shape [batch]."""
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of length 1, float32, shape [batch, width]."""
        inputs = self.image_processor(list(images), return_tensors="pt").to(self.model.device, self.model.dtype)
        return normalize(self.model.get_image_features(**inputs).pooler_output.float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, float32, shape [batch, width]."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        return normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)
