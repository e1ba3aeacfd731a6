"""What a pipeline must have, and what a call of it may ask for: refused at construction, before anything is sampled."""

import inspect
import math
from collections.abc import Iterable

import torch
from diffusers import DiffusionPipeline

from .schedulers import euler_scheduler


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
    # Of its text encoders some may be missing.
    missing = [part for part in ("scheduler", "vae") if pipeline.components.get(part, "no such part") is None]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}: load it whole.")
    try:
        scheduler = euler_scheduler(pipeline.scheduler)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{name} cannot be trained with FDFO: {error}") from None
    for option in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(option):
            raise ValueError(
                f"The scheduler of {name} has `{option}=True`, which changes the sampler that FDFO's churn replaces. "
                f"Set `pipeline.scheduler.register_to_config({option}=False)` if the model allows it."
            )
    for part in ("transformer", "encode_prompt", "prepare_latents"):
        if getattr(pipeline, part, None) is None:
            raise ValueError(f"{name} has no `{part}`, which FDFO needs to sample from it and to replay its steps.")
    steps = _scheduler_steps(pipeline)
    if steps is not None and steps > 1:
        raise ValueError(
            f"{name} calls `scheduler.step` in {steps} places of its sampling loop: it denoises more than one thing, or "
            "in more than one way, and FDFO would not know which velocity to train."
        )
    others = [
        key
        for key, part in pipeline.components.items()
        if key != "transformer" and isinstance(part, torch.nn.Module) and type(part) is type(pipeline.transformer)
    ]
    if others:
        raise ValueError(
            f"{name} has a second transformer, `{others[0]}`, for a part of the noise levels, and FDFO trains one model "
            f"at all of them. Where the pipeline allows it, load it without: `from_pretrained(..., {others[0]}=None)`."
        )
    for key, part in pipeline.components.items():
        if hasattr(part, "momentum_buffer"):
            raise ValueError(
                f"The guidance `{key}` of {name} is a {type(part).__name__}, which carries momentum from step to step: a "
                "single step cannot be replayed. Take a guidance without state, such as `ClassifierFreeGuidance`: "
                f"`pipeline.update_components({key}=...)`."
            )
    if getattr(pipeline.transformer, "is_cache_enabled", False):
        raise ValueError(
            f"The transformer of {name} has a feature cache on, which reuses what earlier steps computed: a single step "
            "cannot be replayed. Call `pipeline.transformer.disable_cache()`."
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
            f"{type(pipeline).__name__} does not take {', '.join(refused)} in its call. It takes: {', '.join(accepted)}."
        )


def check_resolution(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> None:
    """
    Raises:
        ValueError: The height or width, in pixels, is not a multiple of a latent patch's.
    """
    # A pipeline that packs its latents says so by the factor of its image processor, others by the patch size.
    factor = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", 1)
    patch_size = pipeline.transformer.config.get("patch_size", 1)
    if isinstance(patch_size, (list, tuple)):  # of frames, height and width
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


def _scheduler_steps(pipeline: DiffusionPipeline) -> int | None:
    """In how many places the pipeline's call has `scheduler.step(`; None where its source cannot be had."""
    try:
        return inspect.getsource(inspect.unwrap(type(pipeline).__call__)).count("scheduler.step(")
    except (OSError, TypeError):
        return None
