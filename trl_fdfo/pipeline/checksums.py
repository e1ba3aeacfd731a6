"""Short checksums that tell two pipelines, datasets or configs apart."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..redaction import without_origin


def config_checksum(config: dict[str, Any]) -> str:
    """Checksum of a diffusers or transformers config, without its origin."""
    return checksum(sorted(without_origin(config).items()))


def weights_checksum(parameters: Iterable[torch.nn.Parameter]) -> str:
    """Checksum of a few values of each weight, quantised or not: enough to tell two models apart."""
    return checksum([_some_values(parameter) for parameter in parameters])


def checksum(value: Any) -> str:
    """Checksum of any value with a `repr` that says all of it: 16 hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _some_values(parameter: torch.Tensor) -> list:
    if is_traceable_wrapper_subclass(parameter):  # torchao's weights cannot be indexed
        return [_some_values(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0]]
    return parameter.flatten()[:16].tolist()


def by_content(value: Any) -> Any:
    """Nested lists, tuples and dicts with a checksum of the content in the place of each tensor, array and image."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), checksum(value.tobytes())]
    if isinstance(value, Image.Image):
        return [value.mode, list(value.size), checksum(value.tobytes())]
    if isinstance(value, dict):
        return {name: by_content(item) for name, item in value.items()}
    return type(value)(by_content(item) for item in value) if isinstance(value, (list, tuple)) else value
