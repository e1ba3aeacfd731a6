"""
Accelerate's state of the process, of which each config and each trainer makes its own: the device, the mixed precision, the
engine. It is shared by all that is in the process, so that a config which is built takes it from a trainer that is there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.state import AcceleratorState, PartialState


_SHARED = (PartialState._shared_state, AcceleratorState._shared_state)


def accelerate_state() -> list[dict[str, Any]]:
    """The state as it is, for [`put_back`]."""
    return [dict(shared) for shared in _SHARED]


def put_back(state: list[dict[str, Any]]) -> None:
    """Make a state that was noted the one of the process."""
    for shared, own in zip(_SHARED, state):
        shared.clear()
        shared.update(own)


@contextlib.contextmanager
def kept_accelerate_state() -> Iterator[None]:
    """In this context a config may be built, and a trainer that is there keeps its state."""
    state = accelerate_state()
    try:
        yield
    finally:
        put_back(state)
