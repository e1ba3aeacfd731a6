"""PickScore (arXiv 2305.01569): what people choose, by a CLIP-H that was trained on pairs of images of one prompt."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class PickScore(CLIPReward):
    """
    PickScore (arXiv 2305.01569), human preference: about 20 to 23, higher is better.

    It is the cosine of image and prompt times the model's `exp(logit_scale)`, about 100. A difference of d between two
    images says that the better one is chosen with probability sigmoid(d).

    Args:
        model (`str`): The [`~transformers.CLIPModel`]: an id of the Hub or a folder.
        processor (`str`): Where its image processor and tokenizer are; the published model has none of its own.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. The images of a prompt differ by little:
            float32 tells them apart best.
        device (`str` or `torch.device`, *optional*): Where it scores. Default: the device of this process.
        batch_size (`int`): Images scored at a time.
        offload (`bool`): Keep the model on the CPU while the rollout is trained on.
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
