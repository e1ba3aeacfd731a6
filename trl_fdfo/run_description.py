"""What the result of a run depends on: what two runs must share, to go on from one another's checkpoints."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, Value
from diffusers import DiffusionPipeline

from .fdfo_config import FDFOConfig
from .memory_and_speed import some_values
from .rewards.reward_functions import RewardFunctions


def describe_run(
    config: FDFOConfig, pipeline: DiffusionPipeline, rewards: RewardFunctions, prompts: Dataset, model: torch.nn.Module
) -> dict[str, Any]:
    """What the result of a run depends on, as JSON values; the larger parts as checksums."""
    transformer = pipeline.transformer
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    trained = [p for p in transformer.parameters() if p.requires_grad]
    adapter = model.peft_config["default"] if config.use_peft else None
    defaults = {} if adapter is None else type(adapter)().to_dict()
    scalars = [name for name, feature in prompts.features.items() if isinstance(feature, Value)]
    return {
        **config.result_options(),
        **{
            f"adapter.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in (adapter.to_dict() if adapter is not None else {}).items()
            if (value != defaults.get(name) or name in ("r", "lora_alpha"))
            and name not in ("base_model_name_or_path", "peft_version")
        },
        "pipeline": type(pipeline).__name__,
        "components": sorted(name for name, component in pipeline.components.items() if component is not None),
        "transformer (checksum of its config)": config_checksum(transformer.config),
        "transformer (checksum of its frozen weights)": weights_checksum(frozen),
        "adapter (checksum of the weights to go on from)": weights_checksum(trained) if config.adapter else None,
        "scheduler (checksum of its config)": config_checksum(pipeline.scheduler.config),
        "dataset (checksum of its text and numbers)": checksum([prompts[name] for name in scalars]),
        "rewards": rewards.describe(),
    }


def config_checksum(config: dict[str, Any]) -> str:
    # Those with an underscore say where it came from, not what it is.
    return checksum(sorted((name, value) for name, value in config.items() if not name.startswith("_")))


def weights_checksum(parameters: Iterable[torch.nn.Parameter]) -> str:
    return checksum([some_values(parameter) for parameter in parameters])


def checksum(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
