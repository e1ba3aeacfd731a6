"""Everything that a trainer makes of its arguments before the first rollout, and refuses there."""

import copy
import math
import operator
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import PartialState
from accelerate.hooks import UserCpuOffloadHook
from accelerate.utils import recursively_apply
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import is_in_notebook, logging

from ..evaluation.evaluator import read_rows, reported_metrics
from ..media import Outputs
from ..metric_names import EVAL_PREFIX, REWARD
from ..offload import offload_until_called
from ..pipeline.checks import check_call_kwargs, check_resolution, check_trainable, check_trained_transformers
from ..pipeline.encoder_offload import EncoderOffload
from ..pipeline.flow import PipelineFlow
from ..pipeline.loading import load_index, load_pipeline
from ..pipeline.lora import add_adapter, continue_adapter, default_lora_config
from ..pipeline.options import (
    COMPILED_VERSIONS,
    is_quantized,
    quantization_config,
    set_attention_backend,
    set_vae_options,
)
from ..pipeline.patch import carries_state
from ..pipeline.prompt_embeddings import PromptEmbeddings, called_first, text_encoders
from ..pipeline.records import Rehearsal
from ..pipeline.replay_check import MAX_TOLERANCE, default_tolerance
from ..pipeline.trained import TRAINED, frozen_modules, train_weights, trained_module, trained_modules
from ..reporting.progress import RolloutProgressCallback
from ..rewards.reward_functions import RewardFunctions
from .config import RolloutConfig
from .config_checks import check_argument_of_call
from .prompt_sampling import InformativePrompts, row_keys
from .prompts import check_prompts, hold_out, load_prompts, plain, rollout_rows


logger = logging.get_logger(__name__)


# Prompts --------------------------------------------------------------------------------------------------------------


def load_datasets(
    config: RolloutConfig, train_dataset: Dataset | None, eval_dataset: Dataset | None, rewards: RewardFunctions
) -> tuple[Dataset, Dataset | None]:
    """
    The prompts to train on and, if there are any, to evaluate on.

    Raises:
        ValueError: Two sources of prompts were given, or one cannot be used.
    """
    if train_dataset is not None and config.dataset_name is not None:
        raise ValueError(
            f"dataset_name='{config.dataset_name}' was given together with a train_dataset: leave one of them out."
        )
    if train_dataset is None:
        train_dataset = load_prompts(config.dataset_name, config.dataset_prompt_column)
    if eval_dataset is not None and config.eval_dataset_name is not None:
        raise ValueError(
            f"eval_dataset_name='{config.eval_dataset_name}' was given together with an eval_dataset: leave one of them out."
        )
    if config.eval_dataset_name is not None:
        eval_dataset = load_prompts(config.eval_dataset_name, config.dataset_prompt_column, "eval_dataset_name")
    train_dataset, eval_dataset = (
        plain(dataset, config.pipeline_columns or ()) for dataset in (train_dataset, eval_dataset)
    )
    check_prompts(train_dataset, config.dataset_prompt_column, config.pipeline_columns or ())
    rewards.check_columns(train_dataset.column_names, sampled_columns=config.pipeline_columns or ())
    rewards.check_rows(train_dataset)
    if config.num_eval_prompts is not None:
        if eval_dataset is not None:
            raise ValueError(
                f"num_eval_prompts={config.num_eval_prompts} was given together with an eval_dataset"
                f"{'_name' * (config.eval_dataset_name is not None)}: leave one of them out."
            )
        return hold_out(train_dataset, config.dataset_prompt_column, config.num_eval_prompts)
    return train_dataset, eval_dataset


def informative_prompts(config: RolloutConfig, dataset: Dataset) -> InformativePrompts | None:
    """What draws the prompts under `prompt_sampling="informative"`, with a warning if the run draws none of them twice."""
    if config.prompt_sampling != "informative":
        return None
    prompts = InformativePrompts(row_keys(dataset), config.seed)
    drawn = config.num_rollouts * config.prompts_per_rollout
    if drawn <= len(dataset) == prompts.num_prompts:
        logger.warning(
            f"prompt_sampling='informative' changes nothing here: the run draws {config.num_rollouts} x "
            f"{config.prompts_per_rollout} = {drawn} of {len(dataset)} prompts, none of them twice. Train on fewer prompts, or for "
            "more rollouts."
        )
    return prompts


