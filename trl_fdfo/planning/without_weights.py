"""
Plans a run from the configs and tokenizers of a pipeline alone: its modules have shapes and no weights, and return
zeros.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ..pipeline.checks import check_trained_transformers
from ..pipeline.flow import PipelineFlow
from ..pipeline.loading import load_index
from ..pipeline.lora import add_adapter, default_lora_config
from ..pipeline.options import quantize_to_int8, set_vae_options
from ..pipeline.own_dtype import can_run_in_own_dtype, run_in_own_dtype
from ..pipeline.patch import shadowed
from ..pipeline.schedulers import RolloutScheduler
from ..pipeline.trained import train_weights, trained_module
from ..rewards.by_name import reward_without_weights
from .memory import Engine
from .plan import RunPlan
from .time import CARDS


@dataclass
class Planned:
    """
    Mixin of a config whose run is planned and not started, for GPUs that need not be here.

    Parameters:
        plan_processes (`int`, defaults to `1`):
            Processes of the run. The launcher sets their number when a run is started.
        gpu (`str`, *optional*):
            Card of each process, a name in `CARDS`, whose seconds are estimated.
    """

    plan_processes: int = field(default=1, metadata={"help": "With --plan: processes of the run, one for each GPU."})
    gpu: str | None = field(
        default=None,
        metadata={
            "help": "With --plan: the card of each process, for estimated seconds per rollout and hours of the run.",
            "choices": list(CARDS),
        },
    )

    def __post_init__(self):
        if self.plan_processes < 1:
            raise ValueError(f"plan_processes={self.plan_processes} must be at least 1.")
        if self.gpu is not None and self.gpu not in CARDS:
            raise ValueError(f"gpu='{self.gpu}' is not one of {', '.join(CARDS)}.")
        if self.gpu is not None and self.use_cpu:
            raise ValueError(
                f"gpu='{self.gpu}' is for a run on GPUs, and use_cpu=True has none: leave one of them out."
            )
        self.device_type = "cpu" if self.use_cpu else "cuda"
        self.use_cpu = True  # planning needs no GPU
        super().__post_init__()

    def _announced_processes(self) -> int:
        return self.plan_processes

    def _has_bf16(self) -> bool:
        # An absent GPU is assumed to be recent.
        return self.device_type == "cuda" and (is_torch_bf16_gpu_available() or not torch.cuda.is_available())

    @property
    def world_size(self) -> int:
        return self.plan_processes


@functools.cache
def planned(config_class: type[TrainingArguments]) -> type[Planned]:
    """The subclass of a rollout config whose run is planned and not started. The same class each time."""
    body = {"__doc__": f"A run of [`{config_class.__name__}`] that is planned.", "__module__": __name__}
    return dataclass(type(f"Planned{config_class.__name__}", (Planned, config_class), body))


def load_without_weights(name_or_path: str | os.PathLike, dtype: torch.dtype) -> DiffusionPipeline:
    """
    A pipeline with its modules on the meta device. Tokenizers, processors and the scheduler are real.

    Args:
        name_or_path (`str` or `Path`): Hub id, or folder in diffusers' layout, which needs no weights.
        dtype (`torch.dtype`): Dtype of the modules.

    Raises:
        OSError: The folder does not exist, and the configs are not in the cache and cannot be downloaded.
    """
    try:
        index = load_index(name_or_path)
        parts: dict[str, Any] = {}
        for name, value in index.items():
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                if not name.startswith("_"):
                    parts[name] = value  # an option of the pipeline
            elif value[0] is None:
                parts[name] = None
            else:
                parts[name] = _load_part(simple_get_class_obj(*value), name_or_path, name, dtype)
        return getattr(diffusers, index["_class_name"])(**parts)
    except OSError as error:
        raise OSError(
            f"The configs of '{name_or_path}' are neither in that folder nor in the cache. A plan needs the configs "
            "and tokenizers, but no weights: "
            f'`hf download {name_or_path} --exclude "*.safetensors" "*.bin" "*.gguf"`, '
            f"here or elsewhere with --local-dir, and give the folder. ({error})"
        ) from error


def plan_without_weights(
    config: Planned,
    name_or_path: str | os.PathLike,
    rewards: Sequence[str],
    prompts: Dataset,
    scheduler_class: type[RolloutScheduler],
    algorithm: str,
    latents_per_target: int,
    shared_prefix: bool = False,
    eval_prompts: int = 0,
    noises_endpoints: bool = False,
    has_old_policy: bool = False,
) -> RunPlan:
    """
    The plan of a run, for which only configs and tokenizers are loaded.

    Args:
        config ([`Planned`]): Options of the run, an instance of a class from [`planned`].
        name_or_path (`str` or `Path`): Hub id or folder of the pipeline, as for [`load_without_weights`].
        rewards (`Sequence[str]`): Names of the rewards. Those are counted whose size is known without their files.
        prompts (`datasets.Dataset`): Prompts to train on.
        scheduler_class (`type`): The [`RolloutScheduler`] of the algorithm.
        algorithm (`str`): Name of the algorithm.
        latents_per_target (`int`): As in [`RunPlan`].
        shared_prefix (`bool`): As in [`PipelineFlow`].
        eval_prompts (`int`): Number of the prompts to evaluate on.
        noises_endpoints, has_old_policy (`bool`): As in [`RunPlan`].

    Raises:
        ImportError: `quantization="int8"` without torchao.
        OSError: The configs cannot be found.
        ValueError: The pipeline cannot be called with the options, or its code needs the values of tensors, not just
            their shapes.
    """
    pipeline = load_without_weights(name_or_path, config.load_dtype)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    set_vae_options(pipeline, config.vae_slicing, config.vae_tiling, config.decoded_pixels())
    flow = PipelineFlow(
        pipeline,
        num_generations=config.num_candidates,
        scheduler_class=scheduler_class,
        shared_prefix=shared_prefix,
        **config.call_kwargs(),
    )
    model, trained = trained_module(pipeline), config.trained_transformers
    if trained is not None:
        check_trained_transformers(pipeline, trained)
    if config.use_peft:
        lora = (config.lora_r, config.lora_alpha, config.lora_target_modules, model, trained)
        model = add_adapter(pipeline, default_lora_config(*lora))
    else:
        train_weights(pipeline, trained)
    row = prompts[0]
    batch = [row[config.dataset_prompt_column]] * config.per_device_prompt_batch_size
    columns = {name: [row[name]] for name in config.pipeline_columns or ()}
    with running_without_weights(pipeline):
        rehearsal = flow.rehearse(batch, columns, config.num_generations)
        if config.eval_pipeline_kwargs:
            flow.rehearse(batch[:1], columns, **config.eval_pipeline_kwargs)
    if config.quantization == "int8":
        quantize_to_int8(model)  # its unpacked weights stay for the backward pass; those of nf4 do not
    autocast = config.mixed_precision_dtype
    if can_run_in_own_dtype(model, autocast):
        run_in_own_dtype(model)
        autocast = None
    names = [spec.partition("(")[0] for spec in rewards]
    return RunPlan(
        config,
        flow,
        model,
        rehearsal,
        rewards={
            name if names.count(name) == 1 else spec: reward_without_weights(spec) for name, spec in zip(names, rewards)
        },
        engine=Engine(config.device_type, "DDP" if config.world_size > 1 else "", autocast),
        eval_prompts=eval_prompts,
        algorithm=algorithm,
        latents_per_target=latents_per_target,
        noises_endpoints=noises_endpoints,
        has_old_policy=has_old_policy,
        gpu=config.gpu,
    )


@contextlib.contextmanager
def running_without_weights(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Lets the modules of a pipeline from [`load_without_weights`], and adapters in them, be called: zeros return."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                _put_on_cpu(part, mode)
                names = [name for name in ("forward", "encode", "decode") if hasattr(part, name)]
                methods = {name: _returning_zeros(getattr(part, name), mode) for name in names}
                stack.enter_context(shadowed(part, **methods))
        yield


def _load_part(part_class: type, name_or_path: str | os.PathLike, subfolder: str, dtype: torch.dtype) -> Any:
    if not issubclass(part_class, nn.Module):  # a tokenizer, a scheduler
        return part_class.from_pretrained(name_or_path, subfolder=subfolder)
    with torch.device("meta"):
        if issubclass(part_class, ModelMixin):
            part = part_class.from_config(part_class.load_config(name_or_path, subfolder=subfolder))
        else:
            part = part_class(part_class.config_class.from_pretrained(name_or_path, subfolder=subfolder))
    # Some models keep some weights in float32 when they are loaded.
    kept = getattr(part_class, "_keep_in_fp32_modules", None) or () if issubclass(part_class, ModelMixin) else ()
    nn.Module.to(part, dtype)
    for name, weight in part.named_parameters():
        if any(module in name.split(".") for module in kept):
            weight.data = weight.data.float()
    return part


def _put_on_cpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces weights by fake ones of the CPU, where the pipeline then makes its tensors. They have no memory."""
    made: dict[int, Tensor] = {}  # by the id of the weight: modules may share one

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    for part in module.modules():
        for weights in (part._parameters, part._buffers):
            weights.update({name: fake(tensor) for name, tensor in weights.items() if tensor is not None})


def _returning_zeros(method: Callable[..., Any], mode: FakeTensorMode) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args, **kwargs):
        with mode:
            output = method(*args, **kwargs)
        return tree_map_only(FakeTensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype), output)

    return call
