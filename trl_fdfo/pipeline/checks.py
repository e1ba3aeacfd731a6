"""Checks of a pipeline and of the arguments of its call, made at construction, before anything is sampled."""

import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import Tensor, nn
from transformers.utils import logging

from ..media import Media, by_kind
from .patch import DRAW
from .schedulers import check_scheduler
from .trained import TRAINED, has_adapter, trained_module, trained_modules


logger = logging.get_logger(__name__)

# Names that wrappers give to the module that they wrap: `torch.compile`, DDP, FSDP, activation checkpointing.
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def check_pipeline(pipeline: DiffusionPipeline) -> None:
    """
    Raises:
        ValueError: `pipeline` is not a flow-matching pipeline with the parts that the rollout and the replay need, or
            keeps state between its steps.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        received = pipeline.__name__ + " itself" if inspect.isclass(pipeline) else f"a {type(pipeline).__name__}"
        raise ValueError(f"pipeline must be a `DiffusionPipeline`, or the Hub id or path of one, not {received}.")
    name = type(pipeline).__name__
    # Text encoders may be missing. A pipeline may have no VAE, but not one that was left out.
    parts = {"scheduler": getattr(pipeline, "scheduler", None), "vae": pipeline.components.get("vae", "no such part")}
    missing = [part for part, value in parts.items() if value is None]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}: load it whole.")
    try:
        check_scheduler(pipeline.scheduler)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{name} cannot be trained: {error}") from None
    if pipeline.scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            f"The scheduler of {name} has `stochastic_sampling=True`, which changes the sampler that a rollout replaces. "
            "Set `pipeline.scheduler.register_to_config(stochastic_sampling=False)` if the model allows it."
        )
    if getattr(pipeline, TRAINED, None) is None:
        raise ValueError(f"{name} has no `{TRAINED}`, whose velocity would be trained.")
    if not hasattr(pipeline, "prepare_latents") and DRAW not in inspect.unwrap(type(pipeline).__call__).__globals__:
        raise ValueError(
            f"{name} has no `prepare_latents` and does not draw its noise by diffusers' `{DRAW}`: the images of a prompt "
            "could not start from the same noise. Move what draws it into a method `prepare_latents`."
        )
    check_own_layers(pipeline)
    for key, transformer in trained_modules(pipeline).items():
        if getattr(transformer, "is_cache_enabled", False):
            raise ValueError(
                f"`{key}` of {name} has a feature cache on, which reuses results of earlier steps: a single step cannot be "
                f"replayed. Call `pipeline.{key}.disable_cache()`."
            )


def check_call_kwargs(pipeline: DiffusionPipeline, call_kwargs: Iterable[str]) -> None:
    """
    Raises:
        ValueError: The pipeline's call does not take one of the arguments.
    """
    accepted = list(inspect.signature(type(pipeline).__call__).parameters)[1:]
    refused = [name for name in call_kwargs if name not in accepted]
    if refused:
        raise ValueError(
            f"{type(pipeline).__name__} does not take {', '.join(refused)} in its call. It takes: {', '.join(accepted)}. "
            "Leave out the rest: an option of the config, such as height, by None."
        )


def check_steps(arguments: Mapping[str, Any], steps: int | None) -> None:
    """
    Args:
        arguments (`Mapping[str, Any]`): Arguments of the pipeline's call.
        steps (`int`, *optional*): Number of steps that is asked for beside them.

    Raises:
        ValueError: They have a schedule of another number of steps, which a pipeline would take without a word.
    """
    for name in ("sigmas", "timesteps"):
        schedule = arguments.get(name)
        if steps is not None and schedule is not None and len(schedule) != steps:
            raise ValueError(
                f"num_inference_steps={steps} would change nothing: `{name}`, which has {len(schedule)} values, sets the steps. "
                f"Give {name}=None beside it for the pipeline's own schedule, or {name} of {steps} values."
            )


def warn_of_embedded_guidance(pipeline: DiffusionPipeline, guidance_scale: float | None) -> None:
    """Warn of a guidance of 1 for a guidance-distilled model, which gets it as an embedding: 1 is not the plain model."""
    usual = inspect.signature(type(pipeline).__call__).parameters.get("guidance_scale")
    embedded = trained_module(pipeline).config.get("guidance_embeds", False)
    if embedded and guidance_scale == 1 and usual is not None and usual.default not in (None, 1):
        logger.warning_once(
            f"guidance_scale={guidance_scale} does not turn guidance off in this {type(pipeline).__name__}: its transformer is "
            "guidance-distilled, which means that it gets the number as an embedding (`guidance_embeds` of its config), and 1 "
            f"is no normal value of it. Set guidance_scale={usual.default}, the pipeline's default."
        )


def check_resolution(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> None:
    """
    Raises:
        ValueError: The height or width, in pixels, is not a multiple of the side of a latent patch.
    """
    # A pipeline that packs its latents gives its image processor a larger factor; others set a patch size.
    factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", 1)
    patch_size = trained_module(pipeline).config.get("patch_size", 1)
    if isinstance(patch_size, (list, tuple)):  # (frames, height, width)
        patch_size = patch_size[-1]
    processor = getattr(getattr(pipeline, "image_processor", None), "config", {})
    multiple = math.lcm(factor * patch_size, processor.get("vae_scale_factor", 1))
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size <= 0 or size % multiple):
            lower = max(size // multiple, 1) * multiple
            raise ValueError(
                f"{name}={size} is not a multiple of {multiple}, the pixels per latent patch of {type(pipeline).__name__}. "
                f"The nearest that work: {lower} and {lower + multiple}."
            )


def warn_of_other_frames(pipeline: DiffusionPipeline, num_frames: int | None, images: Tensor | Media) -> None:
    """Warn if a call with `num_frames` made videos of another number of frames: some pipelines round it to what fits."""
    videos = by_kind(images).get("videos")
    if videos is not None and num_frames is not None and num_frames != videos.shape[1]:
        logger.warning_once(
            f"num_frames={num_frames}, and {type(pipeline).__name__} makes videos of {videos.shape[1]} frames. Set "
            f"num_frames={videos.shape[1]}, so that your settings say what is made."
        )


def warn_of_other_size(
    pipeline: DiffusionPipeline,
    asked: tuple[int | None, int | None],
    images: Tensor | Media,
    decoded: Sequence[torch.Size],
) -> None:
    """
    Warn if a call with a height and width, in pixels, computed another size: some pipelines take one that the model was trained on,
    and some scale the images back.

    Args:
        asked (`tuple[int, int]`): Height and width of the call.
        images (`Tensor` or [`Media`]): What it returned.
        decoded (`Sequence[torch.Size]`): Shapes of what the VAE made, [..., H, W].
    """
    kinds = by_kind(images)
    made = kinds.get("videos", kinds.get("images"))
    if made is None or None in asked:
        return
    size = tuple(made.shape[-2:])
    # A VAE that makes pieces or features has other shapes; a larger size takes several times the pixels.
    largest = max((tuple(shape[-2:]) for shape in decoded if len(shape) >= 4), key=math.prod, default=size)
    computed = largest if math.prod(largest) > 1.5 * math.prod(asked) else size
    if computed == asked:
        return
    remedy = ". Set"
    if computed != size and "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
        remedy = ", which it scales back. Set use_resolution_binning=False in pipeline_kwargs, or"
    logger.warning_once(
        f"height={asked[0]} and width={asked[1]}, and {type(pipeline).__name__} computes {computed[0]} x {computed[1]} "
        f"pixels{remedy} height={computed[0]} and width={computed[1]}, so that your settings say what is made, and what it costs."
    )


def check_own_layers(pipeline: DiffusionPipeline) -> None:
    """
    Raises:
        ValueError: The layers of the transformer do not have the names that its class gives them, under which another
            pipeline would find trained weights: it is wrapped or compiled, or its attention is fused.
    """
    layers = [
        (".".join(filter(None, ["pipeline", key, path])), module)
        for key, transformer in trained_modules(pipeline).items()
        for path, module in transformer.named_modules()
    ]
    for path, module in layers:
        wrapped = next(iter(module._modules), None)
        if wrapped in _WRAPPED and len(module._modules) == 1:
            raise ValueError(
                f"`{path}` is a {type(module).__name__}, a wrapper: the names of its weights hold `{wrapped}`, and no other "
                f"pipeline would find them in a saved file. Give the module itself, its `{wrapped}`. To compile it, set "
                "torch_compile=True; for several processes the trainer wraps it."
            )
        if getattr(module, "fused_projections", False):
            raise ValueError(
                f"`{path}` is fused, by `fuse_qkv_projections`: no plain pipeline would find the weights of its fused layers "
                f"in a saved file. Load the pipeline anew without it. (`pipeline.{TRAINED}.unfuse_qkv_projections()` leaves "
                "these layers in some models.)"
            )


def check_trained_transformers(pipeline: DiffusionPipeline, names: Collection[str]) -> None:
    """
    Raises:
        ValueError: There is no name, or one is none of the pipeline's transformers.
    """
    known = list(trained_modules(pipeline))
    if not names or not set(names) <= set(known):
        raise ValueError(
            f"trained_transformers={list(names)} must name some of the transformers of {type(pipeline).__name__}: "
            f"{', '.join(known)}."
        )


def check_trainable(pipeline: DiffusionPipeline) -> None:
    """
    Raises:
        ValueError: The transformer has an adapter already, or hooks load the weights of a component layer by layer.
    """
    name = type(pipeline).__name__
    if has_adapter(trained_module(pipeline)):
        raise ValueError(
            f"The transformer of this {name} already has an adapter, from an earlier trainer or from `load_lora_weights`. "
            "Load the pipeline anew; to go on from an adapter, name it in the option `adapter`; to train a new one on top "
            "of it, make it part of the pipeline with `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()`."
        )
    for key, part in pipeline.components.items():
        if isinstance(part, nn.Module) and any(map(_loads_its_weights, part.modules())):
            raise ValueError(
                f"`{key}` of this {name} is offloaded layer by layer (`enable_sequential_cpu_offload`, "
                "`enable_group_offload` or the like): the trainer could neither move it nor train it. Load the pipeline "
                "without; to save memory set offload_components=True, gradient_checkpointing=True or quantization."
            )


def _loads_its_weights(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    by_accelerate = any(isinstance(hook, AlignDevicesHook) and hook.offload for hook in hooks)
    return by_accelerate or _is_group_offload_enabled(module)
