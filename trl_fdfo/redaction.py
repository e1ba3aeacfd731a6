"""Keeps the names of folders and persons of this machine out of the files that a run writes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def without_folders(value: Any) -> Any:
    """The last part of an absolute path (`str` or `Path`); any other value is returned as it is."""
    if isinstance(value, (str, Path)) and os.path.isabs(value):
        return Path(value).name
    return value


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without the names that begin with an underscore: they say where a model came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
