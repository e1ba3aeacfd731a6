"""Bria Fibo 2: bundles of Qwen3-VL's layers for a Perceiver and for layers of the transformer; given images or none."""

import torch
from diffusers import BriaFibo2Pipeline, BriaFibo2Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Qwen2VLImageProcessor, Qwen3VLForConditionalGeneration

from .conditioned import image
from .family import Family
from .flux2_klein import flux2_vae
from .kandinsky5 import wake
from .krea2 import qwen3_vl_config
from .qwen_image import qwen_tokenizer
from .qwen_image_edit import Processor


SIZE = {"height": 16, "width": 16}
CALLS = {
    "plain": {**SIZE, "guidance_scale": 1.0},
    "guided": {**SIZE, "guidance_scale": 5.0},
}


def qwen3_vl_processor(tokenizer, **options) -> Processor:
    """For images of 2 x 2 patches of 16 x 16, which become one token."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    return Processor(Qwen2VLImageProcessor(patch_size=16, size=size), tokenizer, **options)


def build(seed: int = 0) -> BriaFibo2Pipeline:
    """16 x 16 images, latents of 8 x 8 with 4 channels."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer("<|im_start|>user\nassistant\n")
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        patch_size=2,
        dim=24,  # the smallest with a feed-forward layer
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=8,
        gist_max_text_len=64,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 16, 16),
    )
    wake(transformer)
    pipeline = BriaFibo2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer)),
        processor=qwen3_vl_processor(tokenizer),
    )
    pipeline.text_encoder_out_layers = ((1, 2), (2, 3))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {
    "Bria Fibo 2": Family(build, CALLS),
    "Bria Fibo 2 with an image": Family(build, CALLS, image),
}
