"""
Draws prompts whose images tie less often: `prompt_sampling="informative"`.

The prompts of a run are one stream of passes over the dataset, as in [`rollout_rows`], but a pass leaves rows out: a row
whose images tied in each of its last n draws comes with a chance of 1 / (n + 1), drawn anew in each pass. So

- a row whose images differed when it was last drawn comes in each pass. As long as no row has tied, the stream is that of
  `rollout_rows`;
- no chance falls to 0, and one draw whose images differ makes it 1 again;
- a row whose images differ with a probability q comes in a share q of all passes. After n ties it waits for n + 1 passes on
  average, so that the N draws up to the first whose images differ, E[N] = 1 / q, take E[N (N + 1) / 2] = 1 / q^2 passes.
  For pairs and a reward of 0 and 1 that is right with a probability p, q = 2 p (1 - p).

That prompts which tied in their last rollouts are skipped is GRESO's idea (Zheng et al. 2025, arXiv 2506.02177). Prompts drawn
in proportion to p (1 - p) are those of Fatemi 2026 (arXiv 2601.02648).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers.utils import logging


logger = logging.get_logger(__name__)


class InformativePrompts:
    """
    The stream and how often each row has tied. Both follow from the seed and the rewards of all processes, and are the same in
    each process.

    Args:
        num_rows (`int`): Rows of the dataset.
        seed (`int`): Seed of the run.

    Attributes:
        ties (`np.ndarray`): Draws of each row since its images differed last, shape [rows].
        position (`int`): Where in the stream the next rollout begins: pass x rows + place in the pass.
    """

    FILE_NAME = "prompt_ties.safetensors"

    def __init__(self, num_rows: int, seed: int):
        self.num_rows = num_rows
        self.seed = seed
        self.start()

    def start(self, position: int = 0) -> None:
        """Forget all draws, and go on at `position`."""
        self.ties = np.zeros(self.num_rows, dtype=np.int64)
        self.position = position
        # `draw` sets these, and `see` takes them over when the rollout has its rewards.
        self._rows: list[int] = []
        self._end = position

    @property
    def chances(self) -> np.ndarray:
        """The chance of each row to come in a pass, in (0, 1], shape [rows]."""
        return 1 / (self.ties + 1)

    def draw(self, count: int) -> list[int]:
        """
        The next `count` rows of the stream. Nothing counts until `see`: a rollout that is interrupted is drawn again.

        What its own images turn out to be does not change which rows it has: a row may come once in each of its passes.
        """
        rows, position = [], self.position
        num_rows, chances = self.num_rows, self.chances
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
        for row, is_tied in zip(self._rows, tied, strict=True):
            self.ties[row] = self.ties[row] + 1 if is_tied else 0
        self.position = self._end

    def save(self, folder: str | Path) -> None:
        """Write both into a checkpoint."""
        save_file({"ties": self.ties, "position": np.array([self.position])}, Path(folder, self.FILE_NAME))

    def load(self, folder: str | Path, position: int) -> None:
        """Read what `save` wrote. Without it, or with another number of rows, go on at `position` as if no row had tied."""
        path = Path(folder, self.FILE_NAME)
        saved = load_file(path) if path.is_file() else {"ties": []}
        if len(saved["ties"]) != self.num_rows:
            why = (
                f"{self.FILE_NAME} has {len(saved['ties'])} prompts, not {self.num_rows}"
                if path.is_file()
                else "it was not counted"
            )
            logger.warning(
                f"{folder} does not say how often each prompt has tied ({why}): all are drawn as if none had."
            )
            self.start(position)
            return
        self.ties, self.position = saved["ties"], int(saved["position"][0])
