"""PickScore (arXiv 2305.01569): human preference, by a CLIP-H that was trained on pairs of images of one prompt."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class PickScore(CLIPReward):
    """
    PickScore (arXiv 2305.01569), human preference: about 20 to 23, higher is better.

    The score is the cosine of image and prompt times the model's `exp(logit_scale)`, about 100. If two images of a
    prompt differ by d, people choose the better one with probability sigmoid(d).

    Args:
        model (`str`): Hub id or folder of the [`~transformers.CLIPModel`].
        processor (`str`, *optional*): As in [`CLIPReward`]. The published model has no processor of its own.
        dtype, device, batch_size, offload: As in [`CLIPReward`].
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
    ):
        super().__init__(model, processor, dtype=dtype, device=device, batch_size=batch_size, offload=offload)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.logit_scale * self.cosine(images, prompts)
