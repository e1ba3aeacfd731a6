"""Pictures of a run: a before/after grid, the reward curve, and the evaluations."""

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


def evaluation_curves(log_history: Sequence[dict], path: str | Path) -> None:
    """
    Draw the evaluations of a run below each other: the reward that is trained on, each control reward, and the diversity.

    Control rewards and diversity have a band of twice the standard error of their mean over the prompts. Evaluations with an
    alarm are marked in all of them.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`, with at least one evaluation.
        path (`str` or `Path`): File to write.
    """
    logs = [log for log in log_history if "eval_reward" in log]
    prefix, suffix = "eval_controls/", "/mean"
    controls = [
        name
        for name in dict.fromkeys(n for log in logs for n in log)
        if name.startswith(prefix) and name.endswith(suffix)
    ]
    # Title, metric, and that of its standard error.
    panels = [("reward", "eval_reward", None)]
    panels += [
        (f"control {name[len(prefix) : -len(suffix)]}", name, name.removesuffix(suffix) + "/se") for name in controls
    ]
    if any("eval_diversity" in log for log in logs):
        panels.append(("diversity", "eval_diversity", "eval_diversity_se"))
    alarms = [_rollout(log) for log in logs if log.get("eval_alarm")]
    figure = Figure(figsize=(6, 0.6 + 1.7 * len(panels)), dpi=150, layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, metric, error), color in zip(rows, panels, ["C0", *["C2"] * len(controls), "C4"]):
        for number, rollout in enumerate(alarms):
            axes.axvline(rollout, color="C3", linestyle=":", label="alarm" if number == 0 else None)
        if metric == "eval_reward":
            trained = [log for log in log_history if "reward" in log]
            axes.plot(
                [_rollout(log) for log in trained], [log["reward"] for log in trained], "C7", lw=1, label="rollouts"
            )
        shown = [log for log in logs if metric in log]
        rollouts, values = [_rollout(log) for log in shown], [log[metric] for log in shown]
        axes.plot(rollouts, values, color, marker="o", markersize=3, label="evaluations" if error is None else None)
        if error is not None:
            low, high = ([v + sign * 2 * log[error] for v, log in zip(values, shown)] for sign in (-1, 1))
            axes.fill_between(rollouts, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    # Beside its axes: in them it may hide a curve.
    rows[0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)
    rows[-1].set_xlabel("rollout")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def _rollout(log: dict) -> float:
    return log.get("epoch", 0.0)


def _wrap(prompt: str, width: int = 14, lines: int = 5) -> str:
    return "\n".join(wrap(shorten(prompt, width * lines - 6, placeholder=" ..."), width))