def check_eval_dataset(
    config: RolloutConfig, dataset: Dataset, rewards: RewardFunctions, controls: RewardFunctions | None
) -> None:
    """
    Raises:
        ValueError: The dataset cannot be evaluated on.
    """
    check_prompts(dataset, config.dataset_prompt_column, config.pipeline_columns or (), "eval_dataset")
    for functions in (rewards, controls):
        if functions is not None:
            functions.check_columns(dataset.column_names, "eval_dataset", config.pipeline_columns or ())
            functions.check_rows(dataset, "eval_dataset")


def check_evaluation(
    config: RolloutConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    rewards: RewardFunctions,
    controls: RewardFunctions | None,
) -> None:
    """
    Refuse an impossible evaluation, and warn of prompts that are trained on.

    Raises:
        ValueError: The options ask for an impossible evaluation.
    """
    is_evaluated = config.eval_strategy != "no" or config.eval_on_start
    if is_evaluated and eval_dataset is None:
        raise ValueError(
            "eval_strategy or eval_on_start is set, and there is no eval_dataset: give one, or set eval_dataset_name or num_eval_prompts."
        )
    if eval_dataset is not None:
        check_eval_dataset(config, eval_dataset, rewards, controls)
        _check_best_metric(config, rewards, controls)
        evaluated = (
            set(eval_dataset[config.dataset_prompt_column]) if tells_rows_apart(train_dataset, config) else set()
        )
        shared = len(evaluated.intersection(train_dataset[config.dataset_prompt_column])) if evaluated else 0
        if shared:
            logger.warning(
                f"{shared} of the {len(evaluated)} prompts of the eval_dataset are trained on too: evaluations and alarms do not "
                "tell what the training does to other prompts. `num_eval_prompts` holds out some of the train_dataset."
            )
    if not is_evaluated:
        options = {
            "eval_dataset_name": config.eval_dataset_name,
            "num_eval_prompts": config.num_eval_prompts,
            "eval_diversity": config.eval_diversity,
            "eval_reward_fn": controls and controls.names,
        }
        given = ", ".join(name for name, value in options.items() if value is not None)
        if given:
            logger.warning(f"{given}: nothing is evaluated during training without an eval_strategy.")
    has_control = controls is not None and controls.scores and config.alarm_control_drop is not None
    has_diversity = config.eval_diversity is not None and config.alarm_diversity_drop is not None
    if config.stop_on_alarm and (config.eval_strategy == "no" or not (has_control or has_diversity)):
        raise ValueError(
            "stop_on_alarm=True, and no alarm would be raised: it takes an eval_strategy, and an eval_reward_fn or "
            "eval_diversity, to watch while the reward rises."
        )


def check_outputs(
    config: RolloutConfig,
    outputs: Outputs,
    evaluated: Outputs,
    rewards: RewardFunctions,
    controls: RewardFunctions | None,
) -> None:
    """
    Tell the rewards what the pipeline makes: in a rollout, and, of the same kind, in an evaluation.

    Raises:
        ValueError: A reward, or the measure of diversity, is of something else; or an evaluation has another frame rate.
    """
    if evaluated.frame_rate != outputs.frame_rate:
        raise ValueError(
            f"eval_pipeline_kwargs={config.eval_pipeline_kwargs} makes videos of {evaluated.frame_rate} frames per second, and "
            f"rewards are told the {outputs.frame_rate} of the rollouts: set the rate in pipeline_kwargs, for both."
        )
    for functions in filter(None, (rewards, controls)):
        functions.expect(outputs)
    if config.eval_diversity is not None and "images" not in outputs.kinds:
        raise ValueError(
            f"eval_diversity='{config.eval_diversity}' is a distance between images, and the pipeline makes "
            f"{' and '.join(outputs.kinds)}: leave it out. A control reward (`eval_reward_fn`) shows what training costs."
        )


