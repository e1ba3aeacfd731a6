import os
import subprocess

import distributed_run
import pytest
import tiny_pipelines
import torch


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory, warm_python):
    """A folder with the run of one process, what it ended with, and what two end with."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_pipelines.sd3().save_pretrained(folder / "pipeline")
    _, one = distributed_run.run(str(folder / "one"))
    assert one["processes"] == 1 and one["wrapper"] == "_Adapted"
    command = [warm_python.path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, **warm_python.environment, "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, distributed_run.__file__, folder], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(folder / "results.pt", weights_only=True)
    for name in results.keys() - {"traffic", "slow reward", "advantages"}:
        assert results[name]["processes"] == 2 and results[name]["wrapper"] == "DistributedDataParallel"
    return folder, one, results


def test_two_processes_end_in_the_weights_of_one(runs):
    _, one, results = runs
    distributed_run.assert_same(results["two"], one)


def test_two_processes_have_the_figures_of_one(runs):
    _, one, results = runs
    two = results["two"]
    # Of the same weights, before the training; then of those that differ in the last bits.
    for number, (expected, found) in enumerate(zip(one["evaluations"], two["evaluations"], strict=True)):
        assert found == pytest.approx(expected, abs=1e-5 if number else 1e-6)
    assert [log["step"] for log in two["evaluations"]] == [0, 4, 8, 8]
    assert {"eval_reward", "eval_control", "eval_diversity", "eval_alarm"} <= two["evaluations"][0].keys()


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    folder, one, results = runs
    options = distributed_run.NO_EVALUATIONS
    _, fewer = distributed_run.run(str(tmp_path / "fewer"), str(folder / "two" / "checkpoint-4"), **options)
    distributed_run.assert_same(fewer, results["two"])
    distributed_run.assert_same(results["more"], one)


def test_two_processes_with_quantized_weights_end_in_the_weights_of_one(runs, tmp_path):
    pytest.importorskip("torchao")
    folder, _, results = runs
    pipeline = str(folder / "pipeline")
    _, one = distributed_run.run(str(tmp_path / "one"), make_pipeline=lambda: pipeline, **distributed_run.QUANTIZED)
    distributed_run.assert_same(results["quantized"], one)


def test_two_processes_noise_the_endpoints_of_one(runs, tmp_path):
    _, one = distributed_run.run(str(tmp_path / "one"), **distributed_run.FORWARD)
    distributed_run.assert_same(runs[2]["forward"], one)


def test_two_processes_divide_by_the_standard_deviation_of_one(runs, tmp_path):
    one = distributed_run.advantages(tmp_path / "one")
    assert len(one) == 16 and one.abs().max() > 0.1
    torch.testing.assert_close(runs[2]["advantages"], one, rtol=0, atol=1e-4)


def test_two_processes_leave_out_the_same_number_of_ties_and_end_in_the_weights_of_one(runs, tmp_path):
    _, one = distributed_run.run(str(tmp_path / "one"), **distributed_run.SPARSE)
    two = runs[2]["sparse"]
    distributed_run.assert_same(two, one)
    assert all(0 < of_two <= of_one for of_two, of_one in zip(two["left_out"], one["left_out"], strict=True))


def test_two_processes_draw_the_informative_prompts_of_one(runs, tmp_path):
    one, two = distributed_run.informative(tmp_path), runs[2]["informative"]
    distributed_run.assert_same(two, one)
    # Of 24 draws 12 are of the four prompts that always tie, where a uniform run has 16.
    assert two["ties"] == one["ties"] == [0, 0, 2, 4, 2, 4]


def test_gradients_and_metrics_alone_pass_between_processes(runs):
    result = runs[2]["traffic"]
    gradients = [size for name, size in result["collectives"] if (name, size) == ("gloo:all_reduce", result["trained"])]
    # Once per optimizer step, however many micro-batches it has.
    assert len(gradients) == result["steps"] == 4
    others = [size for name, size in result["collectives"] if (name, size) != ("gloo:all_reduce", result["trained"])]
    # The rewards of each rollout's 8 images per process, the traits of its 4 prompts and a few dozen metrics.
    of_rollouts = 2 * (8 + 4 * 196)
    assert of_rollouts < sum(others) < of_rollouts + 200
    # What one rollout has recorded on one process alone.
    assert result["recorded"] > 10_000


def test_a_slow_reward_of_one_process_does_not_end_the_others(runs):
    _, one, results = runs
    assert results["slow reward"] == pytest.approx(one["rewards"][:1], abs=1e-5)
