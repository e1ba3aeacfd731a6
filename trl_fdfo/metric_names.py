"""
The names of metrics, as they stand in logs, files and tables.

    reward                 weighted sum of the rewards; `reward_std` is its standard deviation
    rewards/<name>/mean    one reward function; `std` and, in evaluations, `se` (standard error of the mean) beside it, and
                           `waiting` in rollouts if it waits for people or the like
    control                plain sum of the control rewards, which nothing is trained on
    controls/<name>/mean   one control reward; `std` and `se` beside it
    diversity              distance between images of one prompt; `diversity_se` is its standard error
    alarm                  1 if the evaluation raised an alarm, otherwise 0

Evaluations put `eval_` in front of each name. A `kind` below is "reward" or "control", with or without that prefix.
"""

from collections.abc import Iterable


EVAL_PREFIX = "eval_"
REWARD = "reward"
CONTROL = "control"
DIVERSITY = "diversity"
ALARM = "alarm"


def part(kind: str, name: str, statistic: str = "mean") -> str:
    """Return the metric of the function `name`: `part("control", "clip", "se")` is `"controls/clip/se"`."""
    return f"{kind}s/{name}/{statistic}"


def parts(metrics: Iterable[str], kind: str, statistic: str = "mean") -> dict[str, str]:
    """Map each function to its metric, for the functions of `kind` that occur in `metrics`, in their order."""
    start, end = f"{kind}s/", f"/{statistic}"
    return {m[len(start) : -len(end)]: m for m in metrics if m.startswith(start) and m.endswith(end)}


def standard_error(metric: str) -> str:
    """Return the metric with the standard error of a mean: `rewards/<name>/se`, or `diversity_se`."""
    return _sibling(metric, "se")


def deviation(metric: str) -> str:
    """Return the metric with the standard deviation beside a mean: `rewards/<name>/std`, or `reward_std`."""
    return _sibling(metric, "std")


def _sibling(metric: str, statistic: str) -> str:
    if metric.endswith("/mean"):
        return metric.removesuffix("mean") + statistic
    return f"{metric}_{statistic}"
