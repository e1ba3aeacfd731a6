"""
The model card: README.md beside a result, with its pictures. The words are in the template model_card.md.

The trainer makes a [`CardRecord`] of plain values, and `write_model_card` renders it.
"""

import functools
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import jinja2
import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from torch import Tensor
from transformers.utils import logging
from yaml import YAMLError

from ..media import Media, Outputs, evenly_spread, middle_frame
from ..metric_names import EVAL_PREFIX, REWARD
from ..pipeline.adapter_files import call_options, diffusers_file
from ..pipeline.loading import base_model_name, packaged_folder
from ..pipeline.trained import TRAINED, has_adapter, trained_module, trained_modules
from ..reporting.clips import save_clips
from ..reporting.sheets import before_after_grid, picture


logger = logging.get_logger(__name__)

PACKAGED_TEMPLATE = Path(__file__).with_suffix(".md")

_FRAMEWORKS = ("trl", "transformers", "diffusers", "peft", "accelerate", "datasets")
_PACKAGE = __name__.partition(".")[0]
_WIDGET_PROMPTS = 8
_GRID_PROMPTS, _GRID_SEEDS = 9, 3  # seeds are images per prompt


@dataclass(frozen=True)
class Paper:
    """The paper of an algorithm."""

    title: str
    authors: Sequence[str]  # each as "Last, First"
    arxiv_id: str  # such as "2505.05470"
    year: int
    key: str  # of the BibTeX entry

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv_id}"

    @property
    def bibtex(self) -> str:
        fields = {
            "title": self.title,
            "author": " and ".join(self.authors),
            "year": self.year,
            "eprint": self.arxiv_id,
            "archivePrefix": "arXiv",
            "url": self.url,
        }
        lines = [f"  {name:<13} = {{{value}}}" for name, value in fields.items()]
        return f"@misc{{{self.key},\n" + ",\n".join(lines) + "\n}"


@dataclass(frozen=True)
class PipelineRecord:
    """The pipeline that was trained, and how it was called."""

    class_name: str
    dtype: torch.dtype  # of the trained module's weights
    call_kwargs: Mapping[str, Any]  # arguments of its call in use; the card shows the literals
    columns: Sequence[str] = ()  # dataset columns that were passed to its call, such as images to edit
    outputs: Outputs = Outputs()
    absent: Sequence[str] = ()  # components that the base model may have, such as a large text encoder, and it lacks
    hub_id: str | None = None  # Hub id that it was loaded from
    folder: str | None = None  # name of the local folder that it was loaded from
    packaged: str | None = None  # path of that folder within this package, if it is there
    transformers: Sequence[str] = (TRAINED,)  # names of all its transformers
    adapted: Sequence[str] = (TRAINED,)  # its transformers that have an adapter, if one is trained
    trained_with: Mapping[str, Any] | None = None  # arguments of its call in training; None: `call_kwargs`

    @classmethod
    def of(
        cls,
        pipeline: DiffusionPipeline,
        call_kwargs: Mapping[str, Any],
        columns: Sequence[str] = (),
        outputs: Outputs | None = None,
        trained_with: Mapping[str, Any] | None = None,
    ) -> "PipelineRecord":
        origin, is_on_hub = base_model_name(pipeline)
        optional = pipeline._optional_components
        transformers = trained_modules(pipeline)
        return cls(
            class_name=type(pipeline).__name__,
            dtype=trained_module(pipeline).dtype,
            call_kwargs=call_kwargs,
            columns=columns,
            outputs=outputs or Outputs(),
            absent=[name for name, part in pipeline.components.items() if part is None and name not in optional],
            hub_id=origin if is_on_hub else None,
            folder=None if is_on_hub else origin,
            packaged=packaged_folder(pipeline),
            transformers=tuple(transformers),
            adapted=[name for name, module in transformers.items() if has_adapter(module)] or (TRAINED,),
            trained_with=trained_with,
        )


