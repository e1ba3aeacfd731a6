"""PickScore (arXiv 2305.01569): human preference, by a CLIP-H that was trained on pairs of images of one prompt."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from .clip import CLIP_H, CLIPReward


class PickScore(CLIPReward):
    """
    PickScore (arXiv 2305.01569), human preference: about 20 to 23, higher is better.

    The score is the cosine of image and prompt times the model's `exp(logit_scale)`, about 100. If two images of a
    prompt differ by d, people choose the better one with probability sigmoid(d).

    The arguments are those of [`CLIPReward`]. The published model has no processor of its own.
    """

    default_model = "yuvalkirstain/PickScore_v1"
    default_processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    architecture = CLIP_H

    def score(self, images: Sequence[Image.Image] | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.logit_scale * self.cosine(images, prompts)
