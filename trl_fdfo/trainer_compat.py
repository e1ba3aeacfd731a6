"""What `transformers.Trainer`, its callbacks and DeepSpeed expect of a model, and a diffusers transformer lacks."""

import json

import torch
from diffusers.configuration_utils import FrozenDict


class TrainerConfig(FrozenDict):
    """A diffusers config with the methods of a transformers one that trackers and DeepSpeed call."""

    def to_dict(self) -> dict:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)


def adapt_to_trainer(transformer: torch.nn.Module) -> None:
    """
    Give `transformer`, in place, a [`TrainerConfig`] with `hidden_size` (of which DeepSpeed's `auto` sizes are made) and
    the method by which Trainer turns on activation checkpointing.
    """
    config = TrainerConfig(transformer.config)
    if not hasattr(config, "hidden_size"):
        config.hidden_size = config.get("num_attention_heads", 1) * config.get("attention_head_dim", 1)
    transformer._internal_dict = config

    def activation_checkpointing_enable(**kwargs):
        # diffusers' own default is the non-reentrant checkpoint, which LoRA and DDP need.
        transformer.enable_gradient_checkpointing()

    transformer.activation_checkpointing_enable = activation_checkpointing_enable
    transformer.gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23
