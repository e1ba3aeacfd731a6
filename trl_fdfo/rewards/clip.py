"""The base class of rewards that embed with CLIP."""

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

    Images are resized with PIL even if torchvision is installed, because the two resize differently. An image that is
    not square is cropped to its central square.

    Args:
        model (`str`): Hub id or folder of the model.
        processor (`str`, *optional*): Hub id or folder of its image processor and tokenizer. Default: `model`.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. The images of a prompt differ little,
            and float32 tells them apart best. Embeddings are always compared in float32.
        options: `device`, `batch_size` and `offload` of [`LearnedReward`].

    Raises:
        OSError: The model or the processor does not exist.
        ValueError: The tokenizer does not belong to the model.
    """

    def __init__(
        self, model: str, processor: str | None = None, *, dtype: str | torch.dtype = "float32", **options: Any
    ):
        dtype = torch_dtype(dtype)
        processor = processor or model
        self.image_processor = load_pretrained(CLIPImageProcessorPil, processor)
        self.tokenizer = load_pretrained(CLIPTokenizer, processor)
        clip = load_pretrained(CLIPModel, model, dtype=torch.float32)
        # transformers makes an empty tokenizer, without an error, of a folder that has none.
        if len(self.tokenizer) != clip.config.text_config.vocab_size:
            raise ValueError(
                f"The tokenizer of '{processor}' has {len(self.tokenizer)} tokens, but the model '{model}' has "
                f"{clip.config.text_config.vocab_size}: give the model's own as `processor`."
            )
        # Read the scale before the cast: bfloat16 would turn 100 into 98.9.
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
