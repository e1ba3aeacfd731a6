"""What tells a value apart in any process and on any machine, for files that are compared or shared."""

import re
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..pipeline.checksums import checksum
from ..redaction import without_folders


def identity(value: Any) -> Any:
    """
    A JSON value for any value, equal if and only if two runs mean the same: scalars, lists and dicts as they are, the last
    part of an absolute path, a checksum of a tensor or an image, the name of a function or of an object's class.
    """
    if isinstance(value, Enum):
        return identity(value.value)
    if isinstance(value, (str, Path)):
        return str(without_folders(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(identity, value), key=str)
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} {list(value.shape)} {checksum(value.tolist())}"
    if isinstance(value, Image.Image):
        return f"{value.mode} image {list(value.size)} {checksum(value.tobytes())}"
    # Functions and objects without a `repr` of their own have their address in it, which each process has anew.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
