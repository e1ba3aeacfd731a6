"""
How soon FDFO and Flow-GRPO reach a reward on the packaged pipeline, from equally many images, each tuned over the same grid.

    python benchmarks/convergence.py             # the runs that benchmarks/results/convergence.jsonl lacks, then the report
    python benchmarks/convergence.py --report    # the report alone: results/convergence.md, docs/convergence.png

About three hours on two cores from nothing; a run that is there is not repeated. In order: the grid (one seed that is used
nowhere else), five seeds with each algorithm's best setting in four cells (10 and 20 steps; a quarter of the tuples and all),
what a rollout of each cell costs, and ablations of FDFO with three seeds.

A run is what its settings and seed say, to the bit on one machine, however busy that is. So CPU seconds are not taken from
the runs, which share their processor with others, but are rollouts times the cost of a rollout, and the costs of all cells
are measured in turn in one process.

Every run is scored on the same images, by the pipeline's own sampler: of each of the 54 captions 2 every third rollout, and 8 at
the end, from seeds that training does not see.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each run

RESULTS = Path(__file__).parent / "results"
RUNS, COSTS, REPORT = RESULTS / "convergence.jsonl", RESULTS / "convergence_costs.json", RESULTS / "convergence.md"
PICTURE = Path(__file__).parents[1] / "docs" / "convergence.png"

ROLLOUTS, IMAGES, EVALUATE_EVERY = 30, 144, 3
TUNING_SEED, SEEDS, ABLATION_SEEDS = 100, (1, 2, 3, 4, 5), (1, 2, 3)
LEARNING_RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)
# Ratios of different things: FDFO's moves by 0.05 in a step where Flow-GRPO's, of a mean log-likelihood, moves by 0.0003. The
# same multiples of what is usual for each.
CLIPS = {"FDFO": (0.05, 0.2, 0.8), "Flow-GRPO": (2.5e-4, 1e-3, 4e-3)}
CELLS = [(10, 0.25), (10, 1.0), (20, 0.25), (20, 1.0)]  # steps T, fraction of the tuples
TARGETS = (0.65, 0.70, 0.75, 0.80)

FDFO_CHURN = {"churn_schedule": "prior", "churn": 0.26}
ABLATIONS: dict[str, dict[str, Any]] = {
    "prior churn 0.065": {"churn": 0.065},
    "prior churn 1": {"churn": 1.0},
    "constant churn 0.026": {"churn_schedule": "constant", "churn": 0.026},
    "constant churn 0.0025": {"churn_schedule": "constant", "churn": 0.0025},
    "interval churn 0.26": {"churn_schedule": "interval"},
    "G = 3": {"num_generations": 3},
    "G = 4": {"num_generations": 4},
    "beta 0.025": {"beta": 0.025},
    "no whitening": {"whiten_direction": False},
    "reward gradient": {"direction": "reward_gradient"},
    "first level alone": {},  # where `prior` has its churn; see `FirstLevel`
}


@dataclass(frozen=True)
class Run:
    """What a run is: an algorithm, a cell, its setting, a seed, and the name of an ablation."""

    algorithm: str
    steps: int
    fraction: float
    learning_rate: float
    clip: float
    seed: int
    ablation: str = ""

    @property
    def cell(self) -> str:
        return f"{self.algorithm}, {self.steps} steps, {'all' if self.fraction == 1 else 'a quarter'}"


def make_trainer(run: Run, rollouts: int = ROLLOUTS):
    from datasets import Dataset

    from trl_fdfo import FDFOConfig, FDFOTrainer, FlowGRPOConfig, FlowGRPOTrainer, shapes

    class FirstLevel(FDFOTrainer):
        """Updates of the level alone whose noise differs."""

        def _trained_levels(self, rollout, batch):
            return [0] * self.args.num_trained_levels

    options = {"num_generations": 8}
    trainer_class, config_class = FlowGRPOTrainer, FlowGRPOConfig
    if run.algorithm == "FDFO":
        options = {"num_generations": 2, **FDFO_CHURN, **ABLATIONS.get(run.ablation, {})}
        trainer_class, config_class = FDFOTrainer, FDFOConfig
        if run.ablation == "first level alone":
            trainer_class = FirstLevel
    prompts = IMAGES // options["num_generations"]
    config = config_class(
        output_dir="outputs/convergence",
        num_rollouts=rollouts,
        prompts_per_rollout=prompts,
        per_device_prompt_batch_size=prompts // 6,
        num_inference_steps=run.steps,
        timestep_fraction=run.fraction,
        optimizer_steps_per_rollout=6,
        learning_rate=run.learning_rate,
        epsilon=run.clip,
        seed=run.seed,
        height=32,
        width=32,
        pipeline_kwargs={"max_sequence_length": 0},
        logging_images_steps=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    captions = Dataset.from_dict({"prompt": shapes.captions()})
    return trainer_class(config, shapes.load_pipeline(), shapes.reward, captions)


def train(run: Run) -> dict[str, Any]:
    """Scores of a run before it, after every third rollout, and more closely at the end."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from trl_fdfo import shapes

    torch.set_num_threads(1)
    trainer = make_trainer(run)
    result: dict[str, Any] = {"run": asdict(run), "rollouts": [], "reward": [], "strict": [], "diversity": []}

    def score(images_per_caption: int) -> dict[str, float]:
        prompts = [caption for caption in shapes.captions() for _ in range(images_per_caption)]
        images = trainer.generate(prompts, range(10**6, 10**6 + len(prompts)))
        metrics = shapes.metrics(images, prompts)
        metrics["reward"] = shapes.reward(images, prompts).mean().item()
        return metrics

    def note(rollout: int) -> None:
        metrics = score(2)
        result["rollouts"].append(rollout)
        result["reward"].append(round(metrics["reward"], 5))
        result["strict"].append(round(metrics["strict_accuracy"], 5))
        result["diversity"].append(round(metrics["diversity/pixels"], 5))

    class Evaluate(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            rollout = round(state.global_step / args.steps_per_rollout)
            if rollout % EVALUATE_EVERY == 0:
                note(rollout)

    trainer.add_callback(Evaluate())
    trainer.pop_callback(PrinterCallback)
    note(0)
    try:
        trainer.train()
        result["end"] = {name: round(value, 5) for name, value in score(8).items()}
    except RuntimeError as error:  # a watchdog: the setting is too bold
        result["failed"] = f"{type(error).__name__}: {error}"
    return result


def measure_costs(settings: dict[str, Run], rounds: int = 4) -> dict[str, Any]:
    """CPU seconds of a rollout and its updates in each cell, the median of `rounds` in turn, on one thread."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    torch.set_num_threads(1)

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.process_time()

        def on_epoch_end(self, args, state, control, **kwargs):
            self.seconds = time.process_time() - self.start

    trainers, clock = {}, Clock()
    for name, run in settings.items():
        trainers[name] = make_trainer(run, rollouts=1)
        trainers[name].add_callback(clock)
        trainers[name].pop_callback(PrinterCallback)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, trainer in random.sample(list(trainers.items()), len(trainers)):
            trainer.train()
            seconds[name].append(clock.seconds)
    return {
        "machine": machine(),
        "seconds_per_rollout": {name: round(statistics.median(values[1:]), 3) for name, values in seconds.items()},
        "rounds": {name: [round(value, 3) for value in values[1:]] for name, values in seconds.items()},
    }


def machine() -> str:
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return f"one core of {model}, torch {torch.__version__}"


# What is run -----------------------------------------------------------------------------------------------------------


def grid() -> list[Run]:
    steps, fraction = CELLS[0]
    return [
        Run(algorithm, steps, fraction, rate, clip, TUNING_SEED)
        for algorithm, clips in CLIPS.items()
        for rate in LEARNING_RATES
        for clip in clips
    ]


def area(result: dict[str, Any]) -> float:
    """Mean reward over the course of a run: high where it rises soon and stays."""
    return -math.inf if "failed" in result else statistics.fmean(result["reward"])


def best(results: list[dict[str, Any]]) -> dict[str, Run]:
    """The setting of each algorithm with the highest mean reward on the grid."""
    on_grid = [result for result in results if result["run"]["seed"] == TUNING_SEED]
    return {
        algorithm: Run(**max((r for r in on_grid if r["run"]["algorithm"] == algorithm), key=area)["run"])
        for algorithm in CLIPS
    }


def comparison(settings: dict[str, Run]) -> list[Run]:
    return [
        replace(setting, steps=steps, fraction=fraction, seed=seed)
        for steps, fraction in CELLS
        for seed in SEEDS
        for setting in settings.values()
    ]


def ablations(setting: Run) -> list[Run]:
    return [replace(setting, seed=seed, ablation=name) for seed in ABLATION_SEEDS for name in ABLATIONS]


def load() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.is_file() else []


def run_missing(runs: list[Run], workers: int, deadline: float) -> None:
    done = {Run(**result["run"]) for result in load()}
    missing = [run for run in runs if run not in done]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {}
        queue: Iterator[Run] = iter(missing)
        for run in queue:
            futures[pool.submit(train, run)] = run
            if len(futures) == workers:
                break
        while futures:
            future = next(as_completed(futures))
            run = futures.pop(future)
            result = future.result()
            RESULTS.mkdir(exist_ok=True)
            with RUNS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {run}: {result.get('failed') or result['reward'][-1]}", flush=True)
            following = next(queue, None)
            if following is not None and time.time() < deadline:
                futures[pool.submit(train, following)] = following


# The report ------------------------------------------------------------------------------------------------------------


def reached(result: dict[str, Any], target: float) -> float:
    """Rollouts until the reward reaches a target, between evaluations on a line; infinite where it does not."""
    points = list(zip(result["rollouts"], result["reward"]))
    for (before, low), (after, high) in zip(points, points[1:]):
        if high >= target:
            return before + (after - before) * max(0.0, (target - low) / (high - low)) if low < target else before
    return math.inf


def shown(value: float, digits: int = 3) -> str:
    return "never" if math.isinf(value) else "" if math.isnan(value) else f"{value:.{digits}g}"


def report(results: list[dict[str, Any]]) -> str:
    settings = best(results)
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else None
    seconds = costs["seconds_per_rollout"] if costs else {}
    lines = [
        "# FDFO and Flow-GRPO on the packaged pipeline",
        "",
        f"{ROLLOUTS} rollouts of {IMAGES} images. Medians over seeds {SEEDS[0]} to {SEEDS[-1]}, with the range; what is not "
        "run yet is left out.",
        "",
        "| | reward at the end | strict accuracy | distance of images | CPU s per rollout |",
        "|---|---|---|---|---|",
    ]
    cells: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        run = Run(**result["run"])
        if run.seed in SEEDS and not run.ablation and run == replace(settings[run.algorithm], **_cell(run)):
            cells.setdefault(run.cell, []).append(result)
    base = next(iter(results))
    lines.append(f"| before | {base['reward'][0]:.3f} | {base['strict'][0]:.2f} | {base['diversity'][0]:.3f} | |")
    for cell, members in sorted(cells.items()):
        columns = [_range([m["end"][name] for m in members if "end" in m]) for name in _ENDS]
        lines.append(
            f"| {cell} ({len(members)} seeds) | {' | '.join(columns)} | {shown(seconds.get(cell, math.nan))} |"
        )
    lines += ["", "Rollouts (CPU seconds) to a reward, median over seeds, and how many times as soon FDFO is:", ""]
    lines += ["| | " + " | ".join(f"{target:.2f}" for target in TARGETS) + " | Flow-GRPO's at the end |"]
    lines += ["|---|" + "---|" * (len(TARGETS) + 1)]
    for steps, fraction in CELLS:
        names = {a: replace(setting, steps=steps, fraction=fraction).cell for a, setting in settings.items()}
        if not all(name in cells for name in names.values()):
            continue
        end = statistics.median(member["reward"][-1] for member in cells[names["Flow-GRPO"]])
        times = {}
        for algorithm, name in names.items():
            cost = seconds.get(name, math.nan)
            row = []
            for target in (*TARGETS, end):
                rollouts = statistics.median(reached(member, target) for member in cells[name])
                if algorithm == "Flow-GRPO" and target == end:
                    rollouts = ROLLOUTS
                times[algorithm, target] = (rollouts, rollouts * cost)
                row.append(f"{shown(rollouts)} ({shown(rollouts * cost)})" if math.isfinite(rollouts) else "never")
            row[-1] += f": {end:.3f}" if algorithm == "Flow-GRPO" else ""
            lines.append(f"| {name} | {' | '.join(row)} |")
        ratios = []
        for target in (*TARGETS, end):
            (own, own_cost), (other, other_cost) = times["FDFO", target], times["Flow-GRPO", target]
            if math.isinf(own):
                ratios.append("")
            elif math.isinf(other):
                budget = ROLLOUTS * seconds.get(names["Flow-GRPO"], math.nan)
                ratios.append(f"> {budget / own_cost:.1f}" if not math.isnan(budget) else f"> {ROLLOUTS / own:.1f}")
            else:
                ratios.append(f"**{other_cost / own_cost:.1f}**" if not math.isnan(own_cost) else f"{other / own:.1f}")
        lines.append(f"| times as soon | {' | '.join(ratios)} |")
    lines += [
        "",
        "## The grid",
        "",
        f"{CELLS[0][0]} steps, a quarter of the tuples, seed {TUNING_SEED}: mean reward over the run,",
    ]
    lines += ["and at the end. The best mean is what is used above and below.", ""]
    for algorithm, clips in CLIPS.items():
        lines += [
            f"| {algorithm} | " + " | ".join(f"clip {clip:g}" for clip in clips) + " |",
            "|---|" + "---|" * len(clips),
        ]
        by_setting = {Run(**r["run"]): r for r in results if r["run"]["seed"] == TUNING_SEED}
        for rate in LEARNING_RATES:
            row = []
            for clip in clips:
                result = by_setting.get(Run(algorithm, *CELLS[0], rate, clip, TUNING_SEED))
                text = (
                    ""
                    if result is None
                    else "failed"
                    if "failed" in result
                    else f"{area(result):.3f}, {result['reward'][-1]:.3f}"
                )
                chosen = settings[algorithm].learning_rate == rate and settings[algorithm].clip == clip
                row.append(f"**{text}**" if chosen else text)
            lines.append(f"| learning rate {rate:g} | {' | '.join(row)} |")
        lines.append("")
    lines += [f"## Ablations of FDFO ({CELLS[0][0]} steps, a quarter of the tuples)", ""]
    lines += [
        "| | seeds | mean reward over the run | at the end | strict accuracy | distance of images |",
        "|---|---|---|---|---|---|",
    ]
    groups = {"as above": [r for r in cells.get(settings["FDFO"].cell, []) if r["run"]["seed"] in ABLATION_SEEDS]}
    for name in ABLATIONS:
        groups[name] = [r for r in results if r["run"]["ablation"] == name]
    for name, members in groups.items():
        if members:
            failed = sum("failed" in member for member in members)
            whole = [member for member in members if "failed" not in member]
            columns = [_range([area(member) for member in whole])]
            columns += [_range([m["end"][end] for m in whole]) for end in _ENDS]
            lines.append(f"| {name} | {len(members)}{f', {failed} failed' if failed else ''} | {' | '.join(columns)} |")
    lines += ["", f"Costs: {costs['machine']}." if costs else "Costs are not measured yet.", ""]
    return "\n".join(lines)


_ENDS = ("reward", "strict_accuracy", "diversity/pixels")


def _cell(run: Run) -> dict[str, Any]:
    return {"steps": run.steps, "fraction": run.fraction, "seed": run.seed}


def _range(values: list[float]) -> str:
    values = [value for value in values if not math.isnan(value)]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Reward, strict accuracy and diversity against images and CPU seconds: medians over seeds, and their range."""
    from matplotlib.figure import Figure

    settings = best(results)
    seconds = json.loads(COSTS.read_text())["seconds_per_rollout"]
    rows = [
        ("reward", "reward"),
        ("strict", "strict accuracy"),
        ("diversity", "distance of two\nright images of a caption"),
    ]
    figure = Figure(figsize=(13, 7.5), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), 4, sharey="row")
    colors = {"FDFO": "tab:blue", "Flow-GRPO": "tab:orange"}
    for half, (scale, label) in enumerate([(lambda cell: IMAGES, "images"), (seconds.get, "CPU seconds")]):
        for column, steps in enumerate((10, 20)):
            for row, (key, title) in enumerate(rows):
                ax = axes[row, 2 * half + column]
                for algorithm, setting in settings.items():
                    for fraction, style in ((0.25, "-"), (1.0, "--")):
                        run = replace(setting, steps=steps, fraction=fraction)
                        members = [
                            r
                            for r in results
                            if r["run"]["seed"] in SEEDS
                            and "failed" not in r
                            and Run(**r["run"]) == replace(run, seed=r["run"]["seed"])
                        ]
                        if not members or scale(run.cell) is None:
                            continue
                        x = [rollout * scale(run.cell) for rollout in members[0]["rollouts"]]
                        values = list(zip(*(member[key] for member in members)))
                        ax.fill_between(
                            x, *zip(*((min(v), max(v)) for v in values)), color=colors[algorithm], alpha=0.15, lw=0
                        )
                        name = f"{algorithm}, {'all tuples' if fraction == 1 else 'a quarter'}"
                        ax.plot(x, [statistics.median(v) for v in values], style, color=colors[algorithm], label=name)
                if row == 0:
                    ax.set_title(f"{steps} steps")
                if half == column == 0:
                    ax.set_ylabel(title)
                if row == len(rows) - 1:
                    ax.set_xlabel(label)
                ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Run nothing.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Runs at a time, a core each.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no run after this time.")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    if not args.report:
        run_missing(grid(), args.workers, deadline)
    settings = best(load())
    if not args.report:
        runs = comparison(settings)
        first = [run for run in runs if (run.steps, run.fraction) != CELLS[-1]]
        # The dearest cell last.
        for part in (first, ablations(settings["FDFO"]), runs):
            run_missing(part, args.workers, deadline)
        if not COSTS.is_file():
            cells = {run.cell: run for run in runs}
            COSTS.write_text(json.dumps(measure_costs(cells), indent=2) + "\n")
    text = report(load())
    REPORT.write_text(text)
    print(text)
    if COSTS.is_file():
        draw(load(), PICTURE)


if __name__ == "__main__":
    main()
