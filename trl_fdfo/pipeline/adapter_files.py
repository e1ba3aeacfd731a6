"""Reads adapter files in PEFT's and diffusers' format, and writes files in diffusers' format."""

import functools
import inspect
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import parse_hf_uri, snapshot_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from .checks import check_own_layers, check_trainable
from .trained import TRAINED, restore_point, trained_module, trained_modules


logger = logging.get_logger(__name__)

CALL_OPTIONS = "generation_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
AVERAGED_WEIGHTS_NAME = "averaged_weights.safetensors"  # beside a checkpoint's weights

_PEFT_PREFIX = "base_model.model."


class OtherComponentsError(ValueError):
    """An adapter has weights for other components of the pipeline than the transformer."""


def find_adapter(name_or_path: str) -> Path:
    """
    The folder or file of an adapter; from the Hub its files are downloaded, without those of checkpoints in subfolders.

    Args:
        name_or_path (`str`): Folder or file here; or `owner/name`, `owner/name@revision`, either with `/folder` or
            `/folder/file.safetensors` after it, or the address of such a page of the Hub.

    Raises:
        ValueError: There is no such adapter.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = _download(name_or_path)
    if path.is_dir() and not (path / CONFIG_NAME).is_file() and not (path / DIFFUSERS_FILE).is_file():
        files = list(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(
                f"adapter='{name_or_path}' has neither {DIFFUSERS_FILE} (diffusers) nor {CONFIG_NAME} (PEFT), and "
                f"{len(files)} other .safetensors files: name the folder or the file."
            )
        return files[0]
    return path


def _download(name: str) -> Path:
    try:
        place = parse_hf_uri(name if "://" in name else f"hf://{name}", ENDPOINT)
        if place.type != "model":
            raise ValueError(f"a {place.type} of the Hub holds no adapter")
        inside = PurePosixPath(place.path_in_repo)
        folder = inside.parent if inside.suffix == ".safetensors" else inside
        files = [str(folder / file) for file in (CONFIG_NAME, CALL_OPTIONS, "adapter_model.bin", "*.safetensors")]
        repo = snapshot_download(
            place.id, revision=place.revision, allow_patterns=files, ignore_patterns=[str(folder / "*/*")]
        )
    except (OSError, HTTPError, ValueError) as error:
        raise ValueError(
            f"adapter='{name}' is no folder or file here, and was not found on the Hub ({error})."
        ) from error
    path = Path(repo, inside)
    if not path.exists():
        raise ValueError(f"adapter='{name}': {place.id} has no adapter in '{inside}'.")
    return path


def read_adapter(pipeline: DiffusionPipeline, name_or_path: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """
    Read an adapter that was trained before, with the rank and alpha of its files; the pipeline is left as it is.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline that the adapter is for.
        name_or_path (`str`): The adapter, as [`find_adapter`] takes it, in PEFT's format, or in any that
            `pipeline.load_lora_weights` converts. If a folder has both, PEFT's is taken.

    Returns:
        `tuple[PeftConfig, dict[str, Tensor]]`: The arguments of [`add_adapter`].

    Raises:
        OtherComponentsError: It has weights for other components than the transformer.
        ValueError: There is no such adapter, it is in no format that can be read whole, or the pipeline has one already.
    """
    check_own_layers(pipeline)
    check_trainable(pipeline)
    path = find_adapter(name_or_path)
    if path.name == SAFETENSORS_WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        path = path.parent
    try:
        if (path / CONFIG_NAME).is_file():
            peft_config = PeftConfig.from_pretrained(path)
            weights = load_peft_weights(str(path), device="cpu")
            weights = _averaged(path, weights)
        else:
            peft_config, weights = _read_by_diffusers(pipeline, path)
    except OtherComponentsError:
        raise
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"adapter='{name_or_path}' cannot be read ({type(error).__name__}: {error})") from error
    # Options of its earlier training do not apply here.
    peft_config.inference_mode, peft_config.task_type, peft_config.auto_mapping = False, None, None
    for name in vars(peft_config):
        if name.endswith("dropout"):
            setattr(peft_config, name, 0.0)
    return peft_config, weights


def _averaged(checkpoint: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of a run's checkpoint, where PEFT's file has those to train on; else `weights`."""
    file = checkpoint / AVERAGED_WEIGHTS_NAME
    if not file.is_file():
        return weights
    averaged = {name.replace(".default", ""): weight for name, weight in load_file(file).items()}
    if averaged.keys() != weights.keys():
        logger.warning(
            f"{file} has other names than the adapter beside it, whose weights are taken as they were trained, not their average. "
            "The result of the run has the average."
        )
        return weights
    return {name: averaged[name].to(weight.dtype) for name, weight in weights.items()}


