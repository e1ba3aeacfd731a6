"""Curves of a run: the rewards of its rollouts, and its evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metric_names import ALARM, CONTROL, DIVERSITY, EVAL_PREFIX, REWARD, parts, standard_error


try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The reward curve needs matplotlib: pip install 'trl_fdfo[examples]'.") from error


def reward_curve(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Draw the mean reward of each rollout and, with several reward functions, the mean of each function.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`.
        path (`str` or `Path`): File to write.
    """
    logs = [log for log in log_history if REWARD in log]
    functions = parts(logs[0], REWARD) if logs else {}
    # Each curve has axes of its own: the scales of rewards differ.
    curves = {"mean reward": REWARD, **(functions if len(functions) > 1 else {})}
    figure = Figure(figsize=(6, 3.5 if len(curves) == 1 else 2 * len(curves)), dpi=150, layout="constrained")
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (label, metric) in zip(panels, curves.items()):
        axes.plot([_rollout(log) for log in logs], [log[metric] for log in logs], linewidth=2)
        axes.set_ylabel(label)
        axes.ticklabel_format(useOffset=False)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("rollout")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def evaluation_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Draw the evaluations of a run, a panel each for the training reward, each control reward, and the diversity.

    The bands around control rewards and diversity are twice the standard error of the mean over prompts. Vertical lines
    mark evaluations with an alarm. The panel of the reward also shows the rollouts.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`, with at least one evaluation.
        path (`str` or `Path`): File to write.
    """
    reward, diversity = EVAL_PREFIX + REWARD, EVAL_PREFIX + DIVERSITY
    trained = [log for log in log_history if REWARD in log]
    logs = [log for log in log_history if reward in log]
    controls = parts(dict.fromkeys(name for log in logs for name in log), EVAL_PREFIX + CONTROL)
    panels = [("reward", reward, "C0")]
    panels += [(f"control {name}", metric, "C2") for name, metric in controls.items()]
    if any(diversity in log for log in logs):
        panels.append(("diversity", diversity, "C4"))
    alarms = [_rollout(log) for log in logs if log.get(EVAL_PREFIX + ALARM)]
    figure = Figure(figsize=(6, 0.6 + 1.7 * len(panels)), dpi=150, layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, metric, color) in zip(rows, panels):
        for number, rollout in enumerate(alarms):
            axes.axvline(rollout, color="C3", linestyle=":", label="alarm" if number == 0 else None)
        shown = [log for log in logs if metric in log]
        rollouts, values = [_rollout(log) for log in shown], [log[metric] for log in shown]
        if metric == reward:
            steps, rewards = [_rollout(log) for log in trained], [log[REWARD] for log in trained]
            axes.plot(steps, rewards, "C7", lw=1, label="rollouts")
            axes.plot(rollouts, values, color, marker="o", markersize=3, label="evaluations")
        else:
            axes.plot(rollouts, values, color, marker="o", markersize=3)
            errors = [log[standard_error(metric)] for log in shown]
            low, high = ([v + sign * 2 * error for v, error in zip(values, errors)] for sign in (-1, 1))
            axes.fill_between(rollouts, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    # The legend stands above the axes, where it hides no curve.
    rows[0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)
    rows[-1].set_xlabel("rollout")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def _rollout(log: Mapping[str, Any]) -> float:
    return log.get("epoch", 0.0)
