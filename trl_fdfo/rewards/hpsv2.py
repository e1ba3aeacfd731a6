"""HPSv2 (arXiv 2306.09341): what people prefer, by a CLIP-H that was trained on ranked images of one prompt."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward


class HPSv2(CLIPReward):
    """
    Human Preference Score v2 (arXiv 2306.09341): about 20 to 30, higher is better.

    It is 100 times the cosine of image and prompt, as papers print it. The weights are the published ones as a
    [`~transformers.CLIPModel`]. Images that are not square are cropped; the code of the paper pads them.

    Args:
        model (`str`): The model: an id of the Hub or a folder.
        processor (`str`, *optional*): Where its image processor and tokenizer are, those of any CLIP. Default: where the
            model is.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. The images of a prompt differ by little:
            float32 tells them apart best.
        device (`str` or `torch.device`, *optional*): Where it scores. Default: the device of this process.
        batch_size (`int`): Images scored at a time.
        offload (`bool`): Keep the model on the CPU while the rollout is trained on.
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
