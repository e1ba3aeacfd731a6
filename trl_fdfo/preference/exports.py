"""Votes as a data set of preferences, and back."""

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
# Who has voted in an imported run.
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
    for name in ("chosen", "rejected"):
        votes = votes.cast_column(name, Image(decode=False))
    return votes


def import_votes(folder: str | Path, database: str | Path, run: str | None = None) -> int:
    """
    Add the pairs of an exported data set to a database, each with the votes that make its preference, by a rater of their own.

    Returns:
        `int`: Number of pairs.

    Raises:
        ValueError: The folder has no such data set, or a preference is not a mean of that many votes.
    """
    votes, store, added = read_votes(folder), Store(database), 0
    try:
        for row in votes:
            name, number, preference = (
                run or row.get("run") or "import",
                row.get("votes") or 1,
                row.get("preference", 1.0),
            )
            wins = round(preference * number)
            if abs(wins - preference * number) > 1e-6:
                raise ValueError(f"preference={preference} of {row['prompt']!r} is not a mean of {number} votes.")
            chosen, rejected = row["chosen"]["bytes"], row["rejected"]["bytes"]
            ids = image_id(chosen), image_id(rejected)
            owner = f"import of {folder}"
            opened = store.open_run(name, owner, number)
            store.add(
                opened, owner, row.get("rollout") or 0, [Pair(row["prompt"], *ids)], dict(zip(ids, (chosen, rejected)))
            )
            pair = store.find(opened, row["prompt"], *ids)
            for vote in range(number):
                rater = IMPORTED if number == 1 else f"{IMPORTED} {vote + 1}"
                store.vote(rater, pair, "left" if vote < wins else "tie", ids[0])
            added += 1
    finally:
        store.close()
    return added
