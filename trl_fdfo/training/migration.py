"""
Names that options and arguments have in other trainers, and here. Errors about unknown names and docs/migration.md are
made of these tables.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Here:
    """
    What a name of another trainer is called here.

    Parameters:
        names (`tuple[str, ...]`): Options or arguments in its place. Not every algorithm or script has each of them.
        note (`str`): How they differ; why there is none, if there is none.
    """

    names: tuple[str, ...]
    note: str = ""


def _is(*names: str, note: str = "") -> Here:
    return Here(names, note)


def _none(note: str) -> Here:
    return Here((), note)


def _each(names: str, here: Here) -> dict[str, Here]:
    return dict.fromkeys(names.split(), here)


_IN_PROMPTS = "counted in prompts, of num_generations images each"
_NO_TOKENS = _none("an image is not sampled token by token")
_NO_VLLM = _none("the pipeline itself samples the images")
_NO_TOKEN_LOSS = _none("it shapes a loss over tokens; a trainer class has one loss here")
_GIVE_PEFT_CONFIG = _none("give the trainer a `peft_config`")
_GIVE_PIPELINE = _none("load the pipeline with it and give that to the trainer")
_GIVE_QUANTISED = _none("give the trainer a pipeline that is quantised with it")
_IS_ARGUMENT = _none("it is an argument of the trainer, not of its config")
_SCRIPTS_MODEL = _is("model", note="the trainer takes `pipeline`, the scripts take `model`")
_SCRIPTS_REWARD = _is("reward", note="the trainer takes `reward_fn`, the scripts take `reward`")
_SOME_STEPS = _is("num_noisy_steps", note="an option of the algorithm that can add noise in some of the steps alone")
_EVALUATED_WITH = _is("eval_pipeline_kwargs", note="a dict of them; by default those of the rollouts")
_WINDOW = _is("window_interval", note="the window is drawn from all steps but the last, or moves over them")
_GLOBAL_STD = _is("advantage_std", note='true is "batch", for the algorithm that divides by a standard deviation')

# Options. The names of ConfigDicts are those with dots, such as `sample.num_steps`.
OPTIONS_OF: dict[str, dict[str, Here]] = {
    "GRPOConfig": {
        "model_init_kwargs": _GIVE_PIPELINE,
        "trust_remote_code": _GIVE_PIPELINE,
        "disable_dropout": _none("an update must repeat its rollout exactly: dropout is never on"),
        "router_aux_loss_coef": _NO_TOKEN_LOSS,
        "cast_lm_head_to_fp32": _NO_TOKENS,
        "num_generations_eval": _is("images_per_eval_prompt"),
        **_each("max_completion_length pad_to_multiple_of temperature top_p top_k min_p", _NO_TOKENS),
        "temperature": _is("churn", "noise_level", note="the sampler's noise makes the images of a prompt differ"),
        **_each("repetition_penalty chat_template_kwargs cache_implementation", _NO_TOKENS),
        "ds3_gather_for_generation": _none("a rollout gathers sharded weights layer by layer, as an update does"),
        "shuffle_dataset": _none("prompts are drawn at random, in an order that follows from `seed`"),
        "generation_batch_size": _is("prompts_per_rollout", note=f"{_IN_PROMPTS}, over all processes"),
        "steps_per_generation": _is("optimizer_steps_per_rollout", note="counted in optimizer steps"),
        "generation_kwargs": _is("pipeline_kwargs", note="arguments of the pipeline's call"),
        **_each(
            "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
            "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
            "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
            "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
            _NO_VLLM,
        ),
        **_each(
            "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
            "vllm_importance_sampling_clip_min vllm_importance_sampling_cap off_policy_mask_threshold",
            _none("an update replays the rollout's own velocities: there is no mismatch to correct"),
        ),
        **_each("epsilon_high delta", _is("epsilon", note="the trust region is symmetric")),
        **_each(
            "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg "
            "importance_sampling_level loss_type mask_truncated_completions use_bias_correction_kl top_entropy_quantile "
            "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
            _NO_TOKEN_LOSS,
        ),
        "multi_objective_aggregation": _is("reward_weights", note="rewards are summed"),
        **_each(
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
            _none("`beta` is the distance from the model without its adapter, which stays"),
        ),
        "max_tool_calling_iterations": _NO_TOKENS,
        **_each("log_completions log_multimodal", _is("logging_images_steps")),
        "num_completions_to_print": _is("num_prompts_to_log"),
        "log_unique_prompts": _none("a sheet shows each prompt once"),
        "log_completions_hub_repo": _none("sheets of images are files in `output_dir`"),
    },
    "ModelConfig and ScriptArguments": {
        "model_name_or_path": _SCRIPTS_MODEL,
        **_each("model_revision dtype torch_dtype", _GIVE_PIPELINE),
        "attn_implementation": _is("attention_backend", note="a backend of diffusers"),
        "lora_dropout": _none("an update must repeat its rollout exactly"),
        **_each("lora_target_parameters lora_modules_to_save use_rslora use_dora", _GIVE_PEFT_CONFIG),
        "lora_task_type": _none("a diffusers transformer has no task type"),
        "load_in_8bit": _is("quantization", note='"int8"'),
        "load_in_4bit": _is("quantization", note='"nf4"'),
        **_each("bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", _GIVE_QUANTISED),
        **_each("dataset_config dataset_train_split", _none("load the dataset and give it as `train_dataset`")),
        "dataset_test_split": _is("num_eval_prompts", note="or set `eval_dataset_name`"),
        "dataset_streaming": _none("prompts are drawn by their number"),
        "ignore_bias_buffers": _is("ddp_broadcast_buffers", note="off by default"),
    },
    "DDPOConfig": {
        "exp_name": _is("run_name"),
        "log_with": _is("report_to"),
        "tracker_kwargs": _none("trackers read their environment variables, such as WANDB_PROJECT"),
        "tracker_project_name": _is("project", note="of trackio; wandb reads WANDB_PROJECT"),
        "accelerator_kwargs": _is("accelerator_config"),
        "project_kwargs": _is("output_dir"),
        "logdir": _is("output_dir"),
        "num_epochs": _is("num_rollouts", note="an epoch is a rollout"),
        "save_freq": _is(
            "save_steps", note='counted in optimizer steps; save_strategy="epoch" saves after each rollout'
        ),
        "num_checkpoint_limit": _is("save_total_limit"),
        "mixed_precision": _is("bf16", "fp16", note="switches"),
        "allow_tf32": _is("tf32"),
        "resume_from": _is("resume_from_checkpoint"),
        "sample_num_steps": _is("num_inference_steps"),
        "sample_eta": _is("churn", "noise_level", note="the sampler's noise, on another scale"),
        "sample_guidance_scale": _is("guidance_scale"),
        "sample_batch_size": _is(
            "per_device_sampling_batch_size", "per_device_prompt_batch_size", note=f"both {_IN_PROMPTS}"
        ),
        "sample_num_batches_per_epoch": _is("prompts_per_rollout", note=f"{_IN_PROMPTS}, over all processes"),
        "train_batch_size": _is("per_device_prompt_batch_size", note=_IN_PROMPTS),
        "train_use_8bit_adam": _is("optim", note='"adamw_bnb_8bit"'),
        "train_learning_rate": _is("learning_rate"),
        "train_adam_beta1": _is("adam_beta1"),
        "train_adam_beta2": _is("adam_beta2"),
        "train_adam_weight_decay": _is("weight_decay"),
        "train_adam_epsilon": _is("adam_epsilon"),
        "train_gradient_accumulation_steps": _is(
            "optimizer_steps_per_rollout", note="gradient_accumulation_steps follows from it"
        ),
        "train_max_grad_norm": _is("max_grad_norm"),
        "train_num_inner_epochs": _is("num_iterations"),
        "train_cfg": _is("guidance_scale", note="guidance is trained through whenever it is sampled with; 1 is none"),
        "train_adv_clip_max": _none("differences of rewards are not clipped"),
        "train_clip_range": _is("epsilon", note="on the scale of the algorithm's ratio"),
        "train_timestep_fraction": _is("timestep_fraction"),
        "per_prompt_stat_tracking": _none("rewards are always compared within a prompt"),
        **_each(
            "per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count",
            _is("num_generations", note="a prompt's images are compared with each other, not with earlier ones"),
        ),
        **_each("async_reward_computation max_workers", _none("a reward is `async`, or has `background = True` on it")),
        "negative_prompts": _is("pipeline_kwargs", note='{"negative_prompt": ...}'),
    },
    "ConfigDicts": {
        "pretrained.model": _SCRIPTS_MODEL,
        "pretrained.revision": _GIVE_PIPELINE,
        "eval_freq": _is("eval_steps", note="counted in optimizer steps"),
        "save_dir": _is("output_dir"),
        "use_lora": _is("use_peft"),
        "dataset": _is("dataset_name"),
        "prompt_fn": _is("dataset_name", note="or give the trainer a `train_dataset`"),
        "prompt_fn_kwargs": _none("give the trainer a `train_dataset`"),
        "reward_fn": _SCRIPTS_REWARD,
        "resolution": _is("height", "width", note="set both"),
        "frames": _is("pipeline_kwargs", note='{"num_frames": ...}'),
        "diffusion_loss": _none("training is on the rewards alone"),
        "fsdp_optimizer_offload": _is("fsdp_config"),
        "sample.eval_num_steps": _EVALUATED_WITH,
        "sample.eval_guidance_scale": _EVALUATED_WITH,
        "sample.train_batch_size": _is("per_device_sampling_batch_size", note=_IN_PROMPTS),
        "sample.num_image_per_prompt": _is("num_generations"),
        "sample.mini_num_image_per_prompt": _none("the images of a prompt are sampled together"),
        "sample.test_batch_size": _is("per_device_eval_batch_size"),
        "sample.sample_time_per_prompt": _is("num_generations"),
        "sample.global_std": _GLOBAL_STD,
        "sample.noise_level": _is("noise_level", "churn", note="the sampler's noise, on the scale of the algorithm"),
        "sample.same_latent": _is(
            "same_latent", note="an option of the algorithm whose images of a prompt can start from different noise"
        ),
        "sample.sde_type": _is("sde_type", note="an option of the algorithm whose sampler is an SDE"),
        "sample.sde_window_size": _SOME_STEPS,
        "sample.train_num_steps": _SOME_STEPS,
        "sample.sde_window_range": _WINDOW,
        "sample.kl_reward": _is("beta", note="a term of the loss, not of the reward"),
        "train.clip_range_lt": _is("epsilon", note="the trust region is symmetric"),
        "train.clip_range_gt": _is("epsilon", note="the trust region is symmetric"),
        "train.timestep_shift": _none("noise levels come from the pipeline's scheduler"),
        "train.beta": _is("beta"),
        "train.lora_path": _is("adapter"),
        "train.ema": _is("ema_decay", note="a decay, such as 0.9 per rollout"),
        "train.sft": _none("training is on the rewards alone"),
        "train.sft_batch_size": _none("training is on the rewards alone"),
    },
    "Flow-Factory": {
        "data.dataset_dir": _is("dataset_name", note="a file of the folder, or a Hub id"),
        "data.datasets": _is("dataset_name", note="join several, and give the trainer a `train_dataset`"),
        "data.max_dataset_size": _none("give the trainer a `train_dataset` that is cut"),
        **_each(
            "data.cache_dir data.enable_preprocess data.force_reprocess data.preprocessing_batch_size",
            _is("cache_prompt_embeds", note="a switch; `datasets` decides where"),
        ),
        **_each(
            "data.sampler_type data.sampler_subgroup_size",
            _none("prompts are drawn at random, in an order that follows from `seed`"),
        ),
        "model.finetune_type": _is("use_peft", note="true is lora, false is full"),
        "model.lora_rank": _is("lora_r"),
        "model.target_modules": _is("lora_target_modules"),
        "model.target_components": _is("trained_transformers"),
        "model.model_type": _none("the pipeline is its own adapter"),
        "model.master_weight_dtype": _none("what is trained is kept in float32"),
        "model.resume_path": _is("adapter", "resume_from_checkpoint", note="weights, or a whole run"),
        "model.resume_type": _none("`adapter` goes on from weights, `resume_from_checkpoint` with a run"),
        "log.logging_backend": _is("report_to"),
        "log.save_dir": _is("output_dir"),
        "log.save_freq": _is("save_steps", note="counted in optimizer steps"),
        "log.save_model_only": _is("save_only_model", note="such a run cannot be resumed, unless a signal ended it"),
        "train.trainer_type": _is("algorithm", note="of the scripts; in Python it is the trainer's class"),
        "train.advantage_aggregation": _is("reward_weights", note="rewards are summed"),
        "train.adv_clip_range": _none("differences of rewards are not clipped"),
        "train.kl_beta": _is("beta"),
        "train.kl_type": _none("the algorithm fixes what `beta` measures"),
        "train.ref_param_device": _none("the reference is the model without its adapter"),
        "train.max_epochs": _is("num_rollouts", note="an epoch is a rollout"),
        "train.per_device_batch_size": _is("per_device_prompt_batch_size", note=_IN_PROMPTS),
        "train.group_size": _is("num_generations"),
        "train.unique_sample_num_per_epoch": _is("prompts_per_rollout", note="over all processes"),
        "train.gradient_step_per_epoch": _is("optimizer_steps_per_rollout"),
        "train.global_std": _GLOBAL_STD,
        "train.adam_betas": _is("adam_beta1", "adam_beta2"),
        "train.enable_gradient_checkpointing": _is("gradient_checkpointing"),
        "train.offload_samples_to_cpu": _is("offload_trajectories"),
        **_each(
            "train.ema_update_interval train.ema_device train.ema_decay_schedule",
            _is("ema_decay", note="once per rollout; the decay rises to it, as n / (n + 9) at rollout n"),
        ),
        "train.latent_storage_dtype": _none("recordings keep the dtype that an exact replay needs"),
        "train.shuffle_samples": _none("batches keep their images: a replay is exact only so"),
        **_each(
            "train.reward_optimization_overlap train.reward_optimization_overlap_mode "
            "train.reward_optimization_overlap_poll_interval",
            _none("rewards that are `async` or have `background = True` overlap with sampling"),
        ),
        "scheduler.dynamics_type": _is(
            "sde_type", note='Flow-SDE is "sde", CPS is "cps"; each other algorithm has one sampler'
        ),
        "scheduler.num_sde_steps": _SOME_STEPS,
        "scheduler.sde_steps": _WINDOW,
        **_each("eval.resolution eval.num_inference_steps eval.guidance_scale", _EVALUATED_WITH),
        "eval.per_device_batch_size": _is("per_device_eval_batch_size", note="counted in images"),
        "eval.eval_freq": _is("eval_steps", note="counted in optimizer steps"),
        "rewards": _SCRIPTS_REWARD,
        "eval_rewards": _is("eval_reward", note="the trainer takes `eval_reward_fn`, the scripts take `eval_reward`"),
    },
    "TrainingArguments of transformers 4": {
        "evaluation_strategy": _is("eval_strategy"),
        "no_cuda": _is("use_cpu"),
        "use_mps_device": _none("it is used if it is there"),
        "warmup_ratio": _is("warmup_steps", note="below 1 it is a fraction of the steps"),
        "logging_dir": _none("TensorBoard reads TENSORBOARD_LOGGING_DIR"),
        "overwrite_output_dir": _none("earlier checkpoints in output_dir are set aside, not overwritten"),
        "save_safetensors": _none("weights are always saved as safetensors"),
        "push_to_hub_token": _is("hub_token"),
        "push_to_hub_model_id": _is("hub_model_id"),
    },
}

# Arguments of trainers.
ARGUMENTS: dict[str, Here] = {
    "model": _is("pipeline", note="a pipeline of diffusers, or its Hub id or path"),
    "sd_pipeline": _is("pipeline"),
    "model_init": _is("pipeline"),
    "args": _is("config"),
    **_each("reward_funcs reward_function reward_model", _is("reward_fn", note="a callable, or a list of them")),
    "prompt_function": _is("train_dataset", note="a dataset with a column `prompt`"),
    "ref_model": _none("the option `beta` is the distance from the model without its adapter"),
    **_each("processing_class tokenizer", _none("the pipeline has its tokenizers")),
    "reward_processing_classes": _none("a reward has its own processor"),
    "quantization_config": _none("set the option `quantization`, or give a quantised pipeline"),
    **_each("tools rollout_func environment_factory", _none("the pipeline itself samples the images")),
    "image_samples_hook": _none("the option `logging_images_steps` makes sheets of images"),
    "compute_metrics": _is("eval_reward_fn", note="rewards that are evaluated and not trained on"),
    "compute_loss_func": _none("a trainer class has one loss"),
    "preprocess_logits_for_metrics": _none("there are no logits"),
    "data_collator": _none("prompts are drawn by their number"),
    "optimizer_cls_and_kwargs": _is("optimizers", note="or the option `optim`"),
}

# A ConfigDict's `sample.num_steps` is written with an underscore too, or without its group.
_OPTIONS = {
    **{name.replace(".", "_"): here for names in OPTIONS_OF.values() for name, here in names.items()},
    **_each("pipeline train_dataset eval_dataset eval_reward_fn callbacks optimizers peft_config", _IS_ARGUMENT),
    **_each("reward_funcs reward_function", _SCRIPTS_REWARD),
}
_GROUPS = ("", "sample_", "train_", "pretrained_", "data_", "model_", "log_", "scheduler_", "eval_")


def arguments_of(called: type) -> set[str]:
    """Names of the arguments that a class takes. What an `__init__` passes on as `**kwargs` its parents' take."""
    names: set[str] = set()
    for each in called.__mro__:
        if "__init__" in vars(each):
            parameters = list(inspect.signature(each.__init__).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def unknown_options(
    owner: str,
    given: Iterable[str] | Mapping[str, object],
    known: Collection[str],
    renamed: Mapping[str, str],
    owners: Callable[[], Mapping[str, str]] = dict,
) -> str | None:
    """
    An error's text for options that do not exist; None if all of them do.

    Args:
        owner (`str`): The class or script that was called.
        given (`Iterable[str]` or `Mapping[str, object]`): Names of the options, or their values by name.
        known (`Collection[str]`): The options that there are.
        renamed (`Mapping[str, str]`): Options that had another name in an earlier version, and their new spelling.
        owners (`Callable`): Called for an unknown option: others that exist, and of what they are options.
    """

    def elsewhere(name: str) -> Here | None:
        if name in renamed:
            return Here((renamed[name],))
        plain = name.removeprefix("config.").replace(".", "_")
        there = next((_OPTIONS[group + plain] for group in _GROUPS if group + plain in _OPTIONS), None)
        option = name.partition(".")[0]
        owner = owners().get(option) if option not in known else None
        if owner and not (there and set(there.names) & set(known)):
            return _none(f"it is an option of {owner}")
        return there

    return _unknown(owner, "option", given, [*known, *renamed.values()], elsewhere)


def unknown_arguments(owner: str, given: Iterable[str], known: Collection[str], options: Collection[str]) -> str | None:
    """
    The same for arguments of a trainer.

    Args:
        options (`Collection[str]`): The options of its config, which are no arguments of the trainer.
    """

    def elsewhere(name: str) -> Here | None:
        return _none("it is an option of the config") if name in options else ARGUMENTS.get(name)

    return _unknown(owner, "argument", list(given), known, elsewhere)


def _unknown(owner, kind, given, known, elsewhere) -> str | None:
    unknown = [name for name in given if name not in known]
    if not unknown:
        return None
    shown = [f"{name}={given[name]!r}" if isinstance(given, Mapping) else name for name in unknown]
    sentences = [f"{owner} has no {kind} {', '.join(shown)}."]
    for name in unknown:
        here = elsewhere(name)
        if here is not None:
            names = " or ".join(f"`{each}`" for each in here.names if each in known)
            note = f": {here.note}" if here.note else ""
            sentences.append(f"`{name}` is {names} here{note}." if names else f"There is no `{name}`{note}.")
        elif close := difflib.get_close_matches(name, known):
            meant = " or ".join(f"`{each}`" for each in close)
            sentences.append(f"Did you mean {meant}?" if len(unknown) == 1 else f"For `{name}`, did you mean {meant}?")
    return " ".join(sentences)
