"""Checks that the runs of benchmarks/alarms.py can be made, and that today's thresholds tell the hacked ones from the honest."""

import pytest

from benchmarks import alarms
from trl_fdfo.training.rollout_alarms import SIGNS


RESULTS = alarms.load()


def test_the_file_has_all_runs():
    assert RESULTS.keys() == {run.name for run in alarms.runs()}


@pytest.mark.parametrize("run", alarms.runs(), ids=lambda run: run.name)
def test_hacked_runs_raise_alarms_and_honest_ones_none(run):
    raised = alarms.alarms(RESULTS[run.name])
    assert bool(raised) == (run.reward != "shapes"), raised


def test_an_honest_run_is_one_that_learns():
    for run in alarms.runs():
        reward = RESULTS[run.name]["reward"]
        assert sum(reward[-5:]) > sum(reward[:5]), run.name


@pytest.mark.parametrize("algorithm", ["FDFO", "FlowGRPO", "DiffusionNFT", "AWM"])
def test_a_run_of_each_algorithm_makes_a_trainer(algorithm):
    run = next(run for run in alarms.runs() if run.algorithm == algorithm)
    assert alarms.make_trainer(run).args.optimizer_steps_per_rollout == 6


def test_the_report_has_changes_and_alarms():
    honest, hacked = (next(run for run in alarms.runs() if (run.reward == "shapes") is kind) for kind in (True, False))
    steady = {name: [1.0] * 20 for name in ("reward", *alarms.SIGNS)}
    results = {
        honest.name: {"name": honest.name, **steady},
        hacked.name: {"name": hacked.name, **steady, SIGNS[-1].metric: [1.0] * 10 + [0.2] * 10},
    }
    report = alarms.report(results)
    assert "0 of 1 honest runs raise an alarm, and 1 of 1 hacked ones" in report
    assert f"| {honest.name} | 20 | 1.00 to 1.00 |" in report and "| -80% | prompt_distance after 15 |" in report
