"""Curves of a run: the reward of its rollouts, and its evaluations."""

from collections.abc import Sequence
from pathlib import Path


try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The reward curve needs matplotlib: pip install 'trl_fdfo[examples]'.") from error


def reward_curve(log_history: Sequence[dict], path: str | Path) -> None:
    """
    Draw the mean reward of each rollout, and of each reward function where there are several.

    Args:
        log_history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): File to write.
    """
    logs = [log for log in log_history if "reward" in log]
    names = [name for name in logs[0] if name.startswith("rewards/") and name.endswith("/mean")] if logs else []
    # Each on an axis of its own: their scales differ.
    curves = {"mean reward": "reward", **({name.split("/")[1]: name for name in names} if len(names) > 1 else {})}
    figure = Figure(figsize=(6, 3.5 if len(curves) == 1 else 2 * len(curves)), dpi=150, layout="constrained")
    rollouts = [log["epoch"] for log in logs]
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (label, name) in zip(panels, curves.items()):
        axes.plot(rollouts, [log[name] for log in logs], linewidth=2)
        axes.set_ylabel(label)
        axes.ticklabel_format(useOffset=False)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("rollout")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
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
