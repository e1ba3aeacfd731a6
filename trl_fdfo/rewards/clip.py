"""The base class of rewards that embed with CLIP."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .learned_reward import LearnedReward, load_pretrained
from .pixel_values import pixel_values
from .weights import torch_dtype


# Numbers of the published models, for plans without weights.
CLIP_L = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
CLIP_H = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


class CLIPReward(LearnedReward):
    """
    A reward that embeds images, and prompts up to CLIP's 77 tokens, with a [`~transformers.CLIPModel`].

    Images are resized with PIL even if torchvision is installed, because the two resize differently. An image that is
    not square is cropped to its central square. Tensors are prepared to the same values, with gradients.

    Args:
        model (`str`, *optional*): Hub id or folder of the model. Default: `default_model` of the class.
        processor (`str`, *optional*): Hub id or folder of the image processor and the tokenizer. Default:
            `default_processor` of the class, otherwise `model`.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. The images of a prompt differ little,
            and float32 tells them apart best. Embeddings are always compared in float32.
        device, batch_size, offload, frames: As in [`LearnedReward`].

    Raises:
        OSError: The model or the processor does not exist.
        ValueError: The tokenizer does not belong to the model.
    """

    differentiable = True
    default_model = "openai/clip-vit-large-patch14"
    default_processor: str | None = None
    architecture = CLIP_L  # of the default model

    def __init__(
        self,
        model: str | None = None,
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
        frames: str = "mean",
    ):
        dtype = torch_dtype(dtype)
        model = model or self.default_model
        processor = processor or self.default_processor or model
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
        super().__init__(clip.to(dtype), device=device, batch_size=batch_size, offload=offload, frames=frames)

    @classmethod
    def without_weights(
        cls,
        model: str | None = None,
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        **options: Any,
    ) -> "CLIPReward | None":
        """
        The reward with a model that has shapes and no weights, for a plan; None for another than the default model. Arguments
        are those of the class.
        """
        if model not in (None, cls.default_model):
            return None
        with torch.device("meta"):
            clip = CLIPModel(CLIPConfig(**cls.architecture))
        reward = cls.__new__(cls)
        LearnedReward.__init__(reward, clip.to(torch_dtype(dtype)), **options)
        return reward

    def planned_call(self) -> dict[str, Tensor]:
        vision, text = self.model.config.vision_config, self.model.config.text_config
        size = (vision.num_channels, vision.image_size, vision.image_size)
        return {
            "pixel_values": torch.empty(self.batch_size, *size, dtype=self.model.dtype, device="meta"),
            "input_ids": torch.empty(self.batch_size, text.max_position_embeddings, dtype=torch.long, device="meta"),
        }

    def score(self, images: Sequence[Image.Image] | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Score a batch by 100 times the cosine of the angle between each image and its prompt, float32, [batch]."""
        return 100 * self.cosine(images, prompts)

    def cosine(self, images: Sequence[Image.Image] | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Cosine of the angle between each image and its prompt, float32, shape [batch]."""
        return (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)

    def embed_images(self, images: Sequence[Image.Image] | Sequence[Tensor]) -> Tensor:
        """Embeddings of length 1, float32, shape [batch, width]."""
        pixels = pixel_values(self.image_processor, images).to(self.model.device, self.model.dtype)
        return normalize(self.model.get_image_features(pixels).pooler_output.float(), dim=-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, float32, shape [batch, width]."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)
        return normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)
