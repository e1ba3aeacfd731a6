"""The base class of rewards that are models of `transformers`: loading, device, batches, videos."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..media import checked_frames, over_frames, split_frames
from ..offload import HostCopy


class LearnedReward:
    """
    A reward that is a model. Subclasses load it in their constructor and implement `score`. One with `differentiable = True`
    also scores images that are tensors, with gradients to them.

    Args:
        model (`nn.Module`): The model, on the CPU.
        device (`str` or `torch.device`, *optional*): Device of the model. Default: the device of this process.
        batch_size (`int`): Images scored at a time.
        offload (`bool`): Keep the model on the CPU while the policy is trained.
        frames (`str`): A video scores the `"mean"` over its frames, or that of its worst one, `"min"`.

    Raises:
        ValueError: `batch_size` is less than 1, or `frames` is something else.
    """

    image_type = "pil"
    differentiable = False

    no_effect = ("offload",)

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
        frames: str = "mean",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} of {type(self).__name__} must be at least 1.")
        self.model = model.requires_grad_(False).eval()
        self._device = device
        self.batch_size = batch_size
        self.offload = offload
        self._host_copy = HostCopy(self.model)
        self.frames = checked_frames(frames, type(self).__name__)

    @property
    def device(self) -> torch.device:
        # PartialState is asked at the first images, when the launcher or the trainer has assigned the device.
        return torch.device(self._device) if self._device is not None else PartialState().device

    def __call__(self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Score N images, or N videos as lists of frames: float32 on the CPU, shape [N]. If the reward is differentiable, also
        tensors [N, 3, H, W] or [N, F, 3, H, W] in [0, 1].
        """
        counts, frames, prompts = split_frames(images, prompts)
        return over_frames(self.in_batches(self.score, frames, prompts), counts, self.frames)

    def score(self, images: Sequence[Image.Image] | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Score a batch: shape [batch], on any device."""
        raise NotImplementedError

    def in_batches(self, score: Callable[..., Tensor], *columns: Sequence) -> Tensor:
        """
        Call `score` on `batch_size` of the N values of each column at a time: float32 on the CPU, shape [N, ...]. It has
        gradients if values of the first column do.
        """
        (self._host_copy if self.offload else self.model).to(self.device)
        starts = range(0, len(columns[0]), self.batch_size)
        batches = [[column[start : start + self.batch_size] for column in columns] for start in starts]
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in columns[0]):
            # The backward pass computes each batch again, and so holds the activations of one at a time.
            scores = [checkpoint(score, *batch, use_reentrant=False) for batch in batches]
        else:
            with torch.no_grad():
                scores = [score(*batch) for batch in batches]
        return torch.cat(scores).float().cpu()

    def planned_call(self) -> dict[str, Tensor] | None:
        """Arguments without data of the call of `model` that scores `batch_size` images; None if a plan does not count it."""
        return None

    def on_rollout_end(self) -> None:
        if self.offload:
            self._host_copy.to("cpu")


def load_pretrained(model_class: type, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """`model_class.from_pretrained`, without remote code; an OSError if the folder or model does not exist."""
    try:
        return model_class.from_pretrained(name_or_path, trust_remote_code=False, **kwargs)
    except OSError as error:
        # Some messages of the Hub do not name the model.
        raise OSError(
            f"Cannot load a {model_class.__name__} from '{name_or_path}', which must be a folder or a model of the Hub: "
            f"{error}"
        ) from error
