"""
Draws prompts whose images tie less often: `prompt_sampling="informative"`.

The prompts of a run are one stream of passes over the dataset, as in [`rollout_rows`], but a pass leaves rows out: one whose
images tied in each of its last n draws comes with a chance of (m + 1) / (n + 1), drawn anew in each pass, where m is the
smallest n of all. So

- a row whose images differed when it was last drawn comes in each pass. As long as no row has tied, the stream is that of
  `rollout_rows`;
- no chance falls to 0, and one draw whose images differ makes it 1 again. Some row comes in each pass: if all tie alike, all
  come;
- where some images always differ (m = 0), a row whose images differ with a probability q comes in a share q of all passes.
  After n ties it waits for n + 1 passes on average, so that the N draws up to the first whose images differ, E[N] = 1 / q,
  take E[N (N + 1) / 2] = 1 / q^2 passes. For pairs and a reward of 0 and 1 that is right with a probability p,
  q = 2 p (1 - p).

Rows that are the same count as one prompt, and come one by one.

That prompts which tied in their last rollouts are skipped is GRESO's idea (Zheng et al. 2025, arXiv 2506.02177). Prompts drawn
in proportion to p (1 - p) are those of Fatemi 2026 (arXiv 2601.02648).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.features.features import require_decoding
from safetensors.numpy import load_file, save_file
from transformers.utils import logging

from ..pipeline.checksums import checksum


logger = logging.get_logger(__name__)


class InformativePrompts:
    """
    The stream and how often each prompt has tied. Both follow from the seed and the rewards of all processes, and are the same
    in each process.

    Args:
        keys (`Sequence[int]`): What tells the prompt of each row apart, such as [`row_keys`], in [0, 2^63).
        seed (`int`): Seed of the run.

    Attributes:
        num_prompts (`int`): Different keys.
        ties (`np.ndarray`): Draws of each prompt since its images differed last, in the order of their first rows, shape
            [prompts].
        position (`int`): Where in the stream the next rollout begins: pass x rows + place in the pass.
    """

    FILE_NAME = "prompt_ties.safetensors"

    def __init__(self, keys: Sequence[int], seed: int):
        self._keys = np.array(keys, dtype=np.int64)
        places: dict[int, int] = {}
        self._prompt_of = np.array([places.setdefault(key, len(places)) for key in keys])  # [rows]
        self.num_prompts = len(places)
        self.seed = seed
        self.start()

    def start(self, position: int = 0) -> None:
        """Forget all draws, and go on at `position`."""
        self.ties = np.zeros(self.num_prompts, dtype=np.int64)
        self.position = position
        # `draw` sets these, and `see` takes them over when the rollout has its rewards.
        self._rows: list[int] = []
        self._end = position

    @property
    def chances(self) -> np.ndarray:
        """The chance of each row to come in a pass, in (0, 1], shape [rows]."""
        return ((self.ties.min() + 1) / (self.ties + 1))[self._prompt_of]

    def draw(self, count: int) -> list[int]:
        """
        The next `count` rows of the stream. Nothing counts until `see`: a rollout that is interrupted is drawn again.

        What its own images turn out to be does not change which rows it has: a row may come once in each of its passes.
        """
        rows, position = [], self.position
        num_rows, chances = len(self._keys), self.chances
        while len(rows) < count:
            number, start = divmod(position, num_rows)
            rng = np.random.default_rng([self.seed, number])
            order = rng.permutation(num_rows)  # as `rollout_rows` has it
            places = np.flatnonzero(rng.random(num_rows) < chances[order])
            places = places[places >= start][: count - len(rows)]
            rows += order[places].tolist()
            position = number * num_rows + int(places[-1]) + 1 if len(rows) == count else (number + 1) * num_rows
        self._rows, self._end = rows, position
        return rows

    def see(self, tied: Sequence[bool]) -> None:
        """
        Count the rows that were drawn.

        Args:
            tied (`Sequence[bool]`): For each of them, in their order: True if its images tied, or no reward applied to them.
        """
        for prompt, is_tied in zip(self._prompt_of[self._rows], tied, strict=True):
            self.ties[prompt] = self.ties[prompt] + 1 if is_tied else 0
        self.position = self._end

    def save(self, folder: str | Path) -> None:
        """Write all that `load` needs into a checkpoint, where each count lies beside the key of its row."""
        ties = self.ties[self._prompt_of]
        save_file(
            {"keys": self._keys, "ties": ties, "position": np.array([self.position])}, Path(folder, self.FILE_NAME)
        )

    def load(self, folder: str | Path, position: int) -> None:
        """
        Read what `save` wrote.

        Of another dataset it takes the counts of the prompts that are in both, and goes on at `position`, as it does without
        the file. It warns of prompts that were not counted.
        """
        path = Path(folder, self.FILE_NAME)
        saved = load_file(path) if path.is_file() else {}
        self.start(position)
        counted = dict(zip(saved["keys"].tolist(), saved["ties"].tolist())) if "keys" in saved else {}
        self.ties[self._prompt_of] = [counted.get(key, 0) for key in self._keys.tolist()]
        if counted and np.array_equal(saved["keys"], self._keys):
            self.position = self._end = int(saved["position"][0])
        missing = len({*self._keys.tolist()} - counted.keys())
        if missing:
            logger.warning(
                f"{folder} does not say how often {missing} of the {self.num_prompts} prompts have tied: they are drawn as if "
                "they never had."
            )


def row_keys(dataset: Dataset) -> list[int]:
    """
    What tells the prompts of a dataset apart, the same on any machine: equal for rows of which all columns are equal. Of a
    dataset with images, videos or sounds, which it does not open, each row is a prompt of its own, known by its place too.

    Returns:
        `list[int]`: For each row, in [0, 2^63).
    """
    dataset = dataset.with_format(None)
    plain = [name for name, feature in dataset.features.items() if not _has_media(feature)]
    is_all = len(plain) == len(dataset.features)
    rows = zip(*(dataset[name][:] for name in sorted(plain)), strict=True)
    return [int(checksum(row if is_all else (number, row)), 16) >> 1 for number, row in enumerate(rows)]


def _has_media(feature: Any) -> bool:
    """Whether values of a feature of `datasets` are images, videos, sounds or files, in lists and dicts too."""
    if isinstance(feature, dict):
        return any(map(_has_media, feature.values()))
    if hasattr(feature, "feature"):  # a list
        return _has_media(feature.feature)
    return require_decoding(feature) and type(feature).__name__ != "Json"  # which not all versions of datasets have
