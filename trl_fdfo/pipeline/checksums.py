"""Short checksums that tell two pipelines, datasets or configs apart."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
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
