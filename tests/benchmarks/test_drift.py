"""benchmarks/drift.py: the same package gives the same checksums, and a change that moves a bit is found."""

import shutil
from pathlib import Path

import pytest

from benchmarks import drift


RUNS = ["constant churn", "killed and resumed"]


@pytest.mark.slow
def test_checksums_repeat_and_show_a_change(tmp_path, warm_python):
    unchanged = drift.train_by(drift.ROOT, RUNS, warm_python.path)
    assert unchanged == drift.train_by(drift.ROOT, RUNS, warm_python.path)
    assert unchanged["constant churn"] != unchanged["killed and resumed"]
    # The changed package is imported by a fresh Python, which ends in the same bytes otherwise: test_ctrl_c.py shows it.
    tree = tmp_path / "tree"
    for folder in ("trl_fdfo", "tests/helpers"):
        shutil.copytree(drift.ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    loss = Path(tree, "trl_fdfo", "fdfo", "loss.py")
    text = loss.read_text()
    assert "(2 * epsilon)" in text
    loss.write_text(text.replace("(2 * epsilon)", "(2.000001 * epsilon)"))
    changed = drift.train_by(tree, RUNS[:1])["constant churn"]
    assert changed["weights"] != unchanged["constant churn"]["weights"]


def test_no_metric_but_times_is_left_out():
    class Trainer:
        class model:
            named_parameters = staticmethod({}.items)

        class state:
            log_history = [{"reward": 0.5, "rollout_time": 3.0, "step": 2}]

    class Images:
        @staticmethod
        def numpy():
            return memoryview(b"pixels")

    first = drift.checksums(Trainer, Images)
    Trainer.state.log_history = [{"reward": 0.5, "rollout_time": 4.0, "step": 2}]
    assert drift.checksums(Trainer, Images) == first
    Trainer.state.log_history = [{"reward": 0.5000001, "rollout_time": 4.0, "step": 2}]
    assert drift.checksums(Trainer, Images)["metrics"] != first["metrics"]
