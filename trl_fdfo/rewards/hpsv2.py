"""HPSv2 (arXiv 2306.09341): human preference, by a CLIP-H that was trained on ranked images of one prompt."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class HPSv2(CLIPReward):
    """
    Human Preference Score v2 (arXiv 2306.09341): about 20 to 30, higher is better.

    The score is 100 times the cosine of image and prompt, as in papers. The default is a conversion of the published
    weights to a [`~transformers.CLIPModel`]. Images that are not square are cropped; the paper's code pads them.

    Args:
        model (`str`): Hub id or folder of the [`~transformers.CLIPModel`].
        processor, dtype, device, batch_size, offload: As in [`CLIPReward`].
    """

    def __init__(
        self,
        model: str = "adams-story/HPSv2-hf",
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
