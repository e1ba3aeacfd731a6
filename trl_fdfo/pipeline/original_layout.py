"""
The single file that a model's authors published, in their own names and shapes, which ComfyUI and WebUIs load.

diffusers converts such a file into its own layout: it renames, cuts, joins and permutes. The converter is followed here,
without a table of names: on tensors of the meta device its autograd graph tells which tensors of the file a weight is made
of, and since it only moves numbers, its derivative with respect to the file, transposed, is its inverse.
"""

import json
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


# What ComfyUI takes off the names of a file (`unet_prefix_from_state_dict` in its comfy/model_detection.py).
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.")


@dataclass(frozen=True)
class Part:
    """
    Weights that share tensors of the file, such as query, key and value of one fused projection.

    Attributes:
        names (`frozenset[str]`): Weights of diffusers' transformer.
        keys (`frozenset[str]`): The tensors of the file that they are made of.
    """

    names: frozenset[str]
    keys: frozenset[str]


class OriginalFile:
    """
    A safetensors file in the layout of a model's authors.

    Args:
        path (`Path`): The file. It may hold other models too, such as a VAE.
        transformer (`nn.Module`): diffusers' transformer, whose config and shapes count and whose weights do not.

    Raises:
        ValueError: diffusers cannot convert files for this transformer, or not this one.
    """

    def __init__(self, path: Path, transformer: nn.Module):
        self.path = path
        self._transformer = type(transformer).__name__
        table = SINGLE_FILE_LOADABLE_CLASSES
        own = (name for name in table if isinstance(transformer, getattr(diffusers, name, ())))
        class_name = next(own, None)
        if class_name is None:
            raise ValueError(
                f"diffusers converts no original files for {self._transformer}: they would be {', '.join(table)}."
            )
        self._convert_file = table[class_name]["checkpoint_mapping_fn"]
        self._config = dict(transformer.config)
        self._names = {name: weight.shape for name, weight in transformer.state_dict().items()}
        try:
            with safe_open(path, "pt") as stored:
                slices = {key: stored.get_slice(key) for key in stored.keys()}
                self.shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"original='{path}' is no safetensors file ({error}).") from error
        self._check()

    def _convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors in diffusers' layout, by diffusers' converter; those not given are on the meta device."""
        absent = {key: shape for key, shape in self.shapes.items() if key not in tensors}
        file = {**{key: torch.empty(shape, device="meta") for key, shape in absent.items()}, **tensors}
        if file.keys() == self._names.keys():
            return file
        return self._convert_file(config=self._config, checkpoint=file)

    def _check(self) -> None:
        examples = f"The file has {len(self.shapes)} tensors, such as {', '.join(sorted(self.shapes)[:3])}."
        try:
            shapes = {name: tuple(weight.shape) for name, weight in self._convert({}).items()}
        except Exception as error:
            raise ValueError(
                f"original='{self.path}' cannot be converted to {self._transformer} by diffusers ({type(error).__name__}: "
                f"{error}). {examples} Give the file that the model's authors published, or one with its names."
            ) from error
        wrong = sorted(name for name, shape in self._names.items() if shapes.get(name, tuple(shape)) != tuple(shape))
        missing = sorted(self._names.keys() - shapes.keys())
        # A table of positions may be longer in the file than in the transformer, or not be there.
        other = [name for name in (*missing, *wrong) if name.endswith((".weight", ".bias"))]
        if other:
            raise ValueError(
                f"original='{self.path}' is the file of another model: {len(other)} weights of {self._transformer}, such as "
                f"{other[0]}, are {'not in it' if other[0] in missing else 'of another shape'} after diffusers' conversion. "
                f"{examples}"
            )

    def parts(self, layers: Iterable[Collection[str]]) -> list[Part]:
        """
        The weights of layers, together with the tensors of the file that they are made of.

        Args:
            layers (`Iterable[Collection[str]]`): Names of the weights of each layer, which stay in one part.

        Raises:
            ValueError: A weight is made of no tensor of the file.
        """
        leaves = {key: torch.empty(shape, device="meta").requires_grad_() for key, shape in self.shapes.items()}
        converted = self._convert(dict(leaves))
        parts: list[Part] = []
        for names in layers:
            keys: set[str] = set()
            for name in names:
                sources = _sources(converted.get(name), leaves)
                if not sources:
                    raise ValueError(f"{name} of {self._transformer} is made of no tensor of original='{self.path}'.")
                keys |= sources
            sharing = [part for part in parts if part.keys & keys]
            parts = [part for part in parts if part not in sharing]
            names = frozenset(names).union(*(part.names for part in sharing))
            parts.append(Part(names, frozenset(keys).union(*(part.keys for part in sharing))))
        return parts

    def read(self, part: Part) -> dict[str, Tensor]:
        """
        The tensors of a part as they are in the file.

        Raises:
            ValueError: They are quantised.
        """
        with safe_open(self.path, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in sorted(part.keys)}
        for key, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"original='{self.path}' is quantised ({key} is {tensor.dtype}): what an adapter adds would be lost in "
                    "the rounding. Give the file in bfloat16, or write a LoRA (--format lora)."
                )
        return tensors

    def to_diffusers(self, part: Part, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a part, from its tensors in the layout of the file."""
        converted = self._convert(tensors)
        return {name: converted[name] for name in part.names}

    def to_original(self, part: Part, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a part in the layout of the file, from its weights in float32; 0 where they come from others."""
        leaves = {key: torch.zeros(self.shapes[key]).requires_grad_() for key in sorted(part.keys)}
        converted = self.to_diffusers(part, leaves)
        grads = torch.autograd.grad(
            [converted[name] for name in sorted(part.names)],
            list(leaves.values()),
            [weights[name] for name in sorted(part.names)],
        )
        return dict(zip(leaves, grads))

    def comfyui_name(self, key: str) -> str:
        """The name by which ComfyUI finds a tensor of the file from a LoRA, without `.weight`."""
        prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
        return f"diffusion_model.{key.removeprefix(prefix).removesuffix('.weight')}"

    def write(self, output: Path, changed: Iterable[dict[str, Tensor]]) -> None:
        """
        Copy the file with some tensors changed, which are written one after the other.

        Args:
            output (`Path`): File to write. It appears when it is whole.
            changed (`Iterable[dict[str, Tensor]]`): New tensors, in the dtypes of the file.
        """
        unfinished = output.with_name(f"{output.name}.unfinished")
        try:
            shutil.copyfile(self.path, unfinished)
            with open(unfinished, "r+b") as file:
                # A length, a JSON object of that length, and the numbers (github.com/huggingface/safetensors#format).
                length = int.from_bytes(file.read(8), "little")
                places = json.loads(file.read(length))
                for tensors in changed:
                    for key, tensor in tensors.items():
                        file.seek(8 + length + places[key]["data_offsets"][0])
                        file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)


def _sources(weight: Tensor | None, leaves: dict[str, Tensor]) -> set[str]:
    """The names of the leaves that a weight was computed from."""
    if weight is None or not weight.requires_grad:
        return set()
    gradients = torch.autograd.grad(
        weight, list(leaves.values()), torch.empty_like(weight), retain_graph=True, allow_unused=True
    )
    return {key for key, gradient in zip(leaves, gradients) if gradient is not None}