def _check_best_metric(config: RolloutConfig, rewards: RewardFunctions, controls: RewardFunctions | None) -> None:
    metric = config.metric_for_best_model
    if metric is None:
        return
    known = reported_metrics(rewards, controls, config.eval_diversity is not None)
    name = metric.removeprefix(EVAL_PREFIX)
    if name == REWARD and name not in known:
        raise ValueError(
            f"metric_for_best_model='{metric}' needs a score, and in an evaluation, which looks at each image by itself, "
            f"{', '.join(rewards.names)} has nothing to compare. Give an eval_reward_fn, and "
            "metric_for_best_model='eval_control'."
        )
    if name not in known:
        raise ValueError(
            f"metric_for_best_model='{metric}' is none of what `evaluate` gives here: "
            f"{', '.join(EVAL_PREFIX + name for name in known)}."
        )


# The pipeline ---------------------------------------------------------------------------------------------------------


def open_pipeline(pipeline: DiffusionPipeline | str | os.PathLike, config: RolloutConfig) -> DiffusionPipeline:
    """
    The pipeline itself, or the one that a name or path names.

    Raises:
        ValueError: `quantization` is set for a pipeline that is loaded already.
    """
    if isinstance(pipeline, (str, os.PathLike)):
        options = {"dtype": config.load_dtype}
        if config.quantization:
            index = load_index(pipeline)
            transformers = [name for name, kind in index.items() if kind == index.get(TRAINED)]
            options["quantization_config"] = quantization_config(config.quantization, options["dtype"], transformers)
        return load_pipeline(pipeline, **options)
    if config.quantization:
        raise ValueError(
            f"quantization='{config.quantization}' is how a pipeline is loaded, and this {type(pipeline).__name__} already "
            "is: give its name or path, or load it with `quantization_config=...` and leave the option out."
        )
    return pipeline


def prepare_pipeline(pipeline: DiffusionPipeline, config: RolloutConfig) -> None:
    """Set the options for memory and speed, and freeze all weights, in place."""
    set_vae_options(pipeline, config.vae_slicing, config.vae_tiling, config.decoded_pixels())
    set_attention_backend(pipeline, config.attention_backend)
    for module in (trained_module(pipeline), *frozen_modules(pipeline).values()):
        module.requires_grad_(False).eval()


def make_trainable(pipeline: DiffusionPipeline, config: RolloutConfig, peft_config: PeftConfig | None) -> nn.Module:
    """
    The model to train: the transformer with a new or a continued adapter, or the transformer itself.

    Raises:
        ValueError: The adapter does not fit, or the weights cannot be trained.
    """
    transformer, trained = trained_module(pipeline), config.trained_transformers
    if config.adapter is not None:
        names = ("lora_r", "lora_alpha", "lora_target_modules", "trained_transformers")
        defaults = {name: RolloutConfig.__dataclass_fields__[name].default for name in names}
        given = {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}
        return continue_adapter(pipeline, config.adapter, given, peft_config)
    if trained is not None:
        check_trained_transformers(pipeline, trained)
    if config.use_peft:
        if peft_config is not None and trained is not None:
            raise ValueError(
                "peft_config was given together with trained_transformers: leave the option out, and name the layers in "
                "peft_config, as a regular expression that begins with the name of their transformer."
            )
        lora = (config.lora_r, config.lora_alpha, config.lora_target_modules, transformer, trained)
        return add_adapter(pipeline, peft_config or default_lora_config(*lora))
    if peft_config is not None:
        raise ValueError("peft_config was given together with use_peft=False: leave one of them out.")
    if is_quantized(transformer):
        raise ValueError(
            f"use_peft=False would train the quantised weights of this {type(pipeline).__name__}, which cannot move in "
            "small steps. Set use_peft=True, or load it without quantization."
        )
    check_trainable(pipeline)
    train_weights(pipeline, trained)
    return transformer


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """
    Raises:
        ValueError: The optimizer has none of the trained weights.
    """
    if optimizer is None:
        return
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "The optimizer that was given has none of the trained weights: the adapter is made here. Set `optim` "
            "instead, or `trainer.optimizer` before `train`."
        )


