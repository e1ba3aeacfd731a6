"""
Counts the memory, the floating-point operations and the traffic of a module's calls without computing them: a copy of
the module without weights runs on PyTorch's fake tensors, which have shapes and no data.

Memory counts each tensor that an operation returns for as long as the tensor lives: intermediate results, and those
that autograd keeps for the backward pass. Weights, gradients and the arguments of the calls are not counted.
"""

import contextlib
import copy
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass, transform_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary

from ..pipeline.patch import in_float32, shadowed


# PyTorch's formulas, and formulas for the CPU's attention kernel, which PyTorch lacks. Its `FlopCounterMode` cannot be
# used: it keeps tensors alive that gradient checkpointing frees.
_FLOPS: dict[object, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    # This operation exists once bitsandbytes is imported, so its name stands for it. It multiplies inputs [..., K] by packed weights
    # of shape [N, K].
    "bitsandbytes::gemm_4bit": lambda inputs, packed, shape, *_, **__: 2 * inputs.numel() * shape[0],
}


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        peak (`int`): Most bytes that are alive at once.
        flops (`int`): Floating-point operations of matrix products, convolutions and attention. A multiplication and an
            addition are two.
        traffic (`int`): Bytes that all other operations read and write, which a GPU's bandwidth limits. Views move none.
        operations (`int`): Operations that are no views, so kernels to launch, about.
        attention (`int`): The part of `flops` that attention takes.
    """

    peak: int
    flops: int
    traffic: int = 0
    operations: int = 0
    attention: int = 0


@dataclass(frozen=True)
class Precision:
    """
    Attributes:
        device_type (`str`): Type of the device whose memory is counted. This machine need not have one.
        autocast (`torch.dtype`, *optional*): Dtype of mixed precision; None where it is off.
    """

    device_type: str
    autocast: torch.dtype | None = None

    @property
    def fake_device(self) -> str:
        # Autograd asks for the device's driver even if the tensors are fake.
        return "cuda" if self.device_type == "cuda" and torch.cuda.is_available() else "cpu"

    def autocast_context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(self.fake_device, self.autocast)

    def kernel_context(self) -> contextlib.AbstractContextManager:
        """Makes a CPU's autocast compute norms as a GPU's does. A backward pass may repeat norms: use it there too."""
        simulated = self.device_type == "cuda" and self.fake_device != "cuda"
        return _norms_in_float32() if self.autocast is not None and simulated else contextlib.nullcontext()


def _remembered(function: Callable[..., Cost]) -> Callable[..., Cost]:
    """`function` with a cache: a count takes seconds, and its result depends on shapes and switches alone."""
    known: dict[str, Cost] = {}

    @functools.wraps(function)
    def look_up(module: nn.Module, calls: Sequence[tuple[tuple, dict]], *args, **kwargs) -> Cost:
        describe = lambda tensor: (tensor.shape, tensor.dtype, tensor.requires_grad)
        weights = [describe(tensor) for tensor in (*module.parameters(), *module.buffers())]
        shapes = tree_map_only(Tensor, lambda t: t.tolist() if _has_data(t) else describe(t), list(calls))
        # Switches such as `use_slicing` of a VAE, which no config shows.
        switches = [
            (path, name, value)
            for path, part in module.named_modules()
            for name, value in vars(part).items()
            if isinstance(value, bool)
        ]
        key = repr((module, getattr(module, "config", None), switches, weights, shapes, args, kwargs))
        if key not in known:
            known[key] = function(module, calls, *args, **kwargs)
        return known[key]

    return look_up


@_remembered
def sampling_cost(
    module: nn.Module, calls: Sequence[tuple[tuple, dict]], precision: Precision, method: str = "__call__"
) -> Cost:
    """
    Cost of calls without gradients, one after the other.

    Args:
        module (`nn.Module`): A module on any device, also the meta device.
        calls (`Sequence[tuple[tuple, dict]]`): Arguments of each call.
        precision ([`Precision`]): Precision of the calls.
        method (`str`): The module's method that is called. `decode` is called in float32, as in a rollout.
    """
    decodes = method == "decode"
    upcast = in_float32(module) if decodes else contextlib.nullcontext()  # as in a rollout
    with upcast, _counting(module, calls, precision) as (twin, calls, count), torch.no_grad():
        with contextlib.nullcontext() if decodes else precision.autocast_context():
            for args, kwargs in calls:
                getattr(twin, method)(*args, **kwargs)
    return count()


@_remembered
def training_cost(
    module: nn.Module,
    calls: Sequence[tuple[tuple, dict]],
    precision: Precision,
    gradient_checkpointing: bool = False,
) -> Cost:
    """
    Cost of calls with gradients and of the backward pass through all of them.

    Args:
        module (`nn.Module`): A module on any device, also the meta device.
        calls (`Sequence[tuple[tuple, dict]]`): Arguments of each call.
        precision ([`Precision`]): Precision of the calls.
        gradient_checkpointing (`bool`): Recompute the activations of the module's blocks in the backward pass.
    """
    with _counting(module, calls, precision) as (twin, calls, count):
        for part in twin.modules():
            if gradient_checkpointing and hasattr(part, "enable_gradient_checkpointing"):
                part.enable_gradient_checkpointing()
        with precision.autocast_context():
            outputs = [tree_leaves(twin(*args, **kwargs))[0] for args, kwargs in calls]
        torch.autograd.backward([output.float().square().mean() for output in outputs])
    return count()


@contextlib.contextmanager
def _norms_in_float32() -> Iterator[None]:
    """A GPU's autocast computes these functions in float32, a CPU's in the dtype of their input."""
    # A `TorchFunctionMode` cannot do this: it is off when gradient checkpointing repeats a forward pass.
    names = ("layer_norm", "rms_norm", "group_norm", "softmax")
    with shadowed(functional, **{name: _in_float32(getattr(functional, name)) for name in names}):
        yield


def _in_float32(function: Callable) -> Callable:
    def to_float32(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    @functools.wraps(function)
    def call(*args, **kwargs):
        args, kwargs = tree_map_only(Tensor, to_float32, (args, kwargs))
        return function(*args, **kwargs)

    return call


def _wraps(tensor: Tensor) -> bool:
    """True for a tensor that holds its numbers in other tensors of this process."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def stored(tensor: Tensor) -> list[Tensor]:
    """
    The tensors that hold a tensor's numbers. torchao's wrappers report the size and dtype of the unpacked weight, and
    bitsandbytes keeps the scales of a weight beside it.
    """
    if getattr(tensor, "quant_state", None) is not None:
        return [tensor.data, tensor.quant_state.absmax]
    if not _wraps(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]


