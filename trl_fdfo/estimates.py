"""
Means over prompts with their standard errors, for tables and files.

The images of a prompt are alike, so they are no independent samples: average over them first, and give one value per
prompt. The standard error of the mean of P values is then s / sqrt(P), with s^2 their unbiased variance. Where two models
have made images of the same prompts from the same seeds, the estimate of the difference of their values, prompt by prompt,
is tighter than the two means suggest: what is easy or hard about a prompt cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        mean (`float`, *optional*): Mean over the prompts that have a value; None where none has.
        standard_error (`float`, *optional*): Of the mean, from the spread over prompts; None with fewer than two.
        num_prompts (`int`): How many have a value.
    """

    mean: float | None
    standard_error: float | None
    num_prompts: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """From one value per prompt, shape [P], nan where there is none."""
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]
        n = len(values)
        return cls(
            mean=float(values.mean()) if n > 0 else None,
            standard_error=float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
            num_prompts=n,
        )

    def text(self, sign: str = "") -> str:
        """Such as "21.34 ± 0.12": the error with two digits, and the mean as far as it is known. `sign="+"` shows it."""
        if self.mean is None:
            return "-"
        if not self.standard_error:
            return f"{self.mean:{sign}.4g}" + ("" if self.standard_error is None else " ± 0")
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.mean:{sign}.{decimals}f} ± {self.standard_error:.{decimals}f}"


def markdown_table(estimates: dict[str, dict[str, Estimate]], differences: dict[str, dict[str, Estimate]]) -> str:
    """
    A table with a row for each metric and a column for each model, in Markdown, aligned.

    Args:
        estimates (`dict[str, dict[str, Estimate]]`): Of each model, the first of which is the base, each metric.
        differences (`dict[str, dict[str, Estimate]]`): The same of differences to the base; they stand beside the model.
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
