"""Every option of FDFO, in the order of the paper's steps, and the checks that need no pipeline."""

import inspect
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import is_torch_bf16_gpu_available, logging


logger = logging.get_logger(__name__)

# What `pipeline_kwargs` must leave to others.
_OPTIONS_OF_CALL = ("num_inference_steps", "guidance_scale", "height", "width")
_SET_BY_TRAINER = ("prompt", "generator", "latents", "output_type", "return_dict")

CHURN_SCHEDULES = ("constant", "interval", "prior")
DIRECTIONS = ("finite_difference", "reward_gradient")
QUANTIZATIONS = ("nf4", "int8")

# Options of `TrainingArguments` that make no sense for a replayed diffusers transformer.
_REFUSED = {
    "auto_find_batch_size": "the size of a micro-batch is that of its rollout batch: lower `per_device_prompt_batch_size`",
    "neftune_noise_alpha": "it adds noise to token embeddings, and the replay must repeat the rollout exactly",
    "use_liger_kernel": "it patches language models",
    "label_smoothing_factor": "there are no labels",
    "enable_jit_checkpoint": "it saves inside a rollout, where a run cannot be resumed: set `save_on_signal`",
}

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
    "logging_images_steps": (0, math.inf),
    # log(1 + gamma) in the schedules that are not constant: beyond it nothing is left of the image.
    "churn": (0, 10),
}

# Options of `TrainingArguments` that change the result, and ours that do not, or that the trainer describes otherwise.
_RESULT_OPTIONS = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args"),
    *("lr_scheduler_kwargs", "warmup_steps", "fp16", "seed"),
)
_NO_RESULT_OPTIONS = (
    *("dataset_name", "dataset_prompt_column", "reward_weights", "lora_r", "lora_alpha", "lora_target_modules"),
    *("logging_steps", "save_steps", "save_on_signal", "resume_with_changed_options", "logging_nan_inf_filter"),
    *("offload_components", "offload_trajectories", "cache_prompt_embeds", "shared_prefix", "vae_slicing"),
    *("per_device_sampling_batch_size", "attention_backend", "logging_images_steps", "num_prompts_to_log"),
    *("adapter", "model_card_template"),
    *("images_per_eval_prompt", "eval_diversity", "alarm_control_drop", "alarm_diversity_drop", "stop_on_alarm"),
    "eval_steps",
)


