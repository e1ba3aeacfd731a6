"""Prompts: their sources, and the order in which rollouts draw them."""

import codecs
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, Image, IterableDatasetDict, load_dataset

from ..media import names_image
from .prompt_sets import PROMPT_SETS, load_prompt_set, nearest_prompt_set


PACKAGED_PROMPTS = Path(__file__).with_name("prompts.txt")

# Name endings of local files, and the `datasets` builders that read them.
_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

# Bytes that a text file of another encoding than plain UTF-8 begins with. UTF-32's begin with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def load_prompts(dataset_name: str | None = None, prompt_column: str = "prompt", name: str = "dataset_name") -> Dataset:
    """
    Args:
        dataset_name (`str`, *optional*): A name in `PROMPT_SETS`, a Hub id (its split `train` is taken) or a local .txt (one
            prompt per line), .json, .jsonl, .csv or .parquet file. Text is in UTF-8, or in UTF-16 or UTF-32 with a byte order
            mark. `None` takes the packaged list of prompts.
        prompt_column (`str`): Name that the lines of a .txt file, or the prompts of a set, get as a column.
        name (`str`): Name of `dataset_name` in errors.

    Returns:
        `datasets.Dataset`: The dataset with all of its columns.

    Raises:
        FileNotFoundError: `dataset_name` looks like a local file and there is none.
        ValueError: It is a local file that cannot be read, a set that cannot be loaded or has a namesake here, or nothing that
            exists.
    """
    if dataset_name in PROMPT_SETS:
        if os.path.exists(dataset_name):
            raise ValueError(
                f"{name}='{dataset_name}' is a prompt set, and also a file or folder here: './{dataset_name}' is that file or "
                "folder; for the prompt set, rename it or start elsewhere."
            )
        return load_prompt_set(dataset_name, prompt_column, name)
    path = PACKAGED_PROMPTS if dataset_name is None else Path(dataset_name)
    kind = path.suffix.lower()
    if kind in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"{name}='{dataset_name}': there is no such file.")
        text = None if kind == ".parquet" else _decoded(path, f"{name}='{dataset_name}'")
        try:
            if kind == ".txt":
                # Not `splitlines`, which also ends a line at signs that stand inside of prompts, such as U+2028.
                lines = [line.strip("\ufeff").strip() for line in re.split("\r\n|\r|\n", text)]
                return Dataset.from_dict({prompt_column: [line for line in lines if line]})
            if kind == ".csv":
                return _read_csv(text)
            return _read_by_datasets(path, kind, text)
        except Exception as error:  # of pandas, pyarrow or datasets, without the name of the file
            raise ValueError(
                f"{name}='{dataset_name}' cannot be read as {kind[1:]} with at least one row "
                f"({type(error).__name__}: {error})."
            ) from error
    if path.is_file():
        raise ValueError(
            f"{name}='{dataset_name}' is a file of another kind than {', '.join(_BUILDERS)}: save it as one of them."
        )
    try:
        return load_dataset(dataset_name, split="train")
    except Exception as error:  # of datasets or the Hub, without the name of the option
        meant = nearest_prompt_set(dataset_name)
        by_name = f"Did you mean '{meant}'?" if meant else f"The prompt sets by name: {', '.join(PROMPT_SETS)}."
        raise ValueError(
            f"{name}='{dataset_name}' is no {', '.join(_BUILDERS)} file, and it cannot be loaded as a folder with a dataset, or "
            f"the Hub id of one, that has a split 'train' ({type(error).__name__}: {error}). {by_name}"
        ) from error


def _decoded(path: Path, source: str) -> str:
    """The text of a file; `source` names it in errors."""
    content = path.read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    advice = "Save it as UTF-8, such as by `iconv -f {} -t UTF-8`."
    if encoding.startswith("utf-8") and b"\0" in content:  # which UTF-8 allows, so that it may decode without an error
        raise ValueError(
            f"{source} has zero bytes, so it is no text in UTF-8. Is it in UTF-16, without a byte order mark? "
            + advice.format("UTF-16LE")
        )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source} is not in {encoding.upper()}: byte {error.start}, in line {line}, is 0x{content[error.start]:02x} "
            f"({error.reason}). {advice.format('WINDOWS-1252')}"
        ) from None


def _read_csv(text: str) -> Dataset:
    """
    The table of a CSV file. Words such as "None" and "NA" are missing numbers in a column of numbers, and words in a column
    of text; an empty cell is missing in both.
    """
    table = pd.read_csv(io.StringIO(text))
    words = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, na_values=[""])
    if not len(table):
        raise ValueError("it has no row")
    for name in table.columns:
        if pd.api.types.is_string_dtype(table[name].dtype) or table[name].isna().all():
            table[name] = words[name]
    return Dataset.from_pandas(table, preserve_index=False)


def _read_by_datasets(path: Path, kind: str, text: str | None) -> Dataset:
    """A file that `datasets` reads. It knows no text but UTF-8: it gets a copy of a `text` that came in another encoding."""
    with tempfile.TemporaryDirectory() as folder:
        if text is not None and path.read_bytes().startswith(tuple(_BYTE_ORDER_MARKS)):
            path = Path(folder, path.name)
            path.write_text(text, encoding="utf-8")
        return load_dataset(_BUILDERS[kind], data_files=str(path), split="train")