def _is_plain(tensor: object) -> bool:
    """True for a fake tensor that has neither a known value nor complex numbers."""
    return type(tensor) is FakeTensor and tensor.constant is None and not tensor.is_complex()


def _has_data(tensor: Tensor) -> bool:
    """True for masks, lengths and the like: tensors of integers or booleans, unless they have a shape alone."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta or isinstance(tensor, FakeTensor))


def _description(value: object, tensors: list[Tensor]) -> object:
    """
    A key of one argument of an operation: equal arguments give results of the same shapes, dtypes and devices. Appends the
    argument's tensors to `tensors`.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        if not _is_plain(value):
            return object()  # equal to no other
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if isinstance(value, (list, tuple)):
        return tuple([_description(item, tensors) for item in value])
    return (type(value), value) if isinstance(value, Hashable) else object()  # 1, 1.0 and True are equal


def _is_repeatable(func: torch._ops.OpOverload, given: Sequence[Tensor], result: object) -> bool:
    """Tell if all that an operation returns are new fake tensors, without gaps in their memory."""
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    for made in result if isinstance(result, tuple) else (result,):
        if made is None:
            continue
        if type(made) is not FakeTensor or made.constant is not None or made.layout != torch.strided:
            return False
        storage, last = made.untyped_storage(), sum((size - 1) * step for size, step in zip(made.shape, made.stride()))
        if storage._cdata in storages or storage.nbytes() != (last + 1) * made.element_size() or made.is_complex():
            return False
        storages.add(storage._cdata)
    return not func._schema.is_mutable


@dataclass(frozen=True)
class _Operation:
    """
    An operation that was counted: in a model of equal blocks most are called again with tensors of the same shapes, and
    PyTorch takes longer to find out what they return.

    Attributes:
        outputs: For each tensor that it returns its shape, strides, dtype and device; None for a result that is None.
        is_tuple: They come in a tuple.
        mode: What makes fake tensors.
        flops: Its floating-point operations; None if it has no formula.
    """

    outputs: list[tuple | None]
    is_tuple: bool
    mode: FakeTensorMode
    flops: int | None

    @classmethod
    def of(cls, result: FakeTensor | tuple, flops: int | None) -> "_Operation":
        outputs = result if isinstance(result, tuple) else (result,)
        [mode] = {output.fake_mode for output in outputs if output is not None}
        known = [None if o is None else (o.shape, o.stride(), o.dtype, o.fake_device) for o in outputs]
        return cls(known, isinstance(result, tuple), mode, flops)

    def repeated(self) -> FakeTensor | tuple:
        with torch._C._DisableTorchDispatch():
            made = [None if known is None else self._made(*known) for known in self.outputs]
        return tuple(made) if self.is_tuple else made[0]

    def _made(self, shape: torch.Size, stride: tuple, dtype: torch.dtype, device: torch.device) -> FakeTensor:
        return FakeTensor(self.mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)


