"""
Compares algorithms on the world "counts", whose reward is 0 or 1, and measures what FDFO's options against ties are worth.

    python benchmarks/counts/comparison.py             # the runs that results/counts.jsonl lacks, then the report
    python benchmarks/counts/comparison.py --report    # the report alone: results/counts.md

A run takes some minutes on one core. A run that has a result is not repeated. All settings of a task and of a part of the
tuples have rollouts of equally many images, and are scored on the same images of the pipeline's own sampler, from seeds that
training does not see: 240 before the first rollout and after every third one, and 480 at the end.

The CPU seconds of a run are the median of its rollouts and their updates, times their number. Runs of one seed follow each
other, so that a busy machine slows all settings alike.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from benchmarks.convergence import FDFO_CHURN, RESULTS, machine, over_run, spread, table
from benchmarks.counts import world


RUNS, BEFORE, REPORT = RESULTS / "counts.jsonl", RESULTS / "counts_before.json", RESULTS / "counts.md"
ROLLOUTS, IMAGES, STEPS, EVALUATE_EVERY = 21, 144, 10, 3
SCORED, SCORED_AT_END = 240, 480
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Task:
    """Prompts and a reward. `measure` is the reward's mean in `world.metrics`."""

    title: str
    prompts: list[str]
    reward: Callable
    measure: str


@dataclass(frozen=True)
class Setting:
    """A trainer of `trl_fdfo` and its options, for a task."""

    task: str
    trainer: str
    options: dict[str, Any]


TASKS = {
    "exact": Task("All captions, the exact count", world.captions(), world.reward, "exact"),
    "tidy": Task(
        "Four and five alone, exact and of equal size: most pairs tie",
        [caption for caption, (count, *_) in world.ATTRIBUTES.items() if count >= 4],
        world.tidy_reward,
        "tidy",
    ),
}
# The best settings of benchmarks/convergence.py; nothing is tuned here.
FDFO = {"num_generations": 2, "learning_rate": 6e-4, "epsilon": 0.2, **FDFO_CHURN}
NFT = {"num_generations": 8, "learning_rate": 6e-4, "nft_beta": 1.0}
CPS = {"num_generations": 8, "learning_rate": 1.2e-3, "epsilon": 1e-3, "sde_type": "cps", "noise_level": 0.8}
# Of all tuples, updates are most of a rollout's time, so that ties have most to save.
ALL = {"timestep_fraction": 1.0}
OF_6 = {"num_candidates": 6}
ONE = {"per_device_prompt_batch_size": 1, "per_device_sampling_batch_size": 12}
SETTINGS = {
    "FDFO": Setting("exact", "FDFOTrainer", FDFO),
    "DiffusionNFT": Setting("exact", "DiffusionNFTTrainer", NFT),
    "Flow-GRPO, CPS": Setting("exact", "FlowGRPOTrainer", CPS),
    "FDFO, 2 of 6": Setting("exact", "FDFOTrainer", {**FDFO, **OF_6}),
    "FDFO, all tuples": Setting("exact", "FDFOTrainer", {**FDFO, **ALL}),
    "FDFO, tidy": Setting("tidy", "FDFOTrainer", {**FDFO, **ALL}),
    "FDFO, tidy, 2 of 6": Setting("tidy", "FDFOTrainer", {**FDFO, **ALL, **OF_6, "per_device_prompt_batch_size": 8}),
    "FDFO, tidy, micro-batches of one prompt": Setting("tidy", "FDFOTrainer", {**FDFO, **ALL, **ONE}),
}


@dataclass(frozen=True)
class Run:
    setting: str
    seed: int


