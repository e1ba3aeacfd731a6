"""The merges of `trl-fdfo merge`: into a pipeline, into a checkpoint of the model's authors, and into one LoRA file."""

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import shapes
from ..pipeline.adapter_files import read_adapter, read_call_options, save_call_options
from ..pipeline.loading import load_pipeline
from ..pipeline.lora import add_adapter
from ..pipeline.merging import AdaptedLayer, adapted_layers, give_empty_weights, low_rank_factors
from ..pipeline.options import is_quantized
from ..pipeline.original_layout import OriginalFile, Part
from ..pipeline.trained import TRAINED, restore_point, trained_modules
from ..planning.without_weights import load_without_weights
from ..redaction import forget_origin
from .arguments import MergeArguments
from .models import find_adapters, model_options


NOTHING = "The adapters change no weight: they are untrained, or their scale is 0."


@dataclass
class Rounding:
    """What rounding to the dtype of the file takes from the change of the weights."""

    change: float = 0.0
    error: float = 0.0

    def add(self, before: Tensor, merged: Tensor, rounded: Tensor) -> None:
        self.change += (merged - before.float()).square().sum().item()
        self.error += (rounded.float() - merged).square().sum().item()

    def __str__(self) -> str:
        if not self.change:
            raise ValueError(NOTHING)
        share = (self.error / self.change) ** 0.5
        advice = " Merge in float32, or keep the adapter as a LoRA file." if share > 0.1 else ""
        return f"Rounding changes what the adapters add by {share:.2%} (rms).{advice}"


def merge(arguments: MergeArguments) -> None:
    """
    Raises:
        ValueError: The adapters are for another model, or change nothing; or files do not fit each other.
    """
    arguments.component = arguments.component or TRAINED
    if arguments.model == "shapes":
        arguments.model = str(shapes.PIPELINE_FOLDER)
    adapters = list(find_adapters(arguments.adapter).values())
    scales = arguments.scale * len(adapters) if len(arguments.scale) == 1 else arguments.scale
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write = {"pipeline": merge_pipeline, "checkpoint": merge_checkpoint, "lora": merge_lora}[arguments.format]
    write(arguments, adapters, scales, output)