@dataclass(frozen=True)
class TrainingRecord:
    """The training so far."""

    rewards: Sequence[tuple[str, float]]  # name and weight of each reward
    hyperparameters: Mapping[str, Any]  # by name, in the order of the card, which leaves out None
    num_prompts: int
    first_prompt: str
    rollouts: int
    images: int  # that were sampled and scored
    log_history: Sequence[Mapping[str, Any]]  # `trainer.state.log_history`
    prompt_file: str | None = None  # name of the file of the prompts, without its folder, or of a set that was made
    best: tuple[int, str] | None = None  # rollout whose weights were chosen, and the metric; None: the last weights
    seconds: float | None = None  # time of training, if it is known
    begun_from: str | None = None  # adapter that it went on from, without its folder


@dataclass(frozen=True)
class SampleRecord:
    """Samples of P prompts from the same seeds, before and after training, by the names of the card's columns."""

    prompts: Sequence[str]
    # Images in [0, 1], [P, S, 3, H, W]; videos [P, S, F, 3, H, W]; audio [P, S, C, L]. Shown only with "after".
    images: Mapping[str, Tensor | Media]
    results: Mapping[str, Mapping[str, float]]  # metrics of a column, which may be missing
    held_out: bool  # True if none of the prompts was trained on
    diversity: str  # name of the metric of diversity
    is_few: bool = False  # True if they are too few for their means to tell anything


@dataclass(frozen=True)
class CardRecord:
    """Everything that a model card says."""

    algorithm: str
    paper: Paper
    repo_id: str  # Hub id of the result, or the name of its folder
    adapter: str | None  # "diffusers" if `load_lora_weights` opens it, "peft" if only PEFT does, None: whole module
    pipeline: PipelineRecord
    training: TrainingRecord
    samples: SampleRecord | None = None
    template: str | Path | None = None  # in place of the packaged one
    model_name: str | None = None  # title of the card; default: the last part of `repo_id`
    dataset_name: str | None = None  # Hub id of the prompts
    tags: str | Sequence[str] = ()  # beside the tags that every card has
    license: str | None = None  # default: the licence on the base model's card
    base_model: str | None = None  # Hub id; default: `pipeline.hub_id`
    revision: str | None = None  # branch of `repo_id` that has the result, if it is not the main one
    adapter_kind: str = "LoRA"  # or another of PEFT's, such as "LoKr"


