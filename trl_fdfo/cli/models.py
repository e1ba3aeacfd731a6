"""A base model, adapters on it and prompts, loaded after training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError

from .. import shapes
from ..evaluation.evaluator import read_rows
from ..media import Outputs
from ..pipeline.adapter_files import (
    CALL_OPTIONS,
    DIFFUSERS_FILE,
    OtherComponentsError,
    find_adapter,
    read_adapter,
    read_call_options,
)
from ..pipeline.checks import check_steps
from ..pipeline.flow import PipelineFlow
from ..pipeline.loading import load_pipeline
from ..pipeline.lora import add_adapter
from ..pipeline.schedulers import RolloutScheduler
from ..pipeline.trained import restore_point
from ..training.config_checks import check_argument_of_call, read_json_dict
from ..training.prompts import check_prompts, load_prompts, names_prompts, plain
from .arguments import PACKAGED_CALL, InferenceArguments


BASE = "base"  # name of the pipeline without an adapter


def read_prompts(prompts: list[str], pipeline_columns: Sequence[str] = ()) -> Dataset:
    """
    Prompts, or the prompts of the one file or prompt set that is named, with all its columns, in the column `prompt`.

    Raises:
        FileNotFoundError, ValueError: There are none, or one is no text.
    """
    is_named = len(prompts) == 1 and names_prompts(prompts[0])
    dataset = load_prompts(prompts[0], name="prompts") if is_named else Dataset.from_dict({"prompt": prompts})
    dataset = plain(dataset, pipeline_columns)
    check_prompts(dataset, "prompt", pipeline_columns, name=f"prompts={prompts}")
    return dataset


def find_adapters(names: Sequence[str]) -> dict[str, Path]:
    """
    The folder or file of each adapter, downloaded if its name is that of one on the Hub.

    Raises:
        ValueError: There is no such adapter, or two have one name.
    """
    for name in names:
        if name == BASE or names.count(name) > 1:
            taken = "is what the model without an adapter is called" if name == BASE else "was given more than once"
            raise ValueError(f"adapter='{name}' {taken}: another name tells them apart, such as ./{name}.")
    return {name: find_adapter(name) for name in names}


def model_options(model: str) -> dict[str, Any]:
    """Arguments of the call that a trained or merged pipeline, in a folder or on the Hub, was saved with; otherwise none."""
    if model == "shapes":
        return {"num_inference_steps": 8, **PACKAGED_CALL}
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(model, CALL_OPTIONS)).parent
        except (OSError, HTTPError, ValueError):  # what is wrong beyond that, loading the pipeline tells
            return {}
    options = read_call_options(folder) or {}
    # Its name is also that of a language model's file.
    return {} if "transformers_version" in options else options


def call_options(arguments: InferenceArguments, adapters: dict[str, Path]) -> dict[str, Any]:
    """
    Arguments of the pipeline's call: those that the model was saved with, over them those that the adapters were trained with,
    and over these those set here.

    Raises:
        ValueError: The adapters were trained with different ones, and nothing is set here; the JSON is invalid; or
            `num_inference_steps` is not the length of `sigmas` or `timesteps`.
    """
    names = ("num_inference_steps", "guidance_scale", "height", "width")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    given |= read_json_dict("pipeline_kwargs", arguments.pipeline_kwargs, "arguments of the pipeline's call") or {}
    for name, value in given.items():
        check_argument_of_call("pipeline_kwargs has", name, value)
    options = model_options(arguments.model)
    stored = {name: read_call_options(path) for name, path in adapters.items()}
    trained = {name: own for name, own in stored.items() if own is not None}
    for name, own in trained.items():
        for other, others in trained.items():
            differ = {k for k in own.keys() | others.keys() if own.get(k) != others.get(k)} - given.keys()
            if differ:
                raise ValueError(
                    f"{name} and {other} were trained with other {', '.join(sorted(differ))}: say which to sample with."
                )
        options |= own
    unknown = adapters.keys() - trained.keys()
    missing = [name for name in ("num_inference_steps", "guidance_scale") if name not in options | given]
    if unknown and missing and arguments.pipeline_kwargs is None:
        raise ValueError(
            f"adapter='{min(unknown)}' has no {CALL_OPTIONS}, which would say how it was trained: set "
            f"{' and '.join(missing)}, and height and width if they are not the pipeline's own. For the pipeline's "
            "own settings set pipeline_kwargs='{}'. docs/sharing.md has the settings of the published adapters."
        )
    check_steps(options | given, given.get("num_inference_steps"))
    return options | given


def open_flow(model: str, options: dict[str, Any], adapters: dict[str, Path], device: torch.device) -> PipelineFlow:
    """
    The pipeline on its device, in bfloat16 on a GPU (the tiny packaged one in float32), to sample from, after each adapter
    has been put on it and taken off for a try.

    Args:
        model (`str`): Hub id or path, or "shapes".
        options (`dict[str, Any]`): Arguments of its call.
        adapters (`dict[str, Path]`): Folders or files of adapters, by name.
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


def made_by_first_row(flow: PipelineFlow, dataset: Dataset, columns: Sequence[str] = ()) -> Outputs:
    """
    Rehearse the call of the first prompt, with its values of these columns: what the pipeline makes.

    Raises:
        ValueError: The pipeline cannot be called so.
    """
    row = read_rows(dataset, [0], ["prompt", *columns], "prompts")
    rehearsal = flow.rehearse(row["prompt"], {name: row[name] for name in columns})
    return Outputs.of(flow.pipeline, flow.call_kwargs, rehearsal.images)


def each_model(pipeline: DiffusionPipeline, adapters: dict[str, Path]) -> Iterator[str]:
    """The names of the base model and of each adapter, one after the other, while the pipeline is that."""
    yield BASE
    for name, path in adapters.items():
        restore = restore_point(pipeline)
        try:
            _load_adapter(pipeline, path)
            yield name
        finally:
            restore()


def _load_adapter(pipeline: DiffusionPipeline, path: Path) -> None:
    """Put an adapter on the pipeline: as it was trained, in float32, if it is one of the transformer alone."""
    try:
        add_adapter(pipeline, *read_adapter(pipeline, str(path))).eval()
    except OtherComponentsError:
        file = path if path.is_file() else path / DIFFUSERS_FILE
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
