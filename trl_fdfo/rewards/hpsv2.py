"""HPSv2 (arXiv 2306.09341): human preference, by a CLIP-H that was trained on ranked images of one prompt."""

from .clip import CLIP_H, CLIPReward


class HPSv2(CLIPReward):
    """
    Human Preference Score v2 (arXiv 2306.09341): about 20 to 30, higher is better.

    The score is 100 times the cosine of image and prompt, as in papers. The default is a conversion of the published
    weights to a [`~transformers.CLIPModel`]. Images that are not square are cropped; the paper's code pads them.

    The arguments are those of [`CLIPReward`].
    """

    default_model = "adams-story/HPSv2-hf"
    architecture = CLIP_H
