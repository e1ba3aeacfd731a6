"""LAION's aesthetic predictor: how much people like an image, whatever its prompt. The reward of DDPO (arXiv 2305.13301)."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward
from .weights import linear_layers, load_weights


class AestheticScore(CLIPReward):
    """
    LAION's aesthetic predictor: a rating of about 1 to 10, higher is better. It does not see the prompt.

    The embedding of CLIP ViT-L/14, of length 1, goes through linear layers without activations between them: five in the
    improved predictor, which is the default, one in the first. https://github.com/christophschuhmann/improved-aesthetic-predictor

    Args:
        model (`str`): The [`~transformers.CLIPModel`]: an id of the Hub or a folder.
        head (`str`): The layers: a .pth, .pt or .safetensors file with their state dict, or a folder or an id of the Hub
            that has `aesthetic-model.pth`. They are computed in float32.
        processor (`str`, *optional*): Where the image processor and tokenizer are. Default: where the model is.
        dtype (`str` or `torch.dtype`): Type of the model, such as `"bfloat16"`. The images of a prompt differ by little:
            float32 tells them apart best.
        device (`str` or `torch.device`, *optional*): Where it scores. Default: the device of this process.
        batch_size (`int`): Images scored at a time.
        offload (`bool`): Keep the model on the CPU while the rollout is trained on.

    Raises:
        ValueError: `head` is not made of linear layers from the embedding to one number.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
    ):
        super().__init__(model, processor, dtype=dtype, device=device, batch_size=batch_size, offload=offload)
        weights = load_weights(head, "aesthetic-model.pth")
        # Stays on the CPU: it is small, and so are the embeddings.
        self.head = linear_layers(weights, self.model.config.projection_dim, head)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self.head(self.embed_images(images).cpu()).squeeze(-1)