def place_components(flow: PipelineFlow, config: RolloutConfig, device: torch.device) -> list[UserCpuOffloadHook]:
    """
    Put the frozen components on the device. An offloaded one moves there when it is called, and its hook, of which a list
    is returned, takes it back. Offloaded text encoders and language models also leave, each time, before the transformer is
    called.
    """
    hooks = {}
    encoders = text_encoders(flow.pipeline)
    for name, module in frozen_modules(flow.pipeline).items():
        if config.offload_components or (config.cache_prompt_embeds and name in encoders):
            hooks[name] = offload_until_called(module, device)
        else:
            module.to(device)
    first = called_first(flow.pipeline)
    of_encoders = [hook for name, hook in hooks.items() if name in first]
    if of_encoders:
        flow.encoders = EncoderOffload(of_encoders, trained_module(flow.pipeline), device)
    return list(hooks.values())


def check_callbacks(callbacks: list[TrainerCallback] | None) -> None:
    """
    Raises:
        ValueError: They are no list of callbacks, or of their classes.
    """
    if callbacks is None:
        return
    if not isinstance(callbacks, list):
        raise ValueError(f"callbacks is a {type(callbacks).__name__}, not a list: [EarlyStoppingCallback()].")
    for callback in callbacks:
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise ValueError(
                f"callbacks has {callback!r}, which is no `TrainerCallback`: subclass it, and write the methods that are to "
                "be called, such as `on_log`."
            )


def check_generate(
    flow: PipelineFlow,
    pipeline_columns: Sequence[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
    columns: Mapping[str, Sequence],
    call_kwargs: dict[str, Any],
) -> None:
    """
    Check the arguments of a trainer's `generate`.

    Raises:
        ValueError: It cannot be called with them.
    """
    is_list = hasattr(prompts, "__len__") and not isinstance(prompts, str) and len(prompts) > 0
    if not is_list or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"generate got prompts={prompts!r}: give a list of at least one prompt, as text.")
    try:
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"generate got seeds={seeds!r}: give a list of ints, one for each prompt.") from None
    if len(prompts) != len(seeds):
        raise ValueError(f"generate got {len(prompts)} prompts and {len(seeds)} seeds: give one seed for each.")
    if not all(0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"generate got seeds={seeds}: a seed is in [0, 2^64).")
    if not isinstance(columns, Mapping):
        raise ValueError(f"generate got columns={columns!r}: give a dict of a list for each column.")
    for name in pipeline_columns:
        if name not in columns:
            raise ValueError(
                f"generate got columns for {', '.join(columns) or 'nothing'}, and `pipeline_columns` passes '{name}' to the "
                f"pipeline: give columns={{'{name}': [...]}}."
            )
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise ValueError(
                f"generate got {len(values)} values of the column '{name}' for {len(prompts)} prompts: give one for each."
            )
    check_call_kwargs(flow.pipeline, call_kwargs)
    for name, value in call_kwargs.items():
        check_argument_of_call("generate got", name, value)
    check_resolution(flow.pipeline, call_kwargs.get("height"), call_kwargs.get("width"))


