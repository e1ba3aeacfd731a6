"""Adapters on the trained transformer: the layers that get one, and how it is injected."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from .adapter_files import read_adapter
from .checks import check_own_layers, check_trainable
from .loading import base_model_name
from .trained import Transformers, restored_on_error, trained_module


def attention_projections(transformer: nn.Module) -> list[str]:
    """
    Names of the linear layers of a transformer's attention, as PEFT's target modules: the shortest endings of their full
    names that no other module has (`to_q`, `attn.to_q`, ...).

    If a block has a joint attention, which projects the queries of the text too (`add_q_proj`), other attention in it
    gets no adapter, as in the paper's runs.

    Raises:
        ValueError: No module of the transformer has "Attention" in the name of its class.
    """
    modules = dict(transformer.named_modules())
    attention = {name: module for name, module in modules.items() if "Attention" in type(module).__name__}
    joint = {name for name, module in attention.items() if isinstance(getattr(module, "add_q_proj", None), nn.Linear)}
    joint_blocks = {_block(name) for name in joint}
    layers = {
        f"{prefix}.{name}": name
        for prefix, module in attention.items()
        if prefix in joint or _block(prefix) not in joint_blocks
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    if not layers:
        raise ValueError(
            f"No attention projections were found in {type(transformer).__name__}. Name the layers that are to get an "
            f"adapter in `lora_target_modules`; its linear layers are {_linear_layers(transformer)}."
        )
    taken = {ending for path in modules.keys() - layers.keys() for ending in _endings(path)}
    return sorted(
        {
            next((ending for ending in _endings(path) if len(ending) >= len(name) and ending not in taken), path)
            for path, name in layers.items()
        }
    )


def default_lora_config(
    rank: int, alpha: int, targets: list[str] | None, transformer: nn.Module, trained: Collection[str] | None = None
) -> LoraConfig:
    """
    LoRA with gaussian initialisation.

    Args:
        rank, alpha (`int`): Rank, and scale of the output times the rank.
        targets (`list[str]`, *optional*): Endings of the names of the layers; None means the attention projections.
        transformer (`nn.Module`): The [`trained_module`].
        trained (`Collection[str]`, *optional*): Of several transformers, those that get an adapter; None means all.
    """
    names = [name for name, _ in transformer.named_children()] if isinstance(transformer, Transformers) else []
    others = [] if trained is None else [name for name in names if name not in trained]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=attention_projections(transformer) if targets is None else targets,
        exclude_modules=rf"({'|'.join(others)})\..*" if others else None,
    )


def add_adapter(
    pipeline: DiffusionPipeline, peft_config: PeftConfig, weights: dict[str, Tensor] | None = None
) -> PeftModel:
    """
    Inject an adapter into the pipeline's transformer, in place. Its weights are fp32 whatever the transformer's dtype. If
    it is refused, the pipeline is left as it was.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        peft_config (`PeftConfig`): The adapter.
        weights (`dict[str, Tensor]`, *optional*): Its weights under PEFT's names; new ones by default.

    Raises:
        ValueError: A target module matches no layer, the weights belong to another model, the adapter has dropout or
            otherwise cannot be trained, there already is one, or the transformer is wrapped, fused or offloaded.
    """
    transformer = trained_module(pipeline)
    _check_peft_config(peft_config)
    check_own_layers(pipeline)
    check_trainable(pipeline)
    if getattr(peft_config, "target_modules", "") is None:
        peft_config.target_modules = attention_projections(transformer)
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
    # The adapter's base is the pipeline; PEFT would name the transformer.
    peft_config.base_model_name_or_path = base_model_name(pipeline)[0]
    with restored_on_error(pipeline):
        model = _Adapted(transformer, peft_config)
        for name in ("target_modules", "exclude_modules"):
            names = getattr(peft_config, name, None)
            if isinstance(names, set):  # whose order each process has anew
                setattr(peft_config, name, sorted(names))
        if weights is not None:
            _set_weights(model, weights)
    return model


def continue_adapter(
    pipeline: DiffusionPipeline, name: str, given: dict[str, Any], peft_config: PeftConfig | None = None
) -> PeftModel:
    """
    Inject a stored adapter into the pipeline's transformer, in place.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        name (`str`): Hub id, folder or file of the adapter, as [`read_adapter`] takes it.
        given (`dict[str, Any]`): The user's values of `lora_r`, `lora_alpha`, `lora_target_modules` and
            `trained_transformers`, without options that have their default.
        peft_config (`PeftConfig`, *optional*): A config that the user gave as well, which is refused.

    Raises:
        ValueError: The adapter cannot be read, belongs to another model, or contradicts the user's values.
    """
    if peft_config is not None:
        raise ValueError(f"peft_config was given together with adapter='{name}', which brings its own.")
    peft_config, weights = read_adapter(pipeline, name)
    stored = {"lora_r": getattr(peft_config, "r", None), "lora_alpha": getattr(peft_config, "lora_alpha", None)}
    for option, value in {**stored, "lora_target_modules": None, "trained_transformers": None}.items():
        if option in given and given[option] != value:
            raise ValueError(
                f"{option}={given[option]} was given together with adapter='{name}', which brings its own"
                + ("" if value is None else f": {value}")
                + f". Leave {option} out."
            )
    try:
        return add_adapter(pipeline, peft_config, weights)
    except ValueError as error:
        raise ValueError(f"adapter='{name}' does not fit: {error}") from error


def check_stored_weights(model: nn.Module, folder: str | Path) -> None:
    """
    Compare the names of the weights in a checkpoint with those that `model` would write there. Loading skips names that
    are not the model's, and leaves its own at their start.

    Args:
        model (`nn.Module`): The trained model, with or without an adapter.
        folder (`str` or `Path`): The checkpoint. One without a .safetensors file of the model is in an engine's own format,
            and passes.

    Raises:
        ValueError: The names differ.
    """
    is_adapter = isinstance(model, PeftModel)
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME if is_adapter else SAFE_WEIGHTS_NAME)
    if not file.is_file():
        return
    own = get_peft_model_state_dict(model, save_embedding_layers=False) if is_adapter else model.state_dict()
    with safe_open(file, "pt") as stored:
        other = sorted(own.keys() ^ set(stored.keys()))
    if other:
        place = "the model" if other[0] in own else "the file"
        raise ValueError(
            f"{len(other)} names of weights are only in {file} or only in the model, such as {other[0]} in {place}: a run "
            "cannot go on from the weights of another model, or of one that was wrapped, compiled or fused. Start anew."
        )


class _Adapted(PeftModel):
    """A transformer with an adapter, saved without asking the Hub about the base model and without PEFT's model card."""

    def save_pretrained(self, *args: Any, save_embedding_layers: str | bool = False, **kwargs: Any) -> None:
        # PEFT's default "auto" asks the Hub at each save if the base model's vocabulary was changed.
        super().save_pretrained(*args, save_embedding_layers=save_embedding_layers, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write nothing: PEFT's card would only name the folder that the base model came from."""


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


def _check_peft_config(peft_config: PeftConfig) -> None:
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, not a config of PEFT such as `LoraConfig`.")
    for name, value in vars(peft_config).items():
        if name.endswith("dropout") and value:
            raise ValueError(
                f"{name}={value} would make every replayed velocity differ from the sampled one. Set it to 0."
            )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_config.peft_type)
    if hasattr(tuner, "update_and_allocate") and getattr(peft_config, "use_asa", True):
        raise ValueError(
            f"peft_config is a {type(peft_config).__name__}, whose ranks move between layers only if `update_and_allocate` "
            "is called in each optimizer step, which no trainer here does. Take a `LoraConfig`; its `rank_pattern` gives "
            "layers different ranks."
        )
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config is a {type(peft_config).__name__}, which trains the prompt of a language model. Take a config "
            "that adapts layers, such as `LoraConfig`."
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


def _block(path: str) -> str:
    """The name of the module that a module is a direct part of."""
    return path.rpartition(".")[0]


def _endings(path: str) -> list[str]:
    """The endings of a full name by which PEFT finds its module, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _linear_layers(transformer: nn.Module) -> str:
    """The endings of the names of its linear layers, for a message."""
    names = {name.rpartition(".")[2] for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    # A number is the place in a list of layers: the name before it says more.
    return ", ".join(sorted(name for name in names if not name.isdigit()))
