"""
Patches of a pipeline for the time of one call: another scheduler, a stand-in for its transformer, wrapped methods.

A wrapper of a method takes the original method first, then the arguments of the call.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import honor_type, recursively_apply
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .options import is_quantized
from .schedulers import StandIn
from .trained import frozen_modules


# The function of diffusers by which its pipelines draw their noise.
DRAW = "randn_tensor"


class _Once(logging.Filter):
    """Lets each message through once: a pipeline gives its warnings in each call, and a run has thousands of calls."""

    def __init__(self):
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "is_repeated"):  # by the first of several handlers
            message = record.getMessage()
            record.is_repeated = message in self._seen
            self._seen.add(message)
        return not record.is_repeated


_once = _Once()


@contextlib.contextmanager
def warned_once() -> Iterator[None]:
    """For the time of a `with`, diffusers gives no message that it has given in such a `with` before."""
    handlers = logging.getLogger("diffusers").handlers
    for handler in handlers:
        handler.addFilter(_once)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_once)


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

    Its outputs are float32, as Accelerate's mixed precision returns them: guidance adds up differences of them.

    Args:
        model (`Callable`): The wrapped model.
        module (`nn.Module`): The module itself.
    """

    def __init__(self, model: Callable, module: nn.Module):
        self._model = model
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_float = lambda value: isinstance(value, Tensor) and value.is_floating_point()
        return recursively_apply(Tensor.float, self._model(*args, **kwargs), test_type=is_float)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def carries_state(output: Any) -> bool:
    """Tell if the output of a transformer has an object in it, such as a cache of keys and values for later calls."""
    if isinstance(output, (list, tuple)):
        return any(map(carries_state, output))
    if isinstance(output, dict):
        return any(map(carries_state, output.values()))
    return not (output is None or isinstance(output, (Tensor, bool, int, float, str)))