def rehearse(
    flow: PipelineFlow,
    config: RolloutConfig,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
) -> Rehearsal:
    """
    Call the pipeline once as a rollout will, so that it refuses here what it refuses; encode the prompts if they are to be
    kept on disk. Rewards are not called: one may be a paid service, or a person.

    Args:
        flow ([`PipelineFlow`]): Flow of the run. If a `strength` starts the schedule late, its `num_inference_steps` are
            set so that the pipeline takes as many steps as `config` says.
        config ([`RolloutConfig`]): Options of the run.
        train_dataset (`datasets.Dataset`): Prompts to train on.
        eval_dataset (`datasets.Dataset`, *optional*): Prompts to evaluate on.

    Raises:
        ValueError: The pipeline cannot be called with the options.
    """
    check_call_kwargs(flow.pipeline, config.pipeline_columns or ())
    for name in sorted({"height", "width"} & set(config.pipeline_columns or ())):
        for size in sorted({size for dataset in (train_dataset, eval_dataset) if dataset for size in dataset[name]}):
            check_resolution(flow.pipeline, **{"height": None, "width": None, name: size})
    prompt, columns = _first_row(config, train_dataset)
    prompts = prompt * config.per_device_prompt_batch_size
    rehearsal = _rehearse_row(flow, prompts, columns, config.num_generations)
    call = (prompts, columns, config.num_generations)
    _check_negative_prompt(flow, config, call, rehearsal)
    _warn_of_guidance(flow, config, call, rehearsal)
    if config.gradient_checkpointing and carries_state(rehearsal.outputs):
        raise ValueError(
            f"gradient_checkpointing=True computes the blocks of the transformer once more, and that of this "
            f"{type(flow.pipeline).__name__} keeps results of its first call for later ones, such as the keys and values of "
            "an image: a block would read those of another one, and the gradients would be wrong. Set "
            "gradient_checkpointing=False."
        )
    steps = len(rehearsal.sigmas) - 1
    while rehearsal.skipped_steps and steps < config.num_inference_steps:
        scheduled = flow.call_kwargs["num_inference_steps"]
        scheduled = max(scheduled + 1, scheduled * config.num_inference_steps // (steps + 1))
        flow.call_kwargs["num_inference_steps"] = scheduled
        rehearsal = flow.rehearse(prompts, columns, config.num_generations)
        steps = len(rehearsal.sigmas) - 1
    if steps != config.num_inference_steps:
        raise ValueError(
            f"{type(flow.pipeline).__name__} takes {steps} steps, not num_inference_steps={config.num_inference_steps}: "
            "it or `pipeline_kwargs` sets a schedule of its own. Set the option to that."
        )
    if config.eval_pipeline_kwargs:
        try:
            evaluated = flow.rehearse(prompt, columns, **config.eval_pipeline_kwargs)
        except ValueError as error:
            raise ValueError(
                f"eval_pipeline_kwargs={config.eval_pipeline_kwargs}, the arguments of an evaluation: {error}"
            ) from error
        steps = config.eval_pipeline_kwargs.get("num_inference_steps")
        scheduled = evaluated.skipped_steps + len(evaluated.sigmas) - 1
        if steps not in (None, scheduled):
            raise ValueError(
                f"eval_pipeline_kwargs has num_inference_steps={steps}, and {type(flow.pipeline).__name__} has a schedule of "
                f"{scheduled} steps whatever it is asked for: set that, or leave it out."
            )
    larger_batches = config.prompts_per_call > config.per_device_prompt_batch_size
    leaves_out = config.num_candidates > config.num_generations
    if leaves_out and carries_state(rehearsal.outputs):
        raise ValueError(
            f"num_candidates={config.num_candidates} trains on some images of a batch, and the transformer of this "
            f"{type(flow.pipeline).__name__} keeps results of its first call for later ones, such as the keys and values of "
            "an image, which are those of the whole batch: leave it out, or set num_generations to as many."
        )
    if larger_batches or leaves_out or flow.shared_prefix or config.cache_prompt_embeds:
        flow.axes(columns)
    if config.cache_prompt_embeds:
        disable = config.disable_tqdm or not PartialState().is_main_process
        embeddings = PromptEmbeddings(
            flow,
            _encoded_prompts(config, train_dataset, eval_dataset),
            lambda files, title: tqdm(files, title, disable=disable),
        )
        if not embeddings.same_shapes and config.prompts_per_call > 1:
            raise ValueError(
                f"{type(flow.pipeline).__name__} encodes prompts to different lengths, and cache_prompt_embeds=True cannot "
                "put them into one batch. Set per_device_prompt_batch_size=1 and per_device_sampling_batch_size=1, or "
                "cache_prompt_embeds=False."
            )
        flow.prompt_embeddings = embeddings
    return rehearsal


def warn_of_lengths(flow: PipelineFlow, config: RolloutConfig, dataset: Dataset) -> None:
    """Warn where compilation does not pay: blocks are compiled for the shapes that they see, which a prompt's length may be."""
    if config.pipeline_columns:  # a prompt may be encoded with them
        return
    prompts = dataset[config.dataset_prompt_column]
    ends = [recursively_apply(lambda x: x.shape, flow.encode([end(prompts, key=len)])) for end in (min, max)]
    if ends[0] != ends[1]:
        logger.warning(
            f"torch_compile=True, and {type(flow.pipeline).__name__} encodes each prompt to a length of its own: the blocks are "
            "compiled anew for each length, which takes longer than it saves with many lengths, and after "
            f"{COMPILED_VERSIONS} versions they run without compilation. Launch with --dynamo_use_dynamic, which makes kernels "
            "for any length, or leave torch_compile out."
        )


def find_trainable_levels(rehearsal: Rehearsal, pipeline: DiffusionPipeline, config: RolloutConfig) -> list[int]:
    """
    The noise levels at which a trained transformer is called: all, unless `trained_transformers` leaves one out.

    Raises:
        ValueError: More levels are to be trained than there are.
    """
    trained = {
        name
        for name, module in trained_modules(pipeline).items()
        if any(weight.requires_grad for weight in module.parameters())
    }
    levels = [level for level, names in enumerate(rehearsal.callers) if trained.intersection(names)]
    steps, count = len(rehearsal.callers), config.num_trained_levels
    if len(levels) < min(count, steps):
        raise ValueError(
            f"timestep_fraction={config.timestep_fraction} trains {count} of {steps} noise levels, and the trained "
            f"{', '.join(sorted(trained))} of {type(pipeline).__name__} is called at {len(levels)} of them: set "
            f"timestep_fraction={math.floor(100 * len(levels) / steps) / 100:g}."
        )
    return levels


def refuse_later_noise(pipeline: DiffusionPipeline, scale: float) -> None:
    """
    Raises:
        ValueError: Always: the noise that a run adds has another standard deviation than the model knows.
    """
    raise ValueError(
        f"{type(pipeline).__name__} starts from noise of a standard deviation of {scale:.3g}, and the noise that this run "
        "adds to later latents has 1: the model would see less noise than at its level, and learn from it. Train it "
        "with noise in the first latents alone, as the finite difference with churn_schedule='prior'."
    )


def tells_rows_apart(dataset: Dataset, config: RolloutConfig) -> bool:
    """True if a row is known by its prompt: with images, one instruction may stand for many; and no transform is run over all rows."""
    return not config.pipeline_columns and dataset.format["type"] != "custom"


def _first_row(config: RolloutConfig, dataset: Dataset) -> tuple[list[str], dict[str, list]]:
    """The prompt of the first row, and its values of the columns that the pipeline takes."""
    column, columns = config.dataset_prompt_column, config.pipeline_columns or ()
    row = read_rows(dataset, [0], [column, *columns], "train_dataset")
    return row[column], {name: row[name] for name in columns}


def _rehearse_row(flow: PipelineFlow, prompts: list[str], columns: dict[str, list], samples: int) -> Rehearsal:
    """
    Rehearse with a row; if the pipeline refuses its images, with images in RGB, as `diffusers.utils.load_image` makes them.
    The flow then converts those of all rows.
    """
    try:
        return flow.rehearse(prompts, columns, samples)
    except ValueError:
        others = [name for name, values in columns.items() if _in_rgb(values) != values]
        # One column alone first: another may hold masks.
        for names in [*([name] for name in others), others] if others else []:
            converted = {name: _in_rgb(values) if name in names else values for name, values in columns.items()}
            with suppress(ValueError):
                rehearsal = flow.rehearse(prompts, converted, samples)
                columns.update(converted)
                return rehearsal
        raise


def _in_rgb(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_rgb(item) for item in value]
    return value.convert("RGB") if isinstance(value, Image.Image) and value.mode != "RGB" else value


def _check_negative_prompt(flow: PipelineFlow, config: RolloutConfig, call: tuple, rehearsal: Rehearsal) -> None:
    """Warn of a negative prompt without guidance. Pipelines differ in what turns it on: the transformer's calls tell."""
    given = {name: text for name, text in flow.call_kwargs.items() if name.startswith("negative_prompt") and text}
    if not given or config.guidance_scale is None or config.guidance_scale > 1:
        return
    without = copy.copy(flow)
    without.call_kwargs = {name: value for name, value in flow.call_kwargs.items() if name not in given}
    with suppress(ValueError):  # of a pipeline that needs one
        plain = without.rehearse(*call)
        with_it, without_it = (_tensors(each.model_calls) for each in (rehearsal, plain))
        if len(with_it) == len(without_it) and all(map(torch.equal, with_it, without_it)):
            logger.warning(
                f"{', '.join(given)} in pipeline_kwargs changes nothing at guidance_scale={config.guidance_scale}, which is no "
                "guidance: leave it out, or set a guidance_scale above 1."
            )


def _warn_of_guidance(flow: PipelineFlow, config: RolloutConfig, call: tuple, rehearsal: Rehearsal) -> None:
    """Warn where a scale of 1, which is no guidance in most pipelines, is guidance by as much as the difference to no prompt."""

    def computed(each: Rehearsal) -> int:
        """Numbers in the first argument of all calls of a step: the noisy latents, and what is put beside them."""
        firsts = [next(iter((*args, *kwargs.values())), None) for args, kwargs in each.model_calls]
        return sum(tensor.numel() for tensor in _tensors(firsts))

    if config.guidance_scale != 1 or computed(rehearsal) < 1.5 * rehearsal.latents.numel():
        return
    with suppress(ValueError):
        without = flow.rehearse(*call, guidance_scale=0.0)
        share = computed(without) / computed(rehearsal)
        if share < 0.75:
            logger.warning(
                f"guidance_scale={config.guidance_scale} is guidance in {type(flow.pipeline).__name__}: each step computes "
                f"{1 / share:.2g} times as much as without. Set guidance_scale=0 for none, which a model that is distilled to few "
                "steps needs."
            )


def _tensors(data: Any) -> list[Tensor]:
    found: list[Tensor] = []
    recursively_apply(found.append, data)
    return found


def _encoded_prompts(config: RolloutConfig, train_dataset: Dataset, eval_dataset: Dataset | None) -> list[str]:
    """
    The prompts that a run encodes. If it draws all rows, their order is the same for every seed; otherwise it is that of
    the rollouts, so that a run with more of them finds those of the shorter one.
    """
    column, drawn = config.dataset_prompt_column, config.num_rollouts * config.prompts_per_rollout
    evaluated = sorted(eval_dataset[column]) if eval_dataset else []
    if drawn >= len(train_dataset):
        return sorted({*evaluated, *train_dataset[column]})
    rows = rollout_rows(len(train_dataset), drawn, 0, config.seed)  # the rollouts in succession
    return [*evaluated, *read_rows(train_dataset, rows, [column], "train_dataset")[column]]


def try_replay(
    flow: PipelineFlow, config: RolloutConfig, dataset: Dataset, decodes: bool = False
) -> tuple[float, bool]:
    """
    Sample one batch as the run will, in a few steps, and replay it as it will be trained: in training mode and in the batch size
    of an update.

    Args:
        flow ([`PipelineFlow`]): Flow of the run, which has been rehearsed.
        config ([`RolloutConfig`]): Options of the run.
        dataset (`datasets.Dataset`): Prompts to train on.
        decodes (`bool`): Also decode it with gradients.

    Returns:
        `tuple[float, bool]`: The largest replay error, and whether each velocity depends on every trained weight.

    Raises:
        ReplayError: A replayed velocity is not the sampled one.
        ValueError: The pipeline's call fails.
    """
    model = trained_module(flow.pipeline)
    tolerance = config.replay_tolerance
    if tolerance is None:
        tolerance = MAX_TOLERANCE * default_tolerance(flow.pipeline, config.mixed_precision_dtype)
    prompt, columns = _first_row(config, dataset)
    size = config.prompts_per_call
    modes = [(part, part.training) for part in model.modules()]
    model.train()
    try:
        parts = size // config.per_device_prompt_batch_size
        return flow.try_replay(
            prompt * size, columns, parts=parts, branches=config.num_generations, tolerance=tolerance, decodes=decodes
        )
    finally:
        for part, mode in modes:
            part.training = mode


def progress_callback() -> TrainerCallback:
    """What shows the progress: bars in a terminal, and in a notebook a table with bars. Both have a `rollout_bar`."""
    if is_in_notebook():
        from ..reporting.notebook import NotebookProgress  # which imports IPython

        return NotebookProgress()
    return RolloutProgressCallback()
