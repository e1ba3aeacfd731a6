"""CLIPScore (arXiv 2104.08718): the agreement of an image with its prompt, by OpenAI's CLIP-L or LAION's CLIP-H."""

from .clip import CLIP_H, CLIPReward


class CLIPScore(CLIPReward):
    """
    CLIPScore (arXiv 2104.08718), agreement with the prompt: about 15 to 35, higher is better.

    The score is 100 times the cosine of image and prompt by CLIP ViT-L/14. Papers on text-to-image models print this
    number, or the cosine itself, such as 0.28; their numbers differ because their CLIP models do. The CLIPScore paper
    rates captions by max(0, 2.5 cosine) with ViT-B/32, and puts "A photo depicts" before the caption.

    The arguments are those of [`CLIPReward`].
    """


class CLIPHScore(CLIPScore):
    """
    CLIPScore by LAION's CLIP ViT-H/14, agreement with the prompt: about 20 to 45, higher is better.

    This is the CLIP that PickScore and HPSv2 were trained from, and the CLIP-H of papers. Its numbers are larger than those of
    CLIP ViT-L/14, and not comparable with them. The arguments are those of [`CLIPReward`].
    """

    default_model = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    architecture = CLIP_H
