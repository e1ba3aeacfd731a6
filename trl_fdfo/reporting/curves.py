"""Curves of a run, drawn into a file from `trainer.state.log_history`: the rewards of its rollouts, its evaluations."""

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
    Draw the mean reward of each rollout and, with several reward functions, the mean of each function over its rollouts: a
    resumed run may have other functions than before.
    """
    logs = [log for log in log_history if REWARD in log]
    functions = parts(dict.fromkeys(name for log in logs for name in log), REWARD)
    # Each curve has axes of its own: the scales of rewards differ.
    curves = {"mean reward": REWARD, **(functions if len(functions) > 1 else {})}
    figure, panels = _panels(len(curves), height=3.5 if len(curves) == 1 else 2 * len(curves))
    for axes, (label, metric) in zip(panels, curves.items()):
        _plot(axes, logs, metric, linewidth=2)
        axes.set_ylabel(label)
        axes.ticklabel_format(useOffset=False)
    figure.savefig(path)


def evaluation_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Draw the evaluations of a run, at least one: panels for the training reward, each control reward, and the diversity.

    The bands around control rewards and diversity are twice the standard error of the mean over prompts. Vertical lines
    mark evaluations with an alarm. The panel of the reward also shows the rollouts.
    """
    reward, diversity = EVAL_PREFIX + REWARD, EVAL_PREFIX + DIVERSITY
    logs = [log for log in log_history if reward in log]
    controls = parts(dict.fromkeys(name for log in logs for name in log), EVAL_PREFIX + CONTROL)
    curves = [("reward", reward, "C0"), *((f"control {name}", metric, "C2") for name, metric in controls.items())]
    if any(diversity in log for log in logs):
        curves.append(("diversity", diversity, "C4"))
    alarms = [log for log in logs if log.get(EVAL_PREFIX + ALARM)]
    figure, panels = _panels(len(curves), height=0.6 + 1.7 * len(curves))
    for axes, (title, metric, color) in zip(panels, curves):
        for number, rollout in enumerate(_rollouts(alarms)):
            axes.axvline(rollout, color="C3", linestyle=":", label="alarm" if number == 0 else None)
        if metric == reward:
            _plot(axes, [log for log in log_history if REWARD in log], REWARD, color="C7", lw=1, label="rollouts")
        shown = [log for log in logs if metric in log]
        _plot(axes, shown, metric, color=color, marker="o", markersize=3, label="evaluations")
        if metric != reward:
            bounds = [[log[metric] + 2 * sign * log[standard_error(metric)] for log in shown] for sign in (-1, 1)]
            axes.fill_between(_rollouts(shown), *bounds, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10, loc="left")
    # The legend stands above the axes, where it hides no curve.
    panels[0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)
    figure.savefig(path)


def _panels(count: int, height: float) -> tuple[Figure, Any]:
    """Return a figure of `count` axes, one below the other, over the number of the rollout."""
    figure = Figure(figsize=(6, height), dpi=150, layout="constrained")
    panels = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("rollout")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure, panels


def _plot(axes: Any, logs: Sequence[Mapping[str, Any]], metric: str, **style: Any) -> None:
    shown = [log for log in logs if metric in log]
    axes.plot(_rollouts(shown), [log[metric] for log in shown], **style)


def _rollouts(logs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [log.get("epoch", 0.0) for log in logs]
