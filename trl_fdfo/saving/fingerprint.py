"""The fingerprint of a run: what two runs must share to resume from one another's checkpoints."""

from dataclasses import MISSING, fields
from typing import Any

from datasets import Dataset, Value
from diffusers import DiffusionPipeline, SchedulerMixin
from peft import PeftConfig

from ..pipeline.checksums import checksum, config_checksum, weights_checksum
from ..pipeline.trained import trained_module
from .identity import identity


def fingerprint(
    options: dict[str, Any],
    pipeline: DiffusionPipeline,
    prompts: Dataset,
    rewards: dict[str, str],
    adapter: PeftConfig | None,
    continues_adapter: bool,
) -> dict[str, Any]:
    """
    Everything that the result of a run depends on, as JSON values; the larger parts as checksums.

    Args:
        options (`dict[str, Any]`): Options that change the result, of any type.
        pipeline (`DiffusionPipeline`): The pipeline, with its adapter.
        prompts (`datasets.Dataset`): The training prompts.
        rewards (`dict[str, str]`): Description of each reward.
        adapter (`PeftConfig`, *optional*): The adapter that is trained.
        continues_adapter (`bool`): Its first weights come from another training.
    """
    transformer = trained_module(pipeline)
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    trained = [p for p in transformer.parameters() if p.requires_grad]
    stored = prompts.with_format(None)  # a transform would make all its rows at once, and others each time
    scalars = [name for name, feature in stored.features.items() if isinstance(feature, Value)]
    return {
        **identity(options),
        **{f"adapter.{name}": identity(value) for name, value in _adapter_options(adapter).items()},
        "pipeline": type(pipeline).__name__,
        "components": sorted(name for name, component in pipeline.components.items() if component is not None),
        "transformer (checksum of its config)": config_checksum(transformer.config),
        "transformer (checksum of its frozen weights)": weights_checksum(frozen),
        "adapter (checksum of the weights to go on from)": weights_checksum(trained) if continues_adapter else None,
        "scheduler (checksum of its config)": config_checksum(_scheduler_config(pipeline.scheduler)),
        "dataset (checksum of all its text and numbers)": checksum([stored[name][:] for name in scalars]),
        "rewards": rewards,
    }


def _scheduler_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The scheduler's config. `set_shift` leaves the config as it was."""
    config = dict(scheduler.config)
    return config | {"shift": getattr(scheduler, "shift", config["shift"])} if "shift" in config else config


def _adapter_options(adapter: PeftConfig | None) -> dict[str, Any]:
    """The options of an adapter that differ from PEFT's defaults, and its rank and alpha."""
    if adapter is None:
        return {}
    required = [f.name for f in fields(adapter) if f.default is MISSING and f.default_factory is MISSING]
    defaults = type(adapter)(**{name: getattr(adapter, name) for name in required}).to_dict()
    return {
        name: value
        for name, value in adapter.to_dict().items()
        if (value != defaults.get(name) or name in ("r", "lora_alpha"))
        and name not in ("base_model_name_or_path", "peft_version")
    }