def check_template(path: str) -> None:
    """Raise a ValueError if `path` is no jinja2 template, does not show the metadata, or makes no card of a small run."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        jinja2.Environment().parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise ValueError(f"model_card_template='{path}' cannot be read as a jinja2 template: {error}.") from error
    if "card_data" not in text:
        raise ValueError(
            f"model_card_template='{path}' has no {{{{ card_data }}}}, and without metadata the Hub does not know what "
            f"the model is: put it at the top, between two lines of ---. The packaged template is {PACKAGED_TEMPLATE}."
        )
    run = TrainingRecord(
        [("reward", 1.0)], {"learning_rate": 1e-4}, 1, "a prompt", rollouts=1, images=2, log_history=[]
    )
    pipeline = PipelineRecord(DiffusionPipeline.__name__, torch.float32, {"num_inference_steps": 10})
    paper = Paper("A Title", ["Doe, Jane"], "2001.00001", 2020, "doe2020title")
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_model_card(CardRecord("Algorithm", paper, "out", "peft", pipeline, run, template=path), folder)
        except (jinja2.TemplateError, TypeError, ValueError, YAMLError) as error:
            raise ValueError(
                f"model_card_template='{path}' makes no card of a small run ({type(error).__name__}: {error}). The head of "
                f"{PACKAGED_TEMPLATE} has all variables."
            ) from error


def write_model_card(record: CardRecord, folder: str | Path) -> None:
    """Write README.md and its pictures into `folder`. Only one process calls it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, training, samples = record.pipeline, record.training, record.samples
    if samples is not None and "after" not in samples.images:
        samples = None
    widget = _save_widget(samples, folder, pipeline.outputs) if samples is not None else None
    source = "a list of its own" if training.prompt_file is None else f"`{training.prompt_file}`"
    if record.dataset_name is not None:
        source = f"[{record.dataset_name}](https://huggingface.co/datasets/{record.dataset_name})"
    hyperparameters = {name: value for name, value in training.hyperparameters.items() if value is not None}
    packages = [(name, version(name)) for name in _FRAMEWORKS]
    snippet, reward_names = usage_snippet(record), [name for name, _ in training.rewards]
    used_with = _literals(pipeline.call_kwargs)
    trained_with = used_with if pipeline.trained_with is None else _literals(pipeline.trained_with)
    card = ModelCard.from_template(
        _metadata(record, widget),
        template_path=str(record.template or PACKAGED_TEMPLATE),
        model_name=record.model_name or record.repo_id.rpartition("/")[2],
        algorithm=record.algorithm,
        paper=record.paper,
        pipeline=pipeline.class_name,
        is_adapter=record.adapter is not None,
        adapter_kind=record.adapter_kind,
        begun_from=training.begun_from,
        has_widget=bool(widget),
        snippet=snippet,
        base_folder=None if pipeline.packaged or record.base_model or record.adapter is None else pipeline.folder,
        fence=_fence(snippet, *reward_names),
        sampling=list(trained_with.items()),
        used_with=[item for item in used_with.items() if item not in trained_with.items()],
        rewards=[(name, f"{weight:g}") for name, weight in training.rewards],
        raised=[name for name, weight in training.rewards if weight > 0],
        lowered=[name for name, weight in training.rewards if weight < 0],
        prompts=f"{training.num_prompts:,} prompts from {source}",
        rollouts=f"{training.rollouts:,}",
        images=f"{training.images:,}",
        duration=_duration(training.seconds),
        best=training.best,
        hyperparameters=[(k, v.value if isinstance(v, Enum) else v) for k, v in hyperparameters.items()],
        versions=[("trl_fdfo", version("trl_fdfo")), ("torch", torch.__version__), *packages],
        **_results(samples),
        before_after=_save_before_after(samples, folder),
        **_save_curves(training.log_history, folder),
    )
    card.save(folder / "README.md")


def _load_lora(transformer: str, place: str, branch: str) -> str:
    """The line that loads the adapter of a transformer; a pipeline's own loader knows one transformer."""
    if transformer == TRAINED:
        return f'pipeline.load_lora_weights("{place}"{branch})'
    file = diffusers_file(transformer)
    return f'pipeline.{transformer}.load_lora_adapter("{place}", weight_name="{file}", prefix="{TRAINED}"{branch})'


def _branch(record: CardRecord) -> str:
    """The argument of the loaders that names the branch; without it they load the main one."""
    return f', revision="{record.revision}"' if record.revision is not None else ""


def _class_name(pipeline: PipelineRecord) -> str:
    return pipeline.class_name if hasattr(diffusers, pipeline.class_name) else DiffusionPipeline.__name__


def loading_lines(record: CardRecord, place: str) -> list[str]:
    """
    Python code that loads the result from `place`, a folder or a repo of the Hub: the lines that put the adapter on the
    base model `pipeline`, or the one that loads the whole pipeline.
    """
    pipeline, branch = record.pipeline, _branch(record)
    if record.adapter == "diffusers":
        return [_load_lora(transformer, place, branch) for transformer in pipeline.adapted]
    if record.adapter == "peft":
        # Its file has the layers of all transformers.
        module = "trained_module(pipeline)" if len(pipeline.transformers) > 1 else f"pipeline.{TRAINED}"
        return [f'PeftModel.from_pretrained({module}, "{place}"{branch})']
    absent = "".join(f", {part}=None" for part in pipeline.absent)
    return [f'pipeline = {_class_name(pipeline)}.from_pretrained("{place}"{branch}{absent})']


