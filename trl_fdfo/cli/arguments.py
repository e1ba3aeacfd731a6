"""Command lines: what the scripts of examples/ have in common, and how they are parsed."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from trl import TrlParser

from ..rewards.by_name import reward_table
from ..training.config import RolloutConfig
from ..training.prompts import check_prompts, is_file_name, load_prompts


class RepeatableFlag(argparse.Action):
    """`--flag a --flag b` is `--flag a b`. The command line replaces the default, also one from a YAML file."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the table of rewards line by line."""


def parse(classes: type | Sequence[type], args: list[str] | None = None) -> tuple[Any, ...]:
    """
    Dataclasses from a command line and, with `--config`, a YAML file. `--help` also lists the rewards.

    Raises:
        ValueError: An option has a new name, or an impossible value.
    """
    parser = TrlParser(classes, epilog=reward_table(), formatter_class=HelpFormatter)
    for config_class in [classes] if isinstance(classes, type) else classes:
        if issubclass(config_class, RolloutConfig):
            _refuse_renamed(args or [], config_class.renamed_options)
    return parser.parse_args_and_config(args)


def _refuse_renamed(args: Sequence[str], renamed: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    path = parser.parse_known_args(args)[0].config
    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    if path is not None and path.is_file():
        given |= (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).keys()
    for name in given & renamed.keys():
        raise ValueError(f"{name} has a new name: {renamed[name]}.")


@dataclass
class InferenceArguments:
    """Options of a script that samples a base model and adapters on it."""

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
                setattr(self, name, [value])  # a YAML file may have it so


def read_prompts(prompts: list[str]) -> Dataset:
    """
    Prompts, or the prompts of the one file that is named, with all its columns, in the column `prompt`.

    Raises:
        FileNotFoundError, ValueError: There are none, or one is no text.
    """
    is_file = len(prompts) == 1 and is_file_name(prompts[0])
    dataset = load_prompts(prompts[0], name="prompts") if is_file else Dataset.from_dict({"prompt": prompts})
    check_prompts(dataset, "prompt", name=f"prompts={prompts}")
    return dataset
