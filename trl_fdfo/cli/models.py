"""A base model and adapters on it, loaded after training."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from .. import shapes
from ..pipeline.adapter_files import CALL_OPTIONS
from ..pipeline.flow import PipelineFlow
from ..pipeline.loading import load_pipeline
from ..pipeline.schedulers import RolloutScheduler
from ..pipeline.trained import trained_module
from .arguments import InferenceArguments


BASE = "base"  # name of the pipeline without an adapter
DIFFUSERS_FILE, PEFT_FILES = "pytorch_lora_weights.safetensors", ("adapter_config.json", "adapter_model.safetensors")


def find_adapters(names: Sequence[str]) -> dict[str, Path]:
    """
    The folder of each adapter's files, downloaded if its name is no folder.

    Raises:
        ValueError: There is no such adapter, or two have one name.
    """
    for name in names:
        if name == BASE or names.count(name) > 1:
            taken = "is what the model without an adapter is called" if name == BASE else "was given more than once"
            raise ValueError(f"adapter='{name}' {taken}: another name tells them apart, such as ./{name}.")
    return {name: _find_adapter(name) for name in names}


def _find_adapter(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[DIFFUSERS_FILE, *PEFT_FILES, CALL_OPTIONS]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(f"adapter='{name}' is neither a folder nor an adapter on the Hub: {error}") from None
    if not (folder / DIFFUSERS_FILE).is_file() and not all((folder / file).is_file() for file in PEFT_FILES):
        raise ValueError(
            f"adapter='{name}' has neither {DIFFUSERS_FILE} (diffusers) nor {' and '.join(PEFT_FILES)} (PEFT)."
        )
    return folder


def call_options(arguments: InferenceArguments, adapters: dict[str, Path]) -> dict[str, Any]:
    """
    Arguments of the pipeline's call: those that the adapters were trained with, and over them those set here.

    Raises:
        ValueError: The adapters were trained with different ones, and nothing is set here; or the JSON is invalid.
    """
    names = ("num_inference_steps", "guidance_scale", "height", "width")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        given |= json.loads(arguments.pipeline_kwargs or "{}")
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"pipeline_kwargs={arguments.pipeline_kwargs!r} is not a JSON object: {error}.") from None
    options = {"num_inference_steps": 8, "max_sequence_length": 0} if arguments.model == "shapes" else {}
    files = {name: folder / CALL_OPTIONS for name, folder in adapters.items() if (folder / CALL_OPTIONS).is_file()}
    trained = {name: json.loads(file.read_text()) for name, file in files.items()}
    for name, own in trained.items():
        for other, others in trained.items():
            differ = {k for k in own.keys() | others.keys() if own.get(k) != others.get(k)} - given.keys()
            if differ:
                raise ValueError(
                    f"{name} and {other} were trained with other {', '.join(sorted(differ))}: say which to sample with."
                )
        options |= own
    return options | given


def open_flow(model: str, options: dict[str, Any], adapters: dict[str, Path], device: torch.device) -> PipelineFlow:
    """
    The pipeline on its device, in bfloat16 on a GPU (the tiny packaged one in float32), to sample from, after each adapter
    has been put on it and taken off for a try.

    Args:
        model (`str`): Hub id or path, or "shapes".
        options (`dict[str, Any]`): Arguments of its call.
        adapters (`dict[str, Path]`): Folders of adapters, by name.
        device (`torch.device`): Device of the pipeline.

    Raises:
        ValueError: Its call has no such arguments, or an adapter is for another pipeline.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = shapes.load_pipeline() if model == "shapes" else load_pipeline(model, dtype=dtype)
    # Nothing is rolled out: the number of branches and their scheduler do not matter.
    flow = PipelineFlow(pipeline, num_generations=2, scheduler_class=RolloutScheduler, **options)
    pipeline.to(device)
    for _ in each_model(pipeline, adapters):
        pass
    return flow


def each_model(pipeline: DiffusionPipeline, adapters: dict[str, Path]) -> Iterator[str]:
    """The names of the base model and of each adapter, one after the other, while the pipeline is that."""
    yield BASE
    for name, folder in adapters.items():
        unload = _load_adapter(pipeline, folder)
        yield name
        unload()


def _load_adapter(pipeline: DiffusionPipeline, folder: Path) -> Callable[[], Any]:
    """Put an adapter on the pipeline; the return value takes it off."""
    if (folder / DIFFUSERS_FILE).is_file() and hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder)
        unload = pipeline.unload_lora_weights
    elif (folder / PEFT_FILES[0]).is_file():
        unload = PeftModel.from_pretrained(trained_module(pipeline), folder).unload  # in place
    else:
        raise ValueError(f"{type(pipeline).__name__} cannot load {DIFFUSERS_FILE}: use an adapter in PEFT's format.")
    if not any(isinstance(module, BaseTunerLayer) for module in trained_module(pipeline).modules()):
        raise ValueError(f"{folder} has nothing for the transformer of {type(pipeline).__name__}: is it for another?")
    return unload
