"""
Measures what the options against ties bring for a reward of 0 and 1, on the packaged pipeline: `num_candidates` and
`prompt_sampling="informative"`.

    python benchmarks/sparse_rewards.py             # the runs that results/sparse_rewards.jsonl lacks, then the report
    python benchmarks/sparse_rewards.py --report    # the report alone: results/sparse_rewards.md

The reward is the strict check. Runs draw from two datasets: the 54 captions alone, of which the pipeline draws each rightly at
times; and these with 162 captions of shapes that it has never seen, which are never right, so that three of four prompts
always tie. All rollouts have 144 images: with more candidates of a prompt they have fewer prompts. A run takes one to two
minutes of an idle core; its score is the share of right images, over 8 of each of the 54 captions, every fifth rollout, from
seeds that training does not see. CPU seconds are of the rollouts and their updates alone.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import time
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.convergence import FDFO_CHURN, RESULTS, duration, machine, spread, table


RUNS, REPORT = RESULTS / "sparse_rewards.jsonl", RESULTS / "sparse_rewards.md"

ROLLOUTS, IMAGES, EVALUATE_EVERY = 30, 144, 5
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "informative": {"prompt_sampling": "informative"},
    "2 of 4": {"num_candidates": 4},
    "informative, 2 of 4": {"prompt_sampling": "informative", "num_candidates": 4},
    "informative, 2 of 6": {"prompt_sampling": "informative", "num_candidates": 6},
}
DATASETS = {"captions": "the 54 captions", "mostly unsolvable": "these and 162 unsolvable ones"}
SEEDS = {"captions": (1,), "mostly unsolvable": (1, 2, 3)}
UNKNOWN_SHAPES = ("hexagon", "star", "ring", "heart", "arrow", "spiral", "crescent", "pentagon", "square")


def prompts_of(dataset: str) -> list[str]:
    from trl_fdfo import shapes

    unsolvable = [
        f"a {color} {shape} on a {background} background"
        for color, shape, background in itertools.product(shapes.COLORS, UNKNOWN_SHAPES, shapes.BACKGROUNDS)
    ]
    return shapes.captions() + (unsolvable if dataset == "mostly unsolvable" else [])


def is_right(images, prompts: list[str]) -> list[float]:
    """The strict check: 1 or 0. 0 for shapes that it does not know."""
    from trl_fdfo import shapes

    known = set(shapes.captions())
    solvable = [n for n, prompt in enumerate(prompts) if prompt in known]
    rewards = [0.0] * len(prompts)
    if solvable:
        for n, right in zip(solvable, shapes.strict(images[solvable], [prompts[n] for n in solvable]).tolist()):
            rewards[n] = float(right)
    return rewards


def train(dataset: str, setting: str, seed: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from benchmarks.common import PACKAGED
    from trl_fdfo import FDFOConfig, FDFOTrainer, shapes

    torch.set_num_threads(1)
    options = SETTINGS[setting]
    prompts_per_rollout = IMAGES // options.get("num_candidates", 2)
    config = FDFOConfig(
        output_dir="outputs/sparse_rewards",
        num_rollouts=ROLLOUTS,
        prompts_per_rollout=prompts_per_rollout,
        per_device_prompt_batch_size=prompts_per_rollout // 6,
        num_inference_steps=10,
        timestep_fraction=0.25,
        optimizer_steps_per_rollout=6,
        learning_rate=6e-4,  # the best of convergence.py, with this epsilon, on a quarter of the tuples
        epsilon=0.2,
        seed=seed,
        **FDFO_CHURN,
        **PACKAGED,
        **options,
    )
    trainer = FDFOTrainer(config, shapes.load_pipeline(), is_right, Dataset.from_dict({"prompt": prompts_of(dataset)}))
    result: dict[str, Any] = {"dataset": dataset, "setting": setting, "seed": seed, "right": [], "seconds": []}

    def share_of_right() -> float:
        prompts = [caption for caption in shapes.captions() for _ in range(8)]
        images = trainer.generate(prompts, range(10**6, 10**6 + len(prompts)))
        return shapes.strict(images, prompts).float().mean().item()

    class Watch(TrainerCallback):
        seconds = 0.0

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.process_time()

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seconds += time.process_time() - self.start
            rollout = state.global_step // args.steps_per_rollout
            if rollout % EVALUATE_EVERY == 0:
                result["right"].append(round(share_of_right(), 4))
                result["seconds"].append(round(self.seconds, 1))

    trainer.add_callback(Watch())
    trainer.pop_callback(PrinterCallback)
    result["right"].append(round(share_of_right(), 4))
    result["seconds"].append(0.0)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "frac_reward_zero_std" in log]
    result["tied"] = [round(log["frac_reward_zero_std"], 4) for log in logs]
    if "prompt_sampling" in options:
        result["drawn"] = [round(log["frac_prompts_drawn"], 4) for log in logs]
    return result


def rollouts_to(run: dict[str, Any], target: float) -> float:
    """Rollouts until this share of images is right, interpolated between scores; infinite if it never is."""
    for number, (low, high) in enumerate(itertools.pairwise(run["right"])):
        if low < target <= high:
            return EVALUATE_EVERY * (number + (target - low) / (high - low))
    return math.inf


def report(runs: list[dict[str, Any]]) -> str:
    lines = [
        "# Rewards that mostly tie, on the packaged pipeline",
        "",
        f"FDFO, 10 steps, a quarter of the tuples, a reward of 0 and 1; {ROLLOUTS} rollouts of {IMAGES} images. Medians over "
        "seeds, and the range. *ties*: the share of prompts whose images all have one reward, in the first half of the run and "
        "in the second. *to the end of plain*: rollouts, and CPU seconds, until as many images are right as in the median at the "
        "end of the plain runs.",
    ]
    header = [
        "",
        "right before",
        "right after",
        "ties",
        "CPU s per rollout",
        "to the end of plain",
        "times as soon",
        "runs",
    ]
    for dataset, title in DATASETS.items():
        by = {s: [r for r in runs if (r["dataset"], r["setting"]) == (dataset, s)] for s in SETTINGS}
        end = statistics.median(run["right"][-1] for run in by["plain"])
        rows, plain = [], math.inf
        for setting, members in by.items():
            if not members:
                continue
            half = ROLLOUTS // 2
            ties = [
                statistics.mean(t for run in members for t in run["tied"][part])
                for part in (slice(half), slice(half, None))
            ]
            cost = statistics.median(run["seconds"][-1] / ROLLOUTS for run in members)
            needed = ROLLOUTS if setting == "plain" else statistics.median(rollouts_to(run, end) for run in members)
            plain = ROLLOUTS * cost if setting == "plain" else plain
            rows.append(
                [
                    setting,
                    f"{members[0]['right'][0]:.2f}",
                    spread(run["right"][-1] for run in members),
                    f"{ties[0]:.2f}, {ties[1]:.2f}",
                    f"{cost:.2f}",
                    duration(needed, cost),
                    f"{plain / (needed * cost):.2f}" if math.isfinite(needed) else "",
                    str(len(members)),
                ]
            )
        lines += ["", f"## Drawn from {title}", "", *table(header, rows)]
    return "\n".join([*lines, "", f"`python benchmarks/sparse_rewards.py`, {machine()}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Only report; run nothing.")
    only_report = parser.parse_args().report
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    done = {(run["dataset"], run["setting"], run["seed"]) for run in runs}
    wanted = [(d, s, seed) for d in reversed(DATASETS) for seed in SEEDS[d] for s in SETTINGS]
    for dataset, setting, seed in [] if only_report else wanted:
        if (dataset, setting, seed) in done:
            continue
        runs.append(train(dataset, setting, seed))
        with open(RUNS, "a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        print(time.strftime("%H:%M:%S"), dataset, setting, seed, runs[-1]["right"], flush=True)
    REPORT.write_text(report(runs))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
