"""
Compares algorithms on the world "counts", whose reward is 0 or 1.

    python benchmarks/counts/comparison.py             # the runs that results/counts.jsonl lacks, then the report
    python benchmarks/counts/comparison.py --report    # the report alone: results/counts.md

A run takes some minutes on one core. A run that has a result is not repeated. All have rollouts of equally many images, and are
scored on the same 480 images of the pipeline's own sampler, from seeds that training does not see, before the first rollout and
after every 15th one. Settings are those of benchmarks/convergence.py, with the learning rate that is best here on a seed that
is used nowhere else. CPU seconds are rollouts times the cost of one, which is measured in turn, as there.
"""

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from benchmarks.convergence import ALGORITHMS, FDFO_CHURN, RESULTS, duration, final, reached, spread, table
from benchmarks.counts import world
from benchmarks.runs import load, measure_costs, number_of, run_missing, train_to_the_end


RUNS, COSTS, REPORT = RESULTS / "counts.jsonl", RESULTS / "counts_costs.json", RESULTS / "counts.md"
ROLLOUTS, IMAGES, STEPS, EVALUATE_EVERY, SCORED = 90, 144, 10, 15, 480
TARGETS = (0.25, 0.3, 0.35)
TUNING_SEED, SEEDS = 100, (1, 2, 3)

QUARTER = {"timestep_fraction": 0.25}


@dataclass(frozen=True)
class Setting:
    """A trainer of `trl_fdfo`, its options, and the learning rates that are tried."""

    trainer: str
    options: dict[str, Any]
    learning_rates: tuple[float, ...]


SETTINGS = {
    "FDFO": Setting(
        "FDFOTrainer", {"num_generations": 2, "epsilon": 0.2, **FDFO_CHURN, **QUARTER}, (3e-4, 6e-4, 1.2e-3)
    ),
    "FDFO, fast": Setting(
        "FDFOTrainer",
        {**ALGORITHMS["FDFO, fast"].options, "epsilon": 0.8, "timestep_fraction": 0.1},
        (3e-4, 6e-4, 1.2e-3, 2.4e-3),
    ),
    "DiffusionNFT": Setting(
        "DiffusionNFTTrainer", {"num_generations": 8, "nft_beta": 1.0, **QUARTER}, (1.5e-4, 3e-4, 6e-4)
    ),
    "AWM": Setting("AWMTrainer", {"num_generations": 8, "epsilon": 0.0025, **QUARTER}, (3e-4, 6e-4, 1.2e-3)),
    "RAM": Setting("RAMTrainer", {"num_generations": 8, "reward_multiplier": 56.0, **QUARTER}, (1.5e-4, 3e-4, 6e-4)),
    "Flow-GRPO, CPS": Setting(
        "FlowGRPOTrainer",
        {**ALGORITHMS["Flow-GRPO, CPS"].options, "epsilon": 1e-3, **QUARTER},
        (1.5e-4, 3e-4, 6e-4, 1.2e-3),
    ),
}


@dataclass(frozen=True)
class Run:
    setting: str
    learning_rate: float
    seed: int


def make_trainer(run: Run, rollouts: int = ROLLOUTS):
    from datasets import Dataset

    import trl_fdfo
    from benchmarks.common import PACKAGED

    options = SETTINGS[run.setting].options
    trainer_class = getattr(trl_fdfo, SETTINGS[run.setting].trainer)
    prompts = IMAGES // options.get("num_candidates", options["num_generations"])
    config = trainer_class.config_class(
        output_dir="outputs/counts",
        num_rollouts=rollouts,
        prompts_per_rollout=prompts,
        per_device_prompt_batch_size=prompts // 6,
        num_inference_steps=STEPS,
        optimizer_steps_per_rollout=6,
        learning_rate=run.learning_rate,
        seed=run.seed,
        **PACKAGED,
        **options,
    )
    captions = Dataset.from_dict({"prompt": world.captions()})
    return trainer_class(config, world.load_pipeline(), world.reward, captions)


