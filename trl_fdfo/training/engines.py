"""Gives a diffusers transformer the parts that `transformers.Trainer`, its callbacks, DeepSpeed and FSDP expect."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations import unset_hf_deepspeed_config

from ..pipeline.options import is_quantized
from ..pipeline.own_dtype import can_run_in_own_dtype, run_in_own_dtype
from ..pipeline.records import Rehearsal
from ..pipeline.trained import Transformers, trained_module
from ..redaction import without_origin


class TrainerConfig(FrozenDict):
    """A diffusers config with the methods of a transformers one that trackers and DeepSpeed call."""

    def to_dict(self) -> dict:
        return without_origin(self)  # trackers write it into files

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)


def adapt_to_trainer(transformer: torch.nn.Module) -> None:
    """
    Give `transformer`, in place, a [`TrainerConfig`] with `hidden_size` (DeepSpeed derives its `auto` sizes from it) and
    the method by which Trainer turns on activation checkpointing.
    """
    for part in transformer.children() if isinstance(transformer, Transformers) else [transformer]:
        config = TrainerConfig(part.config)
        if not hasattr(config, "hidden_size"):
            config.hidden_size = config.get("num_attention_heads", 1) * config.get("attention_head_dim", 1)
        part._internal_dict = config

    enable = functools.partial(_enable_checkpointing, transformer)
    transformer.activation_checkpointing_enable = enable
    transformer.gradient_checkpointing_enable = enable  # its name before transformers 5.23


def _enable_checkpointing(transformer: torch.nn.Module, **kwargs: Any) -> None:
    # diffusers' own default is the non-reentrant checkpoint, which LoRA and DDP need.
    transformer.enable_gradient_checkpointing()


def prepare_for_engine(accelerator: Accelerator, pipeline: DiffusionPipeline) -> None:
    """
    Prepare a pipeline for DeepSpeed and FSDP, once the Trainer is built and before they wrap its transformer.

    Raises:
        ValueError: The engine cannot shard quantised weights, or would compute in another dtype than the transformer's; or
            weights in 16 bits are to be trained, of which no engine keeps a copy in float32.
    """
    # Building the Trainer has set it again. Under it, ZeRO-3 would shard every model that is loaded from here on.
    unset_hf_deepspeed_config()
    transformer = trained_module(pipeline)
    # With these engines Trainer leaves the model on the CPU until it trains, but it may be asked for images before. That
    # costs no memory: they shard a model that stands whole on the device.
    transformer.to(accelerator.device)
    dtype = transformer.dtype
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if is_quantized(transformer) and (accelerator.distributed_type == DistributedType.DEEPSPEED or plugin is not None):
        raise ValueError(
            f"The transformer of this {type(pipeline).__name__} is quantised, and {accelerator.distributed_type.value} "
            "shards and casts only weights that it knows. Train it with DDP or on one GPU, or load it without quantization."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        dtype = accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
    elif plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        dtype = plugin.mixed_precision_policy.param_dtype
        # Accelerate has all inputs cast, and a timestep of 857.1 becomes 856 in bfloat16: the pipeline itself casts what
        # its transformer takes. Gradients are added up in float32, as by DDP.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, cast_forward_inputs=False, reduce_dtype=torch.float32
        )
    else:
        _refuse_rounded_steps(pipeline)
    if transformer.dtype != dtype:
        raise ValueError(
            f"{accelerator.distributed_type.value} computes in {dtype} without autocast (the options bf16 and fp16 say in "
            f"what), but the transformer of this {type(pipeline).__name__} is in {transformer.dtype}, and so are its "
            f"inputs. Load the pipeline with torch_dtype={dtype}, or by its name, or set "
            f"bf16={transformer.dtype == torch.bfloat16}."
        )


def _refuse_rounded_steps(pipeline: DiffusionPipeline) -> None:
    half = {p.dtype for p in trained_module(pipeline).parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if half:
        raise ValueError(
            f"use_peft=False would train weights in {half.pop()} of this {type(pipeline).__name__}, in which most steps of an "
            "optimizer, far smaller than a weight, are rounded away. Load it with torch_dtype=torch.float32, or by its name "
            "(bf16=True then computes in bfloat16); or train with DeepSpeed or FSDP2, which keep a copy in float32."
        )


def check_calls_of_levels(
    rehearsal: Rehearsal, levels: Sequence[int], accelerator: Accelerator, pipeline: DiffusionPipeline
) -> None:
    """
    Raises:
        ValueError: Trained levels call different transformers, or one differently often, under an engine whose processes must
            make the same calls: they train different levels at a time, and would mix shards or gradients of different layers.
    """
    shards = accelerator.distributed_type == DistributedType.DEEPSPEED or getattr(
        accelerator.state, "fsdp_plugin", None
    )
    calls = {tuple(rehearsal.callers[level]) for level in levels}
    if shards and accelerator.num_processes > 1 and len(calls) > 1:
        described = " and ".join(" + ".join(each) or "none" for each in sorted(calls))
        raise ValueError(
            f"The noise levels of this {type(pipeline).__name__} call different things ({described}), and the processes train "
            f"different levels at a time: {accelerator.distributed_type.value} would put together parts of different layers "
            "without an error. Train it with DDP (the configuration `ddp`), or one transformer by `trained_transformers`, or with a "
            "guidance that is the same at all levels."
        )


def check_attention_backend(accelerator: Accelerator, backend: str | None) -> None:
    """
    Raises:
        ValueError: The backend computes in 16 bits alone, and autocast, which leaves norms in float32, would give it their results.
    """
    autocasts = accelerator.native_amp and (
        accelerator.autocast_handler is None or accelerator.autocast_handler.enabled
    )
    if backend is not None and autocasts and not backend.startswith(("native", "_native", "flex")):
        raise ValueError(
            f"attention_backend='{backend}' takes queries and keys in 16 bits, and under mixed precision the norms before it give "
            "float32: leave it out (PyTorch's own attention is a flash kernel too), or load the pipeline in 16 bits and train a LoRA, "
            "which needs no autocast."
        )


def called_in_mixed_precision(accelerator: Accelerator, model: torch.nn.Module) -> Callable:
    """
    A function that calls a model as a run does. `train` prepares the model itself for mixed precision, and nothing before it does.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return model(*args, **kwargs)

    return call


def leave_out_autocast(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """
    Compute without autocast what does not need it: a LoRA on a transformer in the dtype of mixed precision, and a model that FSDP2
    casts by its own policy.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "mixed_precision_policy", None) is not None:
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if can_run_in_own_dtype(model, dtype):
        run_in_own_dtype(model)
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