class _Counter(TorchDispatchMode):
    """Counts operations, and the bytes of returned tensors while they live; `known` tensors are free."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.flops = self.traffic = self.operations = self.attention = self.now = self.peak = 0
        self._repeated: dict[tuple, _Operation] = {}
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            for part in stored(tensor):
                self._known[part.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # two of three calls
            return args[0].fake_device
        kwargs = kwargs or {}
        given: list[Tensor] = []
        operation = key = None
        is_viewed = func.is_view and _is_plain(args[0])
        if not is_viewed:
            key = (func, _description(args, given), _description(tuple(kwargs.items()), given))
            operation = self._repeated.get(key)
        if is_viewed:
            given.append(args[0])
            result = _view(func, args, kwargs)
        elif operation is not None:
            result, is_view, flops = operation.repeated(), False, operation.flops
        else:
            # Some models read the lengths of prompts off a mask.
            computed = unset_fake_temporarily() if given and all(map(_has_data, given)) else contextlib.nullcontext()
            with computed:
                result = func(*args, **kwargs)
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if operation is None:
            is_view = _is_view(func, given, returned)
            formula = _FLOPS.get(func._overloadpacket) or _FLOPS.get(func._schema.name)
            flops = None if is_view or formula is None else formula(*args, **kwargs, out_val=result)
            if key is not None and not is_view and _is_repeatable(func, given, result):
                self._repeated[key] = _Operation.of(result, flops)
        if not is_view:
            self.operations += 1
            if flops is not None:
                self.flops += flops
                self.attention += flops if "attention" in func._schema.name else 0
            else:
                self.traffic += sum(_moved_bytes(tensor) for tensor in (*given, *returned))
        for tensor in returned:
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # of a view, or of a tensor that was changed in place
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def _view(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> FakeTensor | Sequence[FakeTensor]:
    """A view of the first argument, made at once: PyTorch takes longer to look up what it returns."""
    mode, device = args[0].fake_mode, args[0].fake_device
    with in_kernel_invocation_manager(mode):
        made = func(*args, **kwargs)
    return tree_map_only(Tensor, lambda view: FakeTensor(mode, view, device), made)


def _is_view(func: torch._ops.OpOverload, given: Sequence[Tensor], returned: Sequence[Tensor]) -> bool:
    """Tell if an operation moves no data: it returns views of its arguments, or memory that it does not write."""
    if func._schema.is_mutable:
        return False
    if func._overloadpacket.__name__.startswith(("empty", "new_empty")):
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return all(tensor.untyped_storage()._cdata in storages for tensor in returned)


def _moved_bytes(tensor: Tensor) -> int:
    """Bytes that an operation reads or writes of a tensor. An expanded tensor has fewer than its shape says."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _hooks(module: nn.Module) -> list[dict]:
    """The registries of PyTorch's hooks on a module's calls."""
    return [value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)]


@contextlib.contextmanager
def _counting(module: nn.Module, calls: Sequence[tuple[tuple, dict]], precision: Precision):
    """Yields a copy of the module and of its calls, with fake tensors, and a function that returns the cost so far."""
    device = torch.device(precision.fake_device)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def new(tensor: Tensor) -> FakeTensor:
        # PyTorch takes longer to do so for each of thousands of weights, and to make an `nn.Parameter` of each.
        return FakeTensor(fake_mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), device)

    def fake(tensor: Tensor) -> Tensor:
        if _wraps(tensor):
            # A quantised weight of torchao: its parts become fake, and its layer unpacks them as it does real ones.
            return transform_subclass(tensor, lambda _, inner: fake(inner))
        made = new(tensor)
        # A weight of bitsandbytes carries its scales, which its layer needs to unpack it.
        vars(made).update({name: value for name, value in vars(tensor).items() if name not in vars(made)})
        if isinstance(tensor, nn.Parameter):
            made._is_param = True
            made.requires_grad_(tensor.requires_grad)
            if tensor.requires_grad:
                # All micro-batches of an optimizer step but the first add to gradients that exist.
                made.grad = new(tensor)
        return made

    # The twin is a deep copy: state that the module keeps between calls must not become fake. It has no hooks: a user's
    # hook would get tensors without data.
    weights = [*module.parameters(), *module.buffers()]
    known = {id(tensor): fake(tensor) for tensor in weights}
    known |= {id(hooks): OrderedDict() for part in module.modules() for hooks in _hooks(part)}
    # What weight normalisation made of the weights is no weight, and PyTorch would not copy it.
    computed = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    known |= {id(tensor): fake(tensor) for tensor in computed if tensor.grad_fn is not None}
    twin = copy.deepcopy(module, known)
    calls = tree_map_only(Tensor, lambda tensor: tensor if _has_data(tensor) else fake(tensor), list(calls))
    gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
    arguments = [leaf for leaf in tree_leaves(calls) if isinstance(leaf, Tensor)]
    counter = _Counter([*twin.parameters(), *twin.buffers(), *gradients, *arguments])
    with precision.kernel_context(), fake_mode, counter:
        cost = lambda: Cost(counter.peak, counter.flops, counter.traffic, counter.operations, counter.attention)
        yield twin, calls, cost
