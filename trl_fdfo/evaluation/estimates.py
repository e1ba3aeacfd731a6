"""
Means over prompts with their standard errors, for tables and files.

The images of a prompt are not independent samples: average over them first, so that each prompt has one value. The
standard error of the mean of P values is then s / sqrt(P), with s^2 their unbiased variance. If two models make images
of the same prompts from the same seeds, estimate the difference prompt by prompt: the difficulty of each prompt
cancels, so the error is smaller than the errors of the two means suggest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error, from the spread over prompts."""

    mean: float | None  # over the prompts that have a value; None without such prompts
    standard_error: float | None  # None with fewer than two prompts that have a value
    num_prompts: int  # that have a value

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate the mean of one value per prompt, shape [P]; nan if a prompt has no value."""
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]
        n = len(values)
        return cls(
            mean=float(values.mean()) if n > 0 else None,
            standard_error=float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
            num_prompts=n,
        )

    def text(self, sign: str = "") -> str:
        """Text such as "21.34 ± 0.12": two digits of the error, the mean to the same place. `sign="+"` shows a plus."""
        if self.mean is None:
            return "-"
        if not self.standard_error:
            return f"{self.mean:{sign}.4g}" + ("" if self.standard_error is None else " ± 0")
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.mean:{sign}.{decimals}f} ± {self.standard_error:.{decimals}f}"


def markdown_table(estimates: dict[str, dict[str, Estimate]], differences: dict[str, dict[str, Estimate]]) -> str:
    """
    A table with a row for each metric and a column for each model, in Markdown, aligned. `estimates` has the metrics of
    each model, the base first. `differences` from the base are shown beside the model.
    """
    base, metrics = next(iter(estimates.items()))
    columns = [["", *metrics]]
    for name, model in estimates.items():
        columns.append([name, *(model[metric].text() for metric in metrics)])
        if name in differences:
            columns.append([f"{name} - {base}", *(differences[name][metric].text("+") for metric in metrics)])
    widths = [max(map(len, column)) for column in columns]
    head, *rows = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in zip(*columns)]
    return "\n".join(f"| {row} |" for row in (head, " | ".join("-" * width for width in widths), *rows))
