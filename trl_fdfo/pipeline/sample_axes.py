"""
Finds the samples of a batch in the values that a pipeline passes around: along one axis of a tensor, as the items of a
list, or nowhere if all samples share a value (position ids, numbers, None).

Two calls are compared, the second with twice as many samples: the axis that has doubled is the axis of the samples. An
axis with c entries per sample, such as 2 under classifier-free guidance, is taken as c blocks of all samples, unless the
values show that the c entries of a sample stand together. Where the values do not tell, nothing here can: the self-check of
the replay fails if a pipeline orders them in another way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


ITEMS = "items"  # the value is a list with one item per sample


class Together(NamedTuple):
    """
    The axis of a tensor where the entries of a sample stand together.

    Attributes:
        axis (`int`): The axis.
        entries (`int`): Entries of each sample.
    """

    axis: int
    entries: int


def sample_axes(some: Any, twice: Any) -> Any:
    """
    Find the axes of the samples in nested lists, tuples and dicts of tensors.

    Args:
        some: Values that a call passes.
        twice: The same values of a call with each of its samples twice.

    Returns:
        The axis of a tensor, a [`Together`], or None, also for offsets; [`ITEMS`] for a list that has doubled; for other nests
        the same nest of these.

    Raises:
        ValueError: Something changes with the number of samples in another way.
    """
    if isinstance(some, Tensor) and isinstance(twice, Tensor) and some.ndim == twice.ndim:
        changed = [axis for axis in range(some.ndim) if some.shape[axis] != twice.shape[axis]]
        if not changed:
            return None
        if len(changed) == 1 and twice.shape[changed[0]] == 2 * some.shape[changed[0]]:
            return _with_order(some, twice, changed[0])
        if some.ndim == 1 and len(twice) == 2 * len(some) - 1 and some[0] == twice[0] == 0:  # one more than samples
            # Offsets of the samples' tokens. What they measure stays padded to the batch's longest sample, whose length a
            # part of the batch needs too.
            return None
    elif isinstance(some, dict) and isinstance(twice, dict) and some.keys() == twice.keys():
        return {name: sample_axes(value, twice[name]) for name, value in some.items()}
    elif isinstance(some, (list, tuple)) and isinstance(twice, (list, tuple)):
        if len(some) == len(twice):
            return [sample_axes(*values) for values in zip(some, twice)]
        if len(twice) == 2 * len(some):
            return ITEMS
    elif type(some) is type(twice) and not isinstance(some, (Tensor, dict)):
        # Values of other types are taken as shared: they may have no equality of their own.
        if not isinstance(some, (int, float, str)) or some == twice:
            return None
    raise ValueError(f"{_shape(some)} and, for twice as many samples, {_shape(twice)}.")


def take(value: Any, axes: Any, samples: Sequence[int], total: int) -> Any:
    """
    Take samples of a batch of `total`, in the order and as often as `samples` names them; tensors are copied.

    Args:
        value: Nested lists, tuples and dicts of tensors.
        axes: Its axes, from [`sample_axes`].
        samples (`Sequence[int]`): Places in the batch, in [0, total).
        total (`int`): Samples of the batch.
    """
    if axes is None or value is None:  # such as a mask that this batch does not need
        return value
    if isinstance(axes, Together):
        index = [n * axes.entries + entry for n in samples for entry in range(axes.entries)]
        return value.index_select(axes.axis, torch.tensor(index, device=value.device))
    if axes == ITEMS:
        return type(value)([value[start + n] for start in range(0, len(value), total) for n in samples])
    if isinstance(axes, int):
        index = [start + n for start in range(0, value.shape[axes], total) for n in samples]
        return value.index_select(axes, torch.tensor(index, device=value.device))
    if isinstance(axes, dict):
        return type(value)({name: take(item, axes[name], samples, total) for name, item in value.items()})
    return type(value)([take(item, axis, samples, total) for item, axis in zip(value, axes, strict=True)])


def concatenate(values: Sequence[Any], axes: Any) -> Any:
    """
    Make one batch of several samples, each of which was passed alone.

    Raises:
        RuntimeError: Their tensors have different shapes.
    """
    if axes is None or all(value is None for value in values):
        return values[0]
    if isinstance(axes, Together):
        return torch.cat(list(values), dim=axes.axis)
    if axes == ITEMS or isinstance(axes, int):
        blocks = [_blocks(value, axes) for value in values]
        # Each block has all samples.
        parts = [part for block in zip(*blocks, strict=True) for part in block]
        return torch.cat(parts, dim=axes) if isinstance(axes, int) else type(values[0])(parts)
    if isinstance(axes, dict):
        return type(values[0])({name: concatenate([value[name] for value in values], axes[name]) for name in axes})
    return type(values[0])([concatenate(items, axis) for *items, axis in zip(*values, axes, strict=True)])


def _with_order(some: Tensor, twice: Tensor, axis: int) -> int | Together:
    """The axis, from the values: each sample twice in a row, or each run of entries."""
    size = some.shape[axis]
    for entries in (count for count in range(1, size + 1) if size % count == 0):
        runs = some.unflatten(axis, (-1, entries)).repeat_interleave(2, dim=axis).flatten(axis, axis + 1)
        if torch.allclose(runs.float(), twice.float(), rtol=1e-3, atol=1e-5):
            return axis if entries == 1 else Together(axis, entries)
    return axis


def _blocks(value: Any, axes: Any) -> Sequence[Any]:
    """The blocks of a single sample."""
    return value if axes == ITEMS else value.split(1, dim=axes)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else repr(value)
