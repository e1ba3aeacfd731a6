"""Loads a pipeline by its name or from a folder, and tells where a pipeline came from."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..redaction import without_folders


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """
    Load a pipeline as `DiffusionPipeline.from_pretrained` does, also if it was saved without some text encoders.

    Args:
        name_or_path (`str` or `Path`): Hub id, or folder in diffusers' layout.
        **kwargs: Passed on.
    """
    # diffusers takes a component as absent only if it is passed as None.
    index = DiffusionPipeline.load_config(name_or_path)
    absent = {name: None for name, value in index.items() if value == [None, None]}
    return DiffusionPipeline.from_pretrained(name_or_path, **{**absent, **kwargs})


def base_model_name(pipeline: DiffusionPipeline) -> tuple[str | None, bool]:
    """Name of the pipeline's origin (a Hub id, or the last part of a folder; None if unknown), and if it is a Hub id."""
    name_or_path = pipeline.config.get("_name_or_path")
    if name_or_path is None:
        return None, False
    if Path(name_or_path).is_dir():
        return without_folders(Path(name_or_path).absolute()), False
    return str(name_or_path), True