def usage_snippet(record: CardRecord) -> str:
    """Return Python code that loads the result from `record.repo_id` and makes an image or a video as in evaluations."""
    pipeline, name = record.pipeline, _class_name(record.pipeline)
    base = record.base_model or pipeline.hub_id or pipeline.folder or "path/to/the/pipeline"
    loaded = f'"{record.repo_id}"{_branch(record)}' if record.adapter is None else f'"{base}"'
    imports, load = ["import torch", f"from diffusers import {name}"], []
    if record.adapter is not None:
        load = loading_lines(record, record.repo_id)
        if record.base_model is None and pipeline.packaged is not None:
            imports.append("from importlib.resources import files")
            loaded = f'files("{_PACKAGE}") / "{pipeline.packaged}"'
    source = [loaded, *(f"{part}=None" for part in pipeline.absent), f"dtype={pipeline.dtype}"]
    if record.adapter == "peft":
        imports.append("from peft import PeftModel")
        if len(pipeline.transformers) > 1:
            imports.append("from trl_fdfo.pipeline.trained import trained_module")
    inputs = {column: f'load_image("{column}.png")' for column in pipeline.columns}
    if inputs:
        imports.append("from diffusers.utils import load_image")
    kinds, rate = pipeline.outputs.kinds, pipeline.outputs.sampling_rate
    of_video = 'export_to_video(video, "video.mp4")'
    of_audio = f'soundfile.write("audio.wav", audio.T.float().cpu().numpy(), {rate or "sampling_rate"})'
    if "videos" in kinds:
        imports.append("from diffusers.utils import export_to_video")
    if "audio" in kinds:
        imports.append("import soundfile")
    if "audio" not in kinds:
        made, part, save = "image", "images", ['image.save("image.png")']
        if "videos" in kinds:
            made, part, save = "video", "frames", [of_video]
    elif "videos" in kinds:
        made, part, save = "made", "", ["video, audio = made.frames[0], made.audio[0]", of_video, of_audio]
    else:
        made, part, save = "audio", "audios", [of_audio]
    prompt = record.samples.prompts[0] if record.samples is not None else record.training.first_prompt
    arguments = {**inputs, **_literals(pipeline.call_kwargs)}
    call = [json.dumps(prompt, ensure_ascii=False), *(f"{n}={v}" for n, v in arguments.items())]
    lines = [
        *sorted(imports, key=lambda line: line.startswith("from")),
        "",
        _call(f"pipeline = {name}.from_pretrained", source),
        *load,
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        _call(f"{made} = pipeline", call) + (f".{part}[0]" if part else ""),
        *save,
    ]
    return "\n".join(lines)


def _call(function: str, arguments: list[str]) -> str:
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) < 80 else "\n".join([f"{function}(", *(f"    {a}," for a in arguments), ")"])


