"""Tensors are prepared, with gradients, to the values that the image processor of `transformers` makes of PIL images."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from trl_fdfo.media import to_pil
from trl_fdfo.rewards.pixel_values import pixel_values


def noise(height: int, width: int) -> torch.Tensor:
    """Not of 8 bits: they are rounded first."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))


def like_a_photo(height: int, width: int) -> torch.Tensor:
    """Waves whose strength falls with their frequency, and hard edges of black and white, where bicubic weights overshoot."""
    random = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = sum(np.sin(40 * random.normal(size=2) @ np.stack([x.ravel(), y.ravel()]) * k) / k for k in range(1, 9))
    photo = (
        torch.tensor((waves / 4 + 0.5).clip(0, 1).reshape(height, width), dtype=torch.float32).expand(3, -1, -1).clone()
    )
    photo *= torch.tensor([1.0, 0.8, 0.6])[:, None, None]
    photo[:, : height // 3, : width // 2] = 1
    photo[:, height // 2 :, width // 3 : width // 2] = 0
    return photo


@pytest.mark.parametrize("image", [noise, like_a_photo])
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((512, 512), {}),
        ((448, 448), {}),  # the weights of a halving have sums that are halves: these are rounded up
        ((224, 224), {}),
        ((64, 64), {}),
        ((300, 517), {}),
        ((401, 224), {}),
        ((96, 40), {}),
        ((40, 57), {"size": {"shortest_edge": 256}}),
        ((90, 200), {"size": {"shortest_edge": 100}}),  # smaller than the crop
        ((90, 201), {"size": {"height": 201, "width": 333}, "crop_size": {"height": 224, "width": 200}}),
        ((64, 64), {"resample": Image.Resampling.BILINEAR}),
        ((300, 200), {"resample": Image.Resampling.LANCZOS}),
        ((30, 30), {"do_resize": False, "do_center_crop": False}),
        ((30, 30), {"do_normalize": False, "size": {"shortest_edge": 20}}),
    ],
)
def test_tensors_are_prepared_as_the_processor_does(image, size, settings):
    processor, images = CLIPImageProcessorPil(**settings), torch.stack([image(*size), 1 - image(*size) / 2])
    prepared = pixel_values(processor, images)
    expected = pixel_values(processor, to_pil(images))
    assert torch.equal(expected, processor(to_pil(images), return_tensors="pt")["pixel_values"])
    # The pixels are equal; float32 rounds their normalisation in another order. A level of 255 would be 0.015.
    torch.testing.assert_close(prepared, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(50, 70), (20, 17), (32, 32)])
def test_the_gradient_is_that_of_resizing_without_rounding(size):
    # PIL resizes floats without rounding. A prepared image is linear in an image that is never cut off.
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = 0.4 + 0.2 * noise(*size)
    change = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(2))
    image.requires_grad_()
    (gradient,) = torch.autograd.grad((weights * pixel_values(processor, [image])[0]).sum(), image)
    scale = 32 / min(size)
    height, width = (int(scale * side) for side in size)
    top, left = (height - 32) // 2, (width - 32) // 2
    change_seen = (
        np.stack(
            [
                np.asarray(Image.fromarray(channel.numpy()).resize((width, height), Image.Resampling.BICUBIC))
                for channel in change
            ]
        )[:, top : top + 32, left : left + 32]
        / np.array(processor.image_std)[:, None, None]
    )
    expected = (weights * torch.from_numpy(change_seen)).sum()
    assert expected.abs() > 1
    torch.testing.assert_close((gradient * change).sum().double(), expected, rtol=1e-4, atol=0)


def test_a_pixel_that_is_cut_off_has_no_gradient():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False, do_normalize=False)
    image = torch.ones(3, 16, 16)
    image[..., 8:] = 0
    prepared = pixel_values(processor, [image.requires_grad_()])[0]
    # Beside the edge the bicubic weights make more than white.
    (gradient,) = torch.autograd.grad(prepared[0, 16, 13], image)
    assert prepared[0, 16, 13] == 1 and not gradient.any()
    (gradient,) = torch.autograd.grad(pixel_values(processor, [image])[0][0, 16, 15], image)
    torch.testing.assert_close(gradient.sum(), torch.tensor(1.0))
