"""Options that every algorithm has. Each algorithm's own stand in the `config.py` of its folder."""

import copy
import difflib
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from accelerate.utils import get_int_from_env, parse_flag_from_env, patch_environment
from numpy import generic
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..rewards.scaling import SCALES
from ..saving.identity import identity
from . import config_checks
from .accelerate_state import kept_accelerate_state
from .config_checks import nearest_multiples
from .migration import arguments_of, unknown_options


logger = logging.get_logger(__name__)

# Arguments of the pipeline's call that are options of their own.
OPTIONS_OF_CALL = ("num_inference_steps", "guidance_scale", "height", "width")
QUANTIZATIONS = ("nf4", "int8")
PROMPT_SAMPLINGS = ("uniform", "informative")

# Options of `TrainingArguments` that change the result of a run.
_INHERITED_RESULT_OPTIONS = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args"),
    *("lr_scheduler_kwargs", "warmup_steps", "fp16", "seed"),
)


# Schedules that follow `metric_for_best_model`.
_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


class _Derived:
    """A number or switch that follows from other options, so that `dataclasses.replace` computes it anew."""

    plain: float | int | bool

    def __repr__(self) -> str:
        return repr(self.plain)

    __str__ = __repr__


class _DerivedInt(_Derived, int):
    pass


class _DerivedFloat(_Derived, float):
    pass


def derived(value: float | int | bool) -> _Derived:
    """`value` as the value of an option that was not given and follows from other options."""
    plain = getattr(value, "plain", value)
    marked = (_DerivedFloat if isinstance(plain, float) else _DerivedInt)(plain)
    marked.plain = plain
    return marked


class _Metadata(dict):
    """Metadata of a field. `HfArgumentParser` passes a copy to argparse, which does not know `changes_result`: no copy has it."""

    def keys(self) -> list[str]:
        return [name for name in super().keys() if name != "changes_result"]

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in self.keys()}


def option(default: Any, *, changes_result: bool = True, choices: tuple[str, ...] | None = None) -> Any:
    """
    A field of a config.

    Args:
        default: Its default.
        changes_result (`bool`): A run with another value ends in other weights, so it cannot resume from a checkpoint.
        choices (`tuple[str, ...]`, *optional*): The values that it may have.
    """
    metadata = _Metadata(changes_result=changes_result, **({"choices": list(choices)} if choices else {}))
    return field(default=default, metadata=metadata)


def with_help(config_class: type) -> type:
    """
    Below `@dataclass`: `--help` shows the paragraph of each option in the docstring of its class.

    Raises:
        TypeError: An option has no paragraph there.
    """
    docstring = inspect.cleandoc(config_class.__doc__ or "") + "\n"
    paragraphs = dict(re.findall(r"^ {4}(\w+) \(.*\):\n((?: {8}.*\n)+)", docstring, re.MULTILINE))
    for name, value in vars(config_class).items():
        if isinstance(value, Field):
            if name not in paragraphs:
                raise TypeError(
                    f"The option `{name}` has no paragraph in the docstring of {config_class.__name__}: write one below "
                    f"`Parameters:`, with a first line like '{name} (`float`, defaults to `1.0`):'."
                )
            help_text = " ".join(paragraphs[name].split()).replace("%", "%%")
            changes_result = value.metadata.get("changes_result", True)
            value.metadata = MappingProxyType(_Metadata(value.metadata, help=help_text, changes_result=changes_result))
    return config_class


