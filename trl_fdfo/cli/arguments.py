"""Command lines: what the commands have in common, and how they are parsed. Imports nothing that takes seconds."""

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from trl import TrlParser

from ..seeds import FIRST_SEED
from ..training.migration import unknown_options
from . import recipes
from .algorithms import ALGORITHMS
from .quick import prompt_set_table, reward_table


class RepeatableFlag(argparse.Action):
    """`--flag a --flag b` is `--flag a b`. The command line replaces the default, also one from a YAML file."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option once, with its default, and the tables of rewards and prompt sets line by line."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = next(flag for flag in action.option_strings if flag.startswith("--"))
        kind = getattr(action.type, "__name__", "text")
        kind = {"str": "text", "string_to_bool": "bool", "<lambda>": "text"}.get(kind, kind).upper()
        return " ".join([name, *([self._format_args(action, kind)] if action.nargs != 0 else [])])

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


# The packaged pipeline knows this size, and no text beyond CLIP's: so it is called unless the user says otherwise.
PACKAGED_CALL = {"max_sequence_length": 0}
PACKAGED_SIZE = {"height": 32, "width": 32}
EVALUATION_FILE = "results.json"
MERGE_FORMATS = ("pipeline", "checkpoint", "lora")
MERGE_DTYPES = ("float32", "bfloat16", "float16")
CONFIG = (
    "A YAML file of options, or the name of one that `trl-fdfo recipes` lists. Options beside it replace those in it."
)


class Parser(TrlParser):
    """
    TRL's parser, without abbreviations and with short errors. A YAML file may write `learning-rate`, as the command line,
    and `--config` names a packaged recipe or a file.

    Args:
        classes (`type` or `Sequence[type]`): Dataclasses.
        partial (`bool`): Pass over options of other dataclasses.
        elsewhere (`Collection[str]`): Options that a YAML file may have for something else. They are put into `passed_over`.
        owners (`Callable`): Called for an unknown option: others that exist, and of what they are options.
        defaults (`Mapping[str, Any]`): Values of options in the place of the defaults of their dataclasses.
        **kwargs: Arguments of [`~trl.TrlParser`].
    """

    def __init__(
        self,
        classes: type | Sequence[type],
        partial: bool = False,
        elsewhere: Collection[str] = (),
        owners: Callable[[], Mapping[str, str]] = dict,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        usage: str = "%(prog)s [--config RECIPE] [--OPTION VALUE ...]",
        **kwargs: Any,
    ):
        super().__init__(classes, allow_abbrev=False, formatter_class=HelpFormatter, usage=usage, **kwargs)
        # Read before all others, by TRL's parser.
        self.add_argument("--config", metavar="RECIPE", default=argparse.SUPPRESS, help=CONFIG)
        self.set_defaults(**defaults)
        self.partial, self.elsewhere, self.owners = partial, elsewhere, owners
        self.passed_over: dict[str, Any] = {}
        for action in self._actions:  # the other spelling of a switch that is on
            if action.option_strings and action.option_strings[0].startswith("--no_") and action.nargs == 0:
                action.help = argparse.SUPPRESS

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        args = sys.argv[1:] if args is None else args
        split = [arg.split("=", 1) if arg.startswith("--config=") else [arg] for arg in args]
        args = [part for parts in split for part in parts]
        if args.count("--config") > 1:
            self.error(f"argument --config: one recipe, and it is given {args.count('--config')} times")
        if "--config" in args:
            place = args.index("--config") + 1
            if place == len(args):
                self.error("argument --config: expected a recipe or a YAML file")
            self.recipe = recipes.find(args[place])
            recipes.read(self.recipe)
            args[place] = str(self.recipe)
        return super().parse_args_and_config(args, **kwargs)

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        plain = {name.replace("-", "_"): value for name, value in options.items()}
        if len(plain) < len(options):
            twice = [name for name in options if "-" in name and name.replace("-", "_") in options]
            raise ValueError(f"The config file has {', '.join(twice)} twice, with `-` and with `_`.")
        names = self._names()
        self.passed_over = {
            name: value for name, value in plain.items() if name in self.elsewhere and name not in names
        }
        plain = {
            name: recipes.beside(self.recipe, name, value)
            for name, value in plain.items()
            if name not in self.passed_over
        }
        self._refuse_unknown(_flat(plain, names))
        return super().set_defaults_with_config(**plain)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        # Before argparse looks for what is missing, which may be there under a wrong name.
        flags = [arg.partition("=")[0] for arg in args or () if arg.startswith("--") and " " not in arg]
        unknown = [flag for flag in flags if flag != "--" and flag not in self._option_string_actions]
        self._refuse_unknown([flag[2:].replace("-", "_") for flag in unknown])
        found, rest = super().parse_known_args(args, namespace)
        if rest and not self.partial:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """As argparse does, without all options."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")

    def _names(self) -> set[str]:
        return {action.dest for action in self._actions} - {"config", "help"}

    def _refuse_unknown(self, given: Iterable[str] | Mapping[str, Any]) -> None:
        configs = [each for each in self.dataclass_types if hasattr(each, "renamed_options")]
        owner = " with ".join([self.prog, *(each.__name__.removeprefix("Planned") for each in configs)])
        renamed = {name: new for each in configs for name, new in each.renamed_options.items()}
        error = None if self.partial else unknown_options(owner, given, self._names(), renamed, self.owners)
        if error:
            raise ValueError(error)


