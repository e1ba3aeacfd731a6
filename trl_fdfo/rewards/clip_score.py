"""CLIPScore (arXiv 2104.08718): the agreement of an image with its prompt, by OpenAI's CLIP."""

from .clip import CLIPReward


class CLIPScore(CLIPReward):
    """
    CLIPScore (arXiv 2104.08718), agreement with the prompt: about 15 to 35, higher is better.

    The score is 100 times the cosine of image and prompt by CLIP ViT-L/14. Papers on text-to-image models print this
    number, or the cosine itself, such as 0.28; their numbers differ because their CLIP models do. The CLIPScore paper
    rates captions by max(0, 2.5 cosine) with ViT-B/32, and puts "A photo depicts" before the caption.

    The arguments are those of [`CLIPReward`].
    """
