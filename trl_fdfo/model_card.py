"""The model card: what README.md says of a result, from the trainer that made it. The words are in model_card.md."""

from __future__ import annotations

import functools
import inspect
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import jinja2
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from . import __version__
from .lora import base_model_name, has_diffusers_format
from .pictures import before_after_grid
from .prompt_dataset import is_file_name


if TYPE_CHECKING:
    from .fdfo_trainer import FDFOTrainer


logger = logging.get_logger(__name__)

PACKAGED_TEMPLATE = Path(__file__).with_suffix(".md")
TAGS = ("text-to-image", "diffusers", "trl")

_FRAMEWORKS = ("trl", "transformers", "diffusers", "peft", "accelerate", "datasets")
_HYPERPARAMETERS = (
    *("prompts_per_rollout", "num_generations", "churn_schedule", "churn", "noise_level", "num_noisy_steps"),
    *(
        "timestep_fraction",
        "optimizer_steps_per_rollout",
        "num_iterations",
        "epsilon",
        "beta",
        "learning_rate",
        "lr_scheduler_type",
    ),
    *("weight_decay", "max_grad_norm", "ema_decay", "seed"),
)


def check_template(path: str) -> None:
    """
    Raises:
        ValueError: `path` is no jinja2 template, or shows no metadata.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment().parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise ValueError(f"model_card_template='{path}' cannot be read as a jinja2 template: {error}.") from error
    if "card_data" not in text:
        raise ValueError(
            f"model_card_template='{path}' has no {{{{ card_data }}}}: without it between two lines of ---, at the top, the Hub "
            f"does not know what the model is. The packaged template is {PACKAGED_TEMPLATE}."
        )


def write_model_card(
    trainer: FDFOTrainer,
    folder: str | Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> None:
    """
    Write README.md, and the pictures that it shows, into `folder`. To be called by one process.

    Args:
        trainer ([`FDFOTrainer`]): What has been trained, with its `comparison`, if there is one.
        folder (`str` or `Path`): Where the result is.
        model_name (`str`, *optional*): Title of the card; default: the name of the repo, or of the output directory.
        dataset_name (`str`, *optional*): Hub id of the prompts; default: that of the option `dataset_name`.
        tags (`str` or `list[str]`, *optional*): Tags beside those that every card has.
        license (`str`, *optional*): Default: what the base model's card says.
        base_model (`str`, *optional*): Hub id of the base model; default: where the pipeline came from.
    """
    args, pipeline, comparison = trainer.args, trainer.pipeline, trainer.comparison
    folder = Path(folder)
    repo_id = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
    base_name, is_on_hub = base_model_name(pipeline)
    if base_model is None and is_on_hub:
        base_model = base_name
    if dataset_name is None and args.dataset_name is not None and not is_file_name(args.dataset_name):
        dataset_name = args.dataset_name
    images, results = {}, {}
    if comparison is not None and "after" in comparison.images:
        images = comparison.images
        results = {name: comparison.results[name] for name in images if name in comparison.results}
    widget = _save_samples(comparison.prompts, images["after"], folder) if images else []
    pictures = _save_pictures(trainer, images, folder)
    task = "image-to-image" if args.pipeline_columns else "text-to-video" if _is_video(pipeline) else TAGS[0]
    own_tags = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        library_name="diffusers",
        base_model=base_model,
        base_model_relation=(("adapter" if args.use_peft else "finetune") if base_model is not None else None),
        pipeline_tag=task,
        tags=[task, *TAGS[1:], args.algorithm.lower(), *(["lora"] if args.use_peft else []), *own_tags],
        datasets=dataset_name,
        widget=widget or None,
        **({"license": license} if license is not None else _license(base_model)),
    )
    finished = next(
        (log["train_runtime"] for log in reversed(trainer.state.log_history) if "train_runtime" in log), None
    )
    rollouts = round(trainer.state.global_step / args.steps_per_rollout)
    rows = list(dict.fromkeys(name for values in results.values() for name in values))
    diversity = comparison.diversity.__name__ if comparison is not None else None
    if dataset_name is not None:
        source = f"[{dataset_name}](https://huggingface.co/datasets/{dataset_name})"
    else:
        source = "a list of its own" if args.dataset_name is None else f"`{Path(args.dataset_name).name}`"
    rewards = trainer.reward_functions
    card = ModelCard.from_template(
        data,
        template_path=str(args.model_card_template or PACKAGED_TEMPLATE),
        model_name=model_name or repo_id.rpartition("/")[2],
        algorithm=args.algorithm,
        pipeline=type(pipeline).__name__,
        is_adapter=args.use_peft,
        has_widget=bool(widget),
        snippet=usage_snippet(trainer, repo_id, base_model or base_name),
        sampling=list(_sampling(trainer).items()),
        rewards=[(name, f"{weight:g}") for name, weight in zip(rewards.names, rewards.weights.tolist())],
        prompts=f"{len(trainer.train_dataset):,} prompts from {source}",
        columns=list(results),
        rows=[(name, [_shown(values.get(name)) for values in results.values()]) for name in rows],
        held_out=comparison is not None and comparison.held_out,
        num_images=len(images["after"].flatten(0, 1)) if images else 0,
        diversity=diversity if diversity in rows else None,
        rollouts=f"{rollouts:,}",
        images=f"{rollouts * args.prompts_per_rollout * args.num_generations:,}",
        duration=None if finished is None else _duration(finished),
        hyperparameters=_hyperparameters(trainer),
        versions=[("trl_fdfo", __version__), ("torch", torch.__version__), *((f, version(f)) for f in _FRAMEWORKS)],
        **pictures,
    )
    card.save(folder / "README.md")


def usage_snippet(trainer: FDFOTrainer, repo_id: str, base_model: str | None) -> str:
    """Python code that loads the result from `repo_id` and makes an image as in training."""
    pipeline, args = trainer.pipeline, trainer.args
    name = type(pipeline).__name__ if hasattr(diffusers, type(pipeline).__name__) else DiffusionPipeline.__name__
    # What the base model's repo may have and this pipeline does without, such as a large text encoder.
    absent = [n for n, part in pipeline.components.items() if part is None and n not in pipeline._optional_components]
    loaded = base_model or "path/to/the/pipeline" if args.use_peft else repo_id
    source = [f'"{loaded}"', *(f"{part}=None" for part in absent), f"dtype={pipeline.transformer.dtype}"]
    imports, load = ["import torch", f"from diffusers import {name}"], []
    if args.use_peft and has_diffusers_format(pipeline, trainer.model):
        load = [f'pipeline.load_lora_weights("{repo_id}")']
    elif args.use_peft:
        imports.append("from peft import PeftModel")
        load = [f'PeftModel.from_pretrained(pipeline.transformer, "{repo_id}")']
    prompt = trainer.train_dataset[0][args.dataset_prompt_column]
    if trainer.comparison is not None:
        prompt = trainer.comparison.prompts[0]
    inputs = {column: f'load_image("{column}.png")' for column in args.pipeline_columns or ()}
    if inputs:
        imports.append("from diffusers.utils import load_image")
    if _is_video(pipeline):
        imports.append("from diffusers.utils import export_to_video")
        made, part, save = "video", "frames", 'export_to_video(video, "video.mp4")'
    else:
        made, part, save = "image", "images", 'image.save("image.png")'
    call = [json.dumps(prompt, ensure_ascii=False), *(f"{n}={v}" for n, v in {**inputs, **_sampling(trainer)}.items())]
    lines = [
        *sorted(imports, key=lambda line: line.startswith("from")),
        "",
        _call(f"pipeline = {name}.from_pretrained", source),
        *load,
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        f"{_call(f'{made} = pipeline', call)}.{part}[0]",
        save,
    ]
    return "\n".join(lines)


def _call(function: str, arguments: list[str]) -> str:
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) < 80 else "\n".join([f"{function}(", *(f"    {a}," for a in arguments), ")"])


def _sampling(trainer: FDFOTrainer) -> dict[str, str]:
    """Arguments of the pipeline's call in training, as code; those that are no literals are left out."""
    kinds = (str, int, float, bool, list, dict)
    return {name: repr(value) for name, value in trainer.flow.call_kwargs.items() if isinstance(value, kinds)}


