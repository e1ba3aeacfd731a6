"""The base class of rewards that are models of `transformers`: loading, device, batches, videos."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..media import mean_over_frames, split_frames


class LearnedReward:
    """
    A reward that is a model. Subclasses load it in their constructor and implement `score`.

    Args:
        model (`nn.Module`): The model, on the CPU.
        device (`str` or `torch.device`, *optional*): Device of the model. Default: the device of this process.
        batch_size (`int`): Images scored at a time.
        offload (`bool`): Keep the model on the CPU while the policy is trained.

    Raises:
        ValueError: `batch_size` is less than 1.
    """

    image_type = "pil"

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} of {type(self).__name__} must be at least 1.")
        self.model = model.requires_grad_(False).eval()
        self._device = device
        self.batch_size = batch_size
        self.offload = offload

    @property
    def device(self) -> torch.device:
        # PartialState is asked at the first images, when the launcher or the trainer has assigned the device.
        return torch.device(self._device) if self._device is not None else PartialState().device

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): N images, or N videos as lists of frames. A video scores the mean over
                its frames.
            prompts (`Sequence[str]`): N prompts.

        Returns:
            `Tensor`: N scores, float32 on the CPU.
        """
        counts, frames, prompts = split_frames(images, prompts)
        self.model.to(self.device)
        batches = range(0, len(frames), self.batch_size)
        scores = [self.score(frames[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in batches]
        return mean_over_frames(torch.cat(scores).float().cpu(), counts)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores of a batch, shape [batch], on any device."""
        raise NotImplementedError

    def on_rollout_end(self) -> None:
        if self.offload:
            self.model.to("cpu")


def load_pretrained(model_class: type, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """
    `model_class.from_pretrained`, without remote code.

    Raises:
        OSError: The folder or model does not exist.
    """
    try:
        return model_class.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except OSError as error:
        # Some messages of the Hub do not name the model.
        raise OSError(
            f"Cannot load a {model_class.__name__} from '{name_or_path}', which must be a folder or a model of the Hub: "
            f"{error}"
        ) from error
