"""Keeps the names of folders and persons of this machine out of the files that a run writes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def without_folders(value: Any) -> Any:
    """The last part of an absolute path (`str` or `Path`); any other value is returned as it is."""
    if isinstance(value, (str, Path)) and os.path.isabs(value):
        return Path(value).name
    return value


def forget_origin(folder: str | Path) -> None:
    """Take out of a saved pipeline where it and its parts came from, which `save_pretrained` writes into their configs."""
    for file in [Path(folder, "model_index.json"), *Path(folder).glob("*/config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the names that begin with an underscore: they say where a model came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
