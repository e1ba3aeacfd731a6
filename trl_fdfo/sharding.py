"""Weights that DeepSpeed ZeRO-3 or FSDP2 have spread over the processes: read and written whole, by all processes."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a forward pass of this model is one of all processes, which gather its weights for it."""
    return bool(_fsdp_modules(model)) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that have gradients, by name. To be asked for anew each time: FSDP2 puts others in their place."""
    for module in _fsdp_modules(model):
        module.reshard()  # a forward pass may have left it whole, as a copy
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_values(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters, whole, on each process."""
    parameters = list(parameters)
    with _gathered(parameters):
        return [
            (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
            for parameter in parameters
        ]


def set_values(parameters: Iterable[torch.nn.Parameter], values: Iterable[Tensor]) -> None:
    """Write whole values, the same on each process, into the parameters."""
    parameters = list(parameters)
    with _gathered(parameters, write=True):
        for parameter, value in zip(parameters, values):
            value = value.to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(value)


@contextlib.contextmanager
def whole_model(model: torch.nn.Module) -> Iterator[None]:
    """The model with whole weights on each process, to be saved: those in its state dict."""
    if not _fsdp_modules(model):
        with _gathered(list(model.parameters())):
            yield
        return
    # FSDP2 shards what is whole before it gives the state dict.
    state = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in model.state_dict().items()
    }
    model.state_dict = lambda *args, **kwargs: state
    try:
        yield
    finally:
        del model.state_dict


def _fsdp_modules(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _gathered(parameters: list[torch.nn.Parameter], write: bool = False) -> contextlib.AbstractContextManager:
    # What ZeRO-3 has sharded has an id of DeepSpeed's.
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0 if write else None)
