"""
Checks of options that need no pipeline. Each raises a ValueError with the value received, what it breaks and what works.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from enum import EnumMeta
from numbers import Integral
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments, get_scheduler


_SET_BY_TRAINER = ("prompt", "generator", "latents", "output_type", "return_dict")

# Options of `TrainingArguments` that make no sense for a replayed diffusers transformer.
_REFUSED = {
    "auto_find_batch_size": "a micro-batch is as large as its rollout batch: lower `per_device_prompt_batch_size`",
    "neftune_noise_alpha": "it adds noise to token embeddings, and the replay must repeat the rollout exactly",
    "use_liger_kernel": "it patches language models",
    "label_smoothing_factor": "there are no labels",
    "data_seed": "the prompts of a rollout follow from `seed`",
    "ignore_data_skip": "a resumed run goes on with the prompts that come next",
    "dataloader_drop_last": "there is no loader that batches the prompts: `prompts_per_rollout` says how many a rollout has",
    "train_sampling_strategy": "each rollout draws its prompts from all: sort none, or train on one part after the other",
    "bf16_full_eval": "an evaluation computes in what the run computes in: set `bf16`",
    "fp16_full_eval": "an evaluation computes in what the run computes in: set `fp16`",
    "eval_accumulation_steps": "an evaluation keeps rewards, no logits",
    "batch_eval_metrics": "an evaluation computes its metrics of all images",
    "enable_jit_checkpoint": "it saves inside a rollout, where a run cannot be resumed: set `save_on_signal`",
}

_QUOTE_IT = " An unquoted no, off, yes or on in a YAML file is a bool: quote it."

_AT_LEAST_ONE = (
    *("num_rollouts", "prompts_per_rollout", "per_device_prompt_batch_size", "num_inference_steps"),
    *("optimizer_steps_per_rollout", "num_iterations", "lora_r", "lora_alpha", "num_prompts_to_log"),
)

# Bounds of numbers that Trainer does not check, both included.
_RANGES = {
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "seed": (0, 2**32 - 1),
    "save_steps": (1e-9, math.inf),
    "eval_steps": (1e-9, math.inf),
    "logging_steps": (1e-9, math.inf),
    "save_total_limit": (1, math.inf),
    "save_minutes": (0, math.inf),
    "logging_images_steps": (0, math.inf),
    "replay_tolerance": (0, 1),
}


def check_types(config: TrainingArguments, own_options: dict[str, Any]) -> None:
    """Name a string from a YAML file, a bool or NaN before it is compared with anything."""
    # Not from `dataclasses.fields`: HfArgumentParser takes the None out of the types there. Of Trainer's own options
    # the numbers and switches, as it lets all of them pass, and the choices, one of which is "no".
    inherited = {name: kind for name, kind in get_type_hints(TrainingArguments).items() if _is_number(kind)}
    for name, annotation in {**inherited, **own_options}.items():
        value = getattr(config, name)
        types = () if get_origin(annotation) is list else get_args(annotation)
        if not any(_is(value, t) for t in types or (annotation,)):
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name}={value} must be finite.")
            expected = annotation if types else getattr(annotation, "__name__", annotation)
            note = _QUOTE_IT if isinstance(value, bool) and str in (types or (annotation,)) else ""
            raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it must be {expected}.{note}")
    for name, annotation in get_type_hints(TrainingArguments).items():
        choices = [kind for kind in get_args(annotation) if isinstance(kind, EnumMeta)]
        value = getattr(config, name)
        if choices and isinstance(value, bool):
            names = ", ".join(choice.value for choice in choices[0])
            raise ValueError(f"{name}={value} is a bool; it must be one of {names}.{_QUOTE_IT}")


def check_output_dir(config: TrainingArguments) -> None:
    # None is Trainer's default, `trainer_output`.
    if config.output_dir is not None and not str(config.output_dir).strip():
        raise ValueError(
            f"output_dir={config.output_dir!r} is no folder, and checkpoints would lie between the files of the working "
            "directory: name one."
        )
    path = Path(config.output_dir or "").absolute()
    file = next((each for each in (path, *path.parents) if each.is_file()), None)
    if file is not None:
        what = "is a file" if file == path else f"lies in '{file}', which is a file"
        raise ValueError(f"output_dir='{config.output_dir}' {what}, and the run writes a folder: take another name.")


def check_checkpoint(config: TrainingArguments) -> None:
    resume = config.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() not in ("true", "false") and not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint='{resume}': there is no such folder to go on from. True takes the newest good checkpoint "
            f"in output_dir='{config.output_dir}'."
        )


def check_pipeline_kwargs(config: TrainingArguments, options_of_call: Sequence[str]) -> None:
    """Also reads them, if they are a JSON string. A column for the pipeline is refused as an argument would be."""
    for name in config.pipeline_columns or ():
        if name in options_of_call and name not in ("height", "width"):
            raise ValueError(f"pipeline_columns has '{name}': set the option `{name}`, one value for all prompts.")
        if name in _SET_BY_TRAINER:
            raise ValueError(f"pipeline_columns has '{name}', which the trainer sets itself.")
    for option in ("pipeline_kwargs", "eval_pipeline_kwargs"):
        setattr(config, option, read_json_dict(option, getattr(config, option), "arguments of the call"))
        for name, value in (getattr(config, option) or {}).items():
            if not isinstance(name, str):
                raise ValueError(f"{option} has {name!r} as a name: the names of its arguments are strings.")
            if option == "pipeline_kwargs" and name in options_of_call:
                raise ValueError(f"pipeline_kwargs has {name}={value!r}: set the option `{name}` instead.")
            if option == "eval_pipeline_kwargs" and name in (config.pipeline_columns or ()):
                raise ValueError(
                    f"eval_pipeline_kwargs has {name}={value!r}, and pipeline_columns takes `{name}` from each row: leave "
                    "one of them out."
                )
            check_argument_of_call(f"{option} has", name, value)
            try:
                json.dumps(value, default=str)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{option} has {name}={value!r}, which cannot be written beside the result: {error}."
                ) from error


def check_argument_of_call(source: str, name: str, value: Any) -> None:
    """`source` begins the error, such as "pipeline_kwargs has"."""
    if name in _SET_BY_TRAINER or name.endswith("_per_prompt"):
        raise ValueError(f"{source} {name}={value!r}, which the trainer sets itself.")
    if name.startswith("negative_prompt") and isinstance(value, list):
        raise ValueError(f"{source} {name}={value!r}: one string for all prompts, not a list.")
    if name in ("num_frames", "num_inference_steps") and value is not None:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{source} {name}={value!r}: it must be an int, at least 1.")


def read_json_dict(name: str, value: dict | str | None, contents: str) -> dict | None:
    """A dictionary as it is given or as a JSON string; `contents` says in an error what it must hold."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not valid JSON: {error}.") from None
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f"{name}={value!r} must be a dict of {contents}.")
    return value


