"""
A pipeline of which only the configs and tokenizers are there, for the plan of a run: its modules have shapes and no weights,
and what they return is zeros.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers.utils import is_torch_bf16_gpu_available

from .fdfo_config import FDFOConfig
from .flow_grpo_config import FlowGRPOConfig
from .lora import add_adapter, default_lora_config
from .pipeline_flow import PipelineFlow
from .run_plan import Engine, RunPlan
from .schedulers import ChurnScheduler, RolloutScheduler


@dataclass
class Planned:
    """
    Of a config: that of a run which is planned and not started, on a GPU, or several, that need not be here.

    Parameters:
        plan_processes (`int`, defaults to `1`):
            Processes of the run. Set by its launcher when it is started.
    """

    plan_processes: int = field(default=1, metadata={"help": "With --plan: processes of the run, one for each GPU."})

    def __post_init__(self):
        if self.plan_processes < 1:
            raise ValueError(f"plan_processes={self.plan_processes} must be at least 1.")
        self.device_type = "cpu" if self.use_cpu else "cuda"
        # What is done now needs no GPU.
        self.use_cpu = True
        super().__post_init__()

    def _announced_processes(self) -> int:
        return self.plan_processes

    def _has_bf16(self) -> bool:
        # A GPU that is not here is taken as one of this decade.
        return self.device_type == "cuda" and (is_torch_bf16_gpu_available() or not torch.cuda.is_available())

    @property
    def world_size(self) -> int:
        return self.plan_processes


@dataclass
class PlannedConfig(Planned, FDFOConfig):
    """A run of FDFO that is planned."""


@dataclass
class PlannedFlowGRPOConfig(Planned, FlowGRPOConfig):
    """A run of Flow-GRPO that is planned."""


def load_without_weights(name_or_path: str | os.PathLike, dtype: torch.dtype) -> DiffusionPipeline:
    """
    A pipeline with its modules on the meta device; tokenizers, processors and the scheduler are real.

    Args:
        name_or_path (`str` or `Path`): Hub id, or folder in diffusers' layout, of which the weights may be missing.
        dtype (`torch.dtype`): Of the modules.

    Raises:
        OSError: There is no such folder, and the configs are not in the cache and cannot be downloaded.
    """
    try:
        index = DiffusionPipeline.load_config(name_or_path)
        parts: dict[str, Any] = {}
        for name, value in index.items():
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                if not name.startswith("_"):
                    parts[name] = value  # an option of the pipeline
            elif value[0] is None:
                parts[name] = None
            else:
                parts[name] = _load_part(
                    getattr(importlib.import_module(value[0]), value[1]), name_or_path, name, dtype
                )
        return getattr(diffusers, index["_class_name"])(**parts)
    except OSError as error:
        raise OSError(
            f"The configs of '{name_or_path}' are neither in that folder nor in the cache, and a plan needs them and the "
            f'tokenizers, but no weights: `hf download {name_or_path} --exclude "*.safetensors" "*.bin" "*.gguf"`, here or '
            f"elsewhere with --local-dir, and give the folder. ({error})"
        ) from error


def plan_without_weights(
    config: PlannedConfig | PlannedFlowGRPOConfig,
    name_or_path: str | os.PathLike,
    rewards: Sequence[str],
    prompts: Dataset,
    sampler: type[RolloutScheduler] = ChurnScheduler,
) -> RunPlan:
    """
    The plan of a run of which nothing is loaded but configs and tokenizers.

    Args:
        config ([`PlannedConfig`] or [`PlannedFlowGRPOConfig`]): Options of the run.
        name_or_path (`str` or `Path`): Of the pipeline, as for [`load_without_weights`].
        rewards (`Sequence[str]`): Names of the rewards, whose weights are not counted.
        prompts (`datasets.Dataset`): What it is trained on.
        sampler (`type`): That of the trainer.

    Raises:
        OSError: There are no configs.
        ValueError: The pipeline cannot be called with the options, or its code needs the values of tensors, not just their
            shapes.
    """
    pipeline = load_without_weights(name_or_path, torch.bfloat16 if config.bf16 else torch.float32)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    flow = PipelineFlow(pipeline, num_generations=config.num_generations, sampler=sampler, **config.call_kwargs())
    if config.use_peft:
        model = add_adapter(pipeline, default_lora_config(config, pipeline.transformer))
    else:
        model = pipeline.transformer.requires_grad_(True)
    row = prompts[0]
    batch = [row[config.dataset_prompt_column]] * config.per_device_prompt_batch_size
    columns = {name: [row[name]] for name in config.pipeline_columns or ()}
    with running_without_weights(pipeline):
        rehearsal = flow.rehearse(batch, columns, config.num_generations)
    autocast = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    engine = Engine(config.device_type, "DDP" if config.world_size > 1 else "", autocast)
    return RunPlan(config, flow, model, rehearsal, dict.fromkeys(rewards), engine, config.num_eval_prompts or 0)


@contextlib.contextmanager
def running_without_weights(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The modules of a pipeline from [`load_without_weights`], with adapters or without, can be called: they return zeros."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack:
        for part in pipeline.components.values():
            if not isinstance(part, nn.Module):
                continue
            _put_on_cpu(part, mode)
            for name in ("forward", "encode", "decode"):
                if hasattr(part, name):
                    method = _returning_zeros(getattr(part, name), mode)
                    stack.enter_context(mock.patch.object(part, name, method))
        yield


def _load_part(part_class: type, name_or_path: str | os.PathLike, subfolder: str, dtype: torch.dtype) -> Any:
    if not issubclass(part_class, nn.Module):  # a tokenizer, a scheduler
        return part_class.from_pretrained(name_or_path, subfolder=subfolder)
    with torch.device("meta"):
        if issubclass(part_class, ModelMixin):
            part = part_class.from_config(part_class.load_config(name_or_path, subfolder=subfolder))
        else:
            part = part_class(part_class.config_class.from_pretrained(name_or_path, subfolder=subfolder))
    # As when it is loaded: some models keep some weights in float32.
    kept = getattr(part_class, "_keep_in_fp32_modules", None) or () if issubclass(part_class, ModelMixin) else ()
    nn.Module.to(part, dtype)
    for name, weight in part.named_parameters():
        if any(module in name.split(".") for module in kept):
            weight.data = weight.data.float()
    return part


def _put_on_cpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """In place: weights that say they are on the CPU, where the pipeline then puts what it makes, and have no memory."""
    made: dict[int, Tensor] = {}  # by the weight, which several modules may share

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
