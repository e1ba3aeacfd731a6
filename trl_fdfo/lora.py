"""LoRA adapters on a diffusers transformer: where they go, and files that both PEFT and diffusers load."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from torch import Tensor

from .fdfo_config import FDFOConfig


CALL_OPTIONS = "generation_config.json"


def attention_projections(transformer: torch.nn.Module) -> list[str]:
    """
    Names of the linear layers of a transformer's attention as PEFT's target modules: relative to the attention module
    (`to_q`, `to_out.0`, ...) where that names nothing else, else in full.

    Raises:
        ValueError: No module of the transformer has "Attention" in the name of its class.
    """
    modules = dict(transformer.named_modules())
    layers = {
        f"{prefix}.{name}": name
        for prefix, attention in modules.items()
        if "Attention" in type(attention).__name__
        for name, layer in attention.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    if not layers:
        raise ValueError(
            f"No attention projections were found in {type(transformer).__name__}. Name the layers that are to get an "
            f"adapter in `lora_target_modules`; its linear layers are {_linear_layers(transformer)}."
        )
    # One block may have a layer where another has a list of them, of the same name.
    others = {name for name, module in modules.items() if not isinstance(module, torch.nn.Linear)}
    ambiguous = {name for name in layers.values() if any(other.endswith(f".{name}") for other in others)}
    return sorted({path if name in ambiguous else name for path, name in layers.items()})


def default_lora_config(config: FDFOConfig, transformer: torch.nn.Module) -> LoraConfig:
    """The paper's adapter: LoRA with gaussian initialisation on the attention projections."""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=config.lora_target_modules or attention_projections(transformer),
    )


def add_adapter(
    pipeline: DiffusionPipeline, peft_config: PeftConfig, weights: dict[str, Tensor] | None = None
) -> PeftModel:
    """
    Inject an adapter into the pipeline's transformer, in place. Its weights are fp32 whatever the transformer's dtype.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        peft_config (`PeftConfig`): The adapter.
        weights (`dict[str, Tensor]`, *optional*): Its weights under PEFT's names; new ones by default.

    Raises:
        ValueError: A target module matches no layer, the weights are those of another model, the adapter has dropout, or
            there already is one.
    """
    transformer = pipeline.transformer
    _check_peft_config(peft_config)
    if getattr(peft_config, "target_modules", "") is None:
        peft_config.target_modules = attention_projections(transformer)
    _check_no_adapter(pipeline)
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, (list, set)):
        layers = [name for name, _ in transformer.named_modules()]
        found = lambda target: any(layer == target or layer.endswith(f".{target}") for layer in layers)
        missing = sorted(target for target in targets if not found(target))
        if missing:
            raise ValueError(
                f"The LoRA target modules {missing} match no layer of {type(transformer).__name__}. Its linear "
                f"layers are {_linear_layers(transformer)}. Leave `lora_target_modules` unset for the attention "
                "projections."
            )
    model = get_peft_model(transformer, peft_config)
    if weights is not None:
        _set_weights(model, weights)
    # "auto" would ask the Hub at each save whether the base model's vocabulary was changed.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    # Nor would its model card say anything of this model, but for the folder that it came from.
    model.create_or_update_model_card = lambda output_dir: None
    # PEFT looks for a name on the transformer; the adapter belongs to the pipeline.
    peft_config.base_model_name_or_path = base_model_name(pipeline)[0]
    return model


def continue_adapter(
    pipeline: DiffusionPipeline, config: FDFOConfig, peft_config: PeftConfig | None = None
) -> PeftModel:
    """
    Inject the adapter that `config.adapter` names, as [`add_adapter`] does.

    Raises:
        ValueError: It cannot be read, is that of another model, or is not what other options say.
    """
    if peft_config is not None:
        raise ValueError(f"peft_config was given together with adapter='{config.adapter}', which brings its own.")
    peft_config, weights = read_adapter(pipeline, config.adapter)
    stored = {"lora_r": getattr(peft_config, "r", None), "lora_alpha": getattr(peft_config, "lora_alpha", None)}
    for option, value in {**stored, "lora_target_modules": None}.items():
        given = getattr(config, option)
        if given not in (FDFOConfig.__dataclass_fields__[option].default, value):
            raise ValueError(
                f"{option}={given} was given together with adapter='{config.adapter}', which brings its own"
                + ("" if value is None else f": {value}")
                + f". Leave {option} out."
            )
    try:
        return add_adapter(pipeline, peft_config, weights)
    except ValueError as error:
        raise ValueError(f"adapter='{config.adapter}' does not fit: {error}") from error


def read_adapter(pipeline: DiffusionPipeline, name_or_path: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """
    An adapter that was trained before, with the rank and alpha of its files; the pipeline is left as it is.

    Args:
        pipeline (`DiffusionPipeline`): What the adapter is for.
        name_or_path (`str`): Hub id, folder or .safetensors file, in PEFT's format, or in any that
            `pipeline.load_lora_weights` reads. Where a folder has both, PEFT's is taken.

    Returns:
        `tuple[PeftConfig, dict[str, Tensor]]`: What [`add_adapter`] takes.

    Raises:
        ValueError: There is no such adapter, or it holds weights of something else than the transformer.
    """
    _check_no_adapter(pipeline)
    path = Path(name_or_path)
    if not path.exists():
        try:
            # Of a repo its own adapter, and nothing of checkpoints.
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
    # How it was trained before is of no matter here.
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
        files = [file for file in files if file.name == "pytorch_lora_weights.safetensors"]
    if not files:
        raise ValueError(f"{path} has neither {CONFIG_NAME} nor a .safetensors file, or has several: name the file.")
    # It converts what other programs write, and finds the rank and alpha of each layer.
    stored = pipeline.lora_state_dict(files[0].parent, weight_name=files[0].name)
    other = sorted({name.partition(".")[0] for name in stored} - {"transformer"})
    if other:
        raise ValueError(
            f"{files[0]} has weights for {', '.join(other)}, and only the transformer is trained here. Make the adapter "
            "part of the pipeline with `load_lora_weights`, `fuse_lora` and `unload_lora_weights`, and give that."
        )
    try:
        pipeline.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="default")
        peft_config = pipeline.transformer.peft_config["default"]
        weights = get_peft_model_state_dict(pipeline.transformer, adapter_name="default")
        # In the dtype of the file: loading has rounded them to that of the transformer.
        exact = {name: stored.get(f"transformer.{name}") for name in weights}
        return peft_config, {
            f"base_model.model.{name}": stored_value
            if (stored_value := exact[name]) is not None and stored_value.shape == value.shape
            else value
            for name, value in weights.items()
        }
    finally:
        pipeline.unload_lora_weights()


