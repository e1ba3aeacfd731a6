"""Pictures of a run: a before/after grid and the reward curve."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten, wrap

from torch import Tensor


try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The pictures of a run need matplotlib: pip install 'trl_fdfo[examples]'.") from error


def before_after_grid(
    prompts: Sequence[str],
    before: Tensor,
    after: Tensor,
    path: str | Path,
    titles: tuple[str, str] = ("before", "after"),
) -> None:
    """
    Draw the images of some prompts before training and, below them, from the same seeds, after it.

    Args:
        prompts (`Sequence[str]`): P prompts, the labels of the columns.
        before (`Tensor`): Images in [0, 1], shape [P, S, 3, H, W], S seeds per prompt.
        after (`Tensor`): Images from the same seeds, the shape of `before`.
        path (`str` or `Path`): File to write.
        titles (`tuple[str, str]`): Labels of the two halves.
    """
    columns, seeds = before.shape[:2]
    cell = 1.15  # inches
    figure = Figure(figsize=(cell * columns + 0.5, 2 * cell * seeds + 1.3), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    halves = figure.subfigures(2, 1, hspace=0.03, height_ratios=[1.0 + 0.65 / (cell * seeds), 1.0])
    for number, (half, title, images) in enumerate(zip(halves, titles, (before, after))):
        half.supylabel(title, fontsize=14, fontweight="bold")
        axes = half.subplots(seeds, columns, squeeze=False)
        for column in range(columns):
            if number == 0:
                axes[0, column].set_title(_wrap(prompts[column]), fontsize=9)
            for row in range(seeds):
                # Tiny images are shown as the pixels that they are.
                smooth = "nearest" if images.shape[-1] < 128 else "antialiased"
                axes[row, column].imshow(images[column, row].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation=smooth)
                axes[row, column].set_axis_off()
    figure.savefig(path)


def reward_curve(log_history: Sequence[dict], path: str | Path) -> None:
    """
    Draw the mean reward of each rollout, and of each reward function where there are several.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): File to write.
    """
    logs = [log for log in log_history if "reward" in log]
    names = [name for name in logs[0] if name.startswith("rewards/") and name.endswith("/mean")] if logs else []
    figure = Figure(figsize=(6, 3.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    rollouts = [log["epoch"] for log in logs]
    axes.plot(rollouts, [log["reward"] for log in logs], label="reward", linewidth=2)
    for name in names if len(names) > 1 else ():
        axes.plot(rollouts, [log[name] for log in logs], label=name.split("/")[1], linewidth=1)
    if len(names) > 1:
        axes.legend()
    axes.set_xlabel("rollout")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("mean reward")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def _wrap(prompt: str, width: int = 14, lines: int = 5) -> str:
    return "\n".join(wrap(shorten(prompt, width * lines - 6, placeholder=" ..."), width))
