"""
What a run may resume from, and where it writes its checkpoints.

Checkpoints stand at the ends of rollouts, so they hold no rollout data, and random numbers follow from (seed, rollout,
index): a resumed run is the run that was never stopped, to the bit.
"""

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints, sort_checkpoints
from transformers.utils import logging

from ..metric_names import EVAL_PREFIX
from .checkpoint_files import (
    SAVING,
    changes,
    commit,
    fault,
    is_whole,
    newest_good_checkpoint,
    removed_on_error,
    set_aside_after,
)


logger = logging.get_logger(__name__)

# A change of these needs other weights or another optimizer than a checkpoint has.
_NEEDS_OTHER_WEIGHTS = ("use_peft:", "optim:", "adapter.")
# Rollouts, and all that follows from their number, are counted by their optimizer steps, M x num_iterations.
_COUNTS_OTHERWISE = ("optimizer_steps_per_rollout:", "num_iterations:")


class Checkpointer:
    """
    The checkpoints of one run.

    Args:
        output_dir (`str`): Folder of the run.
        fingerprint (`dict`): What two runs must share to resume from one another's checkpoints, as JSON values.
        allow_changes (`bool`): Resume although the fingerprint differs, with a warning.
        save_total_limit (`int`, *optional*): Checkpoints to keep.
        is_default (`Callable`): As in [`changes`].

    Attributes:
        folder (`Path`): Folder in which Trainer writes its `checkpoint-<step>`: a staging folder while one is written.
        interim (`set[int]`): Steps of the checkpoints of this process that the next one replaces, or that end the run: with
            what a run goes on from, also under `save_only_model`.
    """

    def __init__(
        self,
        output_dir: str,
        fingerprint: dict[str, Any],
        allow_changes: bool,
        save_total_limit: int | None,
        is_default: Callable[[str], bool],
    ):
        self.output_dir = Path(output_dir)
        self.fingerprint = fingerprint
        self._is_default = is_default
        self.folder = self.output_dir
        self.interim: set[int] = set()
        self._allow_changes = allow_changes
        self._save_total_limit = save_total_limit

    # Resuming ---------------------------------------------------------------------------------------------------------

    def find(self, resume_from_checkpoint: str | bool | None, is_main_process: bool) -> str | None:
        """
        The checkpoint to resume from; None starts from the beginning. All processes must call it.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint, or `True` for the newest good one.
            is_main_process (`bool`): This process reads the files, and the others take what it has found.

        Raises:
            ValueError: There is no such checkpoint, it (or each of them) is damaged, or another run wrote it.
        """
        self.interim.clear()  # in all processes: they save together
        # From a command line it is a string.
        resume = {"true": True, "false": False}.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        if not resume:
            return None
        if not isinstance(resume, (bool, str, os.PathLike)):
            raise ValueError(f"resume_from_checkpoint={resume!r} must be True, or the path of a checkpoint.")
        found: list[Any] = [None, None]
        if is_main_process:
            try:
                found[0] = self._good_checkpoint(resume)
            except ValueError as error:
                found[1] = error
        checkpoint, error = broadcast_object_list(found)
        if error is not None:
            raise error
        return checkpoint

    def begin(self, checkpoint: str | None) -> None:
        """
        Set aside what stands after the step where the run begins. To be called by one process.

        Raises:
            ValueError: No checkpoint could be written.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output_dir).close()
        except OSError as error:
            raise ValueError(
                f"output_dir='{self.output_dir}' cannot be written to ({error}): no checkpoint could be saved. Make it "
                "writable, or set another."
            ) from error
        step = 0
        if checkpoint is not None:
            # Not from the name, which a download from the Hub changes.
            step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
        set_aside_after(self.output_dir, step)

    def set_best(self, state: TrainerState, args: TrainingArguments, checkpoint: str) -> None:
        """
        Put the best evaluation before `checkpoint` into `state`, by the metric of `args`, which the run that wrote it need not
        have had. If the best model is to be loaded at the end, only evaluations count whose checkpoint is still there.
        """
        metric = EVAL_PREFIX + (args.metric_for_best_model or "").removeprefix(EVAL_PREFIX)

        def saved(step: int | None) -> str | None:
            # Not by the name of `checkpoint`, which a download from the Hub changes.
            return checkpoint if step == state.global_step else self.existing(step, Path(checkpoint).parent)

        def counts(log: dict[str, float]) -> bool:
            # As in a run that was not stopped: not before it, not inside a rollout, and no NaN.
            step, value = log["step"], log.get(metric, math.nan)
            at_end = step > 0 and step % args.steps_per_rollout == 0 and not math.isnan(value)
            return at_end and (not args.load_best_model_at_end or saved(step) is not None)

        sign = 1 if args.greater_is_better else -1
        best = max(filter(counts, state.log_history), key=lambda log: sign * log[metric], default={})
        state.best_metric, state.best_global_step = best.get(metric), best.get("step")
        state.best_model_checkpoint = saved(state.best_global_step)

    def how_to_resume(self) -> str:
        checkpoints = sort_checkpoints(self.output_dir, PREFIX_CHECKPOINT_DIR)
        if not checkpoints:
            return f"There is no checkpoint in {self.output_dir} yet: it will start from the beginning."
        whole = list(filter(is_whole, checkpoints))
        if not whole:
            return f"{checkpoints[-1]} has weights alone (save_only_model=True): no run can go on from it."
        return f"To go on from {whole[-1]}: train(resume_from_checkpoint=True), or --resume_from_checkpoint true."

    def _good_checkpoint(self, resume: str | bool) -> str | None:
        if resume is True:
            checkpoint = newest_good_checkpoint(self.output_dir)
            if checkpoint is None:
                logger.warning(f"There is no checkpoint in {self.output_dir} yet: the run starts from the beginning.")
                return None
        else:
            checkpoint = Path(resume)
            found = fault(checkpoint)
            if found is not None:
                raise ValueError(f"Cannot resume from {checkpoint}: {found}.")
        changed = changes(checkpoint, self.fingerprint, self._is_default)
        impossible = [change for change in changed if change.startswith(_NEEDS_OTHER_WEIGHTS)]
        if impossible:
            raise ValueError(
                f"{checkpoint} has the weights and optimizer of another run: {'; '.join(impossible)}. No run can go on from "
                "them with these options: set them back, or start anew."
            )
        miscounted = [change for change in changed if change.startswith(_COUNTS_OTHERWISE)]
        if miscounted:
            raise ValueError(
                f"{checkpoint} is from a run of other rollouts: {'; '.join(miscounted)}. Its optimizer steps count its rollouts, "
                "and so the prompts and seeds that come next: set them back, or load its weights as the start of a new run."
            )
        if changed and not self._allow_changes:
            raise ValueError(
                f"{checkpoint} is from another run: {'; '.join(changed)}. Set them back, or set "
                "resume_with_changed_options=True to go on with what is new."
            )
        if changed:
            logger.warning(f"Going on from {checkpoint} with changes: {'; '.join(changed)}.")
        return str(checkpoint)

    # Saving -----------------------------------------------------------------------------------------------------------

    def path(self, step: int, output_dir: Path | None = None) -> Path:
        """The checkpoint of an optimizer step, in this run's folder or another's."""
        return (output_dir or self.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def existing(self, step: int | None, output_dir: Path | None = None) -> str | None:
        """The same as text; None if there is no such checkpoint."""
        checkpoint = self.path(step, output_dir)
        return str(checkpoint) if checkpoint.is_dir() else None

    @contextlib.contextmanager
    def staged(self, step: int, is_writer: bool, wait_for_everyone: Callable[[], None]) -> Iterator[Path]:
        """
        The folder in which the files of a checkpoint are written; it gets its name when all of it is on the disk. All
        processes must call it.

        Args:
            step (`int`): Optimizer steps so far.
            is_writer (`bool`): This process completes the checkpoint.
            wait_for_everyone (`Callable`): A barrier of all processes.

        Raises:
            RuntimeError: Writing failed; nothing of the checkpoint is left.
        """
        saving, name = self.output_dir / SAVING, self.path(step).name
        with removed_on_error(saving, is_writer):
            if is_writer:
                shutil.rmtree(saving, ignore_errors=True)  # left by a run that was killed
            wait_for_everyone()
            self.folder = saving
            try:
                yield saving / name
            finally:
                self.folder = self.output_dir
            if is_writer:
                commit(saving / name, self.path(step), self.fingerprint)
                shutil.rmtree(saving)
        wait_for_everyone()

    def rotate(self, step: int, best: str | None) -> None:
        """
        Delete the interim checkpoints before `step` and the oldest beyond the limit, but not the best. To be called by one
        process when the checkpoint of `step` is on the disk.
        """
        for earlier in self.interim - {step}:
            # One of weights alone takes no place of one from which a run can go on.
            if self.existing(earlier) != best and is_whole(self.path(step)):
                shutil.rmtree(self.path(earlier), ignore_errors=True)
                self.interim.remove(earlier)
        rotate_checkpoints(
            output_dir=str(self.output_dir), save_total_limit=self._save_total_limit, best_model_checkpoint=best
        )


class TimedCheckpoints(TrainerCallback):
    """
    Has an interim checkpoint saved at the end of a rollout if the latest checkpoint is older than some minutes: what stands
    to be lost does not grow with the time that a rollout takes.

    Args:
        minutes (`float`): Age from which on a checkpoint is too old.
        checkpointer ([`Checkpointer`]): Told which checkpoints are interim ones.
        any_process (`Callable`): True if the value of any process is. All of them call it at the end of each rollout.
    """

    def __init__(self, minutes: float, checkpointer: Checkpointer, any_process: Callable[[bool], bool]):
        self.minutes, self.checkpointer, self.any_process = minutes, checkpointer, any_process
        self._saved_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._saved_at = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        # Otherwise the user has said where checkpoints are wanted.
        by_steps = args.save_strategy == SaveStrategy.STEPS
        if not by_steps or control.should_save or state.global_step % args.steps_per_rollout:
            return
        if self.any_process(time.monotonic() - self._saved_at >= 60 * self.minutes):
            self.checkpointer.interim.add(state.global_step)
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if not args.save_only_model or state.global_step in self.checkpointer.interim:
            self._saved_at = time.monotonic()


class TrainingTime(TrainerCallback):
    """Keeps the seconds of a run in its state, and so in its checkpoints: a resumed run adds its own to them."""

    def on_train_begin(self, args, state, control, **kwargs):
        before = self.seconds(state) if state.global_step else 0.0
        self._start = time.monotonic() - (math.nan if before is None else before)

    def on_step_end(self, args, state, control, **kwargs):
        # As Trainer keeps the states of callbacks, and may restore them.
        kept = {"args": {}, "attributes": {"kept": time.monotonic() - self._start}}
        state.stateful_callbacks[type(self).__name__] = kept

    on_train_end = on_step_end

    @classmethod
    def seconds(cls, state: TrainerState) -> float | None:
        """Seconds that the weights took; None if they are untrained, or if a checkpoint did not tell."""
        # Checkpoints of older versions do not tell.
        seconds = state.stateful_callbacks.get(cls.__name__, {}).get("attributes", {}).get("kept", math.nan)
        return None if math.isnan(seconds) else seconds


def set_options(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, groups: list[dict[str, Any]]) -> None:
    """
    The learning rate, betas and the like of this run's parameter groups, without `params`, in the place of the checkpoint's. A
    schedule that follows a metric goes on with the rate to which it has come.
    """
    follows_metric = not isinstance(scheduler, LambdaLR)
    for group, own in zip(optimizer.param_groups, groups):
        group.update({name: value for name, value in own.items() if not (follows_metric and name == "lr")})
    if follows_metric and any(group["lr"] != own["lr"] for group, own in zip(optimizer.param_groups, groups)):
        logger.warning(
            f"The learning rate goes on with {optimizer.param_groups[0]['lr']:g}, to which its schedule has come, and not with "
            f"{groups[0]['lr']:g}: to change it, take a schedule that follows no metric."
        )
    if not follows_metric:
        scheduler.base_lrs = [own.get("initial_lr", own["lr"]) for own in groups]
        for group, factor, rate in zip(optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs):
            group["lr"] = rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
