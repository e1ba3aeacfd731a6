"""
Compares algorithms on the world "counts", whose reward is 0 or 1.

    python benchmarks/counts/comparison.py             # the runs that results/counts.jsonl lacks, then the report
    python benchmarks/counts/comparison.py --report    # the report alone: results/counts.md

A run takes some minutes on one core. A run that has a result is not repeated. All have rollouts of equally many images, and are
scored on the same 480 images of the pipeline's own sampler, from seeds that training does not see, before the first rollout and
after every 15th one. Settings are those of benchmarks/convergence.py; nothing is tuned here.
"""

import argparse
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from benchmarks.convergence import ALGORITHMS, FDFO_CHURN, RESULTS, duration, machine, reached, spread, table
from benchmarks.counts import world
from benchmarks.runs import load, number_of, run_missing, train_to_the_end


RUNS, REPORT = RESULTS / "counts.jsonl", RESULTS / "counts.md"
ROLLOUTS, IMAGES, STEPS, EVALUATE_EVERY, SCORED = 90, 144, 10, 15, 480
TARGETS = (0.25, 0.3, 0.35)
SEEDS = (1, 2, 3)

QUARTER = {"timestep_fraction": 0.25}
# A trainer of `trl_fdfo` and its options.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "FDFO": (
        "FDFOTrainer",
        {"num_generations": 2, "learning_rate": 6e-4, "epsilon": 0.2, **FDFO_CHURN, **QUARTER},
    ),
    "FDFO, fast": (
        "FDFOTrainer",
        {**ALGORITHMS["FDFO, fast"].options, "learning_rate": 1.2e-3, "epsilon": 0.8, "timestep_fraction": 0.1},
    ),
    "DiffusionNFT": (
        "DiffusionNFTTrainer",
        {"num_generations": 8, "learning_rate": 6e-4, "nft_beta": 1.0, **QUARTER},
    ),
    "Flow-GRPO, CPS": (
        "FlowGRPOTrainer",
        {**ALGORITHMS["Flow-GRPO, CPS"].options, "learning_rate": 1.2e-3, "epsilon": 1e-3, **QUARTER},
    ),
}


@dataclass(frozen=True)
class Run:
    setting: str
    seed: int


def make_config(run: Run):
    """The options of a run, and its trainer's class."""
    import trl_fdfo
    from benchmarks.common import PACKAGED

    trainer, options = SETTINGS[run.setting]
    trainer_class = getattr(trl_fdfo, trainer)
    prompts = IMAGES // options.get("num_candidates", options["num_generations"])
    config = trainer_class.config_class(
        output_dir="outputs/counts",
        num_rollouts=ROLLOUTS,
        prompts_per_rollout=prompts,
        per_device_prompt_batch_size=prompts // 6,
        num_inference_steps=STEPS,
        optimizer_steps_per_rollout=6,
        seed=run.seed,
        **PACKAGED,
        **options,
    )
    return config, trainer_class


def train(run: Run) -> dict[str, Any]:
    """Trains one run, and scores it before the first rollout and after every 15th."""
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    torch.set_num_threads(1)
    config, trainer_class = make_config(run)
    trainer = trainer_class(
        config, world.load_pipeline(), world.reward, Dataset.from_dict({"prompt": world.captions()})
    )
    result: dict[str, Any] = {"run": asdict(run), "rollouts": [], "reward": [], "diversity": [], "seconds": []}

    def note(rollout: int) -> None:
        prompts = [prompt for prompt in world.captions() for _ in range(SCORED // len(world.captions()))]
        seeds = range(10**6, 10**6 + len(prompts))
        metrics = world.metrics(trainer.generate(prompts, seeds), prompts)
        result["rollouts"].append(rollout)
        result["reward"].append(round(metrics["exact"], 5))
        result["diversity"].append(round(metrics["diversity"], 5))

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
    train_to_the_end(trainer, result)
    name = "frac_reward_zero_std"
    result["ties"] = [round(log[name], 4) for log in trainer.state.log_history if name in log]
    return result


# The report -----------------------------------------------------------------------------------------------------------


def report(results: list[dict[str, Any]]) -> str:
    members = {name: [result for result in results if result["run"]["setting"] == name] for name in SETTINGS}
    header = ["", "exact before", "exact at the end", "distance of two right images", "ties", "CPU s per rollout"]
    header += [*(f"to {target:.2f}" for target in TARGETS), "whole run", "runs"]
    rows = []
    for name, runs in members.items():
        if not runs:
            continue
        ended = [run for run in runs if "failed" not in run]
        if not ended:
            rows.append([name, f"{runs[0]['reward'][0]:.3f}", *[""] * (len(header) - 3), number_of(runs)])
            continue
        cost = statistics.median(seconds for run in runs for seconds in run["seconds"])
        times = [statistics.median(reached(run, target) for run in runs) for target in TARGETS]
        rows.append(
            [
                name,
                f"{runs[0]['reward'][0]:.3f}",
                spread(run["reward"][-1] for run in ended),
                spread(run["diversity"][-1] for run in ended),
                f"{statistics.fmean(ratio for run in runs for ratio in run['ties']):.2f}",
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
            f"{ROLLOUTS} rollouts of {IMAGES} images, {STEPS} steps. Medians over seeds, and the range in parentheses. *ties*: the "
            "share of prompts whose images all have one reward. *to 0.25*: rollouts, and CPU seconds, until that share of "
            f"images is exact. It is scored on {SCORED} images, where a share of 0.3 has a standard error of "
            f"{(0.3 * 0.7 / SCORED) ** 0.5:.3f}.",
            "",
            *table(header, rows),
            "",
            f"Measured on {machine()}; `{RUNS.name}` has every run.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Only report; run nothing.")
    parser.add_argument("--workers", type=int, default=1, help="Runs at a time, a core each.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no run after this time.")
    args = parser.parse_args()
    if not args.report:
        runs = [Run(name, seed) for seed in SEEDS for name in SETTINGS]
        run_missing(runs, train, RUNS, args.workers, time.time() + 60 * args.minutes)
    text = report(load(RUNS))
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
