"""Tells the component of a pipeline that is trained from the frozen ones, and puts back what was changed in them."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator

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
