"""CLIPScore (arXiv 2104.08718): how near an image is to its prompt, by CLIP as it was published."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class CLIPScore(CLIPReward):
    """
    CLIPScore (arXiv 2104.08718), agreement with the prompt: about 15 to 35, higher is better.

    It is 100 times the cosine of image and prompt by CLIP ViT-L/14. Papers on text-to-image models print this number, or
    the cosine itself, such as 0.28; which CLIP they take differs, and so do the numbers. The paper on CLIPScore, which
    rates captions, has 2.5 times the cosine by ViT-B/32, negative ones as 0, with "A photo depicts" before the caption.

    Args:
        model (`str`): The [`~transformers.CLIPModel`]: an id of the Hub or a folder.
        processor (`str`, *optional*): Where its image processor and tokenizer are. Default: where the model is.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. The images of a prompt differ by little:
            float32 tells them apart best.
        device (`str` or `torch.device`, *optional*): Where it scores. Default: the device of this process.
        batch_size (`int`): Images scored at a time.
        offload (`bool`): Keep the model on the CPU while the rollout is trained on.
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