class State:
    """Stands for what an output of a transformer carried beside its tensors: see [`outline`]. Its methods do nothing."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def outline(output: Any) -> Any:
    """
    The output of a transformer with its tensors on the meta device, and with a [`State`] for each object that it carries,
    whose own tensors would stay in memory.
    """
    if isinstance(output, Tensor):
        return output.to("meta")
    if isinstance(output, (list, tuple)):
        return honor_type(output, map(outline, output))
    if isinstance(output, dict):
        return type(output)({name: outline(value) for name, value in output.items()})
    return State() if carries_state(output) else output


class PartNames(NamedTuple):
    """
    The names of the components that [`patched`] changes beside the transformers. A pipeline that lists its components takes
    longer for it than for a call of a small transformer, so they are listed once.
    """

    schedulers: Sequence[str]
    decoders: Sequence[str]
    language_models: Sequence[str]

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> "PartNames":
        frozen = frozen_modules(pipeline)
        return cls(
            # Not each pipeline registers its scheduler as a component.
            ["scheduler", *(name for name, part in pipeline.components.items() if isinstance(part, SchedulerMixin))],
            [name for name, part in frozen.items() if is_decoder(name, part)],
            [name for name, part in frozen.items() if hasattr(part, "generate")],
        )


def is_decoder(name: str, part: nn.Module) -> bool:
    """Tell if a component makes what a call returns: a VAE, or a vocoder, which makes audio of a spectrogram."""
    return hasattr(part, "decode") or name == "vocoder"


@contextlib.contextmanager
def patched(
    pipeline: DiffusionPipeline,
    names: PartNames,
    scheduler: StandIn,
    models: dict[str, ModelProxy],
    device: torch.device,
    attention: Sequence[nn.Module] = (),
    encode_image: Callable | None = None,
    generate: Callable | None = None,
    **methods: Callable,
) -> Iterator[None]:
    """
    The pipeline with another scheduler, stand-ins for its transformers, wrapped methods and no progress bar, which
    repeats no warning. After the last step its decoders are float32.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, patched in place.
        names ([`PartNames`]): The names of its components.
        scheduler ([`StandIn`]): The scheduler to run with, in the place of all that the pipeline has.
        models (`dict[str, ModelProxy]`): The stand-ins for the transformers, by name.
        device (`torch.device`): The pipeline's `_execution_device`, which it would look for in all its modules, again and
            again: that takes longer than a small transformer.
        attention (`Sequence[nn.Module]`): Attention modules of the transformers. They get their processors back, which a
            pipeline whose call is cut short may have replaced.
        encode_image (`Callable`, *optional*): Wrapper of each VAE's `encode`.
        generate (`Callable`, *optional*): Wrapper of the `generate` of language models, which write prompts anew.
        **methods (`Callable`): Wrappers of the pipeline's methods, by name. A method that it does not have is not wrapped;
            in the place of a missing `prepare_latents`, the function that draws its noise is.
    """
    attributes = {
        **dict.fromkeys(names.schedulers, scheduler),
        **models,
        "_device_of_call": device,
        "_progress_bar_config": {**getattr(pipeline, "_progress_bar_config", {}), "disable": True},
    }
    attributes |= {
        name: functools.partial(method, getattr(pipeline, name))
        for name, method in methods.items()
        if hasattr(pipeline, name)
    }
    processors = [module.processor for module in attention]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warned_once())
        for name in models:
            # In training mode a transformer may return another layout, which the pipeline does not expect. Its layers keep
            # their mode: some have no gradients in evaluation mode.
            stack.enter_context(shadowed(getattr(pipeline, name), training=False))
        decoders = [getattr(pipeline, name) for name in names.decoders]
        for part in decoders:
            stack.enter_context(shadowed(part, **_wrapped_coder(part, encode_image)))
        if not hasattr(pipeline, "prepare_latents"):
            of_call = inspect.unwrap(type(pipeline).__call__).__globals__
            draw = functools.partial(methods["prepare_latents"], of_call[DRAW])
            stack.enter_context(_replaced(of_call, DRAW, draw))
        if generate is not None:
            for part in (getattr(pipeline, name) for name in names.language_models):
                stack.enter_context(shadowed(part, generate=functools.partial(generate, part.generate)))
        stack.enter_context(shadowed(pipeline, **attributes))
        stack.enter_context(_of_class(pipeline, _with_known_device(type(pipeline))))
        scheduler.on_last_step = lambda: [stack.enter_context(in_float32(_arrived(part))) for part in decoders]
        try:
            yield
        finally:
            scheduler.on_last_step = None
            for module, processor in zip(attention, processors):
                if module.processor is not processor:
                    module.set_processor(processor)


def _wrapped_coder(part: nn.Module, encode_image: Callable | None) -> dict[str, Callable]:
    """The methods of a VAE or a vocoder for the time of a call."""
    if not hasattr(part, "decode"):
        return {"forward": functools.partial(_in_own_dtype, part, part.forward)}
    methods = {"decode": functools.partial(_in_own_dtype, part, part.decode)}
    if encode_image is not None and hasattr(part, "encode"):
        methods["encode"] = functools.partial(encode_image, functools.partial(_in_own_dtype, part, part.encode))
    return methods


@contextlib.contextmanager
def drawn_noise(method: Callable, draw: Callable[[Tensor, bool], Tensor]) -> Iterator[None]:
    """
    For the time of a `with`, pass the noise that a pipeline's method draws through `draw`, with whether it is one sample's, drawn
    with that sample's generator. What a pipeline makes of its noise may hold more: an image that it starts from, which stays
    as it is.
    """
    names = getattr(inspect.unwrap(method), "__globals__", {})
    if DRAW not in names:
        yield
        return
    original = names[DRAW]

    def passed_on(*args: Any, **kwargs: Any) -> Tensor:
        return draw(original(*args, **kwargs), isinstance(kwargs.get("generator"), torch.Generator))

    with _replaced(names, DRAW, passed_on):
        yield


@contextlib.contextmanager
def _replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    original = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = original


@functools.cache
def _with_known_device(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    # A property cannot be shadowed in an object's `__dict__`.
    device = property(lambda self: vars(self)["_device_of_call"])
    body = {"__module__": pipeline_class.__module__, "__doc__": pipeline_class.__doc__, "_execution_device": device}
    return type(pipeline_class.__name__, (pipeline_class,), body)


@contextlib.contextmanager
def _of_class(owner: object, other: type) -> Iterator[None]:
    own = type(owner)
    object.__setattr__(owner, "__class__", other)
    try:
        yield
    finally:
        object.__setattr__(owner, "__class__", own)


def _in_own_dtype(vae: nn.Module, method: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A pipeline may give the VAE what another dtype than the VAE's needs: its `dtype` changes on the way."""
    with torch.autocast(x.device.type, enabled=False):
        return method(x.to(vae.dtype), *args, **kwargs)