def _read_by_diffusers(pipeline: DiffusionPipeline, path: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    # Some pipelines have the loader of another model.
    if TRAINED not in getattr(pipeline, "_lora_loadable_modules", ()):
        raise ValueError(
            f"{path} has no {CONFIG_NAME}, and {type(pipeline).__name__} has no LoRA loader of its own: give it PEFT's "
            "files, an adapter_config.json beside an adapter_model.safetensors."
        )
    file = path if path.is_file() else path / DIFFUSERS_FILE
    if len(trained_modules(pipeline)) > 1:
        raise ValueError(
            f"{file} is an adapter on one transformer, and {type(pipeline).__name__} has "
            f"{', '.join(trained_modules(pipeline))}: give PEFT's files, an {CONFIG_NAME} beside an "
            f"{SAFETENSORS_WEIGHTS_NAME}, whose names say which."
        )
    with safe_open(file, "pt") as stored:
        if any("dora_scale" in name for name in stored.keys()):
            raise ValueError(f"{file} is a DoRA, whose `dora_scale` diffusers would drop: give it in PEFT's format.")
    transformer = trained_module(pipeline)
    # diffusers converts the formats of other programs, and finds the rank and alpha of each layer.
    arguments = {"weight_name": file.name, "adapter_name": "default"}
    stored = pipeline.lora_state_dict(file.parent, weight_name=file.name)
    components = {name.partition(".")[0] for name in stored}
    if components == {TRAINED}:
        load = pipeline.load_lora_weights
        stored = {name.removeprefix(f"{TRAINED}."): value for name, value in stored.items()}
    elif all(_layer(name) in dict(transformer.named_modules()) for name in stored):
        load = functools.partial(transformer.load_lora_adapter, prefix=None)  # saved by the transformer itself
    elif components <= pipeline.components.keys():
        raise OtherComponentsError(
            f"{file} has weights for {', '.join(sorted(components - {TRAINED}))}, and only the transformer is trained here. "
            "Make the adapter part of the pipeline with `load_lora_weights`, `fuse_lora` and `unload_lora_weights`, and give "
            "that."
        )
    else:
        raise ValueError(
            f"{file} has names such as {min(stored)}, which diffusers does not convert for {type(pipeline).__name__}. "
            f"Give it with diffusers' names, {TRAINED}.<layer>.lora_A.weight, or as PEFT's files, an adapter_config.json "
            f"beside an adapter_model.safetensors. `load_lora_weights` would load nothing of it."
        )
    restore = restore_point(pipeline)
    try:
        load(file.parent, **arguments)
        peft_config = transformer.peft_config["default"]
        names = get_peft_model_state_dict(transformer, adapter_name="default").keys()
    finally:
        restore()
    if not any("lora_A" in name for name in stored):
        stored = convert_unet_state_dict_to_peft(stored)
    other = sorted(names ^ stored.keys())
    if other:
        raise ValueError(
            f"{len(other)} of its weights, such as {other[0]}, have no counterpart in a LoRA of "
            f"{type(transformer).__name__}, and would be left out: it is cut short, or the adapter of another model."
        )
    # The weights of the file: loading has rounded them to the dtype of the transformer.
    return peft_config, {f"{_PEFT_PREFIX}{name}": value for name, value in stored.items()}


def _layer(name: str) -> str:
    """The layer whose LoRA the weight of this name is part of."""
    return name.partition(".lora")[0]


def has_diffusers_format(pipeline: DiffusionPipeline, model: PeftModel) -> bool:
    """Tell if `pipeline.load_lora_weights` can load the adapter of `model` with its alpha."""
    save = getattr(pipeline, "save_lora_weights", None)
    peft_config = model.peft_config["default"]
    # diffusers cannot load a LoRA of parameters that are no layers.
    if save is None or not isinstance(peft_config, LoraConfig) or peft_config.target_parameters:
        return False
    return f"{TRAINED}_lora_adapter_metadata" in inspect.signature(save).parameters


def save_diffusers_lora(
    pipeline: DiffusionPipeline, model: PeftModel, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """
    Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` opens; a pipeline with several
    transformers gets a [`diffusers_file`] for each that has an adapter.

    The scale of each layer, alpha / rank, is multiplied into its B, and the metadata say alpha = rank: ComfyUI and others do
    not read them, and take that. If the pipeline has no LoRA loader of its own, or the adapter is no LoRA, nothing is
    written: PEFT's file remains the only one.
    """
    if not has_diffusers_format(pipeline, model):
        return
    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    scales = {name: layer.scaling["default"] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    weights = {
        name: value * scales[_layer(name)] if ".lora_B" in name or ".lora_embedding_B" in name else value
        for name, value in weights.items()
    }
    metadata = model.peft_config["default"].to_dict()
    metadata |= {"lora_alpha": metadata["r"], "alpha_pattern": metadata["rank_pattern"], "use_rslora": False}
    transformers = trained_modules(pipeline)
    for name in transformers:
        prefix = _PEFT_PREFIX if len(transformers) == 1 else f"{_PEFT_PREFIX}{name}."
        layers = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if not layers:
            continue
        if len(transformers) > 1:
            # The names of layers, and of those left out, are the transformer's own.
            targets = sorted({_layer(key) for key in layers})
            metadata = {**metadata, "target_modules": targets, "exclude_modules": None}
        arguments = {f"{TRAINED}_lora_layers": layers, f"{TRAINED}_lora_adapter_metadata": metadata}
        pipeline.save_lora_weights(output_dir, weight_name=diffusers_file(name), **arguments)


def diffusers_file(transformer: str) -> str:
    """
    Name of diffusers' file of an adapter on the transformer of this name. A pipeline's own `load_lora_weights` opens that of
    `transformer`; those of others the transformer's `load_lora_adapter(folder, weight_name=...)`.
    """
    return DIFFUSERS_FILE if transformer == TRAINED else f"pytorch_lora_weights_{transformer}.safetensors"


def call_options(call_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of the pipeline's call as JSON has them, with lists for tuples and for NumPy's rows of numbers. Warns of those that
    it cannot hold, such as tensors, which are left out.
    """
    options = {}
    for name, value in call_kwargs.items():
        try:
            options[name] = json.loads(json.dumps(value, default=_plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            logger.warning_once(
                f"The result does not say that it is called with {name}, which JSON does not hold ({error}): its users must pass "
                "it themselves."
            )
    return options


def _plain(value: Any) -> Any:
    # Not an image, whose numbers nobody reads.
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim <= 1:
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def save_call_options(call_kwargs: dict[str, Any], output_dir: str | Path) -> None:
    """
    Write generation_config.json: the arguments of the pipeline's call that a result is to be sampled with, for its users.
    Arguments that JSON cannot hold are left out.
    """
    Path(output_dir, CALL_OPTIONS).write_text(json.dumps(call_options(call_kwargs), indent=2) + "\n")


def read_call_options(place: str | Path) -> dict[str, Any] | None:
    """What `save_call_options` wrote into the folder of a result, or beside its file; None if there is nothing."""
    place = Path(place)
    file = (place if place.is_dir() else place.parent) / CALL_OPTIONS
    return json.loads(file.read_text()) if file.is_file() else None
