"""LAION's aesthetic predictor: the appeal of an image, without its prompt. A reward of DDPO (arXiv 2305.13301)."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .clip import CLIPReward
from .weights import linear_layers, load_weights


class AestheticScore(CLIPReward):
    """
    LAION's aesthetic predictor: a rating of about 1 to 10, higher is better. It does not see the prompt.

    The CLIP ViT-L/14 embedding, of length 1, passes through linear layers without activations: five in the improved
    predictor, which is the default, one in the first.
    https://github.com/christophschuhmann/improved-aesthetic-predictor

    Args:
        head (`str`): The layers, computed in float32: a .pth, .pt or .safetensors file with their state dict, or a Hub
            id or folder with a file `aesthetic-model.pth`.
        model, processor, dtype, device, batch_size, offload, frames: As in [`CLIPReward`].

    Raises:
        ValueError: `head` is not a stack of linear layers from the embedding to one number.
    """

    def __init__(
        self,
        model: str | None = None,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
        frames: str = "mean",
    ):
        super().__init__(
            model, processor, dtype=dtype, device=device, batch_size=batch_size, offload=offload, frames=frames
        )
        # The head stays on the CPU: it is small, and so are the embeddings.
        weights = load_weights(head, "aesthetic-model.pth")
        self.head = linear_layers(weights, self.model.config.projection_dim, source=head).requires_grad_(False)

    def score(self, images: Sequence[Image.Image] | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        return self.head(self.embed_images(images).cpu()).squeeze(-1)
