"""
Measures what helps where most prompts tie, for a reward of 0 and 1, on the packaged pipeline: to leave out tied prompts,
`num_candidates`, more images of a prompt, and `prompt_sampling="informative"`.

    python benchmarks/sparse_rewards.py             # the runs that results/sparse_rewards.jsonl lacks, then the report
    python benchmarks/sparse_rewards.py --report    # the report alone: results/sparse_rewards.md

The reward is the strict check. Runs draw from two datasets: the 54 captions alone, of which the pipeline draws each rightly at
times; and these with 162 captions of shapes that it has never seen, which are never right, so that three of four prompts
always tie. All rollouts have 144 images, sampled in one call: with more images of a prompt they have fewer prompts. A run takes
two to three minutes of an idle core; its score is the share of right images, over 8 of each of the 54 captions, every fifth
rollout, from seeds that training does not see. CPU seconds are of the rollouts and their updates alone.
"""

import argparse
import itertools
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.convergence import FDFO_CHURN, RESULTS, duration, reached, spread, table
from benchmarks.runs import load, machine, number_of, run_missing, train_to_the_end


RUNS, REPORT = RESULTS / "sparse_rewards.jsonl", RESULTS / "sparse_rewards.md"

ROLLOUTS, IMAGES, EVALUATE_EVERY = 60, 144, 5
TARGETS = (30, 60)  # rollouts of the plain run, whose scores then the others are to reach
PLAIN = "pairs, ties computed"
INFORMATIVE = {"prompt_sampling": "informative"}
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "pairs": {},
    "informative pairs": INFORMATIVE,
    "2 of 6": {"num_candidates": 6},
    "informative, 2 of 6": {"num_candidates": 6, **INFORMATIVE},
    "6 images": {"num_generations": 6},
    "informative, 6 images": {"num_generations": 6, **INFORMATIVE},
}
DATASETS = {"mostly unsolvable": "the 54 captions and 162 unsolvable ones", "captions": "the 54 captions"}
SEEDS = {"mostly unsolvable": (1, 2, 3), "captions": (1,)}
UNKNOWN_SHAPES = ("hexagon", "star", "ring", "heart", "arrow", "spiral", "crescent", "pentagon", "square")


@dataclass(frozen=True)
class Run:
    dataset: str
    setting: str
    seed: int


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


def make_trainer(run: Run, rollouts: int = ROLLOUTS):
    from datasets import Dataset

    from benchmarks.common import PACKAGED
    from trl_fdfo import FDFOConfig, FDFOTrainer, shapes

    class Plain(FDFOTrainer):
        """Computes the updates of ties too, whose gradients are 0."""

        def ties_have_no_loss(self):
            return False

    options = {"num_generations": 2, **SETTINGS[run.setting]}
    prompts = IMAGES // options.get("num_candidates", options["num_generations"])
    config = FDFOConfig(
        output_dir="outputs/sparse_rewards",
        num_rollouts=rollouts,
        prompts_per_rollout=prompts,
        # Micro-batches of one prompt: each tie is left out by itself.
        per_device_prompt_batch_size=prompts // 6 if run.setting == PLAIN else 1,
        per_device_sampling_batch_size=prompts,
        per_device_eval_batch_size=54,
        num_inference_steps=10,
        timestep_fraction=0.25,
        optimizer_steps_per_rollout=6,
        learning_rate=6e-4,  # the best of convergence.py, with this epsilon, on a quarter of the tuples
        epsilon=0.2,
        seed=run.seed,
        **FDFO_CHURN,
        **PACKAGED,
        **options,
    )
    dataset = Dataset.from_dict({"prompt": prompts_of(run.dataset)})
    return (Plain if run.setting == PLAIN else FDFOTrainer)(config, shapes.load_pipeline(), is_right, dataset)


