"""What a model of `transformers` sees of an image: by its image processor, or, with gradients, of tensors."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPImageProcessorPil


def pixel_values(processor: CLIPImageProcessorPil, images: Sequence[Image.Image] | Sequence[Tensor]) -> Tensor:
    """
    Resize, crop and normalise images as the processor says, float32, shape [batch, 3, height, width].

    Tensors have gradients, and give the values that the processor gives for PIL images of them: the images and the results of
    both passes of the resizing are rounded to 8 bits, as there. The gradient takes this rounding for the identity.

    Args:
        processor (`CLIPImageProcessorPil`): Its settings hold for both kinds of images.
        images (`list`): PIL images; or tensors [3, H, W] of one size, floats in [0, 1].
    """
    if not isinstance(images[0], Tensor):
        return processor(list(images), return_tensors="pt")["pixel_values"]
    pixels = 255 * torch.stack(list(images))
    pixels = _rounded(pixels, pixels.round())
    if processor.do_resize:
        pixels = _resize(processor, pixels)
    if processor.do_center_crop:
        pixels = _center_crop(pixels, processor.crop_size.height, processor.crop_size.width)
    if processor.do_rescale:
        pixels = pixels * processor.rescale_factor
    if processor.do_normalize:
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = (pixels - mean) / std
    return pixels


def _resize(processor: CLIPImageProcessorPil, pixels: Tensor) -> Tensor:
    """PIL's resizing of pixels in [0, 255], [batch, 3, H, W]: it resizes the rows first, and rounds after each pass."""
    height, width = pixels.shape[-2:]
    # The processor itself says how large it would make them.
    empty = np.zeros((3, height, width), dtype=np.uint8)
    new_height, new_width = processor.resize(empty, processor.size, processor.resample).shape[-2:]
    # In float64 as exact as PIL's integers. Without it, in some thousands of pixels one differs by a level of 255.
    dtype = torch.float32 if pixels.device.type == "mps" else torch.float64
    rows = _resizing(width, new_width, processor.resample).to(pixels.device, dtype)
    columns = _resizing(height, new_height, processor.resample).to(pixels.device, dtype)
    return _to_8_bits(columns @ _to_8_bits(pixels.to(dtype) @ rows.T)).to(pixels.dtype)


@functools.lru_cache
def _resizing(size: int, new_size: int, resample: int) -> Tensor:
    """PIL's resizing of a column of `size` pixels as a matrix [new_size, size]. It is linear: the identity's columns show it."""
    identity = Image.fromarray(np.eye(size, dtype=np.int32) << 22)  # PIL's weights have 22 bits
    return torch.from_numpy(np.array(identity.resize((size, new_size), resample))).double() / 2**22


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle of the images; smaller ones get a black border."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    right, bottom = left + width - pixels.shape[-1], top + height - pixels.shape[-2]
    return pad(pixels, (-left, right, -top, bottom))  # a negative border is cut off


def _to_8_bits(pixels: Tensor) -> Tensor:
    """Cut off what is outside [0, 255], and round halves up, as PIL does."""
    pixels = pixels.clamp(0, 255)
    return _rounded(pixels, (pixels + 0.5).floor())


def _rounded(values: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the others: the gradient of rounding is 0 and says nothing."""
    return values + (rounded - values).detach()
