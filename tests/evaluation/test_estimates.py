import math

import numpy as np
import pytest

from trl_fdfo.evaluation.estimates import Estimate, markdown_table


def test_mean_and_standard_error_by_hand():
    estimate = Estimate.of([1.0, 2.0, 3.0, 6.0])
    # Deviations -2, -1, 0, 3: variance 14 / 3, and of the mean of four a quarter of it.
    assert estimate.mean == 3 and estimate.num_prompts == 4
    assert estimate.standard_error == pytest.approx(math.sqrt(14 / 3 / 4))


def test_standard_error_is_the_spread_of_the_mean():
    means = np.random.default_rng(0).normal(5, 2, size=(4000, 25)).mean(axis=1)
    errors = [Estimate.of(row).standard_error for row in np.random.default_rng(1).normal(5, 2, size=(400, 25))]
    assert np.mean(errors) == pytest.approx(means.std(), rel=0.05)


def test_prompts_without_a_value_are_left_out():
    assert Estimate.of([1.0, math.nan, 3.0]) == Estimate.of([1.0, 3.0])
    assert Estimate.of([2.0, math.nan]) == Estimate(mean=2.0, standard_error=None, num_prompts=1)
    assert Estimate.of([math.nan]) == Estimate(mean=None, standard_error=None, num_prompts=0)


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (21.3389, 0.1171, "21.34 ± 0.12"),
        (0.2489, 0.00873, "0.2489 ± 0.0087"),
        (61.98, 12.4, "62 ± 12"),
        (61234.0, 1234.0, "61234 ± 1234"),
        (0.25, 0.05, "0.250 ± 0.050"),
        (1.0, 0.0, "1 ± 0"),
        (1 / 3, None, "0.3333"),
        (None, None, "-"),
    ],
)
def test_text(mean, error, text):
    assert Estimate(mean, error, 3).text() == text


def test_table():
    base = {"score": Estimate(20.0, 0.5, 9), "n/a": Estimate(None, None, 0)}
    mine = {"score": Estimate(21.0, 0.5, 9), "n/a": Estimate(None, None, 0)}
    change = {"score": Estimate(1.0, 0.031, 9), "n/a": Estimate(None, None, 0)}
    assert markdown_table({"base": base, "out": mine}, {"out": change}).splitlines() == [
        "|       | base         | out          | out - base     |",
        "| ----- | ------------ | ------------ | -------------- |",
        "| score | 20.00 ± 0.50 | 21.00 ± 0.50 | +1.000 ± 0.031 |",
        "| n/a   | -            | -            | -              |",
    ]
