"""Reads and writes whole the weights that DeepSpeed ZeRO-3 or FSDP2 have spread over the processes; all take part."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..pipeline.patch import shadowed
from ..pipeline.trained import trained_modules
from ..redaction import forget_origin


def is_sharded(model: torch.nn.Module) -> bool:
    """True if all processes must take part in a forward pass, for which they gather the weights."""
    return bool(_fsdp_modules(model)) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that have gradients, by name. Ask anew each time: FSDP2 puts others in their place."""
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


def save_whole_pipeline(pipeline: DiffusionPipeline, folder: str | Path, is_writer: bool) -> None:
    """
    `pipeline.save_pretrained` with the whole weights of the trained module. To be called by all processes.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, whose trained module may be sharded.
        folder (`str` or `Path`): Folder to write.
        is_writer (`bool`): This process writes.
    """
    modules = trained_modules(pipeline)
    if not any(_fsdp_modules(module) for module in modules.values()):
        with _gathered([weight for module in modules.values() for weight in module.parameters()]):
            if is_writer:
                _save_pipeline(pipeline, folder)
        return
    # FSDP2 shards again what is whole before it gives the state dict: twins take the weights.
    twins = {name: _whole_twin(module, is_writer) for name, module in modules.items()}
    if is_writer:
        with shadowed(pipeline, **twins):
            _save_pipeline(pipeline, folder)


def _whole_twin(module: torch.nn.Module, is_writer: bool) -> torch.nn.Module | None:
    """A module like one that FSDP2 has sharded, with its whole weights; None on a process that does not write."""
    state = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in module.state_dict().items()
    }
    if not is_writer:
        return None
    # FSDP2 has made a class of its own of the module's.
    twin_class = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    with init_empty_weights():
        twin = twin_class.from_config(dict(module.config))
    twin.load_state_dict(state, assign=True)
    return twin


def _save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    pipeline.save_pretrained(folder)
    forget_origin(folder)


def _fsdp_modules(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _gathered(parameters: list[torch.nn.Parameter], write: bool = False) -> contextlib.AbstractContextManager:
    # A parameter that ZeRO-3 has sharded has an id of DeepSpeed's.
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0 if write else None)
