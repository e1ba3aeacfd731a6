"""Merges an adapter into the weights of the layers that it is on."""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .trained import trained_module


@dataclass(frozen=True)
class AdaptedLayer:
    """
    A layer of a transformer and what an adapter puts around it.

    Attributes:
        base (`nn.Module`): The layer of the transformer.
        tuners (`list[BaseTunerLayer]`): PEFT's layers around it: one, or one for each parameter that has an adapter.
        rank (`int`): Rank of a LoRA; 0 for other adapters.
    """

    base: nn.Module
    tuners: list[BaseTunerLayer]
    rank: int

    def merge(self, weights: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """
        The layer's weights with the adapter in them. Layer and adapter stay as they are.

        Args:
            weights (`dict[str, Tensor]`): The layer's parameters without the adapter, by the layer's own names.
            scale (`float`): 0 returns the weights as given, 1 with the whole adapter, others lie on the line through both.

        Returns:
            `dict[str, Tensor]`: The same parameters in float32.
        """
        own = dict(self.base._parameters)
        plain = {name: weight.float() for name, weight in weights.items()}
        try:
            self.base._parameters.update({n: nn.Parameter(w.clone(), requires_grad=False) for n, w in plain.items()})
            for tuner in reversed(self.tuners):
                tuner.merge()
            merged = {name: self.base._parameters[name].data for name in plain}
        finally:
            self.base._parameters.update(own)
            for tuner in self.tuners:
                tuner.merged_adapters.clear()
        return merged if scale == 1 else {name: torch.lerp(plain[name], merged[name], scale) for name in plain}


def adapted_layers(model: PeftModel) -> dict[str, AdaptedLayer]:
    """The layers that the adapter of a model is on, by the names that they have in the model without it."""
    layers: dict[nn.Module, AdaptedLayer] = {}
    names: dict[nn.Module, str] = {}
    for name, tuner in model.get_base_model().named_modules():
        if isinstance(tuner, BaseTunerLayer):
            base = tuner.get_base_layer()
            names.setdefault(base, name.replace(".base_layer", ""))
            rank = getattr(tuner, "r", {})
            rank = rank.get("default", 0) if isinstance(rank, dict) else 0
            layers.setdefault(base, AdaptedLayer(base, [], rank)).tuners.append(tuner)
    return {names[base]: layer for base, layer in layers.items()}


def low_rank_factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """
    The matrices A [rank, in] and B [out, rank] of a LoRA of scale 1 that adds `change` [out, in].

    Raises:
        ValueError: No matrices of this rank do.
    """
    rank = min(rank, *change.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, q=rank, niter=1)
    a, b = s.sqrt()[:, None] * v.T, u * s.sqrt()
    if torch.dist(b @ a, change) > 1e-4 * change.norm():
        raise ValueError(f"what the adapter adds to a weight {tuple(change.shape)} has a rank above {rank}.")
    return a.contiguous(), b.contiguous()


def give_empty_weights(pipeline: DiffusionPipeline) -> None:
    """
    Put zeros that take no memory in place of the transformer's weights, which may be on the meta device. An adapter is then
    made on the CPU, by its shapes.
    """
    for module in trained_module(pipeline).modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
