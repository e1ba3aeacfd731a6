import os
import subprocess
import sys
from pathlib import Path

import distributed_run
import pytest
import torch


def launch(script: str, file: Path, *arguments: Path) -> dict:
    """What two processes write."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [Path(__file__).with_name(script), file, *arguments]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(file.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file, weights_only=True)


def run_two(file: Path, *arguments: Path) -> dict:
    """What two processes end with."""
    result = launch("distributed_run.py", file, *arguments)
    assert result["processes"] == 2 and result["wrapper"] == "DistributedDataParallel"
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of one process and one of two, with what they ended with."""
    folder = tmp_path_factory.mktemp("runs")
    _, one = distributed_run.run(str(folder / "one"))
    assert one["processes"] == 1 and one["wrapper"] == "PeftModel"
    return folder, one, run_two(folder / "two")


def assert_same(found: dict, expected: dict) -> None:
    # The wrapper's prefix aside, the same weights.
    assert found["weights"].keys() == expected["weights"].keys()
    moved = 0.0
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)
        moved = max(moved, weight.abs().max().item() if "lora_B" in name else 0.0)
    assert moved > 1e-3, "nothing was trained, and the comparison is empty"
    torch.testing.assert_close(found["images"], expected["images"], rtol=0, atol=1e-4)
    assert found["eval_reward"] == pytest.approx(expected["eval_reward"], abs=1e-5)
    assert found["rewards"] == pytest.approx(expected["rewards"], abs=1e-5)


def test_two_processes_end_in_the_weights_of_one(runs):
    _, one, two = runs
    assert_same(two, one)


def test_two_processes_have_the_figures_of_one(runs):
    _, one, two = runs
    # Of the same weights, before the training; then of those that differ in the last bits.
    for number, (expected, found) in enumerate(zip(one["evaluations"], two["evaluations"], strict=True)):
        assert found == pytest.approx(expected, abs=1e-5 if number else 1e-6)
    assert [log["step"] for log in two["evaluations"]] == [0, 4, 8, 8]
    assert {"eval_reward", "eval_control", "eval_diversity", "eval_alarm"} <= two["evaluations"][0].keys()


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    folder, one, two = runs
    _, fewer = distributed_run.run(str(tmp_path / "fewer"), str(folder / "two.out" / "checkpoint-4"))
    assert_same(fewer, two)
    assert_same(run_two(tmp_path / "more", folder / "one" / "checkpoint-4"), one)


def test_gradients_and_metrics_alone_pass_between_processes(tmp_path):
    result = launch("traffic_run.py", tmp_path / "traffic")
    gradients = [size for name, size in result["collectives"] if (name, size) == ("gloo:all_reduce", result["trained"])]
    # Once per optimizer step, however many micro-batches it has.
    assert len(gradients) == result["steps"] == 8
    others = [size for name, size in result["collectives"] if (name, size) != ("gloo:all_reduce", result["trained"])]
    # The rewards of each rollout's 8 images per process and a few dozen metrics.
    assert 2 * 8 < sum(others) < 200
    # What one rollout has recorded on one process alone.
    assert result["recorded"] > 10_000
