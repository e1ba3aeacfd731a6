"""The reward curve of a run."""

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
