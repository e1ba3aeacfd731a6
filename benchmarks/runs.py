"""Runs of benchmarks that take minutes each, and are made once: their results are the lines of a file of JSON."""

import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import Trainer


def load(path: Path) -> list[dict[str, Any]]:
    """
    The results in a file; none if there is no such file.

    Raises:
        ValueError: A line is not whole.
    """
    results = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of {path} is not a whole result ({error}), as after a kill while it was written: delete it, and "
                "its run is made again."
            ) from None
    return results


def train_to_the_end(trainer: "Trainer", result: dict[str, Any]) -> bool:
    """True if a run ends. If a watchdog ends it, as its setting is too bold, `result` gets the reason as `"failed"`."""
    from trl_fdfo.training.watchdogs import WatchdogError

    try:
        trainer.train()
    except WatchdogError as error:
        result["failed"] = f"{type(error).__name__}: {error}"
    return "failed" not in result


def number_of(runs: Sequence[dict[str, Any]]) -> str:
    """How many runs there are, and how many of these a watchdog ended."""
    failed = sum("failed" in run for run in runs)
    return f"{len(runs)}, {failed} of them ended by a watchdog" if failed else str(len(runs))


def run_missing(
    runs: Sequence[Any],
    train: Callable[[Any], dict[str, Any]],
    path: Path,
    workers: int = 1,
    deadline: float = math.inf,
) -> None:
    """
    Make the runs that have no result yet, and append each result as soon as it is there.

    Args:
        runs (`Sequence`): Descriptions of runs, of one frozen dataclass; one that is there twice is made once.
        train (`Callable`): A function of a module. Makes one run, and returns its result, with `asdict` of the description as `"run"`.
        path (`Path`): File of the results.
        workers (`int`): Runs at a time, each in a process of its own.
        deadline (`float`): No run begins after this `time.time()`.

    Raises:
        BaseException: That of the first run that raised one, when the runs beside it are kept.
    """
    done = {type(runs[0])(**result["run"]) for result in load(path)} if runs else set()
    queue: Iterator[Any] = iter([run for run in dict.fromkeys(runs) if run not in done])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        futures, failure = {}, None

        def begin() -> None:
            run = next(queue, None) if time.time() < deadline else None
            if run is not None:
                futures[pool.submit(train, run)] = run

        for _ in range(workers):
            begin()
        while futures:
            future = next(as_completed(futures))
            run = futures.pop(future)
            # Not raised: a trainer that is told to end leaves by `SystemExit`.
            if (error := future.exception()) is not None:
                failure = failure or error
                continue  # no run begins any more, and those beside it are kept
            result = future.result()
            append(result, path)
            print(f"{time.strftime('%H:%M:%S')} {run}: {result.get('failed') or result['reward'][-1]}", flush=True)
            if failure is None:
                begin()
    if failure is not None:
        raise failure


def measure_costs(
    trainers: Mapping[str, Callable[[], "Trainer"]], known: dict[str, Any], rounds: int = 4
) -> dict[str, Any]:
    """
    CPU seconds of a rollout and its updates on one thread, the median of `rounds`; the trainers take turns in one process, so
    that a busy machine slows all alike.

    Trainers with a `known` cost keep it. The first is measured again beside the new ones, whose times are scaled by its own.

    Args:
        trainers (`Mapping[str, Callable]`): Each makes a trainer of one rollout.
        known (`dict`): What was returned before, or nothing.
        rounds (`int`): Times that each is measured, after one to warm up.

    Returns:
        `dict`: `machine`, `seconds_per_rollout` by the names of the trainers, and `rounds`, all times of each measurement.
    """
    import torch
    from transformers import PrinterCallback, TrainerCallback

    torch.set_num_threads(1)

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.process_time()

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seconds = time.process_time() - self.start

    first, seconds_per_rollout = next(iter(trainers)), dict(known.get("seconds_per_rollout", {}))
    made, clock = {}, Clock()
    for name, make in trainers.items():
        if name == first or name not in seconds_per_rollout:
            made[name] = make()
            made[name].add_callback(clock)
            made[name].pop_callback(PrinterCallback)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds + 1):
        for name, trainer in random.sample(list(made.items()), len(made)):
            trainer.train()
            seconds[name].append(clock.seconds)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    scale = seconds_per_rollout.get(first, medians[first]) / medians[first]
    return {
        "machine": machine(),
        "seconds_per_rollout": seconds_per_rollout | {name: round(scale * value, 3) for name, value in medians.items()},
        "rounds": [
            *known.get("rounds", []),
            {name: [round(value, 3) for value in values[1:]] for name, values in seconds.items()},
        ],
    }


def machine() -> str:
    """Processor and version of torch."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return f"one core of {model}, torch {torch.__version__}"


def append(result: dict[str, Any], path: Path) -> None:
    """Write a result as a line of its own."""
    path.parent.mkdir(exist_ok=True)
    is_open = path.is_file() and not path.read_bytes().endswith(b"\n")  # a last line of which an editor took the end
    with path.open("a") as file:
        file.write("\n" * is_open + json.dumps(result) + "\n")


def _end_with_parent() -> None:
    """End this process when its parent does, even by a kill: a trainer lives through Ctrl-C and SIGTERM to save itself."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
