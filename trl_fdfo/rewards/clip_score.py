"""CLIPScore (arXiv 2104.08718): the agreement of an image with its prompt, by OpenAI's CLIP."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class CLIPScore(CLIPReward):
    """
    CLIPScore (arXiv 2104.08718), agreement with the prompt: about 15 to 35, higher is better.

    The score is 100 times the cosine of image and prompt by CLIP ViT-L/14. Papers on text-to-image models print this
    number, or the cosine itself, such as 0.28; their numbers differ because their CLIP models do. The CLIPScore paper
    rates captions by max(0, 2.5 cosine) with ViT-B/32, and puts "A photo depicts" before the caption.

    Args:
        model (`str`): Hub id or folder of the [`~transformers.CLIPModel`].
        processor, dtype, device, batch_size, offload: As in [`CLIPReward`].
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
    ):
        super().__init__(model, processor, dtype=dtype, device=device, batch_size=batch_size, offload=offload)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return 100 * self.cosine(images, prompts)
