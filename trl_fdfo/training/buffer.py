"""
A rollout's tuples and the order in which the optimizer steps see them.

The unit of training is (rollout batch j, noise level k): the batch as it was sampled, at one step of the sampler. Global
numbers decide the order, so that a result does not depend on how many processes share the batches.

A batch is idle if its loss is 0, as all its prompts tie. Each optimizer step begins with the units of idle batches, and
leaves them out: of each process as many as the process with the fewest has, so that all processes make equally many forward
and backward passes, and at least the last unit, which the optimizer step follows. A sum of gradients loses only zeros.

Dimensions: P prompts, G branches, T steps, K trained levels per batch, M optimizer steps per rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..pipeline.records import RolloutBatch


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """
    A rollout batch with the targets that its rewards give: everything that an update needs.

    Attributes:
        sampled ([`RolloutBatch`]): The recorded tuples (x_t, v_old), or, of an algorithm that noises them, the endpoints.
        targets (`tuple[Tensor, ...]`): What the loss learns from the rewards, each tensor with N samples in front.
        levels (`list[int]`): The K trained levels, in the order in which they are dealt.
        number (`int`): Its global number in the rollout.
    """

    sampled: RolloutBatch
    targets: tuple[Tensor, ...]
    levels: list[int]
    number: int

    def on_device(self, device: torch.device, level: int) -> "ScoredBatch":
        """The batch with everything that the loss needs at one level on the device, without copying what is there."""
        sampled = self.sampled
        tuples = {
            name: {level: getattr(sampled, name)[level].to(device, non_blocking=True)}
            for name in ("x_t", "velocities", "x_s")
            if level in getattr(sampled, name)
        }
        targets = send_to_device(self.targets, device, non_blocking=True)
        return replace(self, sampled=replace(sampled, **tuples), targets=targets)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """
    Attributes:
        batch ([`ScoredBatch`]): A rollout batch.
        level (`int`): The trained noise level, in [0, T).
        step (`int`): Optimizer step of the rollout that it belongs to, in [0, M x num_iterations).
        is_left_out (`bool`): Its loss is 0, and no process computes it.
    """

    batch: ScoredBatch
    level: int
    step: int
    is_left_out: bool = False


class RolloutBuffer:
    """
    The batches of one process, dealt to the optimizer steps: unit q = j K + i of batch j goes to step q mod M.

    Args:
        rollout (`int`): Number of the rollout, from 0.
        first_batch (`int`): Global number j of the first batch.
        batches (`list[ScoredBatch]`): The process's batches, consecutive by global number, K levels each.
        optimizer_steps (`int`): M, which divides len(batches) x K.
        idle (`Sequence[bool]`, *optional*): For the batches of all processes, by global number: True if the loss of a batch
            is 0. None computes all.

    Attributes:
        fraction_left_out (`float`): Share of the micro-batches that are left out.
    """

    def __init__(
        self,
        rollout: int,
        first_batch: int,
        batches: list[ScoredBatch],
        optimizer_steps: int,
        idle: Sequence[bool] | None = None,
    ):
        self.rollout = rollout
        self.steps: list[list[tuple[ScoredBatch, int]]] = [[] for _ in range(optimizer_steps)]
        for j, batch in enumerate(batches, start=first_batch):
            for i, level in enumerate(batch.levels):
                self.steps[(j * len(batch.levels) + i) % optimizer_steps].append((batch, level))
        self.micro_batches_per_step = len(self.steps[0])
        assert all(len(step) == self.micro_batches_per_step for step in self.steps), "M must divide the units"
        self._left_out = [0] * optimizer_steps
        if idle is not None:
            counts = _idle_units(idle, len(batches), len(batches[0].levels), optimizer_steps)
            self._left_out = np.minimum(counts.min(axis=0), self.micro_batches_per_step - 1).tolist()
            is_idle = {id(batch): idle[j] for j, batch in enumerate(batches, start=first_batch)}
            for step in self.steps:
                step.sort(key=lambda unit: not is_idle[id(unit[0])])
        self.fraction_left_out = sum(self._left_out) / (optimizer_steps * self.micro_batches_per_step)

    def __getitem__(self, index: int) -> MicroBatch:
        """Micro-batch `index` of the rollout, counted over the passes (`num_iterations`) on it."""
        step, position = divmod(index, self.micro_batches_per_step)
        batch, level = self.steps[step % len(self.steps)][position]
        return MicroBatch(batch, level, step, position < self._left_out[step % len(self.steps)])


def _idle_units(idle: Sequence[bool], batches: int, levels: int, optimizer_steps: int) -> np.ndarray:
    """Units of idle batches, shape [processes, M], of processes with this many `batches` each, and as many `levels` of each."""
    counts = np.zeros((len(idle) // batches, optimizer_steps), dtype=int)
    for j in np.flatnonzero(idle):
        for i in range(levels):
            counts[j // batches, (j * levels + i) % optimizer_steps] += 1
    return counts


def trained_levels(
    num_levels: int, num_trained_levels: int, optimizer_steps: int, seed: int, rollout: int, batch: int
) -> list[int]:
    """
    Noise levels that a rollout batch is trained on, in the order in which they are dealt to the optimizer steps.

    One is drawn from each of K strata of the schedule. Where K does not divide T they differ by one level, and a level of a
    smaller one is drawn more often. Each run of M neighbouring levels is shuffled, so that every optimizer step gets an even
    spread.

    Args:
        num_levels (`int`): T.
        num_trained_levels (`int`): K <= T.
        optimizer_steps (`int`): M.
        seed (`int`): Seed of the run.
        rollout (`int`): Number of the rollout.
        batch (`int`): Global number j of the batch.

    Returns:
        `list[int]`: K distinct levels in [0, T).
    """
    rng = np.random.default_rng([seed, rollout, batch])
    strata = np.arange(num_trained_levels + 1) * num_levels // num_trained_levels
    levels = rng.integers(strata[:-1], strata[1:])
    runs = [levels[start : start + optimizer_steps] for start in range(0, num_trained_levels, optimizer_steps)]
    return np.concatenate([rng.permutation(run) for run in runs]).tolist()