def is_file_name(dataset_name: str) -> bool:
    """True if `load_prompts` takes it for a local file or folder, not for a Hub id."""
    return Path(dataset_name).suffix.lower() in _BUILDERS or os.path.exists(dataset_name)


def names_prompts(text: str) -> bool:
    """
    True if a text that may be a prompt is the name of a prompt set or of a local file or folder.

    Raises:
        ValueError: It is nearly the name of a set.
    """
    if text in PROMPT_SETS or is_file_name(text):
        return True
    meant = nearest_prompt_set(text)
    if meant is not None:
        raise ValueError(
            f"prompts='{text}': did you mean the prompt set '{meant}'? If it is a prompt, give it as the line of a .txt file."
        )
    return False


def plain(dataset: Dataset, image_columns: Sequence[str] = ()) -> Dataset:
    """
    The dataset with rows of Python values, such as text and PIL images. A format that it had (`with_format`) keeps its
    columns; a transform (`with_transform`) stays.

    Args:
        dataset (`datasets.Dataset`): Any dataset.
        image_columns (`Sequence[str]`): Columns that may be names of image files: those are opened when a row is read.
    """
    if not isinstance(dataset, Dataset):
        return dataset  # which `check_prompts` refuses
    form = dataset.format
    if not form["output_all_columns"]:
        dataset = dataset.select_columns(form["columns"])
    if form["type"] == "custom":
        return dataset
    dataset = dataset.with_format(None)
    for name in set(image_columns) & set(dataset.column_names):
        if len(dataset) and names_image(dataset[name][0]) and Path(dataset[name][0]).is_file():
            dataset = dataset.cast_column(name, Image())
    return dataset


def check_prompts(
    dataset: Dataset, prompt_column: str, pipeline_columns: Sequence[str] = (), name: str = "train_dataset"
) -> None:
    """
    Raises:
        ValueError: `dataset` is no dataset, is empty, lacks a column, or has prompts that are not text.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"{name} is a {type(dataset).__name__} of the splits {', '.join(dataset)}: give one of them, such as "
            f"dataset['{next(iter(dataset), 'train')}']."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, not a `datasets.Dataset`. From a list of prompts: "
            f"`Dataset.from_dict({{'{prompt_column}': prompts}})`."
        )
    if prompt_column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column '{prompt_column}' but {', '.join(dataset.column_names) or 'no column at all'}. Rename "
            "the column that holds the prompts, or set `dataset_prompt_column`."
        )
    missing = [column for column in pipeline_columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} has no column '{missing[0]}', which `pipeline_columns` passes to the pipeline.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to sample images of.")
    for row, prompt in enumerate(dataset[prompt_column]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name} has {prompt!r} as the prompt of row {row}: prompts must be non-empty text.")


def hold_out(dataset: Dataset, prompt_column: str, num_prompts: int) -> tuple[Dataset, Dataset]:
    """
    Split a dataset into prompts to train on and prompts to evaluate on.

    Prompts to evaluate on are drawn at random, as lists are often sorted. The same dataset gives the same ones in every run,
    and a larger number keeps the smaller set. A prompt that is there twice is not trained on if it is held out once.

    Returns:
        `tuple[Dataset, Dataset]`: For training and for evaluation, `num_prompts` rows.

    Raises:
        ValueError: Nothing would be left to train on.
    """
    held_out = sorted(np.random.default_rng(0).permutation(len(dataset))[:num_prompts].tolist())
    prompts = dataset[prompt_column]
    evaluated = {prompts[row] for row in held_out}
    trained = [row for row, prompt in enumerate(prompts) if prompt not in evaluated]
    if num_prompts > len(dataset) or not trained:
        raise ValueError(
            f"num_eval_prompts={num_prompts} leaves none of the {len(dataset)} prompts of the train_dataset "
            f"({len(set(prompts))} different ones) to train on: hold out fewer, or give an eval_dataset."
        )
    return dataset.select(trained), dataset.select(held_out)


def rollout_rows(num_rows: int, prompts_per_rollout: int, rollout: int, seed: int) -> list[int]:
    """
    Rows of the dataset that one rollout samples images of, over all processes.

    The prompts of a run are one stream: pass after pass over the dataset, each in an order of its own. A rollout is a
    section of that stream, so there is nothing to restore when a run is resumed.

    Args:
        num_rows (`int`): Rows of the dataset.
        prompts_per_rollout (`int`): Prompts per rollout, over all processes.
        rollout (`int`): Number of the rollout, from 0.
        seed (`int`): Seed of the run.

    Returns:
        `list[int]`: `prompts_per_rollout` rows.
    """
    rows = []
    position = rollout * prompts_per_rollout
    while len(rows) < prompts_per_rollout:
        number, start = divmod(position + len(rows), num_rows)
        order = np.random.default_rng([seed, number]).permutation(num_rows)
        rows += order[start : start + prompts_per_rollout - len(rows)].tolist()
    return rows
