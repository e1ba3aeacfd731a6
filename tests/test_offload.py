"""Frozen weights that move between host memory and a device."""

import torch
from conftest import EACH_DEVICE
from torch import nn

from trl_fdfo.offload import HostCopy, offload_until_called, packed_copies


def tied() -> nn.Module:
    """Two layers with one weight, a buffer, and a weight that is not needed."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[1].weight = module[0].weight
    return module.requires_grad_(False).eval()


@EACH_DEVICE
def test_a_module_comes_and_goes_without_a_change(device):
    torch.manual_seed(0)
    module, x = tied(), torch.randn(3, 4)
    expected, before = module(x), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    copy = HostCopy(module)
    for _ in range(2):
        copy.to(device)
        places = [parameter.data_ptr() for parameter in module.parameters()]
        copy.to(device)
        assert [parameter.data_ptr() for parameter in module.parameters()] == places, "copied once more"
        assert {tensor.device.type for tensor in module.state_dict().values()} == {device}
        assert module[1].weight is module[0].weight
        torch.testing.assert_close(module(x.to(device)).cpu(), expected)
        copy.to("cpu")
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    # On a GPU the same memory each time, pinned; elsewhere as if there was no copy.
    assert all(parameter.is_pinned() == (device == "cuda") for parameter in module.parameters())


@EACH_DEVICE
def test_a_module_moves_when_it_is_called(device):
    module, x = tied(), torch.ones(3, 4)
    expected = module(x)
    hook = offload_until_called(module, torch.device(device))
    for _ in range(2):
        torch.testing.assert_close(module(x).cpu(), expected)  # the input moves too
        assert next(module.parameters()).device.type == device
        hook.offload()
        assert next(module.parameters()).device.type == "cpu"


@EACH_DEVICE
def test_copies_share_blocks_that_are_powers_of_two(device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 33, 3, 3), (1000, 700), (), (0, 4), (7,), *[(500, 651)] * 20]
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    tensors[1] = tensors[1].T  # as a tied weight may be
    tensors[-1] = tensors[-1].bfloat16()
    copies = packed_copies(tensors, pin_memory=device == "cuda")
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor.cpu()) and copy.dtype == tensor.dtype
        assert copy.stride() == tensor.stride() and copy.device.type == "cpu"
        assert copy.data_ptr() % 16 == 0 and copy.is_pinned() == (device == "cuda")
    blocks = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert all(size & (size - 1) == 0 for size in blocks.values())
    # Each by itself, rounded up, would take 1.55 times as much.
    assert sum(blocks.values()) < 1.1 * sum(tensor.nbytes for tensor in tensors)