def check_numbers(config: TrainingArguments) -> None:
    for name in _AT_LEAST_ONE:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate={config.learning_rate} must be > 0: nothing would move.")
    if not config.beta >= 0:
        raise ValueError(f"beta={config.beta} must not be negative.")
    check_ranges(config, _RANGES)


def check_ranges(config: TrainingArguments, ranges: dict[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name}={value} must be in [{low}, {high}].")


def check_rollouts(config: TrainingArguments, scales: Sequence[str], samplings: Sequence[str]) -> None:
    if config.max_steps > 0:
        raise ValueError(
            f"max_steps={config.max_steps} could end inside a rollout. Set num_rollouts: a rollout is "
            f"{config.optimizer_steps_per_rollout * config.num_iterations} steps here."
        )
    if config.num_generations < 2:
        raise ValueError(
            f"num_generations={config.num_generations}, but the model learns from the difference between the images of a "
            "prompt: it takes at least 2."
        )
    if config.num_candidates is not None and config.num_candidates < config.num_generations:
        raise ValueError(
            f"num_candidates={config.num_candidates} images of a prompt are sampled, and num_generations="
            f"{config.num_generations} of them are to be trained on: set num_candidates to at least that, or leave it out."
        )
    if config.prompt_sampling not in samplings:
        raise ValueError(
            f"prompt_sampling='{config.prompt_sampling}' is not one of {', '.join(samplings)}: whether prompts whose images tie "
            "are drawn as often as others."
        )
    if config.reward_weights is not None and not any(config.reward_weights):
        raise ValueError(f"reward_weights={config.reward_weights} leaves nothing to learn from.")
    if config.scale_rewards not in scales:
        raise ValueError(
            f"scale_rewards='{config.scale_rewards}' is not one of {', '.join(scales)}: the standard deviation that each reward "
            "is divided by before it is weighed."
        )
    if config.pipeline_columns and config.per_device_prompt_batch_size != 1:
        raise ValueError(
            f"pipeline_columns={config.pipeline_columns} needs per_device_prompt_batch_size=1, not "
            f"{config.per_device_prompt_batch_size}: pipelines disagree on what a list of images means for several "
            "prompts, and prompts would be trained with the images of others."
        )


def check_training(config: TrainingArguments) -> None:
    if not 0 < config.timestep_fraction <= 1:
        raise ValueError(f"timestep_fraction={config.timestep_fraction} must be in (0, 1]: 1 trains on all levels.")
    for name, why in config.idle_options.items():
        if getattr(config, name) != getattr(type(config), name):
            raise ValueError(
                f"{name}={getattr(config, name)} {why}: leave it out. What keeps updates small is {config.smaller_updates}."
            )
    if not config.epsilon > 0:
        raise ValueError(f"epsilon={config.epsilon} must be > 0: it is how far a rollout may move the ratio from 1.")
    if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay={config.ema_decay} must be in [0, 1), or None for no averaging.")
    if config.lora_target_modules == []:
        raise ValueError(
            "lora_target_modules=[] names no layer, and nothing would be trained: leave it out for the attention projections."
        )
    if config.adapter is not None and not config.use_peft:
        raise ValueError(
            f"adapter='{config.adapter}' was given together with use_peft=False. To train the whole model that it makes, "
            "give a pipeline with the adapter in it (`load_lora_weights`, `fuse_lora`, `unload_lora_weights`)."
        )
    if config.beta and not config.use_peft:
        raise ValueError(
            f"beta={config.beta} needs the base model, which is the model with its adapter disabled, but "
            "use_peft=False has no adapter. Set beta=0 or use_peft=True."
        )
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for name, reason in _REFUSED.items():
        value = getattr(config, name, None)  # not every version of transformers has all of them
        if name in defaults and value != defaults[name]:
            raise ValueError(f"{name}={value} does not work here: {reason}.")


def check_evaluation(config: TrainingArguments) -> None:
    for name in ("num_eval_prompts", "images_per_eval_prompt"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None.")
    if config.eval_diversity is not None and config.images_per_eval_prompt == 1:
        raise ValueError(
            f"images_per_eval_prompt=1 has no diversity for eval_diversity='{config.eval_diversity}' to measure: set at "
            "least 2, or leave it out for 4."
        )
    for name in ("alarm_control_drop", "alarm_diversity_drop"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be > 0, or None for no such alarm.")
    if config.alarm_diversity_drop is not None and config.alarm_diversity_drop >= 1:
        raise ValueError(
            f"alarm_diversity_drop={config.alarm_diversity_drop} would never raise an alarm: it is the fraction of the "
            "diversity that may be lost, below 1. None says that no alarm is wanted."
        )


def check_memory_and_speed(config: TrainingArguments, quantizations: Sequence[str]) -> None:
    if config.pipeline_columns and config.cache_prompt_embeds:
        raise ValueError(
            f"cache_prompt_embeds=True knows a prompt by its text alone, and pipeline_columns={config.pipeline_columns} "
            "may be encoded with it. Set it to False."
        )
    size = config.per_device_sampling_batch_size
    if size is not None and (size < 1 or size % config.per_device_prompt_batch_size):
        lower, upper = nearest_multiples(size, config.per_device_prompt_batch_size)
        raise ValueError(
            f"per_device_sampling_batch_size={size} is not a multiple of per_device_prompt_batch_size="
            f"{config.per_device_prompt_batch_size}, the prompts trained on at a time. The nearest that are: {lower} and "
            f"{upper}."
        )
    if config.pipeline_columns and size not in (None, 1):
        raise ValueError(
            f"pipeline_columns={config.pipeline_columns} needs per_device_sampling_batch_size=1, not {size}."
        )
    if config.quantization is not None and config.quantization not in quantizations:
        raise ValueError(f"quantization='{config.quantization}' is not one of {', '.join(quantizations)}.")
    if config.quantization and not config.use_peft:
        raise ValueError(
            f"quantization='{config.quantization}' needs use_peft=True: weights that are rounded to a few bits cannot be "
            "trained, only adapters beside them can."
        )
    if config.attention_backend is not None:
        from diffusers.models.attention_dispatch import AttentionBackendName  # which takes seconds

        names = sorted(backend.value for backend in AttentionBackendName if "sage" not in backend.value)
        if config.attention_backend not in names:
            reason = "is not one of those that diffusers has and that have gradients"
            if "sage" in config.attention_backend:
                reason = "has no gradients, so that nothing before it in the transformer would be trained right"
            raise ValueError(f"attention_backend='{config.attention_backend}' {reason}. Those are: {', '.join(names)}.")


def check_intervals(config: TrainingArguments) -> None:
    """Pictures are sampled at the start of a rollout, and checkpoints stand at the end of one."""
    if config.logging_images_steps % config.steps_per_rollout:
        lower, upper = nearest_multiples(config.logging_images_steps, config.steps_per_rollout)
        raise ValueError(
            f"logging_images_steps={config.logging_images_steps} is not a multiple of the {config.steps_per_rollout} "
            f"optimizer steps of a rollout, at whose start its images are sampled. The nearest that are: {lower} and "
            f"{upper}."
        )
    total = config.num_rollouts * config.steps_per_rollout
    # "best" saves where it evaluates.
    name = "eval_steps" if config.save_strategy == "best" and config.eval_strategy == "steps" else "save_steps"
    every = getattr(config, name) or config.logging_steps
    every = math.ceil(every * total) if every < 1 else int(every)
    if config.save_strategy in ("steps", "best") and every % config.steps_per_rollout:
        lower, upper = nearest_multiples(every, config.steps_per_rollout)
        raise ValueError(
            f"{name}={every} falls inside a rollout of {config.steps_per_rollout} optimizer steps, where "
            f"a run cannot be resumed without the rollout's data. The nearest that do not: {lower} and {upper}."
        )


def check_gradient_checkpointing(config: TrainingArguments) -> None:
    options = config.gradient_checkpointing_kwargs or {}
    if options.get("use_reentrant") or set(options) - {"use_reentrant"}:
        raise ValueError(
            f"gradient_checkpointing_kwargs={options}: diffusers' transformers have their own checkpointing, without "
            "options, which is not the reentrant one (that one loses the gradients of adapters). Leave them out."
        )


def check_device(device: torch.device) -> None:
    if device.type == "mps":
        raise ValueError(
            "This run would compute on Apple's GPU (mps), where PyTorch has no float64, in which rewards are compared: it would fail "
            "after its first rollout. Set use_cpu=True."
        )


def check_learning_rate_schedule(config: TrainingArguments) -> None:
    """Build the schedule, which Trainer does only when training starts."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    total = config.num_rollouts * config.steps_per_rollout
    kind, options = config.lr_scheduler_type, config.schedule_kwargs()
    try:
        get_scheduler(kind, optimizer, config.get_warmup_steps(total), total, options)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"lr_scheduler_type='{getattr(kind, 'value', kind)}' with lr_scheduler_kwargs={config.lr_scheduler_kwargs} and "
            f"learning_rate={config.learning_rate} makes no schedule: {error}."
        ) from None


def nearest_multiples(value: int, divisor: int) -> tuple[int, int]:
    """The multiples of `divisor` next to `value`, the lower one at least `divisor` itself."""
    lower = max(value // divisor, 1) * divisor
    return lower, lower + divisor


def _is_number(annotation: Any) -> bool:
    kinds = set(get_args(annotation) or (annotation,)) - {type(None)}
    return bool(kinds) and kinds <= {int, float, bool}


def _is(value: Any, expected: Any) -> bool:
    """Whether `value` is of a type as a user means it: a bool is no number, an int is a float, NaN is nothing."""
    kind = get_origin(expected) or expected
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if kind is list:
        return isinstance(value, list) and all(_is(item, get_args(expected)[0]) for item in value)
    return isinstance(value, kind)
