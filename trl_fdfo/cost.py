"""
What calls of a module take, in memory and in floating-point operations, found without computing anything: a copy of the
module without weights runs on PyTorch's fake tensors, which have shapes and no data.

What is counted is every tensor that an operation returns, for as long as it lives: what autograd keeps for the backward
pass, and what comes and goes on the way. Weights, gradients and the arguments of the calls are not.
"""

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary


# PyTorch's formulas, and those for the attention kernel of CPUs, for which it has none. Not `FlopCounterMode`, which keeps
# alive what gradient checkpointing frees.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        peak (`int`): Bytes alive at once, at most.
        flops (`int`): Floating-point operations of matrix products, convolutions and attention, a multiplication and an
            addition being two.
    """

    peak: int
    flops: int


def _remembered(function: Callable[..., Cost]) -> Callable[..., Cost]:
    """The same question is not worked out twice in a process: it takes seconds."""
    known: dict[str, Cost] = {}

    @functools.wraps(function)
    def ask(module: nn.Module, calls: Sequence[tuple[tuple, dict]], *args, **kwargs) -> Cost:
        describe = lambda tensor: (tensor.shape, tensor.dtype, tensor.requires_grad)
        weights = [describe(tensor) for tensor in (*module.parameters(), *module.buffers())]
        shapes = tree_map_only(Tensor, describe, list(calls))
        key = repr((module, getattr(module, "config", None), weights, shapes, args, kwargs))
        if key not in known:
            known[key] = function(module, calls, *args, **kwargs)
        return known[key]

    return ask


@_remembered
def sampling_cost(
    module: nn.Module, calls: Sequence[tuple[tuple, dict]], precision: "Precision", method: str = "__call__"
) -> Cost:
    """
    Cost of calls without gradients, one after the other.

    Args:
        module (`nn.Module`): On any device, the meta device included.
        calls (`Sequence[tuple[tuple, dict]]`): Arguments of each call.
        precision ([`Precision`]): What the calls are computed in.
        method (`str`): What is called.
    """
    with _counting(module, calls, precision) as (twin, calls, count), torch.no_grad(), precision.autocast_context():
        for args, kwargs in calls:
            getattr(twin, method)(*args, **kwargs)
    return count()


@_remembered
def training_cost(
    module: nn.Module,
    calls: Sequence[tuple[tuple, dict]],
    precision: "Precision",
    gradient_checkpointing: bool = False,
) -> Cost:
    """
    Cost of calls with gradients and of the backward pass through all of them.

    Args:
        module (`nn.Module`): On any device, the meta device included.
        calls (`Sequence[tuple[tuple, dict]]`): Arguments of each call.
        precision ([`Precision`]): What the calls are computed in.
        gradient_checkpointing (`bool`): Whether the blocks of the module compute their activations again.
    """
    with _counting(module, calls, precision) as (twin, calls, count):
        for part in twin.modules():
            if gradient_checkpointing and hasattr(part, "enable_gradient_checkpointing"):
                part.enable_gradient_checkpointing()
        with precision.autocast_context():
            outputs = [tree_leaves(twin(*args, **kwargs))[0] for args, kwargs in calls]
        torch.autograd.backward([output.float().square().mean() for output in outputs])
    return count()


@dataclass(frozen=True)
class Precision:
    """
    Attributes:
        device_type (`str`): Device that is asked about. It need not be there.
        autocast (`torch.dtype`, *optional*): Of mixed precision, where it is on.
    """

    device_type: str
    autocast: torch.dtype | None = None

    @property
    def fake_device(self) -> str:
        # Autograd asks for the driver of a device even where its tensors are fake.
        return "cuda" if self.device_type == "cuda" and torch.cuda.is_available() else "cpu"

    def autocast_context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(self.fake_device, self.autocast)

    def kernel_context(self) -> contextlib.AbstractContextManager:
        """What `autocast_context` lacks on a CPU of what it does on a GPU, here because a backward pass may repeat it."""
        elsewhere = self.device_type == "cuda" and self.fake_device != "cuda"
        return _norms_in_float32() if self.autocast is not None and elsewhere else contextlib.nullcontext()


@contextlib.contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Autocast computes these in float32 on a GPU, and in the dtype of their input on a CPU."""
    # Not by a `TorchFunctionMode`, which is off where gradient checkpointing repeats a forward pass.
    names = ("layer_norm", "rms_norm", "group_norm", "softmax")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(functional, name, _in_float32(getattr(functional, name))))
        yield


def _in_float32(function: Callable) -> Callable:
    def to_float32(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    @functools.wraps(function)
    def call(*args, **kwargs):
        args, kwargs = tree_map_only(Tensor, to_float32, (args, kwargs))
        return function(*args, **kwargs)

    return call


class _Counter(TorchDispatchMode):
    """Counts floating-point operations, and the bytes of what operations return, as long as it lives, but for `known`."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or what was changed in place
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


@contextlib.contextmanager
def _counting(module: nn.Module, calls: Sequence[tuple[tuple, dict]], precision: Precision):
    device = precision.fake_device
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with fake_mode:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if not isinstance(tensor, nn.Parameter):
            return made
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        if made.requires_grad:
            # As in all micro-batches but the first of an optimizer step, which add to what is there.
            with fake_mode:
                made.grad = torch.zeros_like(made)
        return made

    # A copy of all but the weights: what the module keeps from one call to the next must not become fake.
    weights = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(tensor): fake(tensor) for tensor in weights})
    calls = tree_map_only(Tensor, fake, list(calls))
    gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
    arguments = [leaf for leaf in tree_leaves(calls) if isinstance(leaf, Tensor)]
    counter = _Counter([*twin.parameters(), *twin.buffers(), *gradients, *arguments])
    with precision.kernel_context(), fake_mode, counter:
        yield twin, calls, lambda: Cost(counter.peak, counter.flops)
