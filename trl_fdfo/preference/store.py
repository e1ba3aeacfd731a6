"""
The pairs, images and votes of a preference server, in a SQLite file.

A vote is on disk (WAL, synchronous=FULL) when a method returns. Of the two images of a pair, `a` is the one with the smaller
id. A vote's value is 1 for `a`, -1 for `b` and 0 for neither. Votes are in the order of their rowid: a clock may be set back.
"""

import contextlib
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pairs import pair_key


# The choices of a person. A choice adds its value to the image on the left.
CHOICES = {"left": 1, "right": -1, "tie": 0, "both_bad": 0}
# A trainer that has asked for nothing for this many seconds has ended.
LEASE = 10.0
# A rater who has voted within this many seconds is there.
PRESENT = 60.0
# One pair in twenty is shown again to who has voted on it, the other way round, for the agreement with oneself.
REPEATED, REPEATED_AFTER = 0.05, 10

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, seen REAL NOT NULL,
    votes_per_pair INTEGER NOT NULL, state TEXT NOT NULL DEFAULT '{}');
CREATE TABLE IF NOT EXISTS images (id TEXT PRIMARY KEY, png BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs, key TEXT NOT NULL, prompt TEXT NOT NULL,
    a TEXT NOT NULL REFERENCES images, b TEXT NOT NULL REFERENCES images, rollout INTEGER NOT NULL,
    expired INTEGER NOT NULL DEFAULT 0, UNIQUE (run, key));
