"""Tells the component of a pipeline that is trained from the frozen ones, and puts back what was changed in them."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# The name of the trained component in the pipeline, and in the LoRA files that diffusers writes.
TRAINED = "transformer"


class Transformers(nn.Module):
    """
    Several transformers of a pipeline as one module, which one adapter, one optimizer and one wrapper then hold: the
    pipeline has each for a part of the noise levels, or for a part of its guidance.

    Its call takes the name of the component first. Other attributes are those of the first one.
    """

    def __init__(self, transformers: dict[str, nn.Module]):
        super().__init__()
        # Not by `add_module`, which asks for attributes of these names.
        self._modules.update(transformers)

    def forward(self, component: str, *args: Any, **kwargs: Any) -> Any:
        return self._modules[component](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(self.children()), name)

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        for transformer in self.children():
            transformer.enable_gradient_checkpointing(*args, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        for transformer in self.children():
            transformer.set_attention_backend(backend)


def trained_modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The transformer, and other components of its class: all modules whose velocity is trained, by name."""
    transformer = getattr(pipeline, TRAINED)
    others = {name: part for name, part in pipeline.components.items() if type(part) is type(transformer)}
    return {TRAINED: transformer, **others}


def trained_module(pipeline: DiffusionPipeline) -> nn.Module:
    """The module that is trained, whole or by an adapter on it: the transformer, or all of several as [`Transformers`]."""
    modules = trained_modules(pipeline)
    if len(modules) == 1:
        return modules[TRAINED]
    own = vars(pipeline)
    known = own.get("_transformers")
    if known is None or dict(known.named_children()) != modules:
        # Not by the pipeline's `__setattr__`, which would register it as a component.
        own["_transformers"] = Transformers(modules)
    return own["_transformers"]


def has_adapter(module: nn.Module) -> bool:
    """Tell if a module has layers of an adapter."""
    return any(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def train_weights(pipeline: DiffusionPipeline, names: Collection[str] | None = None) -> None:
    """Let all weights of the transformers of these names have gradients, and no others; None means all transformers."""
    for name, module in trained_modules(pipeline).items():
        module.requires_grad_(names is None or name in names)


def frozen_modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The other components that are modules, such as the text encoders and the VAE, by name."""
    trained = trained_modules(pipeline)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if name not in trained}


def restore_point(pipeline: DiffusionPipeline) -> Callable[[], None]:
    """
    Remember how the modules of a pipeline are made; the return value puts them back. Adapters, hooks, methods and modes
    that came since are gone then, and what needs gradients is as before. Devices and values of weights stay as they are.
    """
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    modules = {module: _attributes(module) for part in parts for module in part.modules()}
    needs_gradient = {
        module: {name: weight.requires_grad for name, weight in module._parameters.items() if weight is not None}
        for module in modules
    }

    def restore() -> None:
        for module, attributes in modules.items():
            # Moving a module to another device puts new tensors into these two.
            tensors = {name: module.__dict__[name] for name in ("_parameters", "_buffers")}
            module.__dict__.clear()
            module.__dict__.update(attributes | tensors)
            for name, value in needs_gradient[module].items():
                if name in module._parameters:
                    module._parameters[name].requires_grad_(value)

    return restore


@contextlib.contextmanager
def restored_on_error(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Put the pipeline's modules back as [`restore_point`] does if the body of the `with` raises."""
    restore = restore_point(pipeline)
    try:
        yield
    except BaseException:
        restore()
        raise


def _attributes(module: nn.Module) -> dict[str, object]:
    """Attributes with copies of the dicts, such as submodules and hooks, that others write into."""
    is_dict = lambda value: type(value) in (dict, OrderedDict)
    return {name: value.copy() if is_dict(value) else value for name, value in module.__dict__.items()}