@dataclass
class FDFOConfig(TrainingArguments):
    r"""
    Configuration of [`FDFOTrainer`]: what [`~transformers.TrainingArguments`] has, and the options below. The defaults
    are the setting of the paper (arXiv 2603.12893), but for the number of rollouts.

    An epoch of the Trainer is one rollout and the optimizer steps on it: `save_strategy="epoch"` saves after each
    rollout, and the logged `epoch` counts rollouts.

    Parameters:
        > Data

        dataset_name (`str`, *optional*):
            Prompts to train on where the trainer gets no `train_dataset`: a Hub id, or a local .txt (one prompt per
            line), .json, .jsonl, .csv or .parquet file. Without it, the packaged list of prompts.
        dataset_prompt_column (`str`, defaults to `"prompt"`):
            Column of the dataset that holds the prompts. All columns are passed to the reward functions.
        pipeline_columns (`list[str]`, *optional*):
            Columns of the dataset that are passed to the pipeline's call too, under their own names: `["image"]` for a
            pipeline that edits an image. Needs `per_device_prompt_batch_size=1`: pipelines disagree on what a list of
            images means for several prompts.

        > Step 1: paired rollouts

        num_rollouts (`int`, defaults to `100`):
            Rollouts of the run. Sets `num_train_epochs`.
        prompts_per_rollout (`int`, defaults to `432`):
            Prompts of each rollout, over all processes.
        per_device_prompt_batch_size (`int`, defaults to `2`):
            Prompts sampled, and trained on, at a time by each process; `num_generations` times as many images.
        num_generations (`int`, defaults to `2`):
            Images G per prompt that are compared with each other, at least 2.
        num_inference_steps (`int`, defaults to `40`):
            Steps T of the sampler. The paper's fast setting is 10.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance of the pipeline, sampled with and trained through. 1 is none. `None` leaves it to the pipeline.
        height (`int`, *optional*, defaults to `512`):
            Height of the images in pixels. `None` takes the pipeline's default.
        width (`int`, *optional*, defaults to `512`):
            Width of the images in pixels. `None` takes the pipeline's default.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline's call, such as `{"max_sequence_length": 128}`.
        churn (`float`, defaults to `0.0025`):
            How much fresh noise drives the branches of a prompt apart, >= 0. Under `constant` the gamma of every
            level; under `interval` and `prior` the (median) total of log(1 + gamma).
        churn_schedule (`str`, defaults to `"constant"`):
            `"constant"`: the same churn at every level. `"interval"`: all of it around one random noise level per
            prompt. `"prior"`: all of it in the initial noise.
        churn_location (`float`, defaults to `0.0`):
            `interval`: mean over the prompts of the bump's centre in logit(t). 0 is t = 0.5.
        churn_location_std (`float`, defaults to `1.0`):
            `interval`: standard deviation over the prompts of the bump's centre in logit(t).
        churn_width (`float`, defaults to `0.5`):
            `interval`: standard deviation of the bump in logit(t), > 0.
        churn_spread (`float`, defaults to `0.0`):
            `prior`: standard deviation over the prompts of the logarithm of the churn. 0 gives all prompts the same.

        > Step 2: rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the sum. `None` weighs each by 1.

        > Steps 3 and 4: update

        direction (`str`, defaults to `"finite_difference"`):
            What an update follows. `"reward_gradient"`: the gradient of the reward at the image, through the decoder, for
            rewards that are differentiable; with the finite difference, which estimates it, they need not be.
        whiten_direction (`bool`, defaults to `True`):
            Divide the difference of the images by its mean square. Else close images move the model less.
        optimizer_steps_per_rollout (`int`, defaults to `4`):
            Equal optimizer steps M that a rollout is split into.
        num_iterations (`int`, defaults to `1`):
            Passes over each rollout.
        timestep_fraction (`float`, defaults to `1.0`):
            Fraction in (0, 1] of each rollout batch's noise levels that are trained on, drawn at random and spread
            over the schedule. Lower costs less and learns about as much per image.
        epsilon (`float`, defaults to `0.03`):
            How far one rollout may move the ratio of pseudo likelihoods from 1, > 0.
        beta (`float`, defaults to `0.0`):
            Weight of mean((v - v_base)^2), the penalty on leaving the model without its adapter. Keeps diversity. One
            more forward pass per micro-batch where it is not 0.

        > What is trained

        use_peft (`bool`, defaults to `True`):
            Train LoRA adapters; else the whole transformer.
        lora_r (`int`, defaults to `32`):
            Rank of the adapters.
        lora_alpha (`int`, defaults to `64`):
            Scale of the adapters: their output is multiplied by lora_alpha / lora_r.
        lora_target_modules (`list[str]`, *optional*):
            Names (endings) of the linear layers that get an adapter. `None`: the transformer's attention projections.
        adapter (`str`, *optional*):
            LoRA adapter to go on from, with its rank, alpha and layers: Hub id, folder or .safetensors file, in the
            format of PEFT or of diffusers. `beta` is the distance from the model without any adapter.
        ema_decay (`float`, *optional*):
            Average the trained weights over rollouts with this decay in [0, 1), for `evaluate`, `generate`, `save_model`
            and the diffusers file of each checkpoint. `trainer.pipeline` itself, and PEFT's file of a checkpoint, from
            which a run is resumed, have the trained weights. `None` does not average.

        > Evaluation

        num_eval_prompts (`int`, *optional*):
            Hold out this many of the training prompts and evaluate on them, where the trainer gets no `eval_dataset`. They
            are drawn at random, the same for every `seed`; rows with the same prompt are not trained on either.
        images_per_eval_prompt (`int`, *optional*):
            Images S of each prompt in an evaluation, which takes as many times as long. `None`: 4 where `eval_diversity` is
            set, else 1.
        eval_diversity (`str`, *optional*):
            Measure the diversity of the images of a prompt, their mean distance, in an evaluation: `"clip"` or `"dreamsim"`
            (in the embeddings of these models, whose weights are loaded before the run), `"pixels"` (no weights, for tiny
            images), or a `module:callable` as [`trl_fdfo.diversity`] describes. `None`: it does not.
        alarm_control_drop (`float`, *optional*, defaults to `0.3`):
            Raise an alarm where a control reward (`eval_reward_fn`) has fallen since before the training by more than this
            many of its standard deviations over the prompts, and by more than noise. `None`: no such alarm. While an alarm
            is on, a run with an `eval_strategy` is evaluated once more, before it starts.
        alarm_diversity_drop (`float`, *optional*, defaults to `0.3`):
            Raise an alarm where the diversity has fallen by more than this fraction, and by more than noise. `None`: no
            such alarm.
        stop_on_alarm (`bool`, defaults to `False`):
            End the run at an alarm, as early stopping does, with a checkpoint unless `save_strategy="no"`. Else it warns.

        > Memory

        offload_components (`bool`, defaults to `False`):
            Text encoders, VAE and all else but the transformer wait in host memory while a rollout is trained on. Costs
            their copy to the device once per rollout. Rewards have an `offload` of their own.
        offload_trajectories (`bool`, defaults to `False`):
            What a rollout records (noisy latents, velocities, embeddings of the prompts) waits in host memory, from
            which each micro-batch is copied.
        cache_prompt_embeds (`bool`, defaults to `False`):
            Encode each prompt once, before the run, and keep the embeddings on disk in the cache of `datasets`, for later
            runs too. The text encoders wait in host memory once the run begins. Costs disk: 1 MB per prompt of 128 T5
            tokens in bfloat16. Prompts are encoded one by one, which can round differently from a batch of them. Prompts
            that are not in a dataset of the trainer are encoded when they come.
        shared_prefix (`bool`, defaults to `False`):
            Where the branches of all prompts of a batch are still identical (`churn_schedule="interval"`, before its
            churn begins), sample one of them. Saves up to a third of a rollout's compute. Costs the last bits: a
            smaller batch is computed in another order than the replay's.
        quantization (`str`, *optional*):
            `"nf4"` (bitsandbytes, on a GPU) or `"int8"` (torchao): the linear layers of the frozen transformer in 4 or 8
            bits while LoRA trains beside them, for a pipeline that is given by its name; in an update `int8` saves memory
            only together with `gradient_checkpointing`. Unpacking them costs time in each pass, and what is sampled and
            trained is no longer quite the model that was given. A pipeline that you quantised yourself needs no option.
        vae_slicing (`bool`, defaults to `False`):
            The VAE decodes one image at a time, in as little memory as one takes. Costs nearly nothing.
        vae_tiling (`bool`, defaults to `False`):
            The VAE decodes large images in overlapping tiles that are blended. Costs the overlaps, and images that
            differ a little where tiles meet. Which sizes count as large is the VAE's to say.

        > Speed

        per_device_sampling_batch_size (`int`, *optional*):
            Prompts sampled at a time by each process, a multiple of `per_device_prompt_batch_size`, which is then that of
            training alone. Sampling keeps nothing for a backward pass, and larger batches fill the GPU. Costs the last
            bits, as above. `None`: as many as are trained on at a time.
        attention_backend (`str`, *optional*):
            Backend of attention in the transformer, a name that diffusers' `set_attention_backend` knows, such as
            `"flash"` or `"_native_cudnn"`; diffusers then uses it wherever else in the process nothing is set. `None`
            leaves it to PyTorch. Not every transformer's attention asks for it, and `sage` has no gradients: both are
            refused.
        torch_compile (`bool`, defaults to `False`):
            Of `TrainingArguments`, and here of the transformer's repeated blocks, not of the whole. Costs the compilation,
            in the first rollout and the first update, and a velocity replayed to rounding instead of to the bit.

        > Logging

        logging_images_steps (`int`, *optional*):
            Optimizer steps between sheets of images, a multiple of those per rollout: those of the first prompts of a
            rollout side by side, with their rewards. They are PNG files in `output_dir/pictures/`, and pictures in
            TensorBoard, wandb and trackio where `report_to` names them. `None`: every 10 rollouts. 0: none, nor of
            evaluations, each of which has a sheet of the same prompts and seeds else.
        num_prompts_to_log (`int`, defaults to `4`):
            Prompts on such a sheet.

        > Saving and going on

        save_on_signal (`bool`, defaults to `False`):
            On SIGTERM or SIGINT go on to the end of the rollout's optimizer steps and save before the run ends. Where
            the signal comes while images are sampled, it is saved at once. Else the run ends after the micro-batch.
        resume_with_changed_options (`bool`, defaults to `False`):
            Resume although options, rewards, prompts or the pipeline differ from those of the run that wrote the
            checkpoint, which is refused otherwise, with what differs. `num_rollouts` may change where the learning
            rate is constant; what does not change the result may always.

        > Sharing

        model_card_template (`str`, *optional*):
            A jinja2 file in the place of the packaged template of README.md, `trl_fdfo/model_card.md`, which names the
            variables that it gets.

    Derived (computed once, here):
        num_trained_levels (`int`): K = max(1, round(timestep_fraction T)).
        num_rollout_batches (`int`): batches per process, prompts_per_rollout / (processes x
            per_device_prompt_batch_size).
        steps_per_rollout (`int`): optimizer steps between two rollouts, M x num_iterations.
        gradient_accumulation_steps (`int`): micro-batches per optimizer step, num_rollout_batches x K / M.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "pipeline_kwargs"]

    # Its name, and the options below that it has no use for.
    algorithm = "FDFO"
    unused = ()

    # Data
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: a Hub id or a txt, json, jsonl, csv or parquet file. Default: the packaged list."},
    )
    dataset_prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    pipeline_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that are passed to the pipeline's call too, such as `image`."}
    )

    # Step 1: paired rollouts
    num_rollouts: int = field(default=100, metadata={"help": "Rollouts of the run."})
    prompts_per_rollout: int = field(default=432, metadata={"help": "Prompts per rollout, over all processes."})
    per_device_prompt_batch_size: int = field(
        default=2, metadata={"help": "Prompts sampled, and trained on, at a time by each process."}
    )
    num_generations: int = field(default=2, metadata={"help": "Images per prompt that are compared, at least 2."})
    num_inference_steps: int = field(default=40, metadata={"help": "Steps of the sampler."})
    guidance_scale: float | None = field(default=1.0, metadata={"help": "Guidance of the pipeline; 1 is none."})
    height: int | None = field(default=512, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=512, metadata={"help": "Width of the images in pixels."})
    pipeline_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's call, as a dict or a JSON string."}
    )
    churn: float = field(default=0.0025, metadata={"help": "Fresh noise that drives the branches apart, >= 0."})
    churn_schedule: str = field(
        default="constant", metadata={"help": "Where the churn goes.", "choices": list(CHURN_SCHEDULES)}
    )
    churn_location: float = field(default=0.0, metadata={"help": "interval: mean of the bump's centre in logit(t)."})
    churn_location_std: float = field(
        default=1.0, metadata={"help": "interval: standard deviation over prompts of the bump's centre in logit(t)."}
    )
    churn_width: float = field(default=0.5, metadata={"help": "interval: width of the bump in logit(t)."})
    churn_spread: float = field(
        default=0.0, metadata={"help": "prior: standard deviation over prompts of the churn's logarithm."}
    )

    # Step 2: rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1 each by default."}
    )

    # Steps 3 and 4: update
    direction: str = field(
        default="finite_difference", metadata={"help": "What an update follows.", "choices": list(DIRECTIONS)}
    )
    whiten_direction: bool = field(
        default=True, metadata={"help": "Divide the difference of the images by its mean square."}
    )
    optimizer_steps_per_rollout: int = field(default=4, metadata={"help": "Optimizer steps a rollout is split into."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over each rollout."})
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Fraction of each rollout batch's noise levels that are trained on."}
    )
    epsilon: float = field(default=0.03, metadata={"help": "Width of the trust region of the ratio."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the penalty on leaving the base model."})

    # What is trained
    use_peft: bool = field(default=True, metadata={"help": "Train LoRA adapters; else the whole transformer."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA adapters."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the LoRA adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter. Default: the attention projections."}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "LoRA adapter to go on from: Hub id or path, of PEFT or diffusers."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the trained weights over rollouts for evaluation and saving."}
    )

    # Evaluation
    num_eval_prompts: int | None = field(
        default=None, metadata={"help": "Training prompts to hold out and evaluate on, instead of an eval_dataset."}
    )
    images_per_eval_prompt: int | None = field(
        default=None, metadata={"help": "Images per prompt in an evaluation. Default: 4 with eval_diversity, else 1."}
    )
    eval_diversity: str | None = field(
        default=None, metadata={"help": "Measure of diversity: clip, dreamsim, pixels or module:callable."}
    )
    alarm_control_drop: float | None = field(
        default=0.3, metadata={"help": "Fall of a control reward, in standard deviations over prompts, for an alarm."}
    )
    alarm_diversity_drop: float | None = field(
        default=0.3, metadata={"help": "Fall of the diversity, as a fraction of the base model's, for an alarm."}
    )
    stop_on_alarm: bool = field(default=False, metadata={"help": "End the run at an alarm, with a checkpoint."})

    # Memory
    offload_components: bool = field(
        default=False, metadata={"help": "Text encoders and VAE in host memory while a rollout is trained on."}
    )
    offload_trajectories: bool = field(
        default=False, metadata={"help": "Noisy latents and velocities of a rollout in host memory."}
    )
    cache_prompt_embeds: bool = field(
        default=False, metadata={"help": "Encode each prompt once, to disk; text encoders in host memory."}
    )
    shared_prefix: bool = field(
        default=False, metadata={"help": "interval: sample the branches as one until the churn begins."}
    )

    quantization: str | None = field(
        default=None,
        metadata={"help": "Bits of the frozen transformer under LoRA.", "choices": list(QUANTIZATIONS)},
    )
    vae_slicing: bool = field(default=False, metadata={"help": "Decode one image at a time."})
    vae_tiling: bool = field(default=False, metadata={"help": "Decode large images in tiles."})

    # Speed
    per_device_sampling_batch_size: int | None = field(
        default=None, metadata={"help": "Prompts sampled at a time, a multiple of those trained on at a time."}
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "Backend of attention in the transformer, of those that diffusers has."}
    )

    # Logging
    logging_images_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between sheets of images, a multiple of those per rollout. 0: none. Default: 10 "
            "rollouts."
        },
    )
    num_prompts_to_log: int = field(default=4, metadata={"help": "Prompts on a sheet of images."})

    # Saving and going on
    save_on_signal: bool = field(
        default=False, metadata={"help": "Save at the next end of a rollout when SIGTERM or SIGINT ends the run."}
    )
    resume_with_changed_options: bool = field(
        default=False, metadata={"help": "Resume although something that changes the result differs."}
    )

    # Sharing
    model_card_template: str | None = field(
        default=None, metadata={"help": "A jinja2 file in the place of the packaged template of README.md."}
    )

    # Defaults of TrainingArguments that differ here
    learning_rate: float = field(default=3e-5, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 mixed precision. Default: where the GPU has it and fp16 is not set."}
    )
    logging_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps between logs. Default: one log per rollout."}
    )
    eval_steps: float | None = field(
        default=None,
        metadata={"help": "Optimizer steps between evaluations, for eval_strategy='steps'. Default: save_steps."},
    )
    save_steps: float | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between checkpoints, a multiple of those per rollout. Default: 10 rollouts."
        },
    )

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite. Here they end the run."}
    )

    def __post_init__(self):
        self._validate()
        # DeepSpeed reads the batch sizes in `super().__post_init__`, which is also what learns the number of
        # processes: take it from the launcher's environment, and check it afterwards.
        world_size = self._announced_processes()
        self.num_trained_levels = self._num_trained_levels()
        self.steps_per_rollout = self.optimizer_steps_per_rollout * self.num_iterations
        self._derive_batches(world_size)
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"
        if self.save_steps is None:
            self.save_steps = 10 * self.steps_per_rollout
        if self.eval_steps is None:
            self.eval_steps = self.save_steps
        if self.images_per_eval_prompt is None:
            self.images_per_eval_prompt = 1 if self.eval_diversity is None else 4
        if self.logging_images_steps is None:
            self.logging_images_steps = 10 * self.steps_per_rollout
        if self.logging_images_steps % self.steps_per_rollout:
            lower, upper = nearest_multiples(self.logging_images_steps, self.steps_per_rollout)
            raise ValueError(
                f"logging_images_steps={self.logging_images_steps} is not a multiple of the {self.steps_per_rollout} "
                f"optimizer steps of a rollout, at whose start its images are sampled. The nearest that are: {lower} and "
                f"{upper}."
            )
        total = self.num_rollouts * self.steps_per_rollout
        # "best" saves where it evaluates.
        name = "eval_steps" if self.save_strategy == "best" and self.eval_strategy == "steps" else "save_steps"
        every = getattr(self, name) or self.logging_steps
        every = math.ceil(every * total) if every < 1 else int(every)
        if self.save_strategy in ("steps", "best") and every % self.steps_per_rollout:
            lower, upper = nearest_multiples(every, self.steps_per_rollout)
            raise ValueError(
                f"{name}={every} falls inside a rollout of {self.steps_per_rollout} optimizer steps, where "
                f"a run cannot be resumed without the rollout's data. The nearest that do not: {lower} and {upper}."
            )
        if self.ddp_find_unused_parameters is None:
            # Every adapter takes part in every forward pass; searching for those that do not costs time.
            self.ddp_find_unused_parameters = not self.use_peft
        if self.ddp_broadcast_buffers is None:
            # They never change, and a table of positions can be a gigabyte.
            self.ddp_broadcast_buffers = False
        self._resolve_bf16()
        # The name that all of Trainer's versions have, whose newer ones warn that they have another.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            options = {
                name: getattr(self, name) for name in self._VALID_DICT_FIELDS if isinstance(getattr(self, name), str)
            }
            raise ValueError(f"One of {options} is not valid JSON: {error}.") from None
        self._check_checkpointing()
        self._check_schedule()
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

    def _check_schedule(self):
        """What Trainer finds out when it has a first optimizer."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        total = self.num_rollouts * self.steps_per_rollout
        try:
            get_scheduler(
                self.lr_scheduler_type,
                optimizer,
                self.get_warmup_steps(total),
                total,
                dict(self.lr_scheduler_kwargs or {}),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"lr_scheduler_type='{getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type)}' with "
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} and learning_rate={self.learning_rate} makes no schedule: "
                f"{error}."
            ) from None

    def _num_trained_levels(self) -> int:
        return max(1, round(self.timestep_fraction * self.num_inference_steps))

    def _own_options(self) -> dict[str, Any]:
        """The options that are not of `TrainingArguments`, with their types."""
        classes = [c for c in reversed(type(self).__mro__) if issubclass(c, FDFOConfig)]
        annotations = {name: kind for c in classes for name, kind in inspect.get_annotations(c).items()}
        return {name: kind for name, kind in annotations.items() if name in self.__dataclass_fields__}

    def call_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that options set."""
        options = {name: getattr(self, name) for name in _OPTIONS_OF_CALL}
        return {
            **{name: value for name, value in options.items() if value is not None},
            **(self.pipeline_kwargs or {}),
        }

    def result_options(self) -> dict[str, Any]:
        """The options that the result of a run depends on, as JSON values."""
        names = [
            name for name in (*self._own_options(), *_RESULT_OPTIONS) if name not in (*_NO_RESULT_OPTIONS, *self.unused)
        ]
        if str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)).startswith("constant"):
            names.remove("num_rollouts")
        options = {"algorithm": self.algorithm, **{name: getattr(self, name) for name in names}}
        return json.loads(json.dumps(options, default=str))

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments beside the weights, and a push uploads them: nothing of the machine or its user.
        return {**_without_folders(self.__dict__), "hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        # What trackers write into files, of which those of TensorBoard are pushed.
        return _without_folders(super().to_dict())

    def _check_types(self):
        """A string from a YAML file, a bool, NaN: named here, before it is compared with anything."""
        # Not from `dataclasses.fields`: HfArgumentParser takes the None out of the types there. Of Trainer's own options
        # the numbers and switches, as it lets all of them pass.
        inherited = {name: kind for name, kind in get_type_hints(TrainingArguments).items() if _is_number(kind)}
        for name, annotation in {**inherited, **self._own_options()}.items():
            value = getattr(self, name)
            types = () if get_origin(annotation) is list else get_args(annotation)
            if not any(_is(value, t) for t in types or (annotation,)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name}={value} must be finite.")
                expected = annotation if types else getattr(annotation, "__name__", annotation)
                raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it must be {expected}.")

    def _check_pipeline_kwargs(self):
        if isinstance(self.pipeline_kwargs, str):
            try:
                self.pipeline_kwargs = json.loads(self.pipeline_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"pipeline_kwargs={self.pipeline_kwargs!r} is not valid JSON: {error}.") from None
        if not isinstance(self.pipeline_kwargs, (dict, type(None))):
            raise ValueError(f"pipeline_kwargs={self.pipeline_kwargs!r} must be a dict of arguments of the call.")
        for name, value in (self.pipeline_kwargs or {}).items():
            if not isinstance(name, str):
                raise ValueError(f"pipeline_kwargs has {name!r} as a name: the names of its arguments are strings.")
            if name in _OPTIONS_OF_CALL:
                raise ValueError(f"pipeline_kwargs has {name}={value!r}: set the option `{name}` instead.")
            if name in _SET_BY_TRAINER or name.endswith("_per_prompt"):
                raise ValueError(f"pipeline_kwargs has {name}={value!r}, which the trainer sets itself.")
            if name.startswith("negative_prompt") and isinstance(value, list):
                raise ValueError(f"pipeline_kwargs has {name}={value!r}: one string for all prompts, not a list.")

    def _validate(self):
        self._check_types()
        self._check_pipeline_kwargs()
        if self.max_steps > 0:
            raise ValueError(
                f"max_steps={self.max_steps} could end inside a rollout. Set num_rollouts: a rollout is "
                f"{self.optimizer_steps_per_rollout * self.num_iterations} steps here."
            )
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError(f"reward_weights={self.reward_weights} leaves nothing to learn from.")
        for name in (
            "num_rollouts",
            "prompts_per_rollout",
            "per_device_prompt_batch_size",
            "num_inference_steps",
            "optimizer_steps_per_rollout",
            "num_iterations",
            "lora_r",
            "lora_alpha",
            "num_prompts_to_log",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0: nothing would move.")
        if self.churn_schedule == "interval" and self.num_inference_steps < 2:
            raise ValueError(
                "churn_schedule='interval' puts its churn between the first and the last noise level, and "
                f"num_inference_steps={self.num_inference_steps} has none there. Set at least 2, or another schedule."
            )
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}, but {self.algorithm} learns from the difference between the images "
                "of a prompt: it takes at least 2."
            )
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction={self.timestep_fraction} must be in (0, 1]: 1 trains on all levels.")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon={self.epsilon} must be > 0: it is how far a rollout may move the ratio from 1.")
        for name in ("churn", "churn_location_std", "churn_spread", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must be in [{low}, {high}].")
        if self.churn == 0:
            raise ValueError(
                "churn=0 leaves the images of a prompt identical: there is no difference to learn from. The paper's "
                "setting is 0.0025."
            )
        if not self.churn_width > 0:
            raise ValueError(f"churn_width={self.churn_width} must be > 0.")
        if self.churn_schedule not in CHURN_SCHEDULES:
            raise ValueError(f"churn_schedule='{self.churn_schedule}' is not one of {', '.join(CHURN_SCHEDULES)}.")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction='{self.direction}' is not one of {', '.join(DIRECTIONS)}.")
        if self.direction == "reward_gradient" and not self.whiten_direction:
            raise ValueError(
                "whiten_direction=False is for the finite difference: with direction='reward_gradient' leave it out."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1), or None for no averaging.")
        if self.pipeline_columns and self.per_device_prompt_batch_size != 1:
            raise ValueError(
                f"pipeline_columns={self.pipeline_columns} needs per_device_prompt_batch_size=1, not "
                f"{self.per_device_prompt_batch_size}: pipelines disagree on what a list of images means for several "
                "prompts, and prompts would be trained with the images of others."
            )
        if self.adapter is not None and not self.use_peft:
            raise ValueError(
                f"adapter='{self.adapter}' was given together with use_peft=False. To train the whole model that it makes, "
                "give a pipeline with the adapter in it (`load_lora_weights`, `fuse_lora`, `unload_lora_weights`)."
            )
        if self.beta and not self.use_peft:
            raise ValueError(
                f"beta={self.beta} needs the base model, which is the model with its adapter disabled, but "
                "use_peft=False has no adapter. Set beta=0 or use_peft=True."
            )
        self._check_evaluation()
        self._check_memory_and_speed()
        for name, reason in _REFUSED.items():
            value = getattr(self, name, None)
            if value or (name == "neftune_noise_alpha" and value is not None):
                raise ValueError(f"{name}={getattr(self, name)} does not work with FDFO: {reason}.")

    def _check_evaluation(self):
        for name in ("num_eval_prompts", "images_per_eval_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None.")
        if self.eval_diversity is not None and self.images_per_eval_prompt == 1:
            raise ValueError(
                f"images_per_eval_prompt=1 has no diversity for eval_diversity='{self.eval_diversity}' to measure: set at "
                "least 2, or leave it out for 4."
            )
        for name in ("alarm_control_drop", "alarm_diversity_drop"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be > 0, or None for no such alarm.")
        if self.alarm_diversity_drop is not None and self.alarm_diversity_drop >= 1:
            raise ValueError(
                f"alarm_diversity_drop={self.alarm_diversity_drop} would never raise an alarm: it is the fraction of the "
                "diversity that may be lost, below 1. None says that no alarm is wanted."
            )

    def _check_memory_and_speed(self):
        if self.pipeline_columns and self.cache_prompt_embeds:
            raise ValueError(
                f"cache_prompt_embeds=True knows a prompt by its text alone, and pipeline_columns={self.pipeline_columns} "
                "may be encoded with it. Set it to False."
            )
        if self.shared_prefix and self.churn_schedule != "interval":
            raise ValueError(
                f"shared_prefix=True has nothing to share under churn_schedule='{self.churn_schedule}', which drives the "
                "branches apart from the start. Set it to False, or churn_schedule='interval'."
            )
        if self.per_device_sampling_batch_size is None:
            self.per_device_sampling_batch_size = self.per_device_prompt_batch_size
        size = self.per_device_sampling_batch_size
        if size < 1 or size % self.per_device_prompt_batch_size:
            lower, upper = nearest_multiples(size, self.per_device_prompt_batch_size)
            raise ValueError(
                f"per_device_sampling_batch_size={size} is not a multiple of per_device_prompt_batch_size="
                f"{self.per_device_prompt_batch_size}, the prompts trained on at a time. The nearest that are: {lower} and "
                f"{upper}."
            )
        if self.pipeline_columns and size != 1:
            raise ValueError(
                f"pipeline_columns={self.pipeline_columns} needs per_device_sampling_batch_size=1, not {size}."
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization='{self.quantization}' is not one of {', '.join(QUANTIZATIONS)}.")
        if self.quantization and not self.use_peft:
            raise ValueError(
                f"quantization='{self.quantization}' needs use_peft=True: weights that are rounded to a few bits cannot be "
                "trained, only adapters beside them can."
            )
        if self.attention_backend is not None:
            from diffusers.models.attention_dispatch import AttentionBackendName  # which takes seconds

            names = sorted(backend.value for backend in AttentionBackendName if "sage" not in backend.value)
            if self.attention_backend not in names:
                reason = "is not one of those that diffusers has and that have gradients"
                if "sage" in self.attention_backend:
                    reason = "has no gradients, so that nothing before it in the transformer would be trained right"
                raise ValueError(
                    f"attention_backend='{self.attention_backend}' {reason}. Those are: {', '.join(names)}."
                )

    def _check_checkpointing(self):
        options = self.gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant") or set(options) - {"use_reentrant"}:
            raise ValueError(
                f"gradient_checkpointing_kwargs={options}: diffusers' transformers have their own checkpointing, without "
                "options, which is not the reentrant one (that one loses the gradients of adapters). Leave them out."
            )

    def _derive_batches(self, world_size: int):
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
        self._derive("gradient_accumulation_steps", units // self.optimizer_steps_per_rollout)
        self._derive("per_device_train_batch_size", self.per_device_prompt_batch_size * self.num_generations)
        # An epoch of the Trainer is a rollout.
        self._derive("num_train_epochs", self.num_rollouts)

    def _derive(self, name: str, value: int):
        """Set an option of `TrainingArguments` that follows from ours; one that was set to something else is refused."""
        given, default = getattr(self, name), TrainingArguments.__dataclass_fields__[name].default
        if given not in (default, value):
            raise ValueError(
                f"{name}={given} cannot be set: it follows from the other options and is {value} here. Set num_rollouts, "
                "prompts_per_rollout, per_device_prompt_batch_size, optimizer_steps_per_rollout or timestep_fraction."
            )
        setattr(self, name, value)

    def _announced_processes(self) -> int:
        return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)

    def _has_bf16(self) -> bool:
        return is_torch_bf16_gpu_available() and not self.use_cpu

    def _resolve_bf16(self):
        available = self._has_bf16()
        if self.bf16 is None:
            self.bf16 = available and not self.fp16
        elif self.bf16 and not available and not self.use_cpu:
            raise ValueError(
                "bf16=True, but this machine has no GPU with bfloat16. Leave bf16 unset to use what the machine can do, "
                "set fp16=True on an older GPU, or use_cpu=True to run bfloat16 on the CPU."
            )


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """Paths without the folders above them, which name a user and say nothing of the run."""
    return {
        name: Path(value).name if name == "output_dir" or (isinstance(value, str) and os.path.isabs(value)) else value
        for name, value in options.items()
    }


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


def nearest_multiples(value: int, divisor: int) -> tuple[int, int]:
    """The multiples of `divisor` next to `value`, the lower one at least `divisor` itself."""
    lower = max(value // divisor, 1) * divisor
    return lower, lower + divisor
