"""Tells the component of a pipeline that is trained from the frozen ones."""

from diffusers import DiffusionPipeline
from torch import nn


# The name of the trained component in the pipeline, and in the LoRA files that diffusers writes.
TRAINED = "transformer"


def trained_module(pipeline: DiffusionPipeline) -> nn.Module:
    """
    The module that is trained, whole or by an adapter on it.

    For a pipeline with two transformers this would return both, as a dict by name, and `check_pipeline` let it pass.
    """
    return getattr(pipeline, TRAINED)


def frozen_modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The other components that are modules, such as the text encoders and the VAE, by name."""
    return {name: part for name, part in pipeline.components.items() if name != TRAINED and isinstance(part, nn.Module)}
