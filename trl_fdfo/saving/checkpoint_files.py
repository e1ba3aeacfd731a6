"""
Checkpoints that are whole or not there.

A checkpoint is written into the folder `_saving/` of the output directory and gets its name, `checkpoint-<step>`, when all
of it is on the disk. Its manifest, manifest.json, has the size and checksum of every file, and the options of the run
that change its result: so a checkpoint that was cut short or damaged later is told from a good one, and a run that would
go on as another one is told from the same one.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ..pipeline.adapter_files import CALL_OPTIONS, diffusers_file


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
# Names with an underscore are not pushed.
SAVING, ABANDONED = "_saving", "_abandoned"
# End of the name of weights in one file, of a shard, and of the index of shards.
_LAYOUT = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$")


def commit(staged: Path, final: Path, run: dict[str, Any]) -> None:
    """
    Make a folder whose files are all written the checkpoint `final`. To be called by one process.

    Args:
        staged (`Path`): The folder, on the file system of `final`.
        final (`Path`): Its name from now on; a checkpoint that has this name is replaced.
        run (`dict`): The fingerprint that [`changes`] compares, as JSON values.
    """
    files = {str(path.relative_to(staged)): path for path in sorted(staged.rglob("*")) if path.is_file()}
    contents = {
        "files": {name: {"size": path.stat().st_size, "crc32": _crc32(path)} for name, path in files.items()},
        "run": run,
    }
    (staged / MANIFEST).write_text(json.dumps({**contents, "crc32": _own_crc32(contents)}, indent=2) + "\n")
    for path in [*files.values(), staged / MANIFEST, staged]:
        _sync(path)
    if final.exists():
        os.rename(final, staged.with_name(f"replaced-{final.name}"))
    os.rename(staged, final)
    _sync(final.parent)


@contextlib.contextmanager
def removed_on_error(folder: Path, is_writer: bool = True) -> Iterator[None]:
    """
    Leave nothing of a checkpoint that cannot be written, such as on a full disk.

    Raises:
        RuntimeError: Writing failed.
    """
    try:
        yield
    except Exception as error:
        if not is_writer:  # which says what is wrong
            raise
        shutil.rmtree(folder, ignore_errors=True)
        older = sort_checkpoints(folder.parent, PREFIX_CHECKPOINT_DIR)
        raise RuntimeError(
            f"A checkpoint could not be written to {folder.parent} ({type(error).__name__}: {error}). "
            + (f"Those before it are whole, the newest is {older[-1]}: " if older else "There is none before it. ")
            + f"{_remedy(error)}, and resume."
        ) from error


@contextlib.contextmanager
def written_whole(
    folder: str | Path, is_writer: bool, wait_for_everyone: Callable[[], None], owned: Sequence[str] = ()
) -> Iterator[Path]:
    """
    A new folder, whose files move into `folder` when all of them are written: if one cannot be, `folder` is as it was. All
    processes must call it.

    Args:
        folder (`str` or `Path`): Where the files belong. Files of the same names are replaced, others stay.
        is_writer (`bool`): This process moves them.
        wait_for_everyone (`Callable`): A barrier of all processes.
        owned (`Sequence[str]`): Names of files that a result may have. Those of an earlier one that this one lacks are set
            aside, as are other shards of the same weights: who loads the folder would take them for this one's.

    Raises:
        RuntimeError: Writing failed.
    """
    folder = Path(folder)
    staged = folder / SAVING
    try:
        if is_writer:
            shutil.rmtree(staged, ignore_errors=True)  # left by a run that was killed
            staged.mkdir(parents=True)
        wait_for_everyone()
        yield staged
        wait_for_everyone()
        if is_writer:
            new = {folder / path.relative_to(staged): path for path in staged.rglob("*") if path.is_file()}
            earlier = {folder / name for name in owned if (folder / name).is_file()} | _all_layouts(new)
            for target, path in new.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            set_aside(folder, earlier - new.keys(), "result")
    except Exception as error:
        if not is_writer:  # which says what is wrong
            raise
        raise RuntimeError(
            f"The result could not be written to {folder} ({type(error).__name__}: {error}), which is left as it was. "
            f"{_remedy(error)}, and save again."
        ) from error
    finally:
        if is_writer:
            shutil.rmtree(staged, ignore_errors=True)
    wait_for_everyone()


def result_files(transformers: Iterable[str]) -> list[str]:
    """
    Names of the files of a result that is an adapter on transformers of these names: beside another result they would be taken
    for it.
    """
    own = [SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, CALL_OPTIONS, TRAINING_ARGS_NAME]
    return [*own, *map(diffusers_file, transformers)]


def _all_layouts(files: Iterable[Path]) -> set[Path]:
    """The files that there are of the weights of these, in one file or in any number of shards. Loaders prefer shards."""
    weights = {(path.parent, _LAYOUT.sub("", path.name)) for path in files if _LAYOUT.search(path.name)}
    beside = [path for folder in {folder for folder, _ in weights} if folder.is_dir() for path in folder.iterdir()]
    return {
        path for path in beside if _LAYOUT.search(path.name) and (path.parent, _LAYOUT.sub("", path.name)) in weights
    }


def _remedy(error: Exception) -> str:
    # torch and safetensors have no errors of their own for a full disk.
    if isinstance(error, (OSError, RuntimeError, SafetensorError)):
        return "Make room or make the folder writable"
    return "The disk is not at fault: leave out what the error names"


def fault(checkpoint: str | Path) -> str | None:
    """The fault of a checkpoint; None if all files of its manifest are there, with their sizes and checksums."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    inside = sort_checkpoints(checkpoint, PREFIX_CHECKPOINT_DIR)
    if inside:
        return f"it is no checkpoint but has some, such as {inside[-1]}"
    try:
        contents = json.loads((checkpoint / MANIFEST).read_text())
        sound = contents.pop("crc32") == _own_crc32(contents) and contents["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never completed"
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        return f"its {MANIFEST} is damaged"
    files = contents["files"]
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _crc32(path) != expected["crc32"]:
            return f"{name} is damaged: its checksum is another"
    return None


def check_optimizer_state(checkpoint: str) -> None:
    """
    Raises:
        ValueError: A checkpoint has weights alone, or the optimizer state of an engine.
    """
    if not Path(checkpoint, OPTIMIZER_NAME).is_file():
        raise ValueError(
            f"{checkpoint} has no {OPTIMIZER_NAME}: it was saved with save_only_model=True, and a run cannot go on "
            "from its weights alone, or by a run with DeepSpeed or FSDP, which only such a run reads. Load its "
            "weights as the start of a new run."
        )


def is_whole(checkpoint: str | Path) -> bool:
    """True if a run can go on from a checkpoint: with `save_only_model` it may have weights alone."""
    return any(Path(checkpoint).glob("rng_state*"))


def newest_good_checkpoint(output_dir: str | Path) -> Path | None:
    """
    The newest checkpoint in `output_dir` from which a run can go on; None if there is no checkpoint. Warns of each that it skips.

    Raises:
        ValueError: All have faults.
    """
    checkpoints = sort_checkpoints(output_dir, PREFIX_CHECKPOINT_DIR) if Path(output_dir).is_dir() else []
    faults = []
    for checkpoint in reversed(checkpoints):
        found = fault(checkpoint)
        if found is None and not is_whole(checkpoint):
            found = "it was saved with save_only_model=True, and a run cannot go on from its weights alone"
        if found is None:
            return Path(checkpoint)
        faults.append(f"{checkpoint}: {found}")
        logger.warning(f"Not resuming from {checkpoint}: {found}.")
    if not faults:
        return None
    raise ValueError(f"There is no checkpoint to resume from in {output_dir} ({'; '.join(faults)}).")


def set_aside_after(output_dir: str | Path, step: int) -> None:
    """
    Move the checkpoints after `step`, where a run begins, into `_abandoned/`: they belong to another run or are damaged,
    and would be taken for its newest.
    """
    for checkpoint in map(Path, sort_checkpoints(output_dir, PREFIX_CHECKPOINT_DIR)):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            target = _abandoned(checkpoint.parent, checkpoint.name)
            os.rename(checkpoint, target)
            logger.warning(f"{checkpoint} is not of the run that begins at step {step}: moved to {target}.")


def set_aside(output_dir: Path, files: Collection[Path], name: str) -> None:
    """Move files in `output_dir`, which belong to an earlier run, into a folder `_abandoned/<name>`, where they keep their places."""
    if not files:
        return
    target = _abandoned(output_dir, name)
    for file in sorted(files):
        place = target / file.relative_to(output_dir)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(file, place)
    logger.warning(f"Files of an earlier run in {output_dir}, such as {min(files).name}, were moved to {target}.")


def _abandoned(output_dir: Path, name: str) -> Path:
    """A path in `_abandoned/` that is free."""
    folder = output_dir / ABANDONED
    folder.mkdir(exist_ok=True)
    names = (f"{name}.{n}" if n > 1 else name for n in itertools.count(1))
    return next(folder / free for free in names if not (folder / free).exists())


def changes(checkpoint: str | Path, run: dict[str, Any], is_default: Callable[[str], bool]) -> list[str]:
    """
    Differences between the run that wrote a checkpoint and this one, as `name: before -> now`.

    Args:
        checkpoint (`str` or `Path`): A checkpoint without a fault.
        run (`dict`): The fingerprint of this run, as JSON values.
        is_default (`Callable`): Whether what `run` has under a name is what a run had before the name was known.
    """
    before = json.loads(Path(checkpoint, MANIFEST).read_text())["run"]
    now = json.loads(json.dumps(run))
    # What only one of them knows came with a newer version: until then an option had what is now its default.
    common = [
        name for name in before.keys() | now.keys() if name in before and name in now or name.startswith("adapter.")
    ]
    changed = [f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in common if before.get(n) != now.get(n)]
    newer = [f"{n}: its default -> {now[n]!r}" for n in now.keys() - before.keys() - {*common} if not is_default(n)]
    return sorted([*changed, *newer])


def _own_crc32(contents: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself."""
    if path.is_dir() and os.name == "nt":
        return  # which cannot
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