def _arrived(module: nn.Module) -> nn.Module:
    """
    The module, on its device if it is offloaded until it is called. If it came after it is upcast, the hook would move the
    copies alone: anew in each call, from float32 in host memory.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    return module


def upcast_weights(module: nn.Module) -> dict[int, Tensor]:
    """The weights of a module that [`in_float32`] replaces, by `id`."""
    weights = [
        weight
        for part in module.modules()
        for weight in (*part._parameters.values(), *part._buffers.values())
        if weight is not None and weight.is_floating_point()
    ]
    if is_quantized(module) or any(weight.element_size() < 2 for weight in weights):
        return {}
    return {id(weight): weight for weight in weights if weight.dtype in (torch.bfloat16, torch.float16)}


@contextlib.contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """
    Weights of 16 bits are float32 for the time of a `with`, which is exact, and themselves again afterwards. A module
    with weights of other types, such as quantised ones, stays as it is.
    """
    owners = [weights for part in module.modules() for weights in (part._parameters, part._buffers)]
    # Other tensors, not other data of these: a backward pass may need them after the `with`.
    upcast = {
        key: nn.Parameter(weight.float(), requires_grad=False) if isinstance(weight, nn.Parameter) else weight.float()
        for key, weight in upcast_weights(module).items()
    }
    originals = [dict(weights) for weights in owners]
    for weights in owners:
        weights.update({name: upcast[id(weight)] for name, weight in weights.items() if id(weight) in upcast})
    try:
        yield
    finally:
        for weights, original in zip(owners, originals):
            weights.update(original)


@contextlib.contextmanager
def recorded_decoding(
    pipeline: DiffusionPipeline, calls: list[tuple[tuple, dict]], made: list[torch.Size]
) -> Iterator[None]:
    """
    Append the arguments of each call of the VAE's `decode` to `calls`, and the shape of what it returned to `made`; a pipeline
    without a VAE has none.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return
    decode = vae.decode

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        output = decode(*args, **kwargs)
        made.extend(leaf.shape for leaf in tree_leaves(output)[:1])
        return output

    with shadowed(vae, decode=record):
        yield


def call(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """The wrapper that changes nothing."""
    return original(*args, **kwargs)


# Methods of the pipeline whose return values the replay does not compute again; the last two are the VAE's `encode` and the
# `generate` of language models.
REMEMBERED = ("encode_prompt", "prepare_latents", "encode_image", "generate")


def remember(remembered: dict[str, list]) -> dict[str, Callable]:
    """
    Wrappers of the methods in [`REMEMBERED`]; each appends the return values of its method to its list. A method that
    another of them calls is not remembered, as the replay does not call it.
    """
    active: list[str] = []

    def wrapper(name: str) -> Callable:
        def method(original, *args, **kwargs):
            active.append(name)
            try:
                value = original(*args, **kwargs)
            finally:
                active.pop()
            if name == "encode_image":
                taken: dict[str, Tensor] = {}
                value = Encoding(taken, value)
            if not active:
                kept = taken if name == "encode_image" else value
                if name == "prepare_latents":  # some pipelines write the next latents into these
                    kept = with_latents(value, latents_of(value).clone())
                remembered[name].append(kept)
            return value

        return method

    return {name: wrapper(name) for name in remembered}


class Encoding:
    """
    What a VAE's `encode` returned, which remembers the tensors that are taken from it. In a replay it gives them once more.

    A distribution is sampled with the same noise for all samples of the batch: the branches of a prompt see the same image.
    The generators of the call stay as they are, so that the branches also share their initial noise.

    Args:
        taken (`dict[str, Tensor]`): The tensors by the expression that took them, such as `latent_dist.sample()`.
        output (`Any`, *optional*): The return value. None in a replay.
        path (`str`): The expression that leads to `output`.
    """

    def __init__(self, taken: dict[str, Tensor], output: Any = None, path: str = ""):
        self._taken, self._output, self._path = taken, output, path

    def __getattr__(self, name: str) -> Any:
        if self._output is not None:
            return self._take(getattr(self._output, name), self._path + name)
        return self._taken_at(self._path + name)

    def __getitem__(self, index: int) -> Any:
        """An item of a tuple, or of an output of diffusers, whose first one is its distribution."""
        path = f"{self._path}[{index}]"
        return self._taken_at(path) if self._output is None else self._take(self._output[index], path)

    def _taken_at(self, path: str) -> Any:
        if path in self._taken:
            return self._taken[path]
        if path + "()" in self._taken:
            return lambda *args, **kwargs: self._taken[path + "()"]
        if any(key.startswith(path + ".") for key in self._taken):
            return Encoding(self._taken, path=path + ".")
        raise AttributeError(path)

    def _call(self, method: Callable, path: str, args: tuple, kwargs: dict) -> Any:
        if not path.endswith(".sample"):
            return method(*args, **kwargs)
        mean, std = self._output.mean, self._output.std
        noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(0))
        return mean + std * noise.to(mean)

    def _take(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._taken.setdefault(path, value)
        if callable(value):
            return lambda *args, **kwargs: self._take(self._call(value, path, args, kwargs), path + "()")
        return Encoding(self._taken, value, path + ".")


# `prepare_latents` returns the latents, or a tuple that starts with them.
def latents_of(prepared: Any) -> Tensor:
    return prepared if isinstance(prepared, Tensor) else prepared[0]


def with_latents(prepared: Any, latents: Tensor) -> Any:
    if isinstance(prepared, Tensor):
        return latents
    # What a pipeline makes of its noise beside the latents, such as the noise itself in another layout, has their dtype.
    is_like = lambda value: isinstance(value, Tensor) and value.is_floating_point() and value.numel() == latents.numel()
    return (latents, *(value.to(latents.dtype) if is_like(value) else value for value in prepared[1:]))