def _set_weights(model: PeftModel, weights: dict[str, Tensor]) -> None:
    own = {name: value.shape for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    given = {name: value.shape for name, value in weights.items()}
    other = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if other:
        name = other[0]
        raise ValueError(
            f"{len(other)} of the adapter's weights do not fit {type(model.get_base_model()).__name__}, such as {name}: "
            f"{tuple(given[name]) if name in given else 'missing'} in the file, "
            f"{tuple(own[name]) if name in own else 'missing'} in the model. It is the adapter of another model."
        )
    set_peft_model_state_dict(model, weights)


def _check_no_adapter(pipeline: DiffusionPipeline) -> None:
    if any(isinstance(layer, BaseTunerLayer) for layer in pipeline.transformer.modules()):
        raise ValueError(
            f"The transformer of this {type(pipeline).__name__} already has an adapter, from an earlier trainer or from "
            "`load_lora_weights`. Load the pipeline anew; to go on from an adapter, name it in the option `adapter`; to "
            "train a new one on top of it, make it part of the pipeline with `pipeline.fuse_lora()` and "
            "`pipeline.unload_lora_weights()`."
        )


def base_model_name(pipeline: DiffusionPipeline) -> tuple[str | None, bool]:
    """Where a pipeline came from, None where that is unknown, and whether that is a Hub id."""
    name_or_path = pipeline.config.get("_name_or_path")
    if name_or_path is None:
        return None, False
    if Path(name_or_path).is_dir():
        # Its name alone: the folders above it say more of this machine than of the model.
        return Path(name_or_path).absolute().name, False
    return str(name_or_path), True


def _check_peft_config(peft_config: PeftConfig) -> None:
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, not a config of PEFT such as `LoraConfig`.")
    dropout = getattr(peft_config, "lora_dropout", 0)
    if dropout:
        raise ValueError(
            f"lora_dropout={dropout} would make every replayed velocity differ from the sampled one. Set it to 0."
        )
    if peft_config.inference_mode:
        raise ValueError("peft_config has inference_mode=True, which trains nothing: set it to False.")
    if peft_config.task_type is not None:
        raise ValueError(f"peft_config has task_type={peft_config.task_type!r}, of a language model: leave it out.")
    init = getattr(peft_config, "init_lora_weights", True)
    unfit = {
        "modules_to_save": getattr(peft_config, "modules_to_save", None),
        "bias": getattr(peft_config, "bias", "none").removeprefix("none"),
        "init_lora_weights": init if isinstance(init, str) and init not in ("gaussian", "orthogonal") else None,
    }
    for name, value in unfit.items():
        if value:
            raise ValueError(
                f"peft_config has {name}={value!r}, which changes weights of the base model too: the adapter's file for "
                "diffusers would not hold them, and `beta` would anchor to another model. Leave it out."
            )


def has_diffusers_format(pipeline: DiffusionPipeline, model: PeftModel) -> bool:
    """Whether `pipeline.load_lora_weights` can load the adapter of `model` with its alpha."""
    save = getattr(pipeline, "save_lora_weights", None)
    if save is None or not isinstance(model.peft_config["default"], LoraConfig):
        return False
    return "transformer_lora_adapter_metadata" in inspect.signature(save).parameters


def save_diffusers_lora(
    pipeline: DiffusionPipeline, model: PeftModel, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """
    Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` opens.

    The rank and alpha go along as metadata: without them `load_lora_weights` takes alpha = rank. A pipeline without a
    LoRA loader of its own, and an adapter that is no LoRA, are left with PEFT's file alone.
    """
    if not has_diffusers_format(pipeline, model):
        return
    layers = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    pipeline.save_lora_weights(
        output_dir,
        transformer_lora_layers={name.removeprefix("base_model.model."): value for name, value in layers.items()},
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )


def save_call_options(call_kwargs: dict[str, Any], output_dir: str | Path) -> None:
    """
    Write generation_config.json: the arguments of the pipeline's call that an adapter was trained with, for those who use
    it. Those that JSON has no words for, such as tensors, are left out.
    """
    kinds = (str, int, float, bool, list, dict, type(None))
    options = {name: value for name, value in call_kwargs.items() if isinstance(value, kinds)}
    Path(output_dir, CALL_OPTIONS).write_text(json.dumps(options, indent=2, default=str) + "\n")


def _linear_layers(transformer: torch.nn.Module) -> str:
    """The endings of the names of its linear layers, for a message."""
    names = {
        name.rpartition(".")[2] for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    # A number is the place in a list of layers: the name before it says more.
    return ", ".join(sorted(name for name in names if not name.isdigit()))
