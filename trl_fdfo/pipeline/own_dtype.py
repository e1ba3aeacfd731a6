"""
Calls a transformer of 16 bits in its own dtype, as its users do, with LoRA weights that are cast to it.

Trained weights are float32. Autocast would cast them in each layer too, and compute in float32 what lies between two matrix
products: twice the memory traffic for no smaller error (benchmarks/traffic.py, benchmarks/precision.py).
"""

import functools

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional


def can_run_in_own_dtype(model: nn.Module, dtype: torch.dtype | None) -> bool:
    """
    Tell if a model needs no autocast: its weights are of the dtype that is to be computed in, but for those of a LoRA.

    Args:
        model (`nn.Module`): The trained model.
        dtype (`torch.dtype`, *optional*): Dtype of mixed precision; None where it is off.
    """
    if not isinstance(model, PeftModel) or model.get_base_model().dtype != dtype:
        return False
    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    # PEFT's other adapters, and variants such as DoRA, mix their weights with the input: autocast settles the dtypes.
    return all(isinstance(layer, LoraLayer) and not layer.lora_variant for layer in layers)


def run_in_own_dtype(model: PeftModel) -> None:
    """Make the model's LoRA layers compute in the dtype of their input, in place."""
    for layer in model.modules():
        # Other kinds compute something else with these matrices, and an embedding has none: they stay as they are.
        is_layer = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
        if is_layer and layer.lora_A and all(_is_plain(layer, name) for name in layer.lora_A):
            layer.__class__ = _in_own_dtype(type(layer))


def _is_plain(layer: LoraLayer, name: str) -> bool:
    """Tell if an adapter of a layer only multiplies by its two matrices."""
    return (
        isinstance(layer.lora_A[name], nn.Linear)
        and layer.lora_B[name].bias is None
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
    )


@functools.cache
def _in_own_dtype(layer_class: type[LoraLayer]) -> type[LoraLayer]:
    return type(layer_class.__name__, (_InOwnDtype, layer_class), {})


def _new_layer(layer_class: type[LoraLayer]) -> LoraLayer:
    own = _in_own_dtype(layer_class)
    return own.__new__(own)


class _InOwnDtype:
    """Base of the LoRA layers. PEFT's forward pass would take the input to float32 and add up in three operations."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        # Users add adapters of their own to a trained model, which need not be plain.
        is_plain = all(_is_plain(self, name) for name in names)
        if args or kwargs or self.disable_adapters or self.merged or not is_plain:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        shape = result.shape
        for name in names:
            hidden = functional.linear(x, self.lora_A[name].weight.to(x.dtype))
            weight = self.lora_B[name].weight.to(x.dtype)
            result = torch.addmm(
                result.flatten(0, -2), hidden.flatten(0, -2), weight.t(), alpha=self.scaling[name]
            ).view(shape)
        return result

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Pickle finds no class by name that is made on the way.
        return _new_layer, (type(self).__bases__[1],), vars(self)
