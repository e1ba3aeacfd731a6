"""
Frozen weights that move between host memory and a device, in one copy of pinned memory: from pageable memory, and back into
it, the 11 GB of three text encoders took about 7 s per rollout on an H100.
"""

from collections.abc import Sequence

import torch
from accelerate.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn


# Bytes of a block of pinned memory, if there is as much to keep; and of the parts in which a block is dealt out.
_BLOCK, _PART = 2**28, 256


class HostCopy:
    """
    Moves a frozen module. A GPU gets its weights from pinned memory, which holds them for good: nothing is copied back.

    Args:
        module (`nn.Module`): A module whose weights do not change. It may be on any device.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._pinned: list[torch.Tensor] | None = None

    def to(self, device: str | torch.device) -> None:
        """Move the weights to a device, or to host memory for `"cpu"`."""
        device = torch.empty(0, device=device).device  # with the number of a GPU
        parameters = list(self.module.parameters())
        # A quantised layer has weights of other classes, and `module.to` alone knows all their parts.
        if all(type(parameter) is nn.Parameter for parameter in parameters):
            if device.type == "cuda" and self._pinned is None:
                self._pinned = packed_copies(parameters)
            for parameter, copy in zip(parameters, self._pinned or []):
                if parameter.device != device:  # a reward asks for its model at each call
                    parameter.data = copy if device.type == "cpu" else copy.to(device, non_blocking=True)
        self.module.to(device)  # buffers, and all that is not pinned


def packed_copies(tensors: Sequence[torch.Tensor], pin_memory: bool = True) -> list[torch.Tensor]:
    """
    Copies in host memory that share blocks whose sizes are powers of two. PyTorch rounds each pinned block up to one: by itself a
    matrix of 84 MB takes 134.

    Args:
        tensors (`Sequence[Tensor]`): Tensors of any shapes, dtypes and devices.
        pin_memory (`bool`): Pin the blocks, from which a GPU copies without waiting.

    Returns:
        `list[Tensor]`: Copies with the values, shapes, dtypes and layouts of `tensors`, in their order.
    """
    size = lambda tensor: -(-tensor.nbytes // _PART) * _PART
    copies: dict[int, torch.Tensor] = {}
    blocks: list[tuple[torch.Tensor, int]] = []  # with the bytes that are taken
    left = sum(map(size, tensors))
    for number, tensor in sorted(enumerate(tensors), key=lambda each: -size(each[1])):
        place = next((n for n, (block, taken) in enumerate(blocks) if taken + size(tensor) <= len(block)), len(blocks))
        if place == len(blocks):
            needed, wanted = (max(size(tensor), 1) - 1).bit_length(), min(left, _BLOCK).bit_length() - 1
            block = torch.empty(1 << max(needed, wanted), dtype=torch.uint8, pin_memory=pin_memory)
            blocks.append((block, 0))
        block, start = blocks[place]
        blocks[place] = block, start + size(tensor)
        left -= size(tensor)
        flat = block[start : start + tensor.nbytes].view(tensor.dtype)
        # A layout such as channels-last is kept: the kernels that are chosen by it round otherwise.
        is_dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()
        layout = tensor.stride() if is_dense else tensor.contiguous().stride()
        copies[number] = flat.as_strided(tensor.shape, layout, flat.storage_offset()).copy_(tensor.detach())
    return [copies[number] for number in range(len(tensors))]


class _Offload(CpuOffload):
    """Accelerate's hook, which would copy the weights back to host memory."""

    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__(device)
        self._copy = HostCopy(module)

    def init_hook(self, module: nn.Module) -> nn.Module:
        self._copy.to("cpu")
        return module

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args, **kwargs) -> tuple[tuple, dict]:
        if next(module.parameters()).device != self.execution_device:
            self._copy.to(self.execution_device)
            args, kwargs = send_to_device((args, kwargs), self.execution_device)
        return args, kwargs


def offload_until_called(module: nn.Module, device: torch.device) -> UserCpuOffloadHook:
    """
    Move a frozen module to host memory now, and to the device when it is called.

    Args:
        module (`nn.Module`): The module.
        device (`torch.device`): Where it runs.

    Returns:
        `UserCpuOffloadHook`: Its `offload()` takes the module back to host memory.
    """
    hook = _Offload(module, device)
    add_hook_to_module(module, hook, append=True)
    return UserCpuOffloadHook(module, hook)
