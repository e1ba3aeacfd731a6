"""The families of pipelines that are tested, with the calls of each."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import tiny_pipelines


@dataclass
class Family:
    build: Callable
    calls: dict[str, dict]
    images: Callable | None = None  # makes the images that the pipeline is given, or its columns


def conditioned(name: str, columns: str | None = None) -> Family:
    module = importlib.import_module("tiny_pipelines.conditioned")
    return Family(getattr(module, name), module.CALLS[name], columns and getattr(module, columns))


def family(name: str, build: str = "build", with_images: bool = False) -> Family:
    module = importlib.import_module(f"tiny_pipelines.{name}")
    return Family(getattr(module, build), module.CALLS, module.images if with_images else None)


SMALL = {"height": 16, "width": 16, "max_sequence_length": 8}
SKIP_LAYERS = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
FAMILIES = {
    "Stable Diffusion 3": Family(
        lambda: tiny_pipelines.sd3(with_t5=True),
        {
            "plain": {**SMALL, "guidance_scale": 1.0},
            "guided": {**SMALL, "guidance_scale": 4.0, "negative_prompt": "bad"},
            "skip-layer guidance": {**SMALL, "guidance_scale": 4.0, **SKIP_LAYERS},
        },
    ),
    "FLUX.1": Family(
        tiny_pipelines.flux,
        {
            "embedded guidance": {**SMALL, "guidance_scale": 3.5},
            "guided": {**SMALL, "guidance_scale": 3.5, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
        },
    ),
    "FLUX.1 Kontext": family("flux_kontext", with_images=True),
    "FLUX.2": family("flux2"),
    "FLUX.2 with an image": family("flux2", with_images=True),
    "FLUX.2 Klein": family("flux2_klein"),
    "Qwen-Image": family("qwen_image"),
    "Qwen-Image-Edit": family("qwen_image_edit", with_images=True),
    "Qwen-Image-Edit Plus": family("qwen_image_edit", "build_plus", with_images=True),
    "Sana": family("sana"),
    "AuraFlow": family("aura_flow"),
    "Lumina 2": family("lumina2"),
    "Z-Image": family("z_image"),
    "HiDream": family("hidream"),
    "Chroma": family("chroma"),
    "CogView 4": family("cogview4"),
    "Wan (video)": family("wan"),
    "FLUX.1 Fill": conditioned("fill", "image_and_mask"),
    "FLUX.1 Control": conditioned("control", "control_image"),
    "FLUX.1 ControlNet": conditioned("controlnet", "control_image"),
    "FLUX.1 inpainting": conditioned("inpaint", "image_and_mask"),
    "FLUX.1 image to image": conditioned("img2img", "image"),
    "Stable Diffusion 3 inpainting": conditioned("sd3_inpaint", "image_and_mask"),
    "Stable Diffusion 3 image to image": conditioned("sd3_img2img", "image"),
    "Stable Diffusion 3 ControlNet": conditioned("sd3_controlnet", "control_image"),
    "Stable Diffusion 3 perturbed attention": conditioned("sd3_pag"),
}
CALLS = [(name, call) for name in FAMILIES for call in FAMILIES[name].calls]


def num_prompts(name):
    """Prompts of a call: one if it takes images."""
    return 1 if FAMILIES[name].images is not None else 2


def columns_of(name, count):
    """Arguments beside the prompt: the images that the pipeline edits, if it does."""
    columns = FAMILIES[name].images(count) if FAMILIES[name].images is not None else {}
    return columns if isinstance(columns, dict) else {"image": columns}


def first_call(name):
    return next(iter(FAMILIES[name].calls.values()))
