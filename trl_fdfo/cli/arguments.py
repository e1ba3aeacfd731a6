"""Command lines: what the scripts of examples/ have in common, and how they are parsed."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets import Dataset
from trl import TrlParser

from ..rewards.by_name import reward_table
from ..training.config import RolloutConfig
from ..training.migration import unknown_options
from ..training.prompt_sets import PROMPT_SETS, prompt_set_table
from ..training.prompts import check_prompts, load_prompts, names_prompts


class RepeatableFlag(argparse.Action):
    """`--flag a --flag b` is `--flag a b`. The command line replaces the default, also one from a YAML file."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the tables of rewards and prompt sets line by line."""


class Parser(TrlParser):
    """
    TRL's parser, without abbreviations and with short errors. A YAML file may write `learning-rate`, as the command line.

    Args:
        classes (`type` or `Sequence[type]`): Dataclasses.
        partial (`bool`): Pass over options of other dataclasses.
        **kwargs: Arguments of [`~trl.TrlParser`].
    """

    def __init__(self, classes: type | Sequence[type], partial: bool = False, **kwargs: Any):
        super().__init__(classes, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.partial = partial

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        args = sys.argv[1:] if args is None else args
        split = [arg.split("=", 1) if arg.startswith("--config=") else [arg] for arg in args]
        args = [part for parts in split for part in parts]
        if "--config" in args:
            self._check_config_file(*args[args.index("--config") + 1 :][:1])
        return super().parse_args_and_config(args, **kwargs)

    def _check_config_file(self, path: str | None = None) -> None:
        if path is None:
            self.error("argument --config: expected a YAML file")
        if not Path(path).is_file():
            raise FileNotFoundError(f"--config {path}: there is no such file.")
        try:
            with open(path) as file:
                yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        plain = {name.replace("-", "_"): value for name, value in options.items()}
        if len(plain) < len(options):
            twice = [name for name in options if "-" in name and name.replace("-", "_") in options]
            raise ValueError(f"The config file has {', '.join(twice)} twice, with `-` and with `_`.")
        self._refuse_unknown(_flat(plain, self._names()))
        return super().set_defaults_with_config(**plain)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        # Before argparse looks for what is missing, which may be there under a wrong name.
        flags = [arg.partition("=")[0] for arg in args or () if arg.startswith("--") and " " not in arg]
        unknown = [flag for flag in flags if flag != "--" and flag not in self._option_string_actions]
        self._refuse_unknown([flag[2:].replace("-", "_") for flag in unknown])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """As argparse does, without all options."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")

    def _names(self) -> set[str]:
        return {action.dest for action in self._actions}

    def _refuse_unknown(self, given: Iterable[str] | Mapping[str, Any]) -> None:
        configs = [each for each in self.dataclass_types if issubclass(each, RolloutConfig)]
        owner = " with ".join([self.prog, *(each.__name__.removeprefix("Planned") for each in configs)])
        renamed = {name: new for each in configs for name, new in each.renamed_options.items()}
        error = None if self.partial else unknown_options(owner, given, self._names(), renamed)
        if error:
            raise ValueError(error)


def parse(classes: type | Sequence[type], args: list[str] | None = None) -> tuple[Any, ...]:
    """
    Dataclasses from a command line and, with `--config`, a YAML file. `--help` also lists the rewards and prompt sets.

    Raises:
        ValueError: An option does not exist, or has an impossible value.
    """
    return Parser(classes, epilog=f"{reward_table()}\n\n{prompt_set_table()}").parse_args_and_config(args)


def _flat(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """`{"sample": {"num_steps": 10}}` as `{"sample.num_steps": 10}`, unless `sample` is an option."""
    flat = {}
    for name, value in options.items():
        inner = value if isinstance(value, dict) and name not in names else None
        flat |= {f"{name}.{key}": one for key, one in inner.items()} if inner else {name: value}
    return flat


@dataclass
class InferenceArguments:
    """Options of a script that samples a base model and adapters on it."""

    model: str = field(metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."})
    prompts: list[str] = field(
        metadata={
            "help": f"Prompts, or one txt, json, jsonl, csv or parquet file of them, or one of {', '.join(PROMPT_SETS)}."
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
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance of the pipeline; 1 is none."})
    height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    pipeline_kwargs: str | None = field(
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
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} must be at least 1.")


def read_prompts(prompts: list[str]) -> Dataset:
    """
    Prompts, or the prompts of the one file or prompt set that is named, with all its columns, in the column `prompt`.

    Raises:
        FileNotFoundError, ValueError: There are none, or one is no text.
    """
    is_named = len(prompts) == 1 and names_prompts(prompts[0])
    dataset = load_prompts(prompts[0], name="prompts") if is_named else Dataset.from_dict({"prompt": prompts})
    check_prompts(dataset, "prompt", name=f"prompts={prompts}")
    return dataset
