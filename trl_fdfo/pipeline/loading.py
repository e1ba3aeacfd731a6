"""Loads a pipeline by its name or from a folder, and tells where a pipeline came from."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """
    Load a pipeline as `DiffusionPipeline.from_pretrained` does, also if it was saved without some text encoders.

    Args:
        name_or_path (`str` or `Path`): Hub id, or folder in diffusers' layout.
        **kwargs: Passed on.

    Raises:
        OSError: There is none of this name that can be read.
    """
    # diffusers takes a component as absent only if it is passed as None.
    index = load_index(name_or_path)
    absent = {name: None for name, value in index.items() if value == [None, None]}
    return DiffusionPipeline.from_pretrained(name_or_path, **{**absent, **kwargs})


def load_index(name_or_path: str | Path) -> dict[str, Any]:
    """The components of a pipeline and their classes, from its model_index.json. Raises as [`load_pipeline`] does."""
    try:
        return DiffusionPipeline.load_config(name_or_path)
    except OSError as error:
        raise OSError(
            f"pipeline='{name_or_path}' cannot be loaded: {error}\nIt is a folder that diffusers' `save_pretrained` wrote, or "
            "the Hub id of a pipeline that you may read: a gated one needs its licence accepted and `hf auth login`."
        ) from error


def base_model_name(pipeline: DiffusionPipeline) -> tuple[str | None, bool]:
    """Name of the pipeline's origin (a Hub id, or a folder's as in `folder_name`; None if unknown), and if it is a Hub id."""
    name_or_path = pipeline.config.get("_name_or_path")
    if name_or_path is None:
        return None, False
    if Path(name_or_path).is_dir():
        return folder_name(name_or_path), False
    return str(name_or_path), True


def packaged_folder(pipeline: DiffusionPipeline) -> str | None:
    """Path within this package of the folder that a pipeline was loaded from; None if it came from elsewhere."""
    folder, package = Path(pipeline.config.get("_name_or_path") or "").resolve(), Path(__file__).resolve().parents[1]
    return folder.relative_to(package).as_posix() if package in folder.parents else None


def folder_name(path: str | Path) -> str:
    """How a shared file names a folder: a path below the working directory as it is, otherwise by its last part."""
    path = Path(path)
    if path.parts and not path.is_absolute() and ".." not in path.parts:
        return path.as_posix()
    return path.absolute().name
