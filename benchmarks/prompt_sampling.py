"""
Measures what `prompt_sampling="informative"` brings for a reward of 0 and 1, on the packaged pipeline.

    python benchmarks/prompt_sampling.py             # the runs that results/prompt_sampling.jsonl lacks, then the report
    python benchmarks/prompt_sampling.py --report    # the report alone: results/prompt_sampling.md

The reward is the strict check. Runs draw from two datasets: the 54 captions alone, of which the pipeline draws each rightly at
times; and these with 162 captions of shapes that it has never seen, which are never right, so that three of four prompts
always tie. A run takes one to two minutes of an idle core; its score is the share of right images, over 8 of each of the 54
captions, every fifth rollout, from seeds that training does not see. CPU seconds are of the rollouts and their updates alone.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

RESULTS = Path(__file__).parent / "results"
RUNS, REPORT = RESULTS / "prompt_sampling.jsonl", RESULTS / "prompt_sampling.md"

ROLLOUTS, EVALUATE_EVERY, SEEDS = 30, 5, (1,)
SAMPLINGS = ("uniform", "informative")
DATASETS = {"captions": "the 54 captions", "mostly unsolvable": "these and 162 unsolvable ones"}
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


def train(dataset: str, sampling: str, seed: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from benchmarks.common import PACKAGED
    from trl_fdfo import FDFOConfig, FDFOTrainer, shapes

    torch.set_num_threads(1)
    config = FDFOConfig(
        output_dir="outputs/prompt_sampling",
        num_rollouts=ROLLOUTS,
        prompts_per_rollout=72,
        per_device_prompt_batch_size=12,
        num_inference_steps=10,
        timestep_fraction=0.25,
        churn_schedule="prior",
        churn=0.26,
        churn_kwargs={"spread": 0.0},
        optimizer_steps_per_rollout=6,
        learning_rate=6e-4,  # the best of convergence.py, with this epsilon, on a quarter of the tuples
        epsilon=0.2,
        prompt_sampling=sampling,
        seed=seed,
        **PACKAGED,
    )
    trainer = FDFOTrainer(config, shapes.load_pipeline(), is_right, Dataset.from_dict({"prompt": prompts_of(dataset)}))
    result: dict[str, Any] = {"dataset": dataset, "sampling": sampling, "seed": seed, "right": [], "seconds": []}

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
    if sampling == "informative":
        result["drawn"] = [round(log["frac_prompts_drawn"], 4) for log in logs]
    return result


def report(runs: list[dict[str, Any]]) -> str:
    mean = lambda values: f"{statistics.mean(values):.2f}"
    checkpoints = range(EVALUATE_EVERY, ROLLOUTS + 1, EVALUATE_EVERY)
    lines = [
        "# Prompts that always tie, on the packaged pipeline",
        "",
        f"FDFO, 10 steps, a quarter of the tuples, a reward of 0 and 1; {ROLLOUTS} rollouts of 72 prompts, 2 images of each. The "
        f"share of right images is over 8 of each of the 54 captions; {len(SEEDS)} seed. `python benchmarks/prompt_sampling.py`, "
        "one core of an AMD EPYC server.",
    ]
    for dataset, title in DATASETS.items():
        of_dataset = [run for run in runs if run["dataset"] == dataset]
        if not of_dataset:
            continue
        by = {sampling: [run for run in of_dataset if run["sampling"] == sampling] for sampling in SAMPLINGS}
        start = mean([run["right"][0] for run in of_dataset])
        lines += ["", f"## Drawn from {title}", ""]
        lines += [
            "| rollouts | " + " | ".join(f"right images, {sampling}" for sampling in SAMPLINGS) + " |",
            "|---|---|---|",
        ]
        lines.append(f"| 0 | {start} | {start} |")
        for number, rollouts in enumerate(checkpoints, 1):
            cells = [mean([run["right"][number] for run in by[sampling]]) for sampling in SAMPLINGS]
            lines.append(f"| {rollouts} | " + " | ".join(cells) + " |")
        for name, value in (
            ("prompts that tie, rollouts 1 to 15", lambda run: statistics.mean(run["tied"][:15])),
            ("prompts that tie, rollouts 16 to 30", lambda run: statistics.mean(run["tied"][15:])),
            ("CPU s per rollout", lambda run: run["seconds"][-1] / ROLLOUTS),
        ):
            lines.append(f"| {name} | " + " | ".join(mean([value(run) for run in by[s]]) for s in SAMPLINGS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the report")
    only_report = parser.parse_args().report
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    done = {(run["dataset"], run["sampling"], run["seed"]) for run in runs}
    for seed, dataset, sampling in itertools.product(SEEDS, DATASETS, SAMPLINGS):
        if only_report or (dataset, sampling, seed) in done:
            continue
        runs.append(train(dataset, sampling, seed))
        with open(RUNS, "a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    REPORT.write_text(report(runs))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
