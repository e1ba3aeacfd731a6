"""What a notebook shows of a run: a table of rewards with progress bars, and the sheets of pictures below it."""

from collections.abc import Mapping

from IPython.display import HTML, display
from PIL import Image
from transformers.utils.notebook import (
    NotebookProgressBar,
    NotebookProgressCallback,
    NotebookTrainingTracker,
    text_to_html_table,
)

from ..metric_names import ALARM, CONTROL, DIVERSITY, EVAL_PREFIX, REWARD, deviation
from .progress import rollout_of, short


_INLINE_SIZE = 800  # pixels
_COLUMNS = (REWARD, deviation(REWARD), "branch_distance")
_EVALUATED = tuple(EVAL_PREFIX + name for name in (REWARD, CONTROL, DIVERSITY, ALARM))


class NotebookProgress(NotebookProgressCallback):
    """
    Shows a table with a row for each logged rollout, and the evaluation after it in the same row; below it a bar counts the
    images of a rollout. Trainer's own table would show a loss, which is about 0 in each rollout and says nothing.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self._force_next_update = False
        self.training_tracker = NotebookTrainingTracker(state.max_steps, ["rollout", *_COLUMNS])
        self._count(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        self._count(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = short(logs or {}, *_COLUMNS, *_EVALUATED)
        if not shown:
            return
        row = {"rollout": rollout_of(state.global_step, args.steps_per_rollout), **shown}
        if self.training_tracker is None:  # an evaluation before or after the training
            display(HTML(text_to_html_table([list(row), list(row.values())])))
        else:
            self._write(row)
            self.training_tracker.display()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """`on_log` has them already."""

    def on_train_end(self, args, state, control, **kwargs):
        self._count(args, state, force_update=True)
        self.training_tracker = None

    def rollout_bar(self, rollout: int, images: int) -> "RolloutBar":
        """Return the bar of one rollout, which has `images` images on this process."""
        return RolloutBar(self.training_tracker, rollout, images)

    def _count(self, args, state, force_update: bool = False) -> None:
        done = rollout_of(state.global_step, args.steps_per_rollout)
        self.training_tracker.update(state.global_step, force_update, f"rollout {done}/{args.num_rollouts}")

    def _write(self, row: Mapping[str, object]) -> None:
        """A row of the table; what is not known of a rollout stays empty."""
        columns, *before = self.training_tracker.inner_table
        columns += [name for name in row if name not in columns]
        if before and before[-1][0] == row["rollout"]:
            known = dict(zip(columns, before.pop()))
            row = {**known, **row}
        self.training_tracker.inner_table = [columns, *before, [row.get(name, "") for name in columns]]


class RolloutBar:
    """A bar below the table, for as long as its context lasts, with the methods of tqdm's that a rollout calls."""

    def __init__(self, tracker: NotebookTrainingTracker, rollout: int, images: int):
        self._tracker, self._done = tracker, 0
        self.postfix = ""
        self._bar: NotebookProgressBar = tracker.add_child(images, prefix=f"rollout {rollout + 1}, images")

    def __enter__(self) -> "RolloutBar":
        self._bar.update(0)
        return self

    def __exit__(self, *error) -> None:
        self._tracker.remove_child()

    def update(self, images: int) -> None:
        """Count `images` more."""
        self._done += images
        self._bar.update(self._done, force_update=True)

    def set_postfix_str(self, text: str) -> None:
        """Show a text behind the count."""
        self.postfix = text
        self._bar.update(self._done, force_update=True, comment=text)


def show(title: str, image: Image.Image) -> None:
    """Show a sheet of pictures below the cell, reduced to what a screen has room for; its file is whole."""
    image = image.copy()
    image.thumbnail((_INLINE_SIZE, _INLINE_SIZE))
    display(HTML(f"<b>{title}</b>"), image)