def train(run: Run) -> dict[str, Any]:
    """Trains one run, and scores it before the first rollout and after every fifth."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from trl_fdfo import shapes

    torch.set_num_threads(1)
    trainer = make_trainer(run)
    result: dict[str, Any] = {"run": asdict(run), "rollouts": [], "reward": [], "seconds": []}

    def note(rollout: int) -> None:
        prompts = [caption for caption in shapes.captions() for _ in range(8)]
        images = trainer.generate(prompts, range(10**6, 10**6 + len(prompts)))
        result["rollouts"].append(rollout)
        result["reward"].append(round(shapes.strict(images, prompts).float().mean().item(), 4))

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.process_time()

        def on_epoch_end(self, args, state, control, **kwargs):
            result["seconds"].append(round(time.process_time() - self.start, 3))
            rollout = state.global_step // args.steps_per_rollout
            if rollout % EVALUATE_EVERY == 0:
                note(rollout)

    trainer.add_callback(Watch())
    trainer.pop_callback(PrinterCallback)
    note(0)
    train_to_the_end(trainer, result)
    for name, metric in (("ties", "frac_reward_zero_std"), ("left_out", "frac_updates_left_out")):
        result[name] = [round(log[metric], 4) for log in trainer.state.log_history if metric in log]
    return result


def report(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Rewards that mostly tie, on the packaged pipeline",
        "",
        f"FDFO, 10 steps, a quarter of the tuples, a reward of 0 and 1; {ROLLOUTS} rollouts of {IMAGES} images. Medians over "
        "seeds, and the range. *ties*: the share of prompts whose images all have one reward, in the first half of the run and "
        f"in the second; *left out*: the share of updates that are not computed. In all rows but *{PLAIN}* a tie is left out. "
        "*to 0.50*: rollouts, and CPU seconds, until that share of images is right for the first time: the shares that the "
        f"median of the first row has after {TARGETS[0]} and after {TARGETS[1]} rollouts. *times as soon*: as that row.",
    ]
    for dataset, title in DATASETS.items():
        by = {s: [r for r in results if (r["run"]["dataset"], r["run"]["setting"]) == (dataset, s)] for s in SETTINGS}
        by = {setting: members for setting, members in by.items() if members}
        if not by:
            continue
        first = [run for run in next(iter(by.values())) if "failed" not in run]
        targets = [statistics.median(r["reward"][r["rollouts"].index(n)] for r in first) for n in TARGETS if first]
        header = ["", "right before", "right after", "ties", "left out", "CPU s per rollout"]
        for target in targets:
            header += [f"to {target:.2f}", "times as soon"]
        rows, of_first = [], {}
        for setting, members in by.items():
            ended = [run for run in members if "failed" not in run]
            if not ended:
                rows.append([setting, f"{members[0]['reward'][0]:.2f}", *[""] * (len(header) - 2), number_of(members)])
                continue
            cost = statistics.median(statistics.fmean(run["seconds"]) for run in ended)
            halves = [
                statistics.fmean(t for run in ended for t in run["ties"][part])
                for part in (slice(ROLLOUTS // 2), slice(ROLLOUTS // 2, None))
            ]
            row = [
                setting,
                f"{members[0]['reward'][0]:.2f}",
                spread(run["reward"][-1] for run in ended),
                f"{halves[0]:.2f}, {halves[1]:.2f}",
                f"{statistics.fmean(t for run in members for t in run['left_out'] or [0]):.2f}",
                f"{cost:.2f}",
            ]
            for target in targets:
                needed = statistics.median(reached(run, target) for run in members)
                of_first.setdefault(target, needed * cost)
                soon = f"{of_first[target] / (needed * cost):.2f}" if math.isfinite(needed) else ""
                row += [duration(needed, cost), soon]
            rows.append([*row, number_of(members)])
        lines += ["", f"## Drawn from {title}", "", *table([*header, "runs"], rows)]
    return "\n".join([*lines, "", f"`python benchmarks/sparse_rewards.py`, {machine()}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Only report; run nothing.")
    parser.add_argument("--workers", type=int, default=1, help="Runs at a time, a core each.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no run after this time.")
    args = parser.parse_args()
    if not args.report:
        runs = [Run(dataset, setting, seed) for dataset in DATASETS for seed in SEEDS[dataset] for setting in SETTINGS]
        run_missing(runs, train, RUNS, args.workers, time.time() + 60 * args.minutes)
    text = report(load(RUNS))
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