def merge_pipeline(arguments: MergeArguments, adapters: list[Path], scales: list[float], output: Path) -> None:
    """
    Write the pipeline with the adapters in its weights, and with the arguments of the call that they were trained with.

    Raises:
        ValueError: An adapter is for another pipeline or changes nothing, or the transformer is quantised.
    """
    dtype = _stored_dtypes(arguments.model) if arguments.dtype is None else getattr(torch, arguments.dtype)
    pipeline = load_pipeline(arguments.model, dtype=dtype)
    for name, transformer in trained_modules(pipeline).items():
        if is_quantized(transformer):
            raise ValueError(
                f"{name} of '{arguments.model}' is quantised: what an adapter adds would be lost in the rounding. Give the "
                "pipeline in bfloat16."
            )
    rounding = Rounding()
    for path, scale in zip(adapters, scales):
        _merge_into(pipeline, path, scale, rounding)
    report = str(rounding)
    trained = [options for options in map(read_call_options, adapters) if options is not None]
    options = model_options(arguments.model) | (trained[0] if trained else {})
    if any(own != trained[0] for own in trained):
        options = {}
        report += " The adapters were trained with different steps, guidance or sizes: say which to sample it with."
    # A full disk must not cost the old folder: it is deleted after the new one is written.
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        pipeline.save_pretrained(unfinished)
        forget_origin(unfinished)
        if options:
            save_call_options(options, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    unfinished.rename(output)
    print(f"{output}: '{arguments.model}' with {', '.join(arguments.adapter)}. {report}")


def _stored_dtypes(model: str) -> dict[str, torch.dtype]:
    """The dtype of the largest weight of each component: `from_pretrained` would take float32 for all."""
    folder = Path(model) if Path(model).is_dir() else Path(DiffusionPipeline.download(model))
    dtypes = {}
    for file in folder.glob("*/*.safetensors"):
        if file.name.count(".") == 1:  # no variant, such as model.fp16.safetensors, which is not loaded
            with safe_open(file, "pt") as stored:
                largest = max(stored.keys(), key=lambda name: math.prod(stored.get_slice(name).get_shape()))
                dtypes[file.parent.name] = stored.get_tensor(largest).dtype
    return dtypes


def _merge_into(pipeline: DiffusionPipeline, path: Path, scale: float, rounding: Rounding) -> None:
    restore = restore_point(pipeline)
    try:
        model = add_adapter(pipeline, *read_adapter(pipeline, str(path)))
        for layer in adapted_layers(model).values():
            weights = {name: weight for name, weight in layer.base._parameters.items() if weight is not None}
            for name, merged in layer.merge(weights, scale).items():
                before = weights[name].data
                weights[name].data = merged.to(before.dtype)
                rounding.add(before, merged, weights[name].data)
    finally:
        restore()


class _Layers:
    """The adapted layers of one transformer of a pipeline without weights, for each adapter."""

    def __init__(self, arguments: MergeArguments, adapters: list[Path], scales: list[float]):
        self.name = arguments.component
        self.transformer = self._component(load_without_weights(arguments.model, torch.float32))
        self._merges = [(self._read(arguments, path), scale) for path, scale in zip(adapters, scales)]
        self.ranks: dict[str, int] = {}
        self.weights: dict[str, dict[str, torch.Size]] = {}  # shapes by the layer's name and the weight's own
        for layers, _ in self._merges:
            for name, layer in layers.items():
                self.ranks[name] = self.ranks.get(name, 0) + layer.rank
                own = layer.base._parameters.items()
                self.weights[name] = {key: weight.shape for key, weight in own if weight is not None}
        if not self.weights:
            raise ValueError(
                f"The adapters are on no layer of `{self.name}`: name the transformer in `component` that they are on."
            )

    def _component(self, pipeline: DiffusionPipeline) -> nn.Module:
        transformers = trained_modules(pipeline)
        if self.name not in transformers:
            raise ValueError(
                f"component='{self.name}' is no transformer of {type(pipeline).__name__}: it has {', '.join(transformers)}."
            )
        return transformers[self.name]

    def _read(self, arguments: MergeArguments, path: Path) -> dict[str, AdaptedLayer]:
        pipeline = load_without_weights(arguments.model, torch.float32)
        give_empty_weights(pipeline)
        model = add_adapter(pipeline, *read_adapter(pipeline, str(path)))
        config = model.peft_config["default"]
        plain = isinstance(config, LoraConfig) and not config.use_dora and not config.target_parameters
        if arguments.format == "lora" and not plain:
            kind = "DoRA" if getattr(config, "use_dora", False) else type(config).__name__.removesuffix("Config")
            raise ValueError(
                f"adapter='{path}' is no plain LoRA of layers but {kind}: write it into a checkpoint or a pipeline, with "
                "another `format`."
            )
        layers = adapted_layers(model)
        if len(trained_modules(pipeline)) == 1:
            return layers
        own = f"{self.name}."
        return {name.removeprefix(own): layer for name, layer in layers.items() if name.startswith(own)}

    def names(self, layer: str) -> list[str]:
        """The full names of a layer's weights."""
        return [f"{layer}.{name}" for name in self.weights[layer]]

    def merge(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights, by their full names and whole layers, with the adapters in them, in float32."""
        merged = {}
        for layer in sorted({name.rpartition(".")[0] for name in weights}):
            own = {name: weights[f"{layer}.{name}"] for name in self.weights[layer]}
            for layers, scale in self._merges:
                if layer in layers:
                    own = layers[layer].merge(own, scale)
            merged |= {f"{layer}.{name}": weight for name, weight in own.items()}
        return merged

    def added(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """What the adapters, which must be LoRA, add to the weights of layers."""
        empty = {
            f"{layer}.{name}": torch.zeros(shape) for layer in layers for name, shape in self.weights[layer].items()
        }
        return self.merge(empty)


def merge_checkpoint(arguments: MergeArguments, adapters: list[Path], scales: list[float], output: Path) -> None:
    """
    Write a copy of the original file with the adapters in its weights.

    Raises:
        ValueError: The file is quantised or of another model, an adapter is for another pipeline or changes nothing, or
            diffusers' conversion of the new weights is not the pipeline with the adapters.
    """
    layers = _Layers(arguments, adapters, scales)
    original = OriginalFile(Path(arguments.original), layers.transformer)
    parts = original.parts([layers.names(layer) for layer in layers.weights])
    rounding = Rounding()

    def changed() -> Iterator[dict[str, Tensor]]:
        for part in parts:
            tensors = original.read(part)
            plain = {name: weight.float() for name, weight in original.to_diffusers(part, tensors).items()}
            merged = layers.merge(plain)
            new = {}
            for key, change in original.to_original(part, {name: merged[name] - plain[name] for name in plain}).items():
                exact = tensors[key].float() + change
                new[key] = exact.to(tensors[key].dtype)
                rounding.add(tensors[key], exact, new[key])
            tolerance = 4 * max(torch.finfo(tensor.dtype).eps for tensor in new.values())
            _check_conversion(part, original.to_diffusers(part, new), merged, tolerance)
            yield new
        report.append(str(rounding))

    report: list[str] = []
    original.write(output, changed())
    print(f"{output}: {original.path} with {', '.join(arguments.adapter)}. {report[0]}")


def _check_conversion(part: Part, weights: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, weight in weights.items():
        distance = (weight.float() - expected[name]).abs().max()
        if not distance <= tolerance * expected[name].abs().max():
            raise ValueError(
                f"{name} would not be what diffusers makes of {', '.join(sorted(part.keys))} in the new file: it is off by "
                f"{distance:.2g}. diffusers' conversion does more than move numbers, and cannot be turned round. Nothing "
                "was written; write a pipeline, or a LoRA with diffusers' names."
            )


def merge_lora(arguments: MergeArguments, adapters: list[Path], scales: list[float], output: Path) -> None:
    """
    Write one LoRA of scale 1 that adds what the adapters add, so that a program needs to know no alpha.

    Raises:
        ValueError: An adapter is no LoRA, for another pipeline or changes nothing, or the original file is of another model.
    """
    layers = _Layers(arguments, adapters, scales)
    original = OriginalFile(Path(arguments.original), layers.transformer) if arguments.original else None
    changes = _changes(layers) if original is None else _original_changes(layers, original)
    dtype = getattr(torch, arguments.dtype or "float32")
    tensors = {}
    for name, change, rank in changes:
        if change.any():
            if change.ndim != 2:
                raise ValueError(f"The adapters change {name}, which is no matrix: write a checkpoint or a pipeline.")
            a, b = low_rank_factors(change, rank)
            tensors |= {f"{name}.lora_A.weight": a.to(dtype), f"{name}.lora_B.weight": b.to(dtype)}
    if not tensors:
        raise ValueError(NOTHING)
    save_file(tensors, output, metadata={"format": "pt"})
    print(f"{output}: {', '.join(arguments.adapter)} on {len(tensors) // 2} layers, such as {min(tensors)}")


def _changes(layers: _Layers) -> Iterator[tuple[str, Tensor, int]]:
    """What the adapters add, with the rank of it, by the names of diffusers' LoRA files."""
    for layer, rank in layers.ranks.items():
        for name, change in layers.added([layer]).items():
            yield f"{TRAINED}.{name.removesuffix('.weight')}", change, rank


def _original_changes(layers: _Layers, original: OriginalFile) -> Iterator[tuple[str, Tensor, int]]:
    """The same by ComfyUI's names, in the layout of a file."""
    for part in original.parts([layers.names(layer) for layer in layers.weights]):
        own = sorted({name.rpartition(".")[0] for name in part.names})
        added = layers.added(own)
        changes = original.to_original(part, added)
        _check_conversion(part, original.to_diffusers(part, changes), added, tolerance=1e-6)
        for key, change in changes.items():
            yield original.comfyui_name(key), change, sum(layers.ranks[layer] for layer in own)
