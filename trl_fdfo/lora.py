"""LoRA adapters on a diffusers transformer: where they go, and files that both PEFT and diffusers load."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
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


def add_adapter(pipeline: DiffusionPipeline, peft_config: PeftConfig) -> PeftModel:
    """
    Inject an adapter into the pipeline's transformer, in place. Its weights are fp32 whatever the transformer's dtype.

    Raises:
        ValueError: A target module matches no layer, the adapter has dropout, or there already is one.
    """
    transformer = pipeline.transformer
    _check_peft_config(peft_config)
    if getattr(peft_config, "target_modules", "") is None:
        peft_config.target_modules = attention_projections(transformer)
    if any(isinstance(layer, BaseTunerLayer) for layer in transformer.modules()):
        raise ValueError(
            f"The transformer of this {type(pipeline).__name__} already has an adapter, from an earlier trainer or from "
            "`load_lora_weights`. Load the pipeline anew, or make the adapter part of it with `pipeline.fuse_lora()` and "
            "`pipeline.unload_lora_weights()`."
        )
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
    # "auto" would ask the Hub at each save whether the base model's vocabulary was changed.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    # Nor would its model card say anything of this model, but for the folder that it came from.
    model.create_or_update_model_card = lambda output_dir: None
    # PEFT looks for a name on the transformer; the adapter belongs to the pipeline.
    name_or_path = pipeline.config.get("_name_or_path")
    if name_or_path is not None:
        # Of a folder its name alone: the folders above it say more of this machine than of the model.
        name_or_path = Path(name_or_path).name if Path(name_or_path).is_dir() else str(name_or_path)
    peft_config.base_model_name_or_path = name_or_path
    return model


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


def save_diffusers_lora(
    pipeline: DiffusionPipeline, model: PeftModel, output_dir: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """
    Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output_dir)` opens.

    The rank and alpha go along as metadata: without them `load_lora_weights` takes alpha = rank. A pipeline without a
    LoRA loader of its own, and an adapter that is no LoRA, are left with PEFT's file alone.
    """
    save = getattr(pipeline, "save_lora_weights", None)
    if not isinstance(model.peft_config["default"], LoraConfig):
        return
    if save is None or "transformer_lora_adapter_metadata" not in inspect.signature(save).parameters:
        return
    layers = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    save(
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
