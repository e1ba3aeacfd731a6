"""
Text encoders and language models that wait in host memory: on the device while they encode or write, and away before the
transformer computes.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate.hooks import UserCpuOffloadHook
from accelerate.utils.memory import clear_device_cache
from torch import nn


class EncoderOffload:
    """
    Takes offloaded text encoders off the device before the transformer is called, so that the two phases share its memory.

    Args:
        hooks (`Sequence[UserCpuOffloadHook]`): Hooks of the text encoders. Each moves its encoder to the device when it is
            called, and to host memory by `offload`.
        transformer (`nn.Module`): The transformer, whole and not yet wrapped by an engine while it makes room.
        device (`torch.device`): The device.
    """

    def __init__(self, hooks: Sequence[UserCpuOffloadHook], transformer: nn.Module, device: torch.device):
        self._hooks = hooks
        self._transformer = transformer
        self._device = device
        self._may_be_there = False
        self._alone = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """
        In a `with`, the transformer waits in host memory while prompts are encoded: a device may have room for either, and
        not for both.
        """
        self._alone = True
        try:
            yield
        finally:
            self.leave()
            self._alone = False

    def come(self) -> None:
        """Call this before a text encoder is called."""
        if self._may_be_there:
            return
        self._may_be_there = True
        if self._alone:
            self._move_transformer("cpu")

    def leave(self) -> None:
        """Call this before the transformer is called."""
        if not self._may_be_there:
            return
        self._may_be_there = False
        for hook in self._hooks:
            hook.offload()
        clear_device_cache()
        if self._alone:
            self._move_transformer(self._device)

    def _move_transformer(self, device: torch.device | str) -> None:
        # Not its own `to`: diffusers loads a model in 4 bits with one that warns.
        nn.Module.to(self._transformer, device)
        clear_device_cache()
