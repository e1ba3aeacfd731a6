"""Reads adapter files in PEFT's and diffusers' format, and writes files in diffusers' format."""

import inspect
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from torch import Tensor

from .checks import check_no_adapter
from .trained import TRAINED, trained_module


CALL_OPTIONS = "generation_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_PEFT_PREFIX = "base_model.model."


def read_adapter(pipeline: DiffusionPipeline, name_or_path: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """
    Read an adapter that was trained before, with the rank and alpha of its files; the pipeline is left as it is.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline that the adapter is for.
        name_or_path (`str`): Hub id, folder or .safetensors file, in PEFT's format, or in any that
            `pipeline.load_lora_weights` reads. If a folder has both, PEFT's is taken.

    Returns:
        `tuple[PeftConfig, dict[str, Tensor]]`: The arguments of [`add_adapter`].

    Raises:
        ValueError: There is no such adapter, or it has weights for other components than the transformer.
    """
    check_no_adapter(pipeline)
    path = Path(name_or_path)
    if not path.exists():
        try:
            # The adapter of the repo itself, not of its checkpoints.
            names = [CONFIG_NAME, "adapter_model.bin", "*.safetensors"]
            path = Path(snapshot_download(str(name_or_path), allow_patterns=names, ignore_patterns=["*/*"]))
        except (OSError, HTTPError, ValueError) as error:
            raise ValueError(
                f"adapter='{name_or_path}' is no folder or file here, and was not found on the Hub ({error})."
            ) from error
    try:
        if (path / CONFIG_NAME).is_file():
            peft_config = PeftConfig.from_pretrained(path)
            weights = load_peft_weights(str(path), device="cpu")
        else:
            peft_config, weights = _read_by_diffusers(pipeline, path)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"adapter='{name_or_path}' cannot be read ({type(error).__name__}: {error})") from error
    # Options of its earlier training do not apply here.
    peft_config.inference_mode, peft_config.task_type, peft_config.auto_mapping = False, None, None
    if hasattr(peft_config, "lora_dropout"):
        peft_config.lora_dropout = 0.0
    return peft_config, weights


def _read_by_diffusers(pipeline: DiffusionPipeline, path: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(
            f"{path} has no {CONFIG_NAME}, and {type(pipeline).__name__} has no LoRA loader of its own: give it PEFT's "
            "files, an adapter_config.json beside an adapter_model.safetensors."
        )
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        files = [file for file in files if file.name == DIFFUSERS_FILE]
    if not files:
        raise ValueError(f"{path} has neither {CONFIG_NAME} nor a .safetensors file, or has several: name the file.")
    # diffusers converts the formats of other programs, and finds the rank and alpha of each layer.
    stored = pipeline.lora_state_dict(files[0].parent, weight_name=files[0].name)
    other = sorted({name.partition(".")[0] for name in stored} - {TRAINED})
    if other:
        raise ValueError(
            f"{files[0]} has weights for {', '.join(other)}, and only the transformer is trained here. Make the adapter "
            "part of the pipeline with `load_lora_weights`, `fuse_lora` and `unload_lora_weights`, and give that."
        )
    transformer = trained_module(pipeline)
    try:
        pipeline.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="default")
        weights = get_peft_model_state_dict(transformer, adapter_name="default")
        # Loading has rounded the weights to the dtype of the transformer: take the weights of the file.
        exact = {name: stored.get(f"{TRAINED}.{name}") for name in weights}
        return transformer.peft_config["default"], {
            f"{_PEFT_PREFIX}{name}": stored_value
            if (stored_value := exact[name]) is not None and stored_value.shape == value.shape
            else value
            for name, value in weights.items()
        }
    finally:
        pipeline.unload_lora_weights()


def has_diffusers_format(pipeline: DiffusionPipeline, model: PeftModel) -> bool:
    """Tell if `pipeline.load_lora_weights` can load the adapter of `model` with its alpha."""
    save = getattr(pipeline, "save_lora_weights", None)
    if save is None or not isinstance(model.peft_config["default"], LoraConfig):
        return False
    return f"{TRAINED}_lora_adapter_metadata" in inspect.signature(save).parameters


def save_diffusers_lora(
    pipeline: DiffusionPipeline, model: PeftModel, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """
    Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` opens.

    The rank and alpha go along as metadata: without them `load_lora_weights` takes alpha = rank. If the pipeline has no
    LoRA loader of its own, or the adapter is no LoRA, nothing is written: PEFT's file remains the only one.
    """
    if not has_diffusers_format(pipeline, model):
        return
    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    layers = {name.removeprefix(_PEFT_PREFIX): value for name, value in weights.items()}
    metadata = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(
        output_dir, **{f"{TRAINED}_lora_layers": layers, f"{TRAINED}_lora_adapter_metadata": metadata}
    )


def save_call_options(call_kwargs: dict[str, Any], output_dir: str | Path) -> None:
    """
    Write generation_config.json: the arguments of the pipeline's call that an adapter was trained with, for its users.
    Arguments that JSON cannot hold, such as tensors, are left out.
    """
    kinds = (str, int, float, bool, list, dict, type(None))
    options = {name: value for name, value in call_kwargs.items() if isinstance(value, kinds)}
    Path(output_dir, CALL_OPTIONS).write_text(json.dumps(options, indent=2, default=str) + "\n")