def _hyperparameters(trainer: FDFOTrainer) -> list[tuple[str, Any]]:
    args = trainer.args
    found = {name: getattr(args, name, None) for name in _HYPERPARAMETERS if name not in args.unused}
    if args.use_peft:
        adapter = trainer.model.peft_config["default"]
        found |= {"lora_r": getattr(adapter, "r", None), "lora_alpha": getattr(adapter, "lora_alpha", None)}
    found["mixed_precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    found["num_processes"] = args.world_size
    return [(name, getattr(value, "value", value)) for name, value in found.items() if value is not None]


@functools.cache
def _license(base_model: str | None) -> dict[str, str]:
    """What the card of the base model says of its licence; nothing where it cannot be asked."""
    if base_model is None:
        return {}
    try:
        data = ModelCard.load(base_model, ignore_metadata_errors=True).data
    except (OSError, HTTPError, ValueError) as error:
        logger.info(f"The licence of {base_model} is not known: {error}")
        return {}
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    if found["license_link"] and "://" not in found["license_link"]:
        found["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{found['license_link']}"
    return {name: value for name, value in found.items() if value is not None}


def _save_samples(prompts: list[str], images: Tensor, folder: Path) -> list[dict[str, Any]]:
    """Write one image of each prompt, from images [P, S, ...], and list them as the Hub's widget wants them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    widget = []
    for number, place in enumerate(_spread(len(prompts), 8)):
        name = f"images/{number}.png"
        _to_pil(_still(images)[place, 0]).save(folder / name)
        widget.append({"text": prompts[place], "output": {"url": name}})
    return widget


def _save_pictures(trainer: FDFOTrainer, images: dict[str, Tensor], folder: Path) -> dict[str, str | None]:
    """Draw the grid and the curve where there is something to draw, and say what they are called."""
    made: dict[str, str | None] = {"before_after": None, "reward_curve": None, "evaluation": None}
    folder.mkdir(parents=True, exist_ok=True)
    if len(images) > 1:
        before = next(iter(images))
        prompts = trainer.comparison.prompts
        shown = _spread(len(prompts), 9)
        pair = [_still(images[name])[shown, :3] for name in (before, "after")]
        made["before_after"] = "before_after.png"
        grid = before_after_grid([prompts[n] for n in shown], *pair, titles=(before, "after"))
        grid.save(folder / made["before_after"])
    try:
        from .report import evaluation_curves, reward_curve
    except ImportError as error:
        logger.info(f"The model card has no curves: {error}")
        return made
    if sum("reward" in log for log in trainer.state.log_history) > 1:
        made["reward_curve"] = "reward_curve.png"
        reward_curve(trainer.state.log_history, folder / made["reward_curve"])
    if sum("eval_reward" in log for log in trainer.state.log_history) > 1:
        made["evaluation"] = "evaluation.png"
        evaluation_curves(trainer.state.log_history, folder / made["evaluation"])
    return made


def _spread(count: int, most: int) -> list[int]:
    """Places of at most `most` out of `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def _still(images: Tensor) -> Tensor:
    """Images as they are, [P, S, 3, H, W]; of videos [P, S, F, 3, H, W] the frame in the middle."""
    return images[:, :, images.shape[2] // 2] if images.ndim == 6 else images


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _is_video(pipeline: DiffusionPipeline) -> bool:
    return "num_frames" in inspect.signature(pipeline.__call__).parameters


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