def parse(classes: type | Sequence[type], args: list[str] | None = None, **options: Any) -> tuple[Any, ...]:
    """
    Dataclasses from a command line and, with `--config`, a recipe. `--help` also lists the rewards and prompt sets.

    Args:
        classes (`type` or `Sequence[type]`): Dataclasses.
        args (`list[str]`, *optional*): Default: those of the command line.
        **options: Arguments of [`Parser`].

    Raises:
        ValueError: An option does not exist, or has an impossible value.
    """
    return Parser(classes, **{"epilog": f"{reward_table()}\n\n{prompt_set_table()}", **options}).parse_args_and_config(
        args
    )


def _flat(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """`{"sample": {"num_steps": 10}}` as `{"sample.num_steps": 10}`, unless `sample` is an option."""
    flat = {}
    for name, value in options.items():
        inner = value if isinstance(value, dict) and name not in names else None
        flat |= {f"{name}.{key}": one for key, one in inner.items()} if inner else {name: value}
    return flat


def check_model(model: str) -> None:
    """
    Refuse what can be neither a Hub id nor a pipeline's folder; whether the Hub has an id is told there.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is a file, or a folder of something else.
    """
    if not isinstance(model, str):  # from a YAML file; the trainer says what it may be
        return
    path, index = Path(model), "model_index.json"
    if model == "shapes" or (path / index).is_file():
        return
    if path.exists():
        found = "is a folder without" if path.is_dir() else "is a file and has no"
        raise ValueError(
            f"model='{model}' {found} {index}: name a folder that diffusers' `save_pretrained` wrote, or a Hub id."
        )
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise FileNotFoundError(f"model='{model}': there is no such folder, and a Hub id is owner/name.")


@dataclass
class InferenceArguments:
    """Options of a script that samples a base model and adapters on it."""

    model: str = field(metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."})
    prompts: list[str] = field(
        metadata={
            "help": "Prompts, or one txt, json, jsonl, csv or parquet file of them, or one prompt set, listed below."
        }
    )
    adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folder or .safetensors file of an adapter, or owner/name, owner/name@revision or either with /folder "
            "on the Hub. Repeat for several.",
            "action": RepeatableFlag,
        },
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Steps of the sampler."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of the pipeline; 1 is none, 0 in some."}
    )
    height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    pipeline_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns of the file of prompts that go to the pipeline's call, such as an image: as image data, or as the "
            "name of an image file."
        },
    )
    pipeline_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the pipeline's call, as a JSON string. {} accepts the pipeline's own settings for "
            "an adapter without a generation_config.json."
        },
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, str) and self.__dataclass_fields__[name].type in (list[str], list[str] | None):
                setattr(self, name, [value])  # a YAML file may have it so
        check_model(self.model)
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be at least 1.")


@dataclass
class EvaluationArguments(InferenceArguments):
    """Options of an evaluation."""

    prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts; or one prompt set, listed below, or txt, json, jsonl, csv or parquet file of them, whose other "
            "columns go to the rewards. Default: the packaged list, which training takes by default too; the captions of "
            "`shapes`."
        },
    )
    reward: list[str] = field(
        default_factory=lambda: ["pickscore", "hpsv2", "clip"],
        metadata={"help": "A reward, listed below, or module:callable. Repeat for several.", "action": RepeatableFlag},
    )
    diversity: str | None = field(
        default=None,
        metadata={
            "help": "Features whose distance is diversity: clip, dreamsim, pixels, or module:callable. Default: clip, and pixels "
            "for `shapes`. Audio has none."
        },
    )
    images_per_prompt: int = field(default=4, metadata={"help": "Images per prompt and model, at least 2."})
    first_seed: int = field(default=FIRST_SEED, metadata={"help": "Seed of the first image; the others follow it."})
    batch_size: int = field(default=4, metadata={"help": "Images of a prompt per call of the pipeline."})
    by: str | None = field(
        default=None,
        metadata={
            "help": "A column of the prompts: the table also has each reward for each of its values, such as `tag` for the "
            "tasks of GenEval."
        },
    )
    grid_prompts: int = field(default=8, metadata={"help": "Prompts in grid.png."})
    output: str = field(default="evaluation", metadata={"help": "Folder to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of an earlier evaluation."})

    def __post_init__(self):
        super().__post_init__()
        if (Path(self.output) / EVALUATION_FILE).exists() and not self.overwrite:
            raise ValueError(
                f"output='{self.output}' has the {EVALUATION_FILE} of an earlier evaluation: take another name, or set `overwrite`."
            )