CREATE TABLE IF NOT EXISTS raters (name TEXT PRIMARY KEY, excluded INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS votes (
    pair INTEGER NOT NULL REFERENCES pairs, rater TEXT NOT NULL REFERENCES raters, repeated INTEGER NOT NULL,
    value INTEGER NOT NULL, both_bad INTEGER NOT NULL, time REAL NOT NULL, PRIMARY KEY (pair, rater, repeated));
CREATE TABLE IF NOT EXISTS shown (
    pair INTEGER NOT NULL REFERENCES pairs, rater TEXT NOT NULL REFERENCES raters, a_is_left INTEGER NOT NULL,
    PRIMARY KEY (pair, rater));
CREATE INDEX IF NOT EXISTS votes_of_rater ON votes (rater);
CREATE VIEW IF NOT EXISTS counted AS
    SELECT votes.* FROM votes JOIN raters ON raters.name = votes.rater WHERE NOT repeated AND NOT excluded;
"""
# Selects the pairs, each with the votes that count.
_TALLIED = """
SELECT pairs.*, runs.votes_per_pair, runs.name AS run_name, COUNT(counted.value) AS votes,
    COALESCE(SUM(counted.value = 1), 0) AS for_a, COALESCE(SUM(counted.value = -1), 0) AS for_b
FROM pairs JOIN runs ON runs.id = pairs.run LEFT JOIN counted ON counted.pair = pairs.id
"""


class Refused(Exception):
    """A request that cannot be met, with the status of its answer and what to do."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt, by their ids."""

    prompt: str
    one: str
    other: str


class Store:
    """
    Args:
        path (`str` or `Path`): The SQLite file; it is made if there is none.
        clock (`Callable`): Seconds since the epoch.

    Raises:
        ValueError: The file cannot be opened or written, or is of something else.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time):
        self._lock, self._clock, self._random = threading.RLock(), clock, random.Random()
        self._path = Path(path).absolute()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise ValueError(
                f"{path} cannot be opened as a file of votes ({error}): give the path of such a file, or of a new one, in a "
                "folder that can be written to."
            ) from None
        self._file = self._path.stat()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Trainers ---------------------------------------------------------------------------------------------------------

    def open_run(self, name: str, owner: str, votes_per_pair: int) -> int:
        """
        The id of a run, which is new or goes on. `owner` is a secret of the trainer, the same in all its processes.

        Raises:
            Refused: Another trainer has a run of this name and is at work.
        """
        with self._transaction():
            run = self._one("SELECT * FROM runs WHERE name = ?", name)
            if run is None:
                values = (name, owner, self._clock(), votes_per_pair)
                return self._db.execute(
                    "INSERT INTO runs (name, owner, seen, votes_per_pair) VALUES (?, ?, ?, ?)", values
                ).lastrowid
            if run["owner"] != owner and self._since(run["seen"]) < LEASE:
                raise Refused(
                    409,
                    f"Another trainer is at work on the run {name!r} of this server, and two would share its verdicts: give "
                    f"this one another name, run='...'. If it was killed, its name is free {LEASE:g} s after.",
                )
            values = (owner, self._clock(), votes_per_pair, run["id"])
            self._db.execute("UPDATE runs SET owner = ?, seen = ?, votes_per_pair = ? WHERE id = ?", values)
            return run["id"]

    def add(self, run: int, owner: str, rollout: int, pairs: Sequence[Pair], images: dict[str, bytes]) -> int:
        """
        Add pairs to a run, and PNG files by their ids. Those that are there already stay.

        Returns:
            `int`: Number of pairs that were not there.

        Raises:
            Refused: The run is another trainer's, or an image of a pair is missing.
        """
        with self._transaction():
            self._check_owner(run, owner)
            return self._add(run, rollout, pairs, images)

    def _add(self, run: int, rollout: int, pairs: Sequence[Pair], images: dict[str, bytes]) -> int:
        new = 0
        self._db.executemany("INSERT OR IGNORE INTO images VALUES (?, ?)", images.items())
        for pair in pairs:
            a, b = sorted((pair.one, pair.other))
            for image in (a, b):
                if self._one("SELECT 1 FROM images WHERE id = ?", image) is None:
                    raise Refused(422, f"There is no image {image[:12]}... of a pair: send it with the pair.")
            values = (run, pair_key(pair.prompt, a, b), pair.prompt, a, b, rollout)
            new += self._db.execute(
                "INSERT OR IGNORE INTO pairs (run, key, prompt, a, b, rollout) VALUES (?, ?, ?, ?, ?, ?)", values
            ).rowcount
        return new

    def verdicts(self, run: int, owner: str, keys: Iterable[str]) -> dict[str, dict[str, int | bool]]:
        """
        Of the named pairs, those with a verdict: numbers of votes for `a`, for `b` and for neither, and whether the pair has
        expired without enough of them.

        Raises:
            Refused: The run is another trainer's, or a pair is not in it.
        """
        found = {}
        with self._transaction():
            self._check_owner(run, owner)
            for key in keys:
                pair = self._one(f"{_TALLIED} WHERE run = ? AND key = ? GROUP BY pairs.id", run, key)
                if pair is None:
                    raise Refused(404, f"There is no pair {key[:12]}... in this run: add it first.")
                if pair["votes"] >= pair["votes_per_pair"] or pair["expired"]:
                    ties = pair["votes"] - pair["for_a"] - pair["for_b"]
                    counts = {"a": pair["for_a"], "b": pair["for_b"], "tie": ties}
                    found[key] = {**counts, "expired": bool(pair["expired"])}
        return found

    def idle_seconds(self, run: int) -> float:
        """Seconds since somebody has voted in a run."""
        with self._lock:
            last = self._one(
                "SELECT time FROM votes JOIN pairs ON pairs.id = votes.pair WHERE run = ? ORDER BY votes.rowid DESC LIMIT 1",
                run,
            )
            return self._since(last["time"] if last else 0)

    def expire(self, run: int, owner: str, keys: Iterable[str]) -> None:
        """Ask nobody for the named pairs any more, unless they have their verdict: the trainer goes on without them."""
        with self._transaction():
            self._check_owner(run, owner)
            for key in keys:
                pair = self._one(f"{_TALLIED} WHERE run = ? AND key = ? GROUP BY pairs.id", run, key)
                if pair is not None and pair["votes"] < pair["votes_per_pair"]:
                    self._db.execute("UPDATE pairs SET expired = 1 WHERE id = ?", (pair["id"],))

    def set_state(self, run: int, owner: str, state: dict[str, Any]) -> None:
        """What the page shows of the trainer: its rollout, how many there are, and curves by their names."""
        with self._transaction():
            self._check_owner(run, owner)
            self._db.execute("UPDATE runs SET state = ? WHERE id = ?", (json.dumps(state), run))

    # Raters -----------------------------------------------------------------------------------------------------------

    def next_pairs(self, rater: str, count: int = 1, but_not: Iterable[int] = (), run: str | None = None) -> list[dict]:
        """
        Pairs for a rater to vote on, but not those with the ids `but_not`: the oldest rollout first, then those that lack least.
        Which image is on the left is random, and each place gets half of the `a`.
        """
        but_not = set(but_not)
        with self._transaction():
            self._meet(rater)
            rows = self._db.execute(
                f"{_TALLIED} WHERE NOT expired AND (:run IS NULL OR runs.name = :run) AND NOT EXISTS "
                "(SELECT 1 FROM votes WHERE votes.pair = pairs.id AND votes.rater = :rater) GROUP BY pairs.id "
                "HAVING COUNT(counted.value) < votes_per_pair ORDER BY rollout, COUNT(counted.value) DESC, pairs.id LIMIT :count",
                {"run": run, "rater": rater, "count": count + len(but_not)},
            ).fetchall()
            chosen = [self._show(row, rater) for row in rows if row["id"] not in but_not][:count]
            if chosen and self._random.random() < REPEATED:
                chosen[-1] = self._repeated(rater, run, but_not) or chosen[-1]
            return chosen

    def _repeated(self, rater: str, run: str | None, but_not: set[int]) -> dict | None:
        """A pair on which the rater voted a while ago, with the images in each other's place."""
        rows = self._db.execute(
            f"SELECT pairs.* FROM ({_TALLIED} GROUP BY pairs.id) AS pairs JOIN votes ON votes.pair = pairs.id AND rater = ? "
            "AND NOT repeated WHERE (? IS NULL OR run_name = ?) ORDER BY votes.rowid DESC LIMIT 100 OFFSET ?",
            (rater, run, run, REPEATED_AFTER),
        ).fetchall()
        known = {
            row["pair"] for row in self._db.execute("SELECT pair FROM votes WHERE rater = ? AND repeated", (rater,))
        }
        free = [row for row in rows if row["id"] not in known | but_not]
        return self._show(self._random.choice(free), rater, repeated=True) if free else None

    def _show(self, pair: sqlite3.Row, rater: str, repeated: bool = False) -> dict:
        row = self._one("SELECT a_is_left FROM shown WHERE pair = ? AND rater = ?", pair["id"], rater)
        if row is None:
            left = self._one("SELECT SUM(2 * a_is_left - 1) AS more FROM shown WHERE rater = ?", rater)["more"] or 0
            a_is_left = left < 0 or (left == 0 and self._random.random() < 0.5)
            self._db.execute("INSERT INTO shown VALUES (?, ?, ?)", (pair["id"], rater, a_is_left))
        else:
            a_is_left = bool(row["a_is_left"])
        left, right = (pair["a"], pair["b"]) if a_is_left != repeated else (pair["b"], pair["a"])
        known = {name: pair[name] for name in ("id", "prompt", "rollout")}
        return {**known, "run": pair["run_name"], "left": left, "right": right, "repeated": repeated}

    def vote(self, rater: str, pair: int, choice: str, left: str, repeated: bool = False, change: bool = False) -> bool:
        """
        Note a vote. `left` is the id of the image that was on the left.

        Returns:
            `bool`: False if the rater has voted on this pair before, in another tab, and the vote stays; `change` replaces it.

        Raises:
            Refused: There is no such pair or choice, or `left` is not one of its images.
        """
        with self._transaction():
            self._meet(rater)
            row = self._one("SELECT * FROM pairs WHERE id = ?", pair)
            if row is None:
                raise Refused(404, f"There is no pair {pair}: reload the page.")
            if left not in (row["a"], row["b"]):
                raise Refused(422, "The image on the left is not one of the pair's: reload the page.")
            if choice not in CHOICES:
                raise Refused(422, f"choice={choice!r} is not one of {', '.join(CHOICES)}.")
            known = self._one(
                "SELECT 1 FROM votes WHERE pair = ? AND rater = ? AND repeated = ?", pair, rater, repeated
            )
            if known is not None and not change:
                return False
            value = CHOICES[choice] if left == row["a"] else -CHOICES[choice]
            values = (pair, rater, repeated, value, choice == "both_bad", self._clock())
            self._db.execute("INSERT OR REPLACE INTO votes VALUES (?, ?, ?, ?, ?, ?)", values)
            return True

    def undo(self, rater: str, run: str | None = None) -> dict | None:
        """Take a rater's last vote back, and show its pair as it was shown; None if there is none."""
        with self._transaction():
            row = self._one(
                f"SELECT pairs.*, repeated FROM ({_TALLIED} GROUP BY pairs.id) AS pairs JOIN votes ON votes.pair = pairs.id "
                "WHERE rater = ? AND (? IS NULL OR run_name = ?) ORDER BY votes.rowid DESC LIMIT 1",
                *(rater, run, run),
            )
            if row is None:
                return None
            self._db.execute(
                "DELETE FROM votes WHERE pair = ? AND rater = ? AND repeated = ?", (row["id"], rater, row["repeated"])
            )
            return self._show(row, rater, bool(row["repeated"]))

    def past(self, rater: str, count: int = 50, run: str | None = None) -> list[dict]:
        """A rater's last votes, the newest first, each as its pair was shown and with the `choice`."""
        with self._transaction():
            rows = self._db.execute(
                f"SELECT pairs.*, value, both_bad FROM ({_TALLIED} GROUP BY pairs.id) AS pairs JOIN votes ON "
                "votes.pair = pairs.id WHERE rater = ? AND NOT repeated AND (? IS NULL OR run_name = ?) "
                "ORDER BY votes.rowid DESC LIMIT ?",
                (rater, run, run, count),
            ).fetchall()
            shown = []
            for row in rows:
                pair = self._show(row, rater)
                value = row["value"] if pair["left"] == row["a"] else -row["value"]
                choice = "both_bad" if row["both_bad"] else {1: "left", -1: "right", 0: "tie"}[value]
                shown.append({**pair, "choice": choice})
            return shown

    def set_excluded(self, rater: str, excluded: bool) -> None:
        """
        Leave a rater's votes out, or count them again. Pairs that then lack votes are asked for again.

        Raises:
            Refused: There is no such rater.
        """
        with self._transaction():
            if not self._db.execute("UPDATE raters SET excluded = ? WHERE name = ?", (excluded, rater)).rowcount:
                raise Refused(404, f"There is no rater {rater!r}.")

    def image(self, id: str) -> bytes:
        """
        Raises:
            Refused: There is no such image.
        """
        with self._lock:
            row = self._one("SELECT png FROM images WHERE id = ?", id)
        if row is None:
            raise Refused(404, "There is no such image.")
        return row["png"]

    # What the page shows ----------------------------------------------------------------------------------------------

    def progress(self, run: str | None = None) -> dict[str, Any]:
        """The runs; of one, or of the one whose trainer was last seen, its newest rollout and all; and the raters."""
        with self._transaction():
            runs = self._db.execute("SELECT * FROM runs ORDER BY seen DESC").fetchall()
            row = next((row for row in runs if run in (None, row["name"])), None)
            raters = [self._rater(rater) for rater in self._db.execute("SELECT * FROM raters ORDER BY name")]
            shown: dict[str, Any] = {"runs": [row["name"] for row in runs], "raters": raters, "run": None}
            if row is None:
                return shown
            pairs = self._db.execute(
                f"{_TALLIED} WHERE run = ? GROUP BY pairs.id ORDER BY pairs.id", (row["id"],)
            ).fetchall()
            newest = max((pair["rollout"] for pair in pairs), default=0)
            latest = [pair for pair in pairs if pair["rollout"] == newest]
            done = lambda some: sum(pair["votes"] >= pair["votes_per_pair"] for pair in some)
            return shown | {
                "run": row["name"],
                "rollout": newest,
                "pairs": len(latest),
                "done": done(latest),
                "all_pairs": len(pairs),
                "all_done": done(pairs),
                "expired": sum(pair["expired"] for pair in pairs),
                "votes": sum(pair["votes"] for pair in pairs),
                "trainer_is_there": self._since(row["seen"]) < LEASE,
                "state": json.loads(row["state"]),
                "latest": [
                    {name: pair[name] for name in ("prompt", "a", "b", "for_a", "for_b", "votes")}
                    for pair in latest[:48]
                ],
                "agreement": self._agreement(row["id"]),
            }

    def _rater(self, rater: sqlite3.Row) -> dict[str, Any]:
        name = rater["name"]
        votes = self._one(
            "SELECT COUNT(*) AS number, SUM(ABS(? - time) < 60) AS lately FROM votes WHERE rater = ?",
            *(self._clock(), name),
        )
        last = self._one("SELECT time FROM votes WHERE rater = ? ORDER BY rowid DESC LIMIT 1", name)
        twice = self._one(
            "SELECT COUNT(*) AS number, SUM(once.value = again.value) AS same FROM votes AS once JOIN votes AS again "
            "ON again.pair = once.pair AND again.rater = once.rater WHERE once.rater = ? AND NOT once.repeated "
            "AND again.repeated",
            name,
        )
        return {
            "name": name,
            "excluded": bool(rater["excluded"]),
            "votes": votes["number"],
            "per_minute": votes["lately"] or 0,
            "is_there": last is not None and self._since(last["time"]) < PRESENT,
            "repeated": twice["number"],
            "same": twice["same"] or 0,
        }

    def _agreement(self, run: int) -> dict[str, int]:
        """Of all pairs of votes by two raters on one pair: their number, and how many are the same."""
        row = self._one(
            "SELECT COUNT(*) AS number, SUM(one.value = other.value) AS same FROM counted AS one JOIN counted AS other "
            "ON other.pair = one.pair AND other.rater > one.rater JOIN pairs ON pairs.id = one.pair WHERE run = ?",
            run,
        )
        return {"compared": row["number"], "same": row["same"] or 0}

    # Export and import ------------------------------------------------------------------------------------------------

    def import_pair(self, name: str, votes_per_pair: int, rollout: int, pair: Pair, images: dict[str, bytes]) -> int:
        """
        The id of a pair of the run `name`, after both are added if they are not there. A run that is there stays its trainer's,
        with the `votes_per_pair` that it has.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO runs (name, owner, seen, votes_per_pair) VALUES (?, '', 0, ?)",
                (name, votes_per_pair),
            )
            run = self._one("SELECT id FROM runs WHERE name = ?", name)["id"]
            self._add(run, rollout, [pair], images)
            key = pair_key(pair.prompt, pair.one, pair.other)
            return self._one("SELECT id FROM pairs WHERE run = ? AND key = ?", run, key)["id"]

    def tallies(self, run: str | None = None) -> Iterator[dict[str, Any]]:
        """
        The pairs that have votes: `run`, `prompt`, `rollout`, the PNG files `a` and `b`, and how many votes are for each.

        Raises:
            Refused: There is no such run.
        """
        with self._lock:
            if run is not None and self._one("SELECT 1 FROM runs WHERE name = ?", run) is None:
                raise Refused(404, f"There is no run {run!r} in this file.")
            rows = self._db.execute(
                f"{_TALLIED} WHERE :run IS NULL OR runs.name = :run GROUP BY pairs.id HAVING COUNT(counted.value) ORDER BY pairs.id",
                {"run": run},
            ).fetchall()
        for row in rows:
            known = {name: row[name] for name in ("prompt", "rollout", "for_a", "for_b", "votes")}
            yield {**known, "run": row["run_name"], "a": self.image(row["a"]), "b": self.image(row["b"])}

    # ------------------------------------------------------------------------------------------------------------------

    def _check_owner(self, run: int, owner: str) -> None:
        row = self._one("SELECT owner FROM runs WHERE id = ?", run)
        if row is None:
            raise Refused(
                404,
                f"The server's file has no run {run}: it is another file than the one that the trainer began with. Start the server "
                "on that file (--database), or the trainer again.",
            )
        if row["owner"] != owner:
            raise Refused(
                409,
                "Another trainer has opened this run since: two runs of one name. Give one of them another, run='...'.",
            )
        self._db.execute("UPDATE runs SET seen = ? WHERE id = ?", (self._clock(), run))

    def _since(self, time: float) -> float:
        """Seconds since then. A time to come is of a clock that was set back, and counts as far away as well."""
        return abs(self._clock() - time)

    def _check_file(self) -> None:
        """SQLite goes on with a file that is deleted, and all that it writes is lost when it ends."""
        try:
            same = os.path.samestat(self._path.stat(), self._file)
        except OSError:
            same = False
        if not same:
            raise Refused(
                503,
                f"The file of the votes, {self._path}, was deleted or replaced while the server was at work, so nothing more is "
                "kept: move it back, or end the server and start it again.",
            )

    def _meet(self, rater: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO raters (name) VALUES (?)", (rater,))

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        return self._db.execute(query, values).fetchone()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._check_file()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
