"""
Diversity: the mean distance of two images of a prompt, in a feature space. Training toward a reward tends to lower it.

For the S images of a prompt, with features f_1 ... f_S,

    diversity = mean over pairs a < b of distance(f_a, f_b)

A feature space is a callable from images [N, 3, H, W] in [0, 1] to features [N, D]. Its attribute `distance` is a
callable from two tensors [pairs, D] to [pairs]; the default is `cosine_distance`.
"""

import importlib.util
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessorPil

from ..media import to_pil, unbind_frames
from ..rewards.by_name import load_by_name
from ..rewards.clip import CLIPReward
from ..rewards.learned_reward import load_pretrained


Distance = Callable[[Tensor, Tensor], Tensor]  # from two tensors [..., D] to [...]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the angle between vectors [..., D]: 0 to 2, 1 for orthogonal vectors. Shape [...]."""
    # This is half the squared distance of the unit vectors: exactly 0 for equal vectors, and precise for similar ones.
    return (normalize(a, dim=-1) - normalize(b, dim=-1)).square().sum(dim=-1) / 2


def rms_distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square of the difference of vectors [..., D]: 0 to 1 for pixels in [0, 1]. Shape [...]."""
    return (a - b).square().mean(dim=-1).sqrt()


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared length of the difference of vectors [..., D]: of unit vectors twice their cosine distance. Shape [...]."""
    return (a - b).square().sum(dim=-1)


# Distances of embeddings, by the names of options.
DISTANCES = {"cosine": cosine_distance, "squared": squared_distance}


def mean_pairwise_distance(features: Tensor, distance: Distance = cosine_distance) -> Tensor:
    """Mean distance over all pairs of the S images of each of P prompts, at least 2 each: [P, S, D] -> [P]."""
    first, second = torch.combinations(torch.arange(features.shape[1])).unbind(dim=1)
    # One prompt at a time: all pairs of all prompts would take many times the memory of the images.
    return torch.stack([distance(images[first], images[second]).mean() for images in features])


class Diversity:
    """
    Mean distance of two images of a prompt. Its `__name__`, such as "clip_distance", is its name in tables.

    Args:
        features (`Callable`): A feature space, as described at the top of this file.

    Raises:
        ValueError: `features`, or its `distance`, is not callable.
    """

    def __init__(self, features: Callable[[Tensor], Tensor]):
        self.features = features
        self.distance: Distance = getattr(features, "distance", cosine_distance)
        if not callable(features) or not callable(self.distance):
            raise ValueError(
                f"The features {features!r} for diversity must be a callable from images [N, 3, H, W] to a tensor [N, D], "
                "and their attribute `distance`, if there is one, a callable of two tensors [pairs, D]."
            )
        self._features_name = getattr(features, "__name__", type(features).__name__)
        self.__name__ = f"{self._features_name}_distance"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """
        Diversity of each prompt, shape [P], float32 on the CPU; 0 if all images of a prompt are equal.

        Args:
            images (`Tensor`): Floats in [0, 1], S images of each of P prompts, shape [P, S, 3, H, W], on any device.
                The diversity of videos [P, S, F, 3, H, W] is the mean over F of the diversity of simultaneous frames.

        Raises:
            ValueError: The images have another shape, a prompt has a single image, or the features are not finite
                numbers for each image.
        """
        if images.ndim not in (5, 6) or images.shape[-3] != 3:
            raise ValueError(
                f"Diversity got images of shape {list(images.shape)}: it takes [prompts, images per prompt, 3, H, W], or "
                "[prompts, images per prompt, frames, 3, H, W]."
            )
        if images.shape[1] < 2:
            raise ValueError(
                f"Diversity got {images.shape[1]} image(s) of each prompt, but is a distance between images of the same "
                "prompt: sample at least 2."
            )
        return torch.stack([self._of_images(frames) for frames in unbind_frames(images)]).mean(dim=0)

    def _of_images(self, images: Tensor) -> Tensor:
        flat = images.flatten(0, 1)
        features = self.features(flat)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(flat):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The features '{self._features_name}' gave {got} for {len(flat)} images: they must be a tensor of shape "
                f"[{len(flat)}, D]."
            )
        features = features.float()
        if not features.isfinite().all():
            raise ValueError(f"The features '{self._features_name}' have numbers that are not finite.")
        return mean_pairwise_distance(features.unflatten(0, images.shape[:2]), self.distance).float().cpu()


