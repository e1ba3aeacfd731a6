"""Images of a pipeline, and of adapters on it, after training: what examples/generate.py and examples/evaluate.py share."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from .. import shapes
from ..pipeline.lora import CALL_OPTIONS
from ..pipeline.flow import is_per_sample, load_pipeline
from ..training.prompts import check_prompts, load_prompts
from ..rewards.by_name import RepeatableFlag


BASE = "base"  # what the pipeline without an adapter is called
DIFFUSERS_FILE, PEFT_FILES = "pytorch_lora_weights.safetensors", ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class InferenceArguments:
    """What the command lines of the examples have in common."""

    model: str = field(metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."})
    prompts: list[str] = field(metadata={"help": "Prompts, or one txt, json, jsonl, csv or parquet file of them."})
    adapter: list[str] = field(
        default_factory=list, metadata={"help": "Folder or Hub id. Repeat for several.", "action": RepeatableFlag}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Steps of the sampler."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance of the pipeline; 1 is none."})
    height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    pipeline_kwargs: str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's call, as a JSON string."}
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and self.__dataclass_fields__[name].type in (list[str], list[str] | None):
                setattr(self, name, [value])  # as a YAML file may have it


def read_prompts(prompts: list[str]) -> Dataset:
    """
    Prompts, or those of the one file that is named, with all its columns, in the column `prompt`.

    Raises:
        FileNotFoundError, ValueError: There are none, or one is no text.
    """
    is_file = len(prompts) == 1 and Path(prompts[0]).suffix in (".txt", ".json", ".jsonl", ".csv", ".parquet")
    dataset = load_prompts(prompts[0], name="prompts") if is_file else Dataset.from_dict({"prompt": prompts})
    check_prompts(dataset, "prompt", name=f"prompts={prompts}")
    return dataset


def find_adapters(names: Sequence[str]) -> dict[str, Path]:
    """
    The folder of each adapter's files, downloaded where its name is no folder.

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
        ValueError: The adapters were trained with different ones, and nothing is set here; or what is set is no JSON.
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


def open_pipeline(
    model: str, options: dict[str, Any], adapters: dict[str, Path], device: torch.device
) -> DiffusionPipeline:
    """
    The pipeline on its device, in bfloat16 on a GPU (the tiny packaged one in float32), after each adapter has been put on
    it and taken off for a try.

    Args:
        model (`str`): Hub id or path, or "shapes".
        options (`dict[str, Any]`): Arguments of its call.
        adapters (`dict[str, Path]`): Folders of adapters, by name.
        device (`torch.device`): Where it is to be.

    Raises:
        ValueError: Its call has no such arguments, or an adapter is for another pipeline.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = shapes.load_pipeline() if model == "shapes" else load_pipeline(model, dtype=dtype)
    unknown = options.keys() - inspect.signature(type(pipeline).__call__).parameters.keys()
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(sorted(unknown))}: leave it out.")
    pipeline.to(device).set_progress_bar_config(disable=True)
    for _ in each_model(pipeline, adapters):
        pass
    return pipeline


def each_model(pipeline: DiffusionPipeline, adapters: dict[str, Path]) -> Iterator[str]:
    """The names of the base model and of each adapter, one after the other, while the pipeline is that."""
    yield BASE
    for name, folder in adapters.items():
        unload = _load_adapter(pipeline, folder)
        yield name
        unload()


def _load_adapter(pipeline: DiffusionPipeline, folder: Path) -> Callable[[], Any]:
    """Put an adapter on the pipeline; returns what takes it off."""
    if (folder / DIFFUSERS_FILE).is_file() and hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder)
        unload = pipeline.unload_lora_weights
    elif (folder / PEFT_FILES[0]).is_file():
        unload = PeftModel.from_pretrained(pipeline.transformer, folder).unload  # in place
    else:
        raise ValueError(f"{type(pipeline).__name__} cannot load {DIFFUSERS_FILE}: use an adapter in PEFT's format.")
    if not any(isinstance(module, BaseTunerLayer) for module in pipeline.transformer.modules()):
        raise ValueError(f"{folder} has nothing for the transformer of {type(pipeline).__name__}: is it for another?")
    return unload


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline, prompt: str, seeds: Sequence[int], options: dict[str, Any], batch_size: int = 1
) -> Tensor:
    """
    Images of a prompt by the pipeline's own sampler.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline.
        prompt (`str`): The prompt.
        seeds (`Sequence[int]`): S seeds of the initial noise.
        options (`dict[str, Any]`): Further arguments of the pipeline's call.
        batch_size (`int`): Images per call.

    Returns:
        `Tensor`: Floats in [0, 1], on the CPU, shape [S, 3, H, W]; videos [S, F, 3, H, W].
    """
    images = []
    for start in range(0, len(seeds), batch_size):
        # On the CPU: the noise does not depend on the device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        arguments = {**options, "prompt": prompt, "generator": generators}
        if len(generators) == 1:
            arguments["generator"] = generators[0]
        else:  # one for each image: not every pipeline repeats by itself
            arguments |= {
                name: [value] * len(generators)
                for name, value in arguments.items()
                if is_per_sample(name) and isinstance(value, str)
            }
        images.append(pipeline(**arguments, output_type="pt", return_dict=False)[0].float().cpu())
    return torch.cat(images)