def train(run: Run) -> dict[str, Any]:
    """Trains one run, and scores it before the first rollout and after every 15th."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    torch.set_num_threads(1)
    trainer = make_trainer(run)
    result: dict[str, Any] = {"run": asdict(run), "rollouts": [], "reward": [], "diversity": []}

    def note(rollout: int) -> None:
        prompts = [prompt for prompt in world.captions() for _ in range(SCORED // len(world.captions()))]
        seeds = range(10**6, 10**6 + len(prompts))
        metrics = world.metrics(trainer.generate(prompts, seeds), prompts)
        result["rollouts"].append(rollout)
        result["reward"].append(round(metrics["exact"], 5))
        result["diversity"].append(round(metrics["diversity"], 5))

    class Evaluate(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            rollout = round(state.global_step / args.steps_per_rollout)
            if rollout % EVALUATE_EVERY == 0:
                note(rollout)

    trainer.add_callback(Evaluate())
    trainer.pop_callback(PrinterCallback)
    note(0)
    train_to_the_end(trainer, result)
    name = "frac_reward_zero_std"
    result["ties"] = [round(log[name], 4) for log in trainer.state.log_history if name in log]
    return result


# The runs -------------------------------------------------------------------------------------------------------------


def grid() -> list[Run]:
    return [Run(name, rate, TUNING_SEED) for name, setting in SETTINGS.items() for rate in setting.learning_rates]


def best(results: list[dict[str, Any]]) -> dict[str, Run]:
    """Of each setting that was tuned the run with the highest mean of the last two scores, with the seed that tunes."""
    tuned = sorted(of(results, grid()), key=final)
    best = {result["run"]["setting"]: Run(**result["run"]) for result in tuned}
    return {name: best[name] for name in SETTINGS if name in best}


def of(results: list[dict[str, Any]], runs: Iterable[Run]) -> list[dict[str, Any]]:
    wanted = set(runs)
    return [result for result in results if Run(**result["run"]) in wanted]


# The report -----------------------------------------------------------------------------------------------------------


def report(results: list[dict[str, Any]], costs: dict[str, Any]) -> str:
    header = ["", "learning rate", "exact at the end", "distance of two right images", "ties", "CPU s per rollout"]
    header += [*(f"to {target:.2f}" for target in TARGETS), "whole run", "runs"]
    rows = []
    for name, setting in best(results).items():
        if not (runs := of(results, (replace(setting, seed=seed) for seed in SEEDS))):
            continue
        ties = [ratio for run in runs for ratio in run["ties"]]
        ended, cost = [run for run in runs if "failed" not in run], costs["seconds_per_rollout"][name]
        times = [statistics.median(reached(run, target) for run in runs) for target in TARGETS]
        rows.append(
            [
                name,
                f"{setting.learning_rate:g}",
                spread(run["reward"][-1] for run in ended),
                spread(run["diversity"][-1] for run in ended),
                f"{statistics.fmean(ties):.2f}" if ties else "",
                f"{cost:.2f}",
                *(duration(time, cost) for time in times),
                duration(ROLLOUTS, cost),
                number_of(runs),
            ]
        )
    return "\n".join(
        [
            "# Counts, with a reward of 0 or 1",
            "",
            f"{ROLLOUTS} rollouts of {IMAGES} images, {STEPS} steps. Before training {results[0]['reward'][0]:.3f} of the images are "
            "exact. Medians over seeds, and the range in parentheses. *ties*: the share of prompts whose images all have one "
            "reward. *to 0.25*: rollouts, and CPU seconds, until that share of images is exact. It is scored on "
            f"{SCORED} images, where a share of 0.3 has a standard error of {(0.3 * 0.7 / SCORED) ** 0.5:.3f}.",
            "",
            *table(header, rows),
            "",
            "## The learning rates",
            "",
            f"Seed {TUNING_SEED}: the mean of the last two scores, of which the highest decides, and the highest score of the run. An "
            "empty cell was not run.",
            "",
            *grid_table(results),
            "",
            f"Costs were measured on {costs['machine']}; `{RUNS.name}` has every run.",
            "",
        ]
    )


def grid_table(results: list[dict[str, Any]]) -> list[str]:
    rates = sorted({run.learning_rate for run in grid()})
    rows = []
    for name, chosen in best(results).items():
        row = [name]
        for run in (Run(name, rate, TUNING_SEED) for rate in rates):
            cells = [
                "ended by a watchdog" if "failed" in result else f"{final(result):.3f}, {max(result['reward']):.3f}"
                for result in of(results, [run])
            ]
            row.append("".join(f"**{cell}**" if run == chosen else cell for cell in cells))
        rows.append(row)
    return table(["", *(f"{rate:g}" for rate in rates)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Only report; run nothing.")
    parser.add_argument("--workers", type=int, default=1, help="Runs at a time, a core each.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no run after this time.")
    args = parser.parse_args()
    if not args.report:
        deadline = time.time() + 60 * args.minutes
        run_missing(grid(), train, RUNS, args.workers, deadline)
        settings = best(load(RUNS))
        runs = [replace(setting, seed=seed) for seed in SEEDS for setting in settings.values()]
        run_missing(runs, train, RUNS, args.workers, deadline)
        costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
        if not settings.keys() <= costs.get("seconds_per_rollout", {}).keys():
            trainers = {name: functools.partial(make_trainer, run, rollouts=1) for name, run in settings.items()}
            COSTS.write_text(json.dumps(measure_costs(trainers, costs), indent=2) + "\n")
    text = report(load(RUNS), json.loads(COSTS.read_text()))
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