def _literals(call_kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments that JSON can hold, as Python code."""
    return {name: repr(value) for name, value in call_options(call_kwargs).items() if value is not None}


def _fence(*texts: str) -> str:
    """More backticks than there are in a row in the texts, so that they are code as a whole."""
    runs = [run for text in texts for run in re.findall("`+", text)]
    return "`" * max([2, *map(len, runs)]) + "`"


def _metadata(record: CardRecord, widget: list[dict[str, Any]]) -> ModelCardData:
    pipeline, is_adapter = record.pipeline, record.adapter is not None
    base_model = record.base_model or pipeline.hub_id
    relation = "adapter" if is_adapter else "finetune"
    kinds = pipeline.outputs.kinds
    made = "video" if "videos" in kinds else "image" if "images" in kinds else "audio"
    # The tasks of the Hub: from what is shown to the pipeline beside the prompt.
    shown = "text" if made == "audio" or not pipeline.columns else "image"
    if made == "video" and any("video" in column for column in pipeline.columns):
        shown = "video"
    task = f"{shown}-to-{made}"
    own_tags = [record.tags] if isinstance(record.tags, str) else record.tags
    kind = [record.adapter_kind.lower()] if is_adapter else []
    return ModelCardData(
        library_name="diffusers",
        base_model=base_model,
        base_model_relation=relation if base_model is not None else None,
        pipeline_tag=task,
        tags=[task, "diffusers", "trl", record.algorithm.lower(), *kind, *own_tags],
        datasets=record.dataset_name,
        widget=widget or None,
        **({"license": record.license} if record.license is not None else _license(base_model)),
    )


@functools.cache
def _license(base_model: str | None) -> dict[str, str]:
    """Return the licence on the base model's card; nothing if the card cannot be read."""
    if base_model is None:
        return {}
    try:
        data = ModelCard.load(base_model, ignore_metadata_errors=True).data
    except (OSError, HTTPError, ValueError) as error:
        logger.info(f"The licence of {base_model} is not known: {error}")
        return {}
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    if found["license_link"] and "://" not in found["license_link"]:
        found["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{found['license_link']}"
    return {name: value for name, value in found.items() if value is not None}


def _results(samples: SampleRecord | None) -> dict[str, Any]:
    """Return the template's variables for the table of results."""
    if samples is None:
        return {"columns": [], "rows": [], "held_out": False, "num_images": 0, "is_few": False, "diversity": None}
    columns = {name: samples.results[name] for name in samples.images if name in samples.results}
    metrics = list(dict.fromkeys(metric for values in columns.values() for metric in values))
    return {
        "columns": list(columns),
        "rows": [(metric, [_shown(values.get(metric)) for values in columns.values()]) for metric in metrics],
        "held_out": samples.held_out,
        "num_images": len(_seen(samples.images["after"]).flatten(0, 1)),
        "is_few": samples.is_few,
        "diversity": samples.diversity if samples.diversity in metrics else None,
    }


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _seen(made: Tensor | Media) -> Tensor:
    """What a still shows: images or videos, and audio alone only where there are none."""
    return made.images if isinstance(made, Media) else made


def _save_widget(samples: SampleRecord, folder: Path, outputs: Outputs) -> list[dict[str, Any]]:
    """
    Write one sample of each prompt, and list them in the format of the Hub's widget: an image, a video, or audio; otherwise
    the picture of it.
    """
    (folder / "images").mkdir(exist_ok=True)
    after = samples.images["after"]
    stills, widget = middle_frame(_seen(after)), []
    for number, place in enumerate(evenly_spread(len(samples.prompts), _WIDGET_PROMPTS)):
        still = folder / "images" / f"{number}.png"
        picture(stills[place, 0]).save(still)
        clips = save_clips(recursively_apply(lambda made: made[place, 0], after), still.with_suffix(""), outputs)  # noqa: B023
        shown = next(iter(clips), still)
        widget.append({"text": samples.prompts[place], "output": {"url": f"images/{shown.name}"}})
    return widget


def _save_before_after(samples: SampleRecord | None, folder: Path) -> str | None:
    """Draw the first column of samples above "after": the name of the file, or None if there is only one column."""
    if samples is None or len(samples.images) < 2:
        return None
    titles = (next(iter(samples.images)), "after")
    shown = evenly_spread(len(samples.prompts), _GRID_PROMPTS)
    before, after = (middle_frame(_seen(samples.images[title]))[shown, :_GRID_SEEDS] for title in titles)
    name = "before_after.png"
    before_after_grid([samples.prompts[place] for place in shown], before, after, titles).save(folder / name)
    return name


def _save_curves(log_history: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, str | None]:
    """Draw the curves that have at least two points: the names of their files, or None."""
    made: dict[str, str | None] = {"reward_curve": None, "evaluation": None}
    try:
        from ..reporting.curves import evaluation_curves, reward_curve
    except ImportError as error:
        logger.info(f"The model card has no curves: {error}")
        return made
    curves = (("reward_curve", REWARD, reward_curve), ("evaluation", EVAL_PREFIX + REWARD, evaluation_curves))
    for name, metric, draw in curves:
        if sum(metric in log for log in log_history) > 1:
            made[name] = f"{name}.png"
            draw(log_history, folder / made[name])
    return made