def make_config(run: Run):
    """The options of a run, and its trainer's class."""
    import trl_fdfo
    from benchmarks.common import PACKAGED

    setting = SETTINGS[run.setting]
    trainer_class = getattr(trl_fdfo, setting.trainer)
    prompts = IMAGES // setting.options.get("num_candidates", setting.options["num_generations"])
    config = trainer_class.config_class(
        output_dir="outputs/counts",
        num_rollouts=ROLLOUTS,
        prompts_per_rollout=prompts,
        num_inference_steps=STEPS,
        optimizer_steps_per_rollout=6,
        seed=run.seed,
        **PACKAGED,
        **{"per_device_prompt_batch_size": prompts // 6, "timestep_fraction": 0.25, **setting.options},
    )
    return config, trainer_class


def make_trainer(run: Run):
    from datasets import Dataset

    task, (config, trainer_class) = TASKS[SETTINGS[run.setting].task], make_config(run)
    return trainer_class(config, world.load_pipeline(), task.reward, Dataset.from_dict({"prompt": task.prompts}))


def score(trainer, task: Task, images: int) -> dict[str, float]:
    """The metrics of this many images of the task's prompts, the same for all runs."""
    prompts = [prompt for prompt in task.prompts for _ in range(images // len(task.prompts))]
    seeds = range(10**6, 10**6 + len(prompts))
    metrics = world.metrics(trainer.generate(prompts, seeds, num_inference_steps=STEPS), prompts)
    return {name: round(value, 5) for name, value in metrics.items()}


def score_untrained() -> dict[str, dict[str, float]]:
    """The metrics of each task before training, of as many images as at the end."""
    first = {task: next(name for name, setting in SETTINGS.items() if setting.task == task) for task in TASKS}
    trainers = {task: make_trainer(Run(name, SEEDS[0])) for task, name in first.items()}
    return {task: score(trainer, TASKS[task], SCORED_AT_END) for task, trainer in trainers.items()}


def train(run: Run) -> dict[str, Any]:
    """Trains one run, and scores it before the first rollout, after every third, and on more images at the end."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    torch.set_num_threads(1)
    task = TASKS[SETTINGS[run.setting].task]
    trainer = make_trainer(run)
    result: dict[str, Any] = {"run": asdict(run), "rollouts": [], "reward": [], "seconds": []}

    def note(rollout: int) -> None:
        result["rollouts"].append(rollout)
        result["reward"].append(score(trainer, task, SCORED)[task.measure])

    class Measure(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.process_time()

        def on_epoch_end(self, args, state, control, **kwargs):
            result["seconds"].append(round(time.process_time() - self.start, 3))
            rollout = round(state.global_step / args.steps_per_rollout)
            if rollout % EVALUATE_EVERY == 0:
                note(rollout)

    trainer.add_callback(Measure())
    trainer.pop_callback(PrinterCallback)
    note(0)
    try:
        trainer.train()
        result["end"] = score(trainer, task, SCORED_AT_END)
    except RuntimeError as error:  # a watchdog ended a setting that is too bold
        result["failed"] = f"{type(error).__name__}: {error}"
    for name in ("frac_reward_zero_std", "frac_updates_left_out"):
        result[name] = [round(log[name], 4) for log in trainer.state.log_history if name in log]
    return result


def load() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.is_file() else []


def run_missing(runs: list[Run], deadline: float) -> None:
    done = {Run(**result["run"]) for result in load()}
    for run in runs:
        if run in done or time.time() >= deadline:
            continue
        result = train(run)
        RESULTS.mkdir(exist_ok=True)
        with RUNS.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {run}: {result.get('failed') or result['reward']}", flush=True)


# The report -----------------------------------------------------------------------------------------------------------


def report(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Counts, with a reward of 0 or 1",
        "",
        f"{ROLLOUTS} rollouts of {IMAGES} images, {STEPS} steps. {LEGEND}",
        "",
    ]
    for name in TASKS:
        names = [setting for setting, its in SETTINGS.items() if its.task == name]
        members = {setting: [result for result in results if result["run"]["setting"] == setting] for setting in names}
        if members[names[0]]:
            before = json.loads(BEFORE.read_text())[name]
            lines += [f"## {TASKS[name].title}", "", *comparison_table(TASKS[name], members, before), ""]
    return "\n".join([*lines, f"Measured on {machine()}; `{RUNS.name}` has every run.", ""])


LEGEND = (
    "Medians over seeds, and the range in parentheses. *ties*: the share of prompts whose images all have one reward. "
    "*left out*: the share of micro-batches that are not computed. The end is scored "
    f"on {SCORED_AT_END} images, where a share of 0.2 has a standard error of {(0.2 * 0.8 / SCORED_AT_END) ** 0.5:.3f}; the "
    f"mean over the run is that of {ROLLOUTS // EVALUATE_EVERY + 1} scores on {SCORED} images each."
)


def comparison_table(task: Task, members: dict[str, list[dict[str, Any]]], before: dict[str, float]) -> list[str]:
    """A row for the pipeline `before` training, and one per setting that has runs."""
    header = ["", f"{task.measure} at the end", "mean over the run", "distance of two right images", "ties", "left out"]
    header += ["CPU s per rollout", "whole run", "runs"]
    start = f"{next(iter(members.values()))[0]['reward'][0]:.3f}"
    rows = [["before", f"{before[task.measure]:.3f}", start, f"{before['diversity']:.3f}", *[""] * (len(header) - 4)]]
    for name, runs in members.items():
        ended = [run for run in runs if "end" in run]
        if not ended:
            continue
        cost = statistics.median(seconds for run in runs for seconds in run["seconds"])
        ties = [ratio for run in runs for ratio in run["frac_reward_zero_std"]]
        left_out = [ratio for run in runs for ratio in run["frac_updates_left_out"]]
        rows.append(
            [
                name,
                spread(run["end"][task.measure] for run in ended),
                spread(map(over_run, runs)),
                spread(run["end"]["diversity"] for run in ended),
                f"{statistics.fmean(ties):.2f}",
                f"{statistics.fmean(left_out):.2f}" if left_out else "",
                f"{cost:.2f}",
                f"{ROLLOUTS * cost:.0f} s",
                f"{len(runs)}" + ("" if len(ended) == len(runs) else f", {len(runs) - len(ended)} ended by a watchdog"),
            ]
        )
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Only report; run nothing.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no run after this time.")
    args = parser.parse_args()
    if not args.report:
        if not BEFORE.is_file():
            BEFORE.write_text(json.dumps(score_untrained(), indent=2) + "\n")
        run_missing([Run(name, seed) for seed in SEEDS for name in SETTINGS], time.time() + 60 * args.minutes)
    text = report(load())
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