@dataclass
class MergeArguments:
    """Options of a merge of adapters."""

    model: str = field(metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."})
    adapter: list[str] = field(
        metadata={
            "help": "Folder or .safetensors file of an adapter, or its place on the Hub. Repeat for several, which are merged "
            "one after the other.",
            "action": RepeatableFlag,
        },
    )
    output: str = field(metadata={"help": "Folder of the pipeline, or .safetensors file, to write."})
    format: str = field(
        default="pipeline",
        metadata={
            "help": "`pipeline`: all of it, for `DiffusionPipeline.from_pretrained`. `checkpoint`: the file `original` with "
            "the adapters in it. `lora`: the adapters as one LoRA of scale 1, with the names of `original`, or with "
            "diffusers' names if that is not given.",
            "choices": MERGE_FORMATS,
        },
    )
    original: str | None = field(
        default=None,
        metadata={"help": "The model's .safetensors file in the layout of its authors, as ComfyUI loads it."},
    )
    component: str | None = field(
        default=None,
        metadata={"help": "The transformer that a file is of, if the pipeline has several. Default: `transformer`."},
    )
    scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "How much of the adapters is merged: one number, or one for each.", "action": RepeatableFlag},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights: that of the model's files by default, float32 for a LoRA.",
            "choices": MERGE_DTYPES,
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an output that exists."})

    def __post_init__(self):
        for name in ("adapter", "scale"):
            value = getattr(self, name)
            setattr(self, name, value if isinstance(value, list) else [value])  # a YAML file may have it so
        check_model(self.model)
        if not self.adapter:
            raise ValueError("adapter=[] leaves nothing to merge: name at least one.")
        if len(self.scale) not in (1, len(self.adapter)):
            raise ValueError(
                f"scale={self.scale} must be one number, or one for each of the {len(self.adapter)} adapters."
            )
        if self.format == "checkpoint" and self.original is None:
            raise ValueError(
                "format='checkpoint' changes a copy of the model's own file: name it in `original`, such as the one that "
                "ComfyUI loads."
            )
        if self.format == "pipeline" and self.original is not None:
            raise ValueError(
                f"original='{self.original}' is not read for format='pipeline'. Set format='checkpoint' for that file with "
                "the adapters in it, or 'lora' for a LoRA with its names."
            )
        if self.format == "checkpoint" and self.dtype is not None:
            raise ValueError(
                f"dtype={self.dtype} was given, and a checkpoint keeps the dtype of its original: leave it out."
            )
        self._check_output()

    def _check_output(self) -> None:
        output = Path(self.output)
        is_file = self.format != "pipeline"
        if is_file and output.suffix != ".safetensors":
            raise ValueError(f"output='{output}' is a file for format='{self.format}': end its name in .safetensors.")
        if not output.exists():
            return
        for name in ("original", "model"):
            source = getattr(self, name)
            if source is not None and Path(source).exists() and output.samefile(source):
                raise ValueError(f"output='{output}' is the {name} itself: take another name.")
        if not self.overwrite:
            raise ValueError(f"output='{output}' exists: take another name, or set `overwrite`.")
        if output.is_file() != is_file or not (is_file or (output / "model_index.json").is_file()):
            kind = "file" if is_file else "folder of a pipeline"
            raise ValueError(f"output='{output}' is no {kind}: it is not overwritten.")
        if any(output.glob("checkpoint-*")):
            raise ValueError(f"output='{output}' has the checkpoints of a run, which would go: take another name.")


@dataclass
class RunArguments:
    """Options of a training run that are not those of its config."""

    _argument_group_name = "What trains, on what, and what is reported"

    algorithm: str = field(
        default=next(iter(ALGORITHMS)), metadata={"help": "What trains.", "choices": list(ALGORITHMS)}
    )
    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."},
    )
    reward: list[str] = field(
        default_factory=lambda: ["pickscore"],
        metadata={"help": "A reward, listed below, or module:callable. Repeat for several.", "action": RepeatableFlag},
    )
    eval_reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "A control reward: evaluated beside those trained on, never trained on. Named like a reward. Repeat "
            "for several.",
            "action": RepeatableFlag,
        },
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print what the run would do and the memory of its GPUs, without loading weights, and exit. With --gpu also its hours."
        },
    )
    metrics: str | None = field(
        default=None,
        metadata={"help": "A module:callable `(images, prompts) -> dict of floats` to report before and after."},
    )
    num_report_prompts: int = field(default=8, metadata={"help": "Prompts to report on, the first of the dataset."})
    images_per_report_prompt: int = field(default=4, metadata={"help": "Seeds per prompt to report on."})
    report_guidance_scale: float | None = field(
        default=None, metadata={"help": "Report the untrained pipeline with this guidance too, the free alternative."}
    )

    def __post_init__(self):
        for name in ("reward", "eval_reward"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])  # a YAML file may have it so
        for name in ("num_report_prompts", "images_per_report_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
