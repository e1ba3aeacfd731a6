"""Votes as a data set of preferences, and back."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value, load_from_disk

from .pairs import image_id
from .store import Pair, Store


# The usual columns of preference data; `preference` and `votes` make the export whole.
FEATURES = Features(
    {
        "prompt": Value("string"),
        "chosen": Image(decode=False),
        "rejected": Image(decode=False),
        "preference": Value("float64"),
        "votes": Value("int64"),
        "run": Value("string"),
        "rollout": Value("int64"),
    }
)
# Start of the names of those who have voted in a data set; and the run of one without any.
IMPORTED = "import"


def export_votes(database: str | Path, folder: str | Path, run: str | None = None) -> int:
    """
    Write the pairs with votes to a folder that [`~datasets.load_from_disk`] reads: `prompt`, `chosen`, `rejected`, and
    `preference`, the mean of the votes for `chosen` (1), for `rejected` (-1) and for neither (0), in [0, 1]. At 0 `chosen` is
    either.

    Returns:
        `int`: Number of pairs.

    Raises:
        Refused: There is no such run.
        ValueError: There is no such file, or nobody has voted.
    """
    if not Path(database).is_file():
        raise ValueError(f"There is no file {database}.")
    store = Store(database)
    try:
        rows = [_row(tally) for tally in store.tallies(run)]
    finally:
        store.close()
    if not rows:
        raise ValueError(f"{database} has no votes yet.")
    Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)
    return len(rows)


def _row(tally: dict[str, Any]) -> dict[str, Any]:
    preference = (tally["for_a"] - tally["for_b"]) / tally["votes"]
    chosen, rejected = (tally["a"], tally["b"]) if preference >= 0 else (tally["b"], tally["a"])
    known = {name: tally[name] for name in ("prompt", "votes", "run", "rollout")}
    images = {"chosen": {"bytes": chosen, "path": None}, "rejected": {"bytes": rejected, "path": None}}
    return {**known, **images, "preference": abs(preference)}


def read_votes(folder: str | Path) -> Dataset:
    """
    An exported data set.

    Raises:
        ValueError: The folder has none, or lacks a column.
    """
    try:
        votes = load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{folder} is no folder of an exported data set: {error}") from None
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in getattr(votes, "column_names", ())]
    if missing:
        raise ValueError(f"The data set in {folder} has no column {missing[0]!r}: it is not of exported votes.")
    try:
        for name in ("chosen", "rejected"):
            votes = votes.cast_column(name, Image(decode=False))
    except Exception as error:
        raise ValueError(f"The column {name!r} of {folder} does not hold images: {error}") from None
    return votes


def voted_pairs(votes: Dataset) -> Iterator[tuple[str, bytes, bytes, float, int]]:
    """
    Of each pair of an exported data set: the prompt, the PNG files of the chosen and the rejected image, the preference for the
    first, and the number of votes.

    Raises:
        ValueError: A file is no PNG, as those are that people saw, or a preference is none.
    """
    for row in votes:
        files = []
        for name in ("chosen", "rejected"):
            image = row[name] or {}
            file = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else b"")
            if not file.startswith(b"\x89PNG"):
                raise ValueError(
                    f"The {name} image of the prompt {row['prompt']!r} is no PNG file, so it is not of exported votes: a pair is "
                    "known by the bytes that people saw."
                )
            files.append(file)
        preference, number = (row.get(name) for name in ("preference", "votes"))
        preference, number = 1.0 if preference is None else preference, 1 if number is None else number
        if not 0 <= preference <= 1 or number < 1:
            raise ValueError(
                f"The pair of the prompt {row['prompt']!r} has preference={preference} and votes={number}: the mean for `chosen` "
                "is in [0, 1], of at least 1 vote."
            )
        yield row["prompt"], *files, float(preference), int(number)


def import_votes(folder: str | Path, database: str | Path, run: str | None = None) -> int:
    """
    Add the pairs of an exported data set to a database, each with the votes that make its preference, by raters of their own.
    Its votes are added once: a second import of the same data set adds none. The trainer of a run may be at work.

    Returns:
        `int`: Number of votes that were added.

    Raises:
        ValueError: The folder has no such data set, or a preference is not a mean of that many votes. Then nothing is added.
    """
    votes = read_votes(folder)
    run_of = lambda row: run or row.get("run") or IMPORTED
    most: dict[str, int] = {}  # votes on a pair of each run
    checksum = 0
    for row, (prompt, chosen, rejected, preference, number) in zip(votes, voted_pairs(votes)):
        if abs(round(preference * number) - preference * number) > 1e-6:
            raise ValueError(f"preference={preference} of {prompt!r} is not a mean of {number} votes.")
        most[run_of(row)] = max(number, most.get(run_of(row), 0))
        content = (prompt, image_id(chosen), image_id(rejected), preference, number)
        checksum = zlib.crc32(repr(content).encode(), checksum)
    added = 0
    store = Store(database)
    try:
        for row, (prompt, chosen, rejected, preference, number) in zip(votes, voted_pairs(votes)):
            images = {image_id(file): file for file in (chosen, rejected)}
            pair = Pair(prompt, image_id(chosen), image_id(rejected))
            imported = store.import_pair(run_of(row), most[run_of(row)], row.get("rollout") or 0, pair, images)
            for vote in range(number):
                choice = "left" if vote < round(preference * number) else "tie"
                added += store.vote(f"{IMPORTED} {checksum:08x} {vote + 1}", imported, choice, pair.one)
    finally:
        store.close()
    return added
