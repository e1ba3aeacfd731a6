"""
Patches of a pipeline for the time of one call: another scheduler, a stand-in for its transformer, wrapped methods.

A wrapper of a method takes the original method first, then the arguments of the call.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .trained import TRAINED, trained_module


@contextlib.contextmanager
def shadowed(owner: object, **attributes: Any) -> Iterator[None]:
    """
    Put attributes into `owner.__dict__` for the time of a `with`. Afterwards each has its old value, or is absent again.

    Args:
        owner (`object`): A Python module, an `nn.Module`, a pipeline or another object with a `__dict__`. Its
            `__setattr__` is not called: a pipeline's would rewrite its config, an `nn.Module`'s register submodules.
        **attributes: The attributes by name. They also hide methods and submodules of the same name.
    """
    own = owner.__dict__
    originals = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes.keys() - originals.keys():
            own.pop(name, None)
        own.update(originals)


class ModelProxy:
    """
    Stands in for the transformer: calls go to the wrapped model, attributes to the module itself.

    Accelerate's mixed precision returns fp32 whatever the module's own dtype, which a VAE in bf16 cannot decode:
    the proxy casts outputs back.

    Args:
        model (`Callable`): The wrapped model.
        module (`nn.Module`): The module itself.
        dtype (`torch.dtype`): The dtype of its outputs.
    """

    def __init__(self, model: Callable, module: nn.Module, dtype: torch.dtype):
        self._model = model
        self._module = module
        self._dtype = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return recursively_apply(
            lambda output: output.to(self._dtype), self._model(*args, **kwargs), test_type=torch.is_floating_point
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def patched(
    pipeline: DiffusionPipeline, scheduler: FlowMatchEulerDiscreteScheduler, model: ModelProxy, **methods: Callable
) -> Iterator[None]:
    """
    The pipeline with another scheduler, a stand-in for its transformer, wrapped methods and no progress bar.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, patched in place.
        scheduler (`FlowMatchEulerDiscreteScheduler`): The scheduler to run with.
        model ([`ModelProxy`]): The stand-in for the transformer.
        **methods (`Callable`): Wrappers of the pipeline's methods, by name.
    """
    attributes = {
        "scheduler": scheduler,
        TRAINED: model,
        "_progress_bar_config": {**getattr(pipeline, "_progress_bar_config", {}), "disable": True},
        **{name: functools.partial(method, getattr(pipeline, name)) for name, method in methods.items()},
    }
    # In training mode a transformer may return another layout, which the pipeline does not expect. Its layers keep their
    # mode: some have no gradients in evaluation mode.
    with shadowed(trained_module(pipeline), training=False), shadowed(pipeline, **attributes):
        yield


@contextlib.contextmanager
def recorded_decoding(pipeline: DiffusionPipeline, calls: list[tuple[tuple, dict]]) -> Iterator[None]:
    """Append the arguments of each call of the VAE's `decode` to `calls`."""
    decode = pipeline.vae.decode

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return decode(*args, **kwargs)

    with shadowed(pipeline.vae, decode=record):
        yield


def call(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """The wrapper that changes nothing."""
    return original(*args, **kwargs)


def remember(remembered: dict[str, list]) -> dict[str, Callable]:
    """Wrappers of the methods that `remembered` names; each appends the return values of its method there."""

    def wrapper(name: str) -> Callable:
        def method(original, *args, **kwargs):
            remembered[name].append(original(*args, **kwargs))
            return remembered[name][-1]

        return method

    return {name: wrapper(name) for name in remembered}


# `prepare_latents` returns the latents, or a tuple that starts with them.
def latents_of(prepared: Any) -> Tensor:
    return prepared if isinstance(prepared, Tensor) else prepared[0]


def with_latents(prepared: Any, latents: Tensor) -> Any:
    return latents if isinstance(prepared, Tensor) else (latents, *prepared[1:])