@dataclass
@with_help
class RolloutConfig(TrainingArguments):
    r"""
    Options of online reinforcement learning: [`~transformers.TrainingArguments`] and the options below. The defaults suit
    images of 512 pixels.

    An epoch of the Trainer is one rollout and the optimizer steps on it: `save_strategy="epoch"` saves after each
    rollout, and the logged `epoch` counts rollouts.

    Parameters:
        > Data

        dataset_name (`str`, *optional*):
            Prompts to train on if the trainer gets no `train_dataset`: a prompt set by name (docs/training.md lists
            them), a Hub id, or a local .txt (one prompt per line), .json, .jsonl, .csv or .parquet file. `None` takes the
            packaged list of prompts.
        dataset_prompt_column (`str`, defaults to `"prompt"`):
            Column of the dataset that holds the prompts; a prompt set gets it. All columns are passed to the reward
            functions.
        pipeline_columns (`list[str]`, *optional*):
            Columns of the dataset that the pipeline's call gets too, under their own names: `["image"]` for a
            pipeline that edits an image. Needs `per_device_prompt_batch_size=1`: pipelines disagree on what a list of
            images means for several prompts.

        > Rollouts

        num_rollouts (`int`, defaults to `100`):
            Rollouts of the run. Sets `num_train_epochs`.
        prompts_per_rollout (`int`, defaults to `432`):
            Prompts of each rollout, over all processes.
        per_device_prompt_batch_size (`int`, defaults to `2`):
            Prompts that each process samples, and trains on, at a time; `num_generations` times as many images.
        num_generations (`int`, defaults to `2`):
            Images G per prompt that are compared with each other, at least 2.
        num_candidates (`int`, *optional*):
            Images per prompt that are sampled and scored, at least `num_generations`: those that differ most in reward are
            trained on, for two the best and the worst. For rewards that often tie. Costs the sampling of all, and the last
            bits: the batch that is replayed is smaller than the one that was sampled. `None` takes `num_generations`.
        prompt_sampling (`str`, defaults to `"uniform"`):
            How often each prompt is drawn. `"uniform"`: once in each pass over the dataset. `"informative"`: in each pass with a
            chance of 1 / (n + 1), relative to that of the prompt that tied least, if its images tied in reward in each of its last
            n draws. For rewards that always tie on many prompts; it changes something from the second pass on. `reward` is then
            that of other prompts than in a uniform run: compare evaluations.
        num_inference_steps (`int`, defaults to `40`):
            Steps T of the sampler.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance of the pipeline, in sampling and in training. 1 is none (in some 0, of which a run warns). `None`
            leaves it to the pipeline.
        height (`int`, *optional*, defaults to `512`):
            Height of the images in pixels. `None` takes the pipeline's default.
        width (`int`, *optional*, defaults to `512`):
            Width of the images in pixels. `None` takes the pipeline's default.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline's call, such as `{"max_sequence_length": 128}`.

        > Rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the sum. `None` weighs each by 1.
        scale_rewards (`str`, defaults to `"none"`):
            Put each reward on a scale of its own before it is weighed. `"group"`: in units of its standard deviation
            between the images of a prompt, so that every prompt counts alike, however little its images differ.
            `"batch"`: in units of its standard deviation over all images of a rollout. `"none"`: as it is. What the algorithm
            itself does with the sum stays.

        > Updates

        optimizer_steps_per_rollout (`int`, defaults to `4`):
            Equal optimizer steps M that a rollout is split into.
        num_iterations (`int`, defaults to `1`):
            Passes over each rollout.
        timestep_fraction (`float`, defaults to `1.0`):
            Fraction in (0, 1] of each rollout batch's noise levels that are trained, drawn at random and spread over
            the schedule. A smaller fraction costs less and learns about as much per image.
        epsilon (`float`, defaults to `0.03`):
            Half the width of the trust region: how far one rollout may move the ratio from 1, > 0.
        beta (`float`, defaults to `0.0`):
            Weight of the distance from the model without its adapter, which keeps diversity. It is in units of the reward where
            the algorithm does not normalise rewards: a start is then 0.2 times `reward_std`. Any other value than 0 costs one
            more forward pass per micro-batch.

        > What is trained

        use_peft (`bool`, defaults to `True`):
            Train LoRA adapters. `False` trains the whole transformer.
        lora_r (`int`, defaults to `32`):
            Rank of the adapters.
        lora_alpha (`int`, defaults to `64`):
            Scale of the adapters: their output is multiplied by lora_alpha / lora_r.
        lora_target_modules (`list[str]`, *optional*):
            Names (endings) of the linear layers that get an adapter. `None` takes the transformer's attention
            projections; in a block with joint attention, the projections of the joint one.
        trained_transformers (`list[str]`, *optional*):
            Of a pipeline with several transformers, such as one for the low noise levels, the components that are trained:
            `["transformer_2"]`. The others stay as they are. `None` trains all of them.
        adapter (`str`, *optional*):
            LoRA adapter to continue, with its rank, alpha and layers, in the format of PEFT or of diffusers: a folder, a
            .safetensors file, or a place on the Hub (`owner/name`, `owner/name@revision`, either with `/folder`, or the
            address of its page). `beta` is then the distance from the model without any adapter.
        ema_decay (`float`, *optional*):
            Average the trained weights over rollouts with this decay in [0, 1). The decay begins at 0 and rises as n / (n + 9)
            at rollout n: 0.9 is reached at rollout 81. `evaluate`, `generate`, `save_model` and the diffusers file of each
            checkpoint use the average. `trainer.pipeline` and PEFT's file of a checkpoint, from which a run resumes, keep
            the trained weights. `None` does not average.

        > Evaluation

        eval_dataset_name (`str`, *optional*):
            Prompts to evaluate on, such as `"drawbench"`, named like those of `dataset_name`, if the trainer gets no
            `eval_dataset`.
        num_eval_prompts (`int`, *optional*):
            Hold out this many of the training prompts and evaluate on them, if the trainer gets no `eval_dataset`. They
            are drawn at random, the same for every `seed`. Rows with the same prompt are not trained on either.
        images_per_eval_prompt (`int`, *optional*):
            Images S of each prompt in an evaluation, whose time grows with them. `None` takes 4 if `eval_diversity` is
            set, otherwise 1.
        eval_pipeline_kwargs (`dict`, *optional*):
            Arguments of the pipeline's call wherever the result is used, in the place of those of the rollouts:
            `{"num_inference_steps": 40}` for rollouts of fewer steps, also `guidance_scale`, `height` and `width`. They hold
            for evaluations, `generate`, the samples before and after training, `generation_config.json` and the model card.
            They are passed to the call as they are; `None` as the value of one leaves it to the pipeline.
        eval_diversity (`str`, *optional*):
            Measure the mean distance of the images of a prompt in an evaluation: `"clip"` or `"dreamsim"` (in the
            embeddings of these models, loaded before the run), `"pixels"` (no weights, for tiny images), or a
            `module:callable` as [`trl_fdfo.diversity`] describes. `None` measures none.
        alarm_control_drop (`float`, *optional*, defaults to `0.3`):
            Raise an alarm if a control reward (`eval_reward_fn`) has fallen since before the training by more than this
            many of its standard deviations over the prompts, and by more than noise. `None` turns this alarm off. If an
            alarm is on, a run with an `eval_strategy` is also evaluated before it starts.
        alarm_diversity_drop (`float`, *optional*, defaults to `0.3`):
            Raise an alarm if the diversity has fallen by more than this fraction, and by more than noise. `None` turns
            this alarm off.
        stop_on_alarm (`bool`, defaults to `False`):
            End the run at an alarm, as early stopping does, with a checkpoint unless `save_strategy="no"`. Otherwise an
            alarm only warns.

        > Memory

        offload_components (`bool`, defaults to `False`):
            Text encoders, VAE and everything but the transformer wait in host memory while a rollout is trained on. A
            rollout encodes all its prompts first, and the text encoders leave before it is sampled. Costs their copy to the
            device once per rollout. Rewards have an `offload` of their own.
        offload_trajectories (`bool`, defaults to `False`):
            The records of a rollout (noisy latents, velocities, embeddings of the prompts) wait in host memory, and each
            micro-batch is copied from there.
        cache_prompt_embeds (`bool`, defaults to `False`):
            Encode each prompt that the run draws once, before the run, and keep the embeddings on disk in the cache of
            `datasets`, for later runs too. The text encoders wait in host memory once the run begins. Costs disk: 1 to 2 MB
            per prompt of 128 T5 tokens in bfloat16; how much is said beforehand. Prompts are encoded one by one, which can
            round differently from a batch of them. A prompt that is in no dataset of the trainer is encoded when it comes.
        quantization (`str`, *optional*):
            `"nf4"` (bitsandbytes, on a GPU) or `"int8"` (torchao): load the linear layers of the frozen transformer in 4
            or 8 bits and train LoRA beside them, for a pipeline that is given by its name. `int8` saves memory in an
            update only together with `gradient_checkpointing`. Unpacking costs time in each pass, and the model is no
            longer quite the one that was given. A pipeline that you quantised yourself needs no option.
        vae_slicing (`bool`, *optional*):
            The VAE decodes one image at a time, in as little memory as one takes. Costs nearly nothing. `None` does so where
            more pixels than those of two images of 512 x 512 would be decoded at a time.
        vae_tiling (`bool`, defaults to `False`):
            The VAE decodes large images in overlapping tiles that are blended. Costs the overlaps, and images that
            differ a little where tiles meet. The VAE decides which sizes are large.

        > Speed

        per_device_sampling_batch_size (`int`, *optional*):
            Prompts sampled at a time by each process, a multiple of `per_device_prompt_batch_size`, which is then the
            batch size of training alone. Sampling keeps nothing for a backward pass, and larger batches fill the GPU.
            Costs the last bits: another batch size is computed in another order than the replay's. `None` takes
            `per_device_prompt_batch_size`.
        attention_backend (`str`, *optional*):
            Backend of attention in the transformer, a name that diffusers' `set_attention_backend` knows, such as
            `"flash"` or `"_native_cudnn"`. Diffusers then uses it wherever else in the process nothing is set. `None`
            leaves it to PyTorch, without cuDNN's kernel: its backward pass can return NaN (docs/memory.md#attention). A
            transformer that does not ask for a backend knows `"_native_cudnn"` alone. `sage`, which has no gradients, is
            refused.
        torch_compile (`bool`, defaults to `False`):
            Compile the transformer's repeated blocks, not the whole. Costs the compilation, in the first rollout and the
            first update, and a velocity replayed to rounding instead of to the bit.
        replay_tolerance (`float`, *optional*):
            Largest relative rms difference between a replayed and a recorded velocity that does not end the run. `None` takes
            four times what a batch shows at construction, in the run's own batch sizes and kernels, within bounds
            (docs/pipelines.md).

        > Logging

        logging_images_steps (`int`, *optional*):
            Optimizer steps between sheets of images, a multiple of the steps per rollout. A sheet shows the images of
            the first prompts of a rollout side by side, with their rewards: a PNG file in `output_dir/pictures/`, and a
            picture in TensorBoard, wandb and trackio if `report_to` names them. `None`: every 10 rollouts. The first and
            the last rollout have one in any case. 0: no sheets, for evaluations either. Otherwise each evaluation gets
            one, of the same prompts and seeds.
        num_prompts_to_log (`int`, defaults to `4`):
            Prompts on such a sheet.

        > Saving and resuming

        save_minutes (`float`, *optional*, defaults to `30.0`):
            With `save_strategy="steps"`, which is the default, save at the end of a rollout too if the latest checkpoint
            is older than these minutes. The next checkpoint replaces it, so that a long run does not fill the disk.
            `None` saves by `save_steps` alone.
        save_on_signal (`bool`, defaults to `True`):
            On SIGTERM or SIGINT (Ctrl-C) finish the rollout's optimizer steps and save before the run ends, with any
            `save_strategy`. If the signal comes while images are sampled, save at once. A second signal ends the run at
            once. `False` ends it after the micro-batch, unsaved.
        resume_with_changed_options (`bool`, defaults to `False`):
            Resume although options, rewards, prompts or the pipeline differ from the run that wrote the checkpoint.
            Otherwise that is refused, with the differences. `num_rollouts` may change if the learning rate is constant, or
            warms up for a number of steps; options that do not change the result may always change.

        > Sharing

        model_card_template (`str`, *optional*):
            A jinja2 file in the place of the packaged template of README.md, `trl_fdfo/saving/model_card.md`, which
            names its variables.

        > Options of TrainingArguments that follow from others

        num_train_epochs (`float`, *optional*):
            `num_rollouts`. Another value is refused.
        per_device_train_batch_size (`int`, *optional*):
            Images of a micro-batch, `per_device_prompt_batch_size x num_generations`. Another value is refused.
        gradient_accumulation_steps (`int`, *optional*):
            Micro-batches per optimizer step, num_rollout_batches x K / M. Another value is refused.
        per_device_eval_batch_size (`int`, *optional*):
            Images that each process samples at a time in an evaluation. The default is the number of a rollout,
            `prompts_per_call x num_candidates`.

        > Options of TrainingArguments with another default

        learning_rate (`float`, defaults to `3e-5`):
            Initial learning rate of AdamW.
        weight_decay (`float`, defaults to `1e-4`):
            Weight decay of AdamW.
        lr_scheduler_type (`str`, defaults to `"constant"`):
            Learning rate schedule.
        bf16 (`bool`, *optional*):
            bfloat16 mixed precision. `None` takes what `accelerate launch` is told (`--mixed_precision`, or its config); else
            bfloat16 if the GPU has it and `fp16` is not set.
        logging_steps (`float`, *optional*):
            Optimizer steps between logs. `None`: one log per rollout.
        eval_steps (`float`, *optional*):
            Optimizer steps between evaluations, for `eval_strategy="steps"`. `None` takes `save_steps`.
        save_steps (`float`, *optional*):
            Optimizer steps between checkpoints, a multiple of the steps per rollout. `None`: every 10 rollouts.

    Derived (computed once, here):
        num_trained_levels (`int`): K = max(1, round(timestep_fraction x trainable levels)).
        num_rollout_batches (`int`): batches per process, prompts_per_rollout / (processes x
            per_device_prompt_batch_size).
        prompts_per_call (`int`): prompts that each process samples at a time, `per_device_sampling_batch_size` or, if these are
            fewer, all that it has in a rollout.
        steps_per_rollout (`int`): optimizer steps between two rollouts, M x num_iterations.

    `dataclasses.replace` works for every option, and an assignment before a trainer is built takes full effect.

    Raises:
        ValueError: An option has an impossible value, or two options contradict each other.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "pipeline_kwargs", "eval_pipeline_kwargs"]

    # Options that had another name in an earlier version, and their new spelling.
    renamed_options: ClassVar[dict[str, str]] = {}

    # An algorithm's own config names the shared options that do nothing in it, with the reason, and what warnings advise: how to
    # make updates smaller, and the option of the sampler's noise.
    idle_options: ClassVar[dict[str, str]] = {}
    smaller_updates: ClassVar[str] = "a lower learning_rate, a smaller epsilon or a larger beta"
    noise_option: ClassVar[str | None] = None

    # Data
    dataset_name: str | None = option(None, changes_result=False)
    dataset_prompt_column: str = option("prompt", changes_result=False)
    pipeline_columns: list[str] | None = option(None)

    # Rollouts
    num_rollouts: int = option(100)
    prompts_per_rollout: int = option(432)
    per_device_prompt_batch_size: int = option(2)
    num_generations: int = option(2)
    num_candidates: int | None = option(None)
    prompt_sampling: str = option("uniform", choices=PROMPT_SAMPLINGS)
    num_inference_steps: int = option(40)
    guidance_scale: float | None = option(1.0)
    height: int | None = option(512)
    width: int | None = option(512)
    pipeline_kwargs: dict | str | None = option(None)

    # Rewards
    reward_weights: list[float] | None = option(None, changes_result=False)
    scale_rewards: str = option("none", choices=SCALES)

    # Updates
    optimizer_steps_per_rollout: int = option(4)
    num_iterations: int = option(1)
    timestep_fraction: float = option(1.0)
    epsilon: float = option(0.03)
    beta: float = option(0.0)

    # What is trained
    use_peft: bool = option(True)
    lora_r: int = option(32, changes_result=False)
    lora_alpha: int = option(64, changes_result=False)
    lora_target_modules: list[str] | None = option(None, changes_result=False)
    trained_transformers: list[str] | None = option(None, changes_result=False)
    adapter: str | None = option(None, changes_result=False)
    ema_decay: float | None = option(None)

    # Evaluation
    eval_dataset_name: str | None = option(None, changes_result=False)
    num_eval_prompts: int | None = option(None)
    images_per_eval_prompt: int | None = option(None, changes_result=False)
    eval_pipeline_kwargs: dict | str | None = option(None, changes_result=False)
    eval_diversity: str | None = option(None, changes_result=False)
    alarm_control_drop: float | None = option(0.3, changes_result=False)
    alarm_diversity_drop: float | None = option(0.3, changes_result=False)
    stop_on_alarm: bool = option(False, changes_result=False)

    # Memory
    offload_components: bool = option(False, changes_result=False)
    offload_trajectories: bool = option(False, changes_result=False)
    cache_prompt_embeds: bool = option(False, changes_result=False)
    quantization: str | None = option(None, choices=QUANTIZATIONS)
    vae_slicing: bool | None = option(None, changes_result=False)
    vae_tiling: bool = option(False)

    # Speed
    per_device_sampling_batch_size: int | None = option(None, changes_result=False)
    attention_backend: str | None = option(None, changes_result=False)
    replay_tolerance: float | None = option(None, changes_result=False)

    # Logging
    logging_images_steps: int | None = option(None, changes_result=False)
    num_prompts_to_log: int = option(4, changes_result=False)

    # Saving and resuming
    save_minutes: float | None = option(30.0, changes_result=False)
    save_on_signal: bool = option(True, changes_result=False)
    resume_with_changed_options: bool = option(False, changes_result=False)

    # Sharing
    model_card_template: str | None = option(None, changes_result=False)

    # Options of TrainingArguments that follow from others
    num_train_epochs: float | None = option(None, changes_result=False)
    per_device_train_batch_size: int | None = option(None, changes_result=False)
    gradient_accumulation_steps: int | None = option(None, changes_result=False)
    per_device_eval_batch_size: int | None = option(None, changes_result=False)

    # Defaults of TrainingArguments that differ here
    learning_rate: float = option(3e-5)
    weight_decay: float = option(1e-4)
    lr_scheduler_type: str = option("constant")
    bf16: bool | None = option(None)
    logging_steps: float | None = option(None, changes_result=False)
    eval_steps: float | None = option(None, changes_result=False)
    save_steps: float | None = option(None, changes_result=False)

    def __new__(cls, *args: Any, **options: Any) -> "RolloutConfig":
        error = unknown_options(cls.__name__, options, arguments_of(cls), cls.renamed_options, _options_elsewhere)
        if error:
            raise TypeError(error)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_given" not in self.__dict__:  # under construction
            object.__setattr__(self, name, value)
            return
        options = {field.name for field in fields(self) if field.init}
        held = {*self._own_options(), *_INHERITED_RESULT_OPTIONS, "max_steps", "output_dir"}
        is_new = name in options and value != self.__dict__.get(name)
        is_misspelt = name not in options and not hasattr(self, name)
        # Others may be new: Trainer sets `hf_deepspeed_config`, and a subclass or a user attributes of its own.
        if is_misspelt and (difflib.get_close_matches(name, options, cutoff=0.8) or name in _options_elsewhere()):
            error = unknown_options(
                type(self).__name__, {name: value}, options, self.renamed_options, _options_elsewhere
            )
            raise AttributeError(error)
        if not is_new or (self._is_in_use and name not in held):
            object.__setattr__(self, name, value)
        elif self._is_in_use:
            raise ValueError(
                f"{name}={value!r} comes too late: a trainer was built with {name}={getattr(self, name)!r}. Build one with "
                f"dataclasses.replace(config, {name}={value!r})."
            )
        else:  # checked, and with everything that follows from it
            self.__dict__.update(vars(type(self)(**{**self._given, name: value})))

    def hold(self) -> None:
        """Refuse to change from here on: a trainer is built on these options."""
        self.__dict__["_is_in_use"] = True

    def __post_init__(self):
        given = {}
        for name in (each.name for each in fields(self)):
            if isinstance(getattr(self, name), _Derived):
                setattr(self, name, None)
            setattr(self, name, _in_python(getattr(self, name)))
            given[name] = getattr(self, name)
        config_checks.check_types(self, self._own_options())
        config_checks.check_pipeline_kwargs(self, OPTIONS_OF_CALL)
        self._check()
        self.steps_per_rollout = self.optimizer_steps_per_rollout * self.num_iterations
        # DeepSpeed reads the batch sizes in `super().__post_init__`, which is also what learns the number of
        # processes: take it from the launcher's environment, and check it afterwards.
        world_size = self._announced_processes()
        self._derive_batches(world_size)
        self._fill_in_defaults()
        config_checks.check_intervals(self)
        self._resolve_mixed_precision()
        followed = [field.name for field in fields(self) if isinstance(getattr(self, field.name), _Derived)]
        precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "no"
        try:
            # Without bf16 and fp16 Trainer would take what the launcher announces, and the options say otherwise.
            with patch_environment(ACCELERATE_MIXED_PRECISION=precision):
                super().__post_init__()
        except json.JSONDecodeError as error:
            options = {
                name: getattr(self, name) for name in self._VALID_DICT_FIELDS if isinstance(getattr(self, name), str)
            }
            raise ValueError(f"One of {options} is not valid JSON: {error}.") from None
        for name in followed:  # it has made plain integers of some
            setattr(self, name, derived(getattr(self, name)))
        config_checks.check_device(self.device)
        config_checks.check_gradient_checkpointing(self)
        config_checks.check_learning_rate_schedule(self)
        # Under ZeRO-3 every model of transformers that is loaded from here on would be sharded and could not be called:
        # text encoders and rewards, the user's own too.
        unset_hf_deepspeed_config()
        if self.world_size != world_size:
            raise ValueError(
                f"The environment announces {world_size} processes, but {self.world_size} are running. Launch with "
                "`accelerate launch` or `torchrun`, which set WORLD_SIZE."
            )
        if self.n_gpu > 1:
            logger.warning(
                f"{self.n_gpu} GPUs are visible to one process, which trains on the first. For all of them: "
                f"`accelerate launch --num_processes {self.n_gpu} ...`."
            )
            self._n_gpu = 1
        self.__dict__ |= {"_given": given, "_is_in_use": False}

    def _check(self) -> None:
        """
        Refuse impossible options. An algorithm adds the checks of its own.

        Raises:
            ValueError: An option has an impossible value, or two options contradict each other.
        """
        config_checks.check_output_dir(self)
        config_checks.check_checkpoint(self)
        config_checks.check_numbers(self)
        config_checks.check_rollouts(self, SCALES, PROMPT_SAMPLINGS)
        config_checks.check_training(self)
        config_checks.check_evaluation(self)
        config_checks.check_memory_and_speed(self, QUANTIZATIONS)

    def _num_trainable_levels(self) -> int:
        """Noise levels of the sampler that could be trained, of which `timestep_fraction` are."""
        return self.num_inference_steps

    @property
    def num_trained_levels(self) -> int:
        return max(1, round(self.timestep_fraction * self._num_trainable_levels()))

    @property
    def prompts_per_call(self) -> int:
        return min(self.per_device_sampling_batch_size, self.num_rollout_batches * self.per_device_prompt_batch_size)

    @property
    def mixed_precision_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype that is computed in; None without mixed precision."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def load_dtype(self) -> torch.dtype:
        """Dtype in which a pipeline is loaded by its name."""
        # Trained weights are float32: a LoRA's always, and those that DeepSpeed and FSDP2 keep of a transformer in 16 bits.
        sharded = self.deepspeed_plugin is not None or bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
        return (
            self.mixed_precision_dtype if self.mixed_precision_dtype and (self.use_peft or sharded) else torch.float32
        )

    def schedule_kwargs(self) -> dict[str, Any]:
        """Arguments of the schedule of the learning rate."""
        given = dict(self.lr_scheduler_kwargs or {})
        if self.lr_scheduler_type not in _FOLLOW_A_METRIC:
            return given
        # By themselves they wait for a metric that falls, such as a loss.
        return {"mode": "min" if self.greater_is_better is False else "max", **given}

    def call_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that options set."""
        options = {name: getattr(self, name) for name in OPTIONS_OF_CALL}
        return {
            **{name: value for name, value in options.items() if value is not None},
            **(self.pipeline_kwargs or {}),
        }

    def decoded_pixels(self) -> int:
        """Most pixels that a process decodes at a time, where a size that is the pipeline's own counts as 1024."""
        sampled = self.num_candidates * self.prompts_per_call
        evaluated = self.call_kwargs() | (self.eval_pipeline_kwargs or {})
        pixels = lambda options: (options.get("height") or 1024) * (options.get("width") or 1024)
        return max(sampled * pixels(self.call_kwargs()), self.per_device_eval_batch_size * pixels(evaluated))

    def result_options(self) -> dict[str, Any]:
        """The options that the result of a run depends on, as JSON values that are the same in each process."""
        metadata = {field.name: field.metadata for field in fields(self)}
        own = [name for name in self._own_options() if metadata[name].get("changes_result", True)]
        names = [*own, *_INHERITED_RESULT_OPTIONS]
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        # A warm-up may be a fraction of the run.
        if schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < self.warmup_steps < 1):
            names.remove("num_rollouts")
        return identity({name: getattr(self, name) for name in names})

    def is_default(self, name: str) -> bool:
        """
        True if one of `result_options` has the value that a run had before the option came, which is the default of the package's
        class, or what follows from it. So has what is no option.
        """
        # Left out of `result_options` under some schedules, so that not to know it does not mean to be older.
        if name not in self._own_options() or name == "num_rollouts":
            return True
        configs = [each for each in reversed(type(self).__mro__) if is_dataclass(each)]
        first = next(each.__dataclass_fields__[name] for each in configs if name in each.__dataclass_fields__)
        default = first.default if first.default_factory is MISSING else first.default_factory()
        if default is MISSING:
            return False
        try:
            with kept_accelerate_state():
                older = replace(self, **{name: default})
            return older.result_options()[name] == self.result_options()[name]
        except ValueError:  # the other options need another value
            return False

    def redacted(self) -> "RolloutConfig":
        """A copy for a file that may be shared, without folders of this machine and without the token."""
        redacted = copy.copy(self)
        redacted.__dict__ |= {**_redacted(self.__dict__), "hub_token": None, "_given": {}}
        return redacted

    def to_dict(self) -> dict[str, Any]:
        options = super().to_dict() | {"hub_token": None}
        if self._is_in_use:  # by a run, whose trackers write it into files, and TensorBoard's files are pushed
            return _redacted({n: value.plain if isinstance(value, _Derived) else value for n, value in options.items()})
        # A config may be made of it again, on another machine, and computes anew what follows from others.
        return {n: None if isinstance(value, _Derived) else _in_json(value) for n, value in options.items()}

    @classmethod
    @functools.cache
    def _own_options(cls) -> dict[str, Any]:
        """The options that are not of `TrainingArguments`, or have another default here, with their types."""
        classes = [c for c in reversed(cls.__mro__) if issubclass(c, RolloutConfig)]
        annotations = {name: kind for c in classes for name, kind in inspect.get_annotations(c).items()}
        names = {field.name for field in fields(cls)}
        return {name: kind for name, kind in annotations.items() if name in names}

    # Derived options --------------------------------------------------------------------------------------------------

    def _derive_batches(self, world_size: int) -> None:
        prompts_per_batch = world_size * self.per_device_prompt_batch_size
        if self.prompts_per_rollout % prompts_per_batch:
            lower, upper = nearest_multiples(self.prompts_per_rollout, prompts_per_batch)
            raise ValueError(
                f"prompts_per_rollout={self.prompts_per_rollout} cannot be split evenly over {world_size} process(es) "
                f"x per_device_prompt_batch_size={self.per_device_prompt_batch_size}. The nearest that can: "
                f"{lower} and {upper}."
            )
        self.num_rollout_batches = self.prompts_per_rollout // prompts_per_batch
        units = self.num_rollout_batches * self.num_trained_levels
        if units % self.optimizer_steps_per_rollout:
            steps = [m for m in range(1, units + 1) if units % m == 0]
            steps = sorted(sorted(steps, key=lambda m: abs(m - self.optimizer_steps_per_rollout))[:2])
            # The number of batches must be a multiple of this for the steps that were asked for.
            batches = self.optimizer_steps_per_rollout // math.gcd(
                self.optimizer_steps_per_rollout, self.num_trained_levels
            )
            lower, upper = nearest_multiples(self.prompts_per_rollout, batches * prompts_per_batch)
            raise ValueError(
                f"The {self.num_rollout_batches} rollout batches per process x {self.num_trained_levels} trained noise "
                f"levels = {units} micro-batches cannot be split into optimizer_steps_per_rollout="
                f"{self.optimizer_steps_per_rollout} equal steps. The nearest that can: optimizer_steps_per_rollout="
                f"{' or '.join(map(str, steps))}, or prompts_per_rollout={lower} or {upper}."
            )
        self._derive(
            "gradient_accumulation_steps",
            units // self.optimizer_steps_per_rollout,
            *("prompts_per_rollout", "per_device_prompt_batch_size", "num_inference_steps", "timestep_fraction"),
            "optimizer_steps_per_rollout",
        )
        self._derive(
            "per_device_train_batch_size",
            self.per_device_prompt_batch_size * self.num_generations,
            *("per_device_prompt_batch_size", "num_generations"),
        )
        # An epoch of the Trainer is a rollout.
        self._derive("num_train_epochs", self.num_rollouts, "num_rollouts")

    def _derive(self, name: str, value: int, *options: str) -> None:
        """Set an option of `TrainingArguments` that follows from these of ours; refuse another value."""
        given = getattr(self, name)
        if given not in (None, value):
            raise ValueError(
                f"{name}={given} cannot be set: it follows from other options and is {value} here. Set {' or '.join(options)}."
            )
        setattr(self, name, derived(value))

    def _fill_in_defaults(self) -> None:
        """Options whose default follows from others."""
        ten_rollouts = 10 * self.steps_per_rollout
        defaults = {
            "logging_steps": self.steps_per_rollout,
            "save_steps": ten_rollouts,
            "logging_images_steps": ten_rollouts,
            "num_candidates": self.num_generations,
            "per_device_sampling_batch_size": self.per_device_prompt_batch_size,
            "images_per_eval_prompt": 1 if self.eval_diversity is None else 4,
            # Searching for weights that take no part costs time. A trainer does it if its adapter has some.
            "ddp_find_unused_parameters": not self.use_peft,
            # They never change, and a table of positions can be a gigabyte.
            "ddp_broadcast_buffers": False,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, derived(default))
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = derived(self.prompts_per_call * self.num_candidates)
        if self.eval_steps is None:
            self.eval_steps = derived(self.save_steps)
        takes_metric = self.load_best_model_at_end or self.lr_scheduler_type in _FOLLOW_A_METRIC
        if takes_metric and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"
        # A loss that is not finite ends the run: nothing is left to filter, and the filter waits for the device.
        self.logging_nan_inf_filter = False
        # All versions of Trainer have `gradient_checkpointing`; newer ones warn that they have another name.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing

    def _announced_processes(self) -> int:
        return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)

    def _has_bf16(self) -> bool:
        if self.use_cpu or not is_torch_bf16_gpu_available():
            return False
        # PyTorch counts cards that only emulate it, many times slower than float16.
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)

    def _resolve_mixed_precision(self) -> None:
        available = self._has_bf16()
        announced = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by `accelerate launch`; "no" is its default
        if self.bf16 is None and not self.fp16 and announced != "no":
            if announced not in ("bf16", "fp16"):
                raise ValueError(
                    f"The launcher announces mixed_precision={announced}, and a run computes in bf16, fp16 or float32: give it "
                    "--mixed_precision bf16, or set bf16 or fp16."
                )
            setattr(self, announced, derived(True))
        if self.bf16 is None:
            self.bf16 = derived(available and not self.fp16)
        elif self.bf16 and not available and not self.use_cpu:
            raise ValueError(
                "bf16=True, but this machine has no GPU with bfloat16. Leave bf16 unset to use what the machine can do, "
                "set fp16=True on an older GPU, or use_cpu=True to run bfloat16 on the CPU."
            )


def _in_python(value: Any) -> Any:
    """The value with Python's numbers in the place of numpy's, such as those of a sweep over `np.linspace`."""
    if isinstance(value, generic):
        return value.item()
    if isinstance(value, list):
        return [_in_python(item) for item in value]
    return {name: _in_python(item) for name, item in value.items()} if isinstance(value, dict) else value


def _options_elsewhere() -> dict[str, str]:
    """The options of the configs of all algorithms, and one that has each."""
    import trl_fdfo  # in an error alone: the algorithms lie above this room

    configs = [getattr(trl_fdfo, name) for name in trl_fdfo.__all__ if name.endswith("Config")]
    return {field.name: config.__name__ for config in configs for field in fields(config)}


def _in_json(value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError:  # functions and tensors in a dict, a path
        return str(value) if isinstance(value, Path) else identity(value)
    return value


def _redacted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the folders above their paths, and `output_dir` as its name alone."""
    kinds = (str, Path, dict)  # a dict may hold functions and tensors, which neither JSON nor pickle writes
    redacted = {name: identity(value) if isinstance(value, kinds) else value for name, value in options.items()}
    return redacted | {"output_dir": Path(options["output_dir"]).name}
