import pytest
import torch

from benchmarks import sparse_rewards
from benchmarks.runs import load
from benchmarks.sparse_rewards import PLAIN, Run
from trl_fdfo import shapes


@pytest.mark.parametrize("setting", sparse_rewards.SETTINGS)
def test_every_setting_samples_equally_many_images_in_one_call(setting):
    trainer = sparse_rewards.make_trainer(Run("mostly unsolvable", setting, 1), rollouts=1)
    args = trainer.args
    assert args.prompts_per_rollout * args.num_candidates == sparse_rewards.IMAGES
    assert args.per_device_sampling_batch_size == args.prompts_per_rollout
    assert trainer.ties_have_no_loss() == (setting != PLAIN)
    assert len(trainer.train_dataset) == 54 + 162


def test_unknown_shapes_are_never_right():
    images = shapes.load_pipeline()("a red circle on a white background", output_type="pt", height=32, width=32).images
    solvable, unsolvable = sparse_rewards.prompts_of("mostly unsolvable")[0], "a red star on a white background"
    assert unsolvable in sparse_rewards.prompts_of("mostly unsolvable")
    found = sparse_rewards.is_right(images.expand(2, -1, -1, -1), [unsolvable, solvable])
    assert found == [0.0, float(shapes.strict(images, [solvable]).item())]
    assert sparse_rewards.is_right(torch.zeros(1, 3, 32, 32), [unsolvable]) == [0.0]


def made_up(setting, seed, reward, seconds, left_out):
    run = {"dataset": "captions", "setting": setting, "seed": seed}
    rollouts = [0, 30, 60]
    return {
        "run": run,
        "rollouts": rollouts,
        "reward": reward,
        "seconds": [seconds] * 60,
        "ties": [0.9] * 30 + [0.8] * 30,
    } | {"left_out": [left_out] * 60 if left_out else []}


def test_report_of_made_up_runs():
    runs = [
        made_up(PLAIN, 1, [0.3, 0.4, 0.5], 2.0, 0.0),
        made_up("6 images", 1, [0.3, 0.5, 0.6], 1.6, 0.75),
        made_up("2 of 6", 1, [0.3, 0.35, 0.4], 1.0, 0.9),
    ]
    lines = sparse_rewards.report(runs).splitlines()
    [plain] = [line for line in lines if line.startswith(f"| {PLAIN} |")]
    assert plain == f"| {PLAIN} | 0.30 | 0.500 | 0.90, 0.80 | 0.00 | 2.00 | 30 (60 s) | 1.00 | 60 (120 s) | 1.00 | 1 |"
    # 0.4 is halfway to 0.5: 15 rollouts of 1.6 s in the place of 30 of 2 s.
    [six] = [line for line in lines if line.startswith("| 6 images |")]
    assert six == "| 6 images | 0.30 | 0.600 | 0.90, 0.80 | 0.75 | 1.60 | 15 (24 s) | 2.50 | 30 (48 s) | 2.50 | 1 |"
    [two] = [line for line in lines if line.startswith("| 2 of 6 |")]
    assert two.endswith("| 60 (60 s) | 1.00 | never |  | 1 |")
    assert "to 0.40 | times as soon | to 0.50" in "\n".join(lines)


def test_report_of_runs_that_a_watchdog_ended():
    plain = made_up(PLAIN, 1, [0.3, 0.4, 0.5], 2.0, 0.0)
    ended = {
        "run": {**plain["run"], "setting": "pairs"},
        "rollouts": [0],
        "reward": [0.3],
        "seconds": [2.0],
        "ties": [],
    }
    ended |= {"left_out": [], "failed": "WatchdogError: it came apart"}
    cells = [line[2:-2].split(" | ") for line in sparse_rewards.report([plain, ended]).splitlines() if line[:1] == "|"]
    assert cells[-1][:2] == ["pairs", "0.30"] and cells[-1][-1] == "1, 1 of them ended by a watchdog"
    assert len({len(row) for row in cells}) == 1
    assert sparse_rewards.report([{**ended, "run": plain["run"]}]).count("ended by a watchdog") == 1
    beside = {**ended, "run": plain["run"]}
    assert "| 0.500 |" in sparse_rewards.report([plain, beside])


def test_the_report_is_of_the_kept_runs():
    assert sparse_rewards.REPORT.read_text().startswith(
        sparse_rewards.report(load(sparse_rewards.RUNS)).rsplit("`python", 1)[0]
    )
