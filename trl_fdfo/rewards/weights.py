"""Loads published weights that are a file of tensors, not a model of `transformers`."""

import os
import pickle
import re

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file


def load_weights(name_or_path: str, filename: str) -> dict[str, Tensor]:
    """
    Load the named tensors of a file to the CPU. `name_or_path` is a .pth, .pt or .safetensors file, or a Hub id or
    folder with a file `filename`.

    Raises:
        OSError: The file does not exist.
        ValueError: The file is not a dict of tensors.
    """
    try:
        path = name_or_path if os.path.isfile(name_or_path) else cached_file(name_or_path, filename)
    except OSError as error:
        raise OSError(
            f"Cannot load '{name_or_path}', which must be a file, or a folder or a model of the Hub with a file "
            f"{filename}: {error}"
        ) from error
    try:
        weights = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError):
        weights = None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(
            f"'{path}' has something else than a dict of tensors. It must be the state dict of a module, and is read "
            "without unpickling other objects."
        )
    return weights


def linear_layers(weights: dict[str, Tensor], width: int, source: str) -> nn.Sequential:
    """
    A stack of linear layers, in float32, that maps an embedding of `width` numbers to one number.

    Args:
        weights (`dict[str, Tensor]`): Weight [out, in] and bias [out] of each layer, such as `layers.0.weight` and
            `layers.0.bias`. The numbers in the names give the order.
        source (`str`): Origin of the weights, for the error.

    Raises:
        ValueError: The weights are not linear layers from `width` numbers to one.
    """
    # Sort by number: a safetensors file has layers.10 before layers.2. Dropout layers leave gaps in the numbers.
    names = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    names.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    widths = [width, *(weights[f"{name}weight"].shape[:1].numel() for name in names)]
    shapes = {}
    for name, width_in, width_out in zip(names, widths, widths[1:]):
        shapes[f"{name}weight"] = (width_out, width_in)
        shapes[f"{name}bias"] = (width_out,)
    if not names or widths[-1] != 1 or shapes != {name: tuple(tensor.shape) for name, tensor in weights.items()}:
        found = [f"{name} {list(tensor.shape)}" for name, tensor in weights.items()]
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise ValueError(
            f"'{source}' must have linear layers, a weight [out, in] and a bias [out] each, that lead from the {width} "
            f"numbers of the embedding to 1; it has {', '.join(found[:10]) or 'no tensors'}{more}."
        )
    layers = [nn.utils.skip_init(nn.Linear, *pair) for pair in zip(widths, widths[1:])]
    for name, layer in zip(names, layers):
        layer.load_state_dict({"weight": weights[f"{name}weight"], "bias": weights[f"{name}bias"]})
    return nn.Sequential(*layers)


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type, also by its name, such as "bfloat16"; a ValueError for any other `dtype`."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating-point type, such as 'float32' or 'bfloat16'.")
    return found