class PixelFeatures:
    """The pixels themselves, compared by the rms of their difference. A shift by a few pixels is a difference."""

    __name__ = "pixel"
    distance = staticmethod(rms_distance)

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class CLIPFeatures:
    """
    CLIP's embeddings, compared by the cosine: content more than layout. The weights are loaded at the first images.

    Args:
        model, processor, dtype, device, batch_size, offload: As in [`~trl_fdfo.rewards.clip.CLIPReward`]. With
            `offload`, the model is on the CPU between calls.

    Raises:
        OSError: The model or the processor does not exist.
    """

    __name__ = "clip"

    def __init__(
        self,
        model: str = CLIPReward.default_model,
        processor: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        batch_size: int = 16,
        offload: bool = False,
    ):
        # Load small files now, so that a wrong name fails early.
        load_pretrained(CLIPConfig, model)
        load_pretrained(CLIPImageProcessorPil, processor or model)
        self.model, self.processor = model, processor
        self._options = {"dtype": dtype, "device": device, "batch_size": batch_size, "offload": offload}

    def __call__(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [0, 1]: vectors of length 1, shape [N, width], float32 on the CPU."""
        features = self._clip.in_batches(self._clip.embed_images, to_pil(images))
        self._clip.on_rollout_end()  # offload the model
        return features

    @cached_property
    def _clip(self) -> CLIPReward:
        return CLIPReward(self.model, self.processor, **self._options)


class DreamSimFeatures:
    """
    DreamSim (arXiv 2306.09344), trained on human judgements of similarity: layout and content. Needs
    `trl_fdfo[dreamsim]`. The weights are loaded at the first images, and downloaded to PyTorch's cache (`TORCH_HOME`).

    Args:
        kind (`str`): The package's `dreamsim_type`: "ensemble", its default and best, or a single model, such as
            "dino_vitb16", which takes about a third of the time.
        distance (`str`): "cosine", DreamSim's own distance; or "squared", the squared distance of the embeddings, about twice
            as large, which is named "dreamsim_squared_distance" in tables.
        device, batch_size: As in [`~trl_fdfo.rewards.learned_reward.LearnedReward`].

    Raises:
        ImportError: The package `dreamsim` is not installed.
        ValueError: `distance` is another, or `batch_size` is less than 1.
    """

    def __init__(
        self,
        kind: str = "ensemble",
        distance: str = "cosine",
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
    ):
        if distance not in DISTANCES:
            raise ValueError(f"distance={distance!r} of DreamSimFeatures is not one of {', '.join(DISTANCES)}.")
        if importlib.util.find_spec("dreamsim") is None:
            raise ImportError('DreamSim needs the package dreamsim: pip install "trl_fdfo[dreamsim]".')
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} of DreamSimFeatures must be at least 1.")
        self.kind, self.batch_size, self._device = kind, batch_size, device
        self.distance = DISTANCES[distance]
        self.__name__ = "dreamsim" if distance == "cosine" else f"dreamsim_{distance}"

    def __call__(self, images: Tensor) -> Tensor:
        """Embed images [N, 3, H, W] in [0, 1]: shape [N, width], float32 on the CPU."""
        model, preprocess, device = self._model
        pixels = torch.cat([preprocess(picture) for picture in to_pil(images)])  # [N, 3, 224, 224]
        return torch.cat([model.embed(batch.to(device)).float().cpu() for batch in pixels.split(self.batch_size)])

    @cached_property
    def _model(self) -> tuple[Any, Callable[[Image.Image], Tensor], torch.device]:
        from dreamsim import dreamsim

        device = torch.device(self._device) if self._device is not None else PartialState().device
        folder = Path(torch.hub.get_dir(), "dreamsim", self.kind)
        folder.mkdir(parents=True, exist_ok=True)
        # The lock keeps other processes from downloading the same zip file into the same folder.
        with FileLock(folder.with_suffix(".lock")):
            model, preprocess = dreamsim(
                pretrained=True, device=str(device), cache_dir=str(folder), dreamsim_type=self.kind
            )
        return model, preprocess, device


FEATURES = {"clip": CLIPFeatures, "dreamsim": DreamSimFeatures, "pixels": PixelFeatures}


def load_diversity(spec: str) -> Diversity:
    """
    The diversity in the feature space that a string names: "clip", "dreamsim", "pixels", or `module:name` of a feature
    space, as described at the top of this file, on the Python path or in the working directory. Options may follow in
    parentheses, as for a reward: `"clip(model='openai/clip-vit-base-patch32')"`.

    Raises:
        ImportError: A package is missing.
        OSError: A model does not exist.
        ValueError: `spec` names nothing that exists, or has unknown options.
    """
    return Diversity(load_by_name(spec, FEATURES, "diversity"))


def load_working_diversity(spec: str, image_size: tuple[int, int], device: torch.device) -> Diversity:
    """
    Call `load_diversity` and try the diversity on noise of `image_size`, height and width in pixels, on the device of
    the images: otherwise a run would find out after its first rollouts.

    Raises:
        ValueError: The diversity cannot be measured, such as without its weights.
    """
    noise = torch.rand(1, 2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    try:
        diversity = load_diversity(spec)
        diversity(noise.to(device))
    except Exception as error:
        raise ValueError(
            f"eval_diversity='{spec}' does not work here ({type(error).__name__}: {error}). Where weights "
            "or a package are missing, get them first or name a folder, such as \"clip(model='folder')\"; "
            "eval_diversity='pixels' needs neither, and leaving the option out measures none."
        ) from error
    return diversity
