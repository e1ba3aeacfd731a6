import multiprocessing
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from benchmarks.runs import load, number_of, run_missing, train_to_the_end
from trl_fdfo.training.watchdogs import WatchdogError


@dataclass(frozen=True)
class Run:
    name: str
    seed: int = 0


def train(run):
    if run.name == "bad":
        raise ValueError("a bad run")
    if run.name == "told to end":
        raise SystemExit(143)
    time.sleep(run.seed)
    return {"run": asdict(run), "reward": [len(run.name) + run.seed]}


def test_each_run_is_made_once_and_kept(tmp_path, capsys):
    path = tmp_path / "results" / "runs.jsonl"
    assert load(path) == []
    run_missing([Run("a"), Run("b", 1), Run("aa"), Run("a")], train, path, workers=2)
    made = load(path)
    assert sorted((result["run"]["name"], *result["reward"]) for result in made) == [("a", 1), ("aa", 2), ("b", 2)]
    capsys.readouterr()
    run_missing([Run("b", 1), Run("cc"), Run("a")], train, path)
    assert load(path) == [*made, {"run": {"name": "cc", "seed": 0}, "reward": [2]}]
    assert capsys.readouterr().out.endswith("Run(name='cc', seed=0): 2\n")


def test_a_line_that_is_not_whole_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"run": {"name": "a", "seed": 0}, "reward": [1]}\n{"run": {"na')
    with pytest.raises(
        ValueError, match=r"Line 2 of .*runs.jsonl is not a whole result .*: delete it, and its run is made"
    ):
        load(path)


def test_a_run_that_a_watchdog_ends_has_a_result():
    class Trainer:
        def train(self):
            raise WatchdogError("too bold")

    result = {}
    assert not train_to_the_end(Trainer(), result) and result == {"failed": "WatchdogError: too bold"}
    assert number_of([result, {}]) == "2, 1 of them ended by a watchdog" and number_of([{}]) == "1"


def wait_for_ever(run):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(run.name).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_run_ends_with_the_program_that_made_it(tmp_path):
    path = tmp_path / "pid"
    parent = multiprocessing.get_context("spawn").Process(
        target=run_missing, args=([Run(str(path))], wait_for_ever, tmp_path / "runs.jsonl")
    )
    parent.start()
    while not (path.is_file() and path.read_text()):
        assert parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    deadline = time.monotonic() + 60
    while is_running(int(path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_run_begins_after_the_deadline(tmp_path):
    run_missing([Run("a")], train, tmp_path / "runs.jsonl", deadline=time.time())
    run_missing([], train, tmp_path / "runs.jsonl")
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(("name", "error"), [("bad", ValueError), ("told to end", SystemExit)])
def test_a_run_that_fails_ends_no_other_and_none_begins_after_it(tmp_path, name, error):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(error, match="a bad run|143"):
        run_missing([Run(name), Run("good", 1), Run("next")], train, path, workers=2)
    assert [result["run"]["name"] for result in load(path)] == ["good"]


def test_a_result_begins_a_line_of_its_own(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"run": {"name": "a", "seed": 0}, "reward": [1]}')
    run_missing([Run("a"), Run("b")], train, path)
    assert [result["run"]["name"] for result in load(path)] == ["a", "b"]
