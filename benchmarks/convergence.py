"""
Measures how soon FDFO, Flow-GRPO, DiffusionNFT, AWM and RAM reach a reward on the packaged pipeline. All get equally
many images and are tuned over grids of the same size.

    python benchmarks/convergence.py             # the runs that results/convergence.jsonl lacks, then the report
    python benchmarks/convergence.py --report    # the report alone: results/convergence.md, docs/convergence.png

All runs take some hours on two cores; a run that has a result is not repeated. They come in this order: the grids, with a
seed that is used nowhere else; five seeds with the best settings, of all algorithms in the cells of `RACE` and `RACE_20`,
and of FDFO and Flow-GRPO in those of `CELLS`; ablations of FDFO and AWM with three seeds; the most expensive cell; the cost of a
rollout in each cell.

On one machine a run's settings and seed decide its result to the bit, however busy the machine is. Its CPU seconds
would not repeat, because runs share a processor. So the costs of a rollout are measured in turn in one process, and the
CPU seconds of a run are its rollouts times that cost.

Every run is scored on the same images of the pipeline's own sampler, from seeds that training does not see: 2 of each
of the 54 captions every third rollout, and 8 of each at the end. They have as many steps as the rollouts, or the steps of
use of their table, 10 or 20, where the rollouts have fewer.
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each run

from benchmarks.runs import load, measure_costs, number_of, run_missing, train_to_the_end


RESULTS = Path(__file__).parent / "results"
RUNS, COSTS, REPORT = RESULTS / "convergence.jsonl", RESULTS / "convergence_costs.json", RESULTS / "convergence.md"
PICTURE = Path(__file__).parents[1] / "docs" / "convergence.png"

ROLLOUTS, IMAGES, EVALUATE_EVERY = 30, 144, 3
TUNING_SEED, SEEDS, ABLATION_SEEDS = 100, (1, 2, 3, 4, 5), (1, 2, 3)
LEARNING_RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3)


@dataclass(frozen=True)
class Algorithm:
    """A trainer of `trl_fdfo`, its options, and the settings among which it is tuned."""

    trainer: str
    options: dict[str, Any]
    knob: str  # the option that, beside the learning rate, decides how far a rollout moves the weights
    # Learning rates and values of the knob, by steps and fraction of the tuples.
    grids: dict[tuple[int, float], list[tuple[float, float]]]


def grid_of(*knobs: float) -> list[tuple[float, float]]:
    return list(itertools.product(LEARNING_RATES, knobs))


FDFO_CHURN = {"churn_schedule": "prior", "churn": 0.26, "churn_kwargs": {"spread": 0.0}}
# The algorithms clip different ratios: in a step FDFO's moves by 0.05, and Flow-GRPO's, of a mean log-likelihood, by
# 0.0003. All grids are the same multiples of each algorithm's usual value; a smaller nft_beta moves the weights farther.
# All tuples leave out the smallest clip, which was the worst on a quarter, and have settings beyond the grid, because the
# best one was at its edge.
# "FDFO, fast" is what lowered the time to FDFO's final reward on the tuning seed, of what was tried there: rollouts of half
# the steps, of each prompt the best and the worst of four images, updates of the first level alone, and a learning rate
# that decays to zero.
ALGORITHMS = {
    "FDFO": Algorithm(
        "FDFOTrainer",
        {"num_generations": 2, **FDFO_CHURN},
        "epsilon",
        {
            (10, 0.25): grid_of(0.0125, 0.05, 0.2, 0.8),
            (10, 1.0): [*grid_of(0.05, 0.2, 0.8), (3e-4, 3.2), (6e-4, 3.2), (1.2e-3, 3.2)],
        },
    ),
    "Flow-GRPO": Algorithm(
        "FlowGRPOTrainer",
        {"num_generations": 8},
        "epsilon",
        {
            (10, 0.25): grid_of(6.25e-5, 2.5e-4, 1e-3, 4e-3),
            (10, 1.0): [
                *grid_of(2.5e-4, 1e-3, 4e-3),
                (2.4e-3, 1.6e-2),
                (4.8e-3, 1e-3),
                (4.8e-3, 4e-3),
                (4.8e-3, 1.6e-2),
            ],
        },
    ),
    "DiffusionNFT": Algorithm(
        "DiffusionNFTTrainer",
        {"num_generations": 8},
        "nft_beta",
        {cell: grid_of(4.0, 1.0, 0.25, 0.0625) for cell in ((10, 0.25), (5, 0.4))},
    ),
    "AWM": Algorithm(
        "AWMTrainer",
        {"num_generations": 8},
        "epsilon",
        {(10, 0.25): [*grid_of(0.0025, 0.01, 0.04, 0.16), (6e-4, 6.25e-4), (1.2e-3, 6.25e-4)]},
    ),
    "Flow-GRPO, CPS": Algorithm(
        "FlowGRPOTrainer",
        {"num_generations": 8, "sde_type": "cps", "noise_level": 0.8},
        "epsilon",
        {
            (10, 0.25): grid_of(6.25e-5, 2.5e-4, 1e-3, 4e-3),
            (10, 1.0): [*grid_of(2.5e-4, 1e-3, 4e-3), (1.2e-3, 6.25e-5), (6e-4, 1.6e-2), (1.2e-3, 1.6e-2)],
        },
    ),
    "RAM": Algorithm(
        "RAMTrainer",
        {"num_generations": 8},
        "reward_multiplier",
        {(10, 0.25): [*grid_of(3.5, 14.0, 56.0, 224.0), (3e-4, 0.875), (6e-4, 0.875)]},
    ),
    "FDFO, fast": Algorithm(
        "FDFOTrainer",
        {
            "num_generations": 2,
            "num_candidates": 4,
            **FDFO_CHURN,
            "timestep_selection": "first",
            "lr_scheduler_type": "cosine",
        },
        "epsilon",
        {(5, 0.2): grid_of(0.05, 0.2, 0.8, 3.2)},
    ),
}
PAIR = ("FDFO", "Flow-GRPO")  # compared in each of the cells
CELLS = [(10, 0.25), (10, 1.0), (20, 0.25), (20, 1.0)]  # steps T, fraction of the tuples
# All algorithms: those of `PAIR` and the cells in which the others are compared with them.
RACE = [
    ("FDFO", 10, 0.25),
    ("FDFO, fast", 5, 0.2),
    ("DiffusionNFT", 10, 0.25),
    ("DiffusionNFT", 5, 0.4),
    ("AWM", 10, 0.25),
    ("RAM", 10, 0.25),
    ("Flow-GRPO", 10, 0.25),
    ("Flow-GRPO", 10, 1.0),
    ("Flow-GRPO, CPS", 10, 0.25),
    ("Flow-GRPO, CPS", 10, 1.0),
]
RACE_20 = [
    ("FDFO", 20, 0.25),
    ("DiffusionNFT", 20, 0.25),
    ("AWM", 20, 0.25),
    ("RAM", 20, 0.25),
    ("Flow-GRPO", 20, 0.25),
    ("Flow-GRPO", 20, 1.0),
    ("Flow-GRPO, CPS", 20, 0.25),
    ("Flow-GRPO, CPS", 20, 1.0),
]
# Rollouts of fewer steps, whose images of 20 steps are scored.
COARSE_20 = [
    ("FDFO", 10, 0.25),
    ("FDFO, fast", 5, 0.2),
    ("FDFO, fast", 10, 0.1),
    ("DiffusionNFT", 10, 0.25),
    ("DiffusionNFT", 5, 0.4),
]
# Here the setting with the highest mean over the run ends a little lower, and is much sooner: both are compared.
CPS_ON_ALL = ("Flow-GRPO, CPS", 10, 1.0)
TUNED_STEPS = 10  # cells without a grid take the settings of 10 steps
FRACTIONS = {0.1: "a tenth", 0.2: "a fifth", 0.25: "a quarter", 0.4: "two fifths", 1.0: "all"}
LONGER = "twice as many rollouts"
TARGETS = (0.65, 0.70, 0.75, 0.80)
TIE = 0.002  # of rewards at the end, which differ by 0.01 and more between seeds

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "FDFO": {
        "prior churn 0.065": {"churn": 0.065},
        "prior churn 1": {"churn": 1.0},
        "constant churn 0.026": {"churn_schedule": "constant", "churn": 0.026, "churn_kwargs": None},
        "constant churn 0.0025": {"churn_schedule": "constant", "churn": 0.0025, "churn_kwargs": None},
        "interval churn 0.26": {
            "churn_schedule": "interval",
            "churn_kwargs": {"location": 0.0, "location_std": 1.0, "width": 0.5, "spread": 0.0},
        },
        "G = 3": {"num_generations": 3},
        "G = 4": {"num_generations": 4},
        "beta 0.025": {"beta": 0.025},
        "no whitening": {"whiten_direction": False},
        "reward gradient": {"direction": "reward_gradient"},
        "first level alone": {},  # the level of `prior`'s churn; see `FirstLevel`
    },
    "FDFO, fast": {
        "rollouts of 10 steps": {"num_inference_steps": 10, "timestep_fraction": 0.1},
        "rollouts of 4 steps": {"num_inference_steps": 4, "timestep_fraction": 0.25},
        "rollouts of 3 steps": {"num_inference_steps": 3, "timestep_fraction": 0.33},
        "one level of five, at random": {"timestep_selection": "stratified"},
        "the first two levels": {"timestep_fraction": 0.4},
        "2 of 2 images": {"num_candidates": 2},
        "2 of 6 images": {"num_candidates": 6},
        "a constant learning rate": {"lr_scheduler_type": "constant"},
        LONGER: {"num_rollouts": 2 * ROLLOUTS},  # about the time of the other algorithms' runs
    },
    "AWM": {
        "levels weighed by t": {"level_power": 1.0},
        "levels weighed by t, errors to the power 1/4": {"level_power": 1.0, "error_power": 0.25},
        "old_policy_beta 1": {"old_policy_beta": 1.0},
    },
}
ABLATED = [*RACE[:2], ("AWM", 10, 0.25)]


@dataclass(frozen=True)
class Run:
    """
    The description of a run: its algorithm, cell, setting and seed, the name of an ablation, and the steps that the images
    which are scored have at least.
    """

    algorithm: str
    steps: int
    fraction: float
    learning_rate: float
    knob: float
    seed: int
    ablation: str = ""
    use_steps: int = TUNED_STEPS

    @property
    def cell(self) -> str:
        return f"{self.algorithm}, {self.steps} steps, {FRACTIONS[self.fraction]}"


def changes_of(run: Run) -> dict[str, Any]:
    """The options that an ablation changes."""
    return ABLATIONS.get(run.algorithm, {}).get(run.ablation, {})


def make_trainer(run: Run, rollouts: int = ROLLOUTS):
    from datasets import Dataset

    import trl_fdfo
    from benchmarks.common import PACKAGED
    from trl_fdfo import shapes

    class FirstLevel(trl_fdfo.FDFOTrainer):
        """Trains on the first level alone, whose noise differs between the branches."""

        def trained_levels(self, rollout, batch):
            return [0] * self.args.num_trained_levels

    algorithm = ALGORITHMS[run.algorithm]
    trainer_class = FirstLevel if run.ablation == "first level alone" else getattr(trl_fdfo, algorithm.trainer)
    options = {
        "num_inference_steps": run.steps,
        "timestep_fraction": run.fraction,
        **algorithm.options,
        algorithm.knob: run.knob,
        **changes_of(run),
    }
    prompts = IMAGES // options.get("num_candidates", options["num_generations"])
    options.setdefault("num_rollouts", rollouts)
    config = trainer_class.config_class(
        output_dir="outputs/convergence",
        prompts_per_rollout=prompts,
        per_device_prompt_batch_size=prompts // 6,
        optimizer_steps_per_rollout=6,
        learning_rate=run.learning_rate,
        seed=run.seed,
        **PACKAGED,
        **options,
    )
    captions = Dataset.from_dict({"prompt": shapes.captions()})
    return trainer_class(config, shapes.load_pipeline(), shapes.reward, captions)


def train(run: Run) -> dict[str, Any]:
    """Trains one run, and scores it before the first rollout, after every third, and on more images at the end."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from trl_fdfo import shapes

    torch.set_num_threads(1)
    trainer = make_trainer(run)
    result: dict[str, Any] = {"run": asdict(run), "rollouts": [], "reward": [], "strict": [], "diversity": []}

    def score(images_per_caption: int) -> dict[str, float]:
        prompts = [caption for caption in shapes.captions() for _ in range(images_per_caption)]
        seeds = range(10**6, 10**6 + len(prompts))
        images = trainer.generate(prompts, seeds, num_inference_steps=max(run.steps, run.use_steps))
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
    if train_to_the_end(trainer, result):
        result["end"] = {name: round(value, 5) for name, value in score(8).items()}
    return result


# The runs -------------------------------------------------------------------------------------------------------------


def grid() -> list[Run]:
    return [
        Run(name, *cell, *setting, TUNING_SEED)
        for name, algorithm in ALGORITHMS.items()
        for cell, settings in algorithm.grids.items()
        for setting in settings
    ]


def final(result: dict[str, Any]) -> float:
    """Reward at the end of a run's budget: the mean of its last two evaluations."""
    return -math.inf if "failed" in result else statistics.fmean(result["reward"][-2:])


def over_run(result: dict[str, Any]) -> float:
    """Mean reward over a run's course, which is high if the reward rises soon and stays."""
    return statistics.fmean(result["reward"])


def tuning(results: list[dict[str, Any]], algorithm: str, steps: int, fraction: float) -> list[dict[str, Any]]:
    """The grid runs of an algorithm with these steps on this fraction of the tuples."""
    wanted = {run for run in grid() if (run.algorithm, run.steps, run.fraction) == (algorithm, steps, fraction)}
    return [result for result in results if Run(**result["run"]) in wanted]


def best(results: list[dict[str, Any]], algorithm: str, steps: int, fraction: float) -> Run:
    """
    The setting with the highest reward at the end on the grid of this cell; of those that end within `TIE` of it, which chance
    decides, the one with the highest mean over the run. A cell that has none takes that of 10 steps, on all tuples, or on a
    quarter for a part of them, and where the algorithm has one grid alone, that of this.
    """
    grids = ALGORITHMS[algorithm].grids
    ten_steps = (TUNED_STEPS, 1.0 if fraction == 1 else 0.25)
    cell = next((cell for cell in ((steps, fraction), ten_steps) if cell in grids), next(iter(grids)))
    runs = tuning(results, algorithm, *cell)
    highest = max(map(final, runs))
    run = max((run for run in runs if final(run) >= highest - TIE), key=over_run)
    return replace(Run(**run["run"]), steps=steps, fraction=fraction)


def soonest(
    results: list[dict[str, Any]], algorithm: str = "FDFO", steps: int = TUNED_STEPS, fraction: float = 0.25
) -> Run:
    """The setting with the highest mean reward over the run on the grid of a cell."""
    runs = [result for result in tuning(results, algorithm, steps, fraction) if "failed" not in result]
    return Run(**max(runs, key=over_run)["run"])


def race(results: list[dict[str, Any]], cells: Sequence[tuple[str, int, float]] = RACE) -> list[Run]:
    """Each algorithm's best setting in its cells of a race."""
    return [best(results, *cell) for cell in cells]


def race_10(results: list[dict[str, Any]]) -> list[Run]:
    """The settings whose images of 10 steps are compared."""
    return [*race(results), longer(results), soonest(results, *CPS_ON_ALL), coarse(results)]


def race_20(results: list[dict[str, Any]]) -> list[Run]:
    """The settings whose images of 20 steps are compared."""
    coarser = [*race(results, COARSE_20), longer(results)]
    return [*race(results, RACE_20), *(replace(run, use_steps=20) for run in coarser)]


def pairs(results: list[dict[str, Any]]) -> list[dict[str, Run]]:
    """FDFO's and Flow-GRPO's best settings in each cell."""
    return [{algorithm: best(results, algorithm, *cell) for algorithm in PAIR} for cell in CELLS]


def coarse(results: list[dict[str, Any]]) -> Run:
    """FDFO with rollouts of fewer steps than the images that are scored."""
    return best(results, "FDFO", 5, 0.4)


def longer(results: list[dict[str, Any]]) -> Run:
    """FDFO, fast, with more images."""
    return replace(best(results, *RACE[1]), ablation=LONGER)


def comparison(results: list[dict[str, Any]]) -> list[Run]:
    groups = [race_10(results), *(list(pair.values()) for pair in pairs(results)), race_20(results)]
    runs = [replace(setting, seed=seed) for group in groups for seed in SEEDS for setting in group]
    return list(dict.fromkeys(runs))


def ablations(results: list[dict[str, Any]]) -> list[Run]:
    settings = [best(results, *cell) for cell in ABLATED]
    return [
        replace(setting, seed=seed, ablation=name)
        for seed in ABLATION_SEEDS
        for setting in settings
        for name in ABLATIONS[setting.algorithm]
    ]


# The report -----------------------------------------------------------------------------------------------------------


def reached(result: dict[str, Any], target: float) -> float:
    """Rollouts until the reward reaches a target, interpolated between evaluations; infinite if it never does."""
    points = list(zip(result["rollouts"], result["reward"]))
    for (before, low), (after, high) in zip(points, points[1:]):
        if low < target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return math.inf


def of_setting(results: list[dict[str, Any]], setting: Run, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """The runs of a setting with these seeds. The setting's own seed does not matter."""
    wanted = {replace(setting, seed=seed) for seed in seeds}
    return [result for result in results if Run(**result["run"]) in wanted]


def report(results: list[dict[str, Any]]) -> str:
    costs = json.loads(COSTS.read_text())
    cells = pairs(results)
    # The first cell again, with FDFO tuned to be soon.
    cells.insert(1, {**cells[0], "FDFO": soonest(results)})
    # Each algorithm with its best fraction: FDFO on a quarter of the tuples, Flow-GRPO on all.
    cells += [
        {"FDFO": best(results, "FDFO", steps, 0.25), "Flow-GRPO": best(results, "Flow-GRPO", steps, 1.0)}
        for steps in sorted({steps for steps, _ in CELLS})
    ]
    cells = [cell for cell in cells if all(of_setting(results, setting) for setting in cell.values())]
    settings = [
        *(setting for cell in cells for setting in cell.values()),
        *race_10(results),
        *race_20(results),
    ]
    return "\n".join(
        [
            "# FDFO and other algorithms on the packaged pipeline",
            "",
            f"{ROLLOUTS} rollouts of {IMAGES} images, of each prompt 2 for FDFO, 4 for FDFO, fast, and 8 for the others. "
            "Medians over seeds, and the range in parentheses.",
            "",
            *end_table(results, settings, costs["seconds_per_rollout"]),
            "",
            "## How soon",
            "",
            "Rollouts to a reward, median over seeds, and CPU seconds; the ratio is of CPU seconds. The last column is "
            "the reward that Flow-GRPO has at the end of its budget (median over seeds of its last two evaluations), "
            "and its time the whole of it; the ratio's range is over the seeds of FDFO.",
            "",
            *speed_table(results, cells, costs["seconds_per_rollout"]),
            "",
            "## All algorithms",
            "",
            "Rollouts to a reward, median over seeds, and CPU seconds. The last column is the reward that FDFO has at the "
            f"end of its budget, in the first row, and how much sooner it is reached there than by FDFO. The images that are "
            f"scored have {TUNED_STEPS} steps.",
            "",
            *race_table(results, race_10(results), costs["seconds_per_rollout"]),
            "",
            f"The same for images of 20 steps, where each algorithm has its settings of {TUNED_STEPS} steps or fewer:",
            "",
            *race_table(results, race_20(results), costs["seconds_per_rollout"]),
            "",
            "## The grid",
            "",
            f"{TUNED_STEPS} steps, seed {TUNING_SEED}: reward at the end (mean of the last two evaluations), and mean over "
            "the run. In bold is the setting that is used elsewhere, at 5 and 20 steps too: it ends highest, or within "
            f"{TIE:g} of the highest, where the highest mean over the run decides. By that mean FDFO on a quarter is soonest with "
            f"learning rate {soonest(results).learning_rate:g}: that setting is compared too. An empty cell was not run.",
            "",
            *grid_tables(results),
            f"## Ablations of FDFO: {CELLS[0][0]} steps, a quarter of the tuples",
            "",
            *ablation_table(results, best(results, *RACE[0])),
            "",
            "## Ablations of FDFO, fast",
            "",
            *ablation_table(results, best(results, *RACE[1])),
            "",
            "## Ablations of AWM",
            "",
            *ablation_table(results, best(results, *ABLATED[2])),
            "",
            f"Costs were measured on {costs['machine']}; `{RUNS.name}` has every run.",
            "",
        ]
    )


def end_table(results: list[dict[str, Any]], settings: list[Run], seconds: dict[str, float]) -> list[str]:
    base = results[0]
    rows = [["before", *(f"{base[name][0]:.3f}" for name in ("reward", "strict", "diversity")), "", ""]]
    for setting in dict.fromkeys(settings):
        if members := of_setting(results, setting):
            rows.append([label(setting, results), *columns_of(members), f"{seconds[setting.cell]:.2f}"])
    return table(["", *MEASURES, "runs", "CPU s per rollout"], rows)


def race_table(results: list[dict[str, Any]], settings: list[Run], seconds: dict[str, float]) -> list[str]:
    rows = []
    end = statistics.median(map(final, of_setting(results, settings[0])))
    first = None  # CPU seconds of FDFO to that reward
    for setting in settings:
        if members := of_setting(results, setting):
            cost = seconds[setting.cell]
            *times, last = (
                statistics.median(reached(member, target) for member in members) for target in (*TARGETS, end)
            )
            first = first or last * cost
            ratio = f", {first / (last * cost):.2f} times as soon" if math.isfinite(last) else ""
            row = [spread(map(over_run, members)), *(duration(time, cost) for time in times)]
            rows.append(
                [
                    label(setting, results),
                    *row,
                    duration(last, cost) + ratio,
                    duration(changes_of(setting).get("num_rollouts", ROLLOUTS), cost),
                    str(len(members)),
                ]
            )
    targets = [f"{target:.2f}" for target in TARGETS]
    return table(["", "mean reward over the run", *targets, f"{end:.3f}", "whole run", "runs"], rows)


def speed_table(results: list[dict[str, Any]], cells: list[dict[str, Run]], seconds: dict[str, float]) -> list[str]:
    rows = []
    for cell in cells:
        members = {algorithm: of_setting(results, setting) for algorithm, setting in cell.items()}
        cost = {algorithm: seconds[setting.cell] for algorithm, setting in cell.items()}
        budget = ROLLOUTS * cost["Flow-GRPO"]
        end = statistics.median(map(final, members["Flow-GRPO"]))
        times = {
            (algorithm, target): statistics.median(reached(member, target) for member in runs)
            for algorithm, runs in members.items()
            for target in TARGETS
        }
        for algorithm in cell:
            row = [duration(times[algorithm, target], cost[algorithm]) for target in TARGETS]
            if algorithm == "Flow-GRPO":
                row.append(f"{end:.3f}: {duration(ROLLOUTS, cost[algorithm])}")
            else:
                row.append(duration(statistics.median(reached(m, end) for m in members[algorithm]), cost[algorithm]))
            rows.append([label(cell[algorithm], results), *row])
        ratios = []
        for target in TARGETS:
            own, other = (times[algorithm, target] * cost[algorithm] for algorithm in cell)
            reaches = math.isfinite(other)
            ratios.append("" if math.isinf(own) else f"{'' if reaches else '> '}{min(other, budget) / own:.1f}")
        each = [budget / (reached(member, end) * cost["FDFO"]) for member in members["FDFO"]]
        ratios.append(f"**{statistics.median(each):.1f}** ({min(each):.1f} to {max(each):.1f})")
        rows.append(["times as soon", *ratios])
    return table(["", *(f"{target:.2f}" for target in TARGETS), "at the end of Flow-GRPO"], rows)


def grid_tables(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for algorithm, steps, fraction in dict.fromkeys((run.algorithm, run.steps, run.fraction) for run in grid()):
        values = {Run(**result["run"]): grid_cell(result) for result in tuning(results, algorithm, steps, fraction)}
        if not values:
            continue
        setting = best(results, algorithm, steps, fraction)
        values[setting] = f"**{values[setting]}**"
        name = ALGORITHMS[algorithm].knob
        rates, knobs = (sorted(set(numbers)) for numbers in zip(*ALGORITHMS[algorithm].grids[steps, fraction]))
        rows = [
            [
                f"learning rate {rate:g}",
                *(values.get(replace(setting, learning_rate=rate, knob=knob), "") for knob in knobs),
            ]
            for rate in rates
        ]
        lines += [*table([setting.cell, *(f"{name} {knob:g}" for knob in knobs)], rows), ""]
    return lines


def grid_cell(result: dict[str, Any]) -> str:
    """Reward at the end of a run, and mean reward over the run."""
    return "ended by a watchdog" if "failed" in result else f"{final(result):.3f}, {over_run(result):.3f}"


def ablation_table(results: list[dict[str, Any]], setting: Run) -> list[str]:
    groups = {"as above": of_setting(results, setting, ABLATION_SEEDS)}
    for name in ABLATIONS[setting.algorithm]:
        groups[name] = of_setting(results, replace(setting, ablation=name), ABLATION_SEEDS)
    rows = []
    for name, runs in groups.items():
        if runs:
            times = [statistics.median(reached(run, target) for run in runs) for target in (0.75, 0.78)]
            rows.append(
                [name, spread(map(over_run, runs)), *(f"{t:.3g}" if math.isfinite(t) else "never" for t in times)]
                + columns_of(runs)
            )
    return table(["", "mean reward over the run", "rollouts to 0.75", "to 0.78", *MEASURES, "runs"], rows)


# Names of the scores at the end of a run, by their titles in tables.
MEASURES = {
    "reward at the end": "reward",
    "strict accuracy": "strict_accuracy",
    "distance of two right images": "diversity/pixels",
}


def label(setting: Run, results: list[dict[str, Any]]) -> str:
    chosen = best(results, setting.algorithm, setting.steps, setting.fraction)
    if setting.use_steps > max(setting.steps, TUNED_STEPS):
        return f"{label(replace(setting, use_steps=TUNED_STEPS), results)}, images of {setting.use_steps} steps"
    if setting.ablation:
        return f"{setting.cell}, {setting.ablation}"
    if setting == chosen:
        return setting.cell
    if setting.learning_rate != chosen.learning_rate:
        return f"{setting.cell}, learning rate {setting.learning_rate:g}"
    return f"{setting.cell}, {ALGORITHMS[setting.algorithm].knob} {setting.knob:g}"


def columns_of(runs: list[dict[str, Any]]) -> list[str]:
    return [*(spread(run["end"][name] for run in runs if "end" in run) for name in MEASURES.values()), number_of(runs)]


def spread(values: Iterable[float]) -> str:
    values = [value for value in values if not math.isnan(value)]
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def duration(rollouts: float, cost: float) -> str:
    return f"{rollouts:.3g} ({rollouts * cost:.0f} s)" if math.isfinite(rollouts) else "never"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws reward, strict accuracy and diversity against images and CPU seconds: medians over seeds, with ranges."""
    from matplotlib.figure import Figure

    seconds = json.loads(COSTS.read_text())["seconds_per_rollout"]
    measures = {
        "reward": "reward",
        "strict": "strict accuracy",
        "diversity": "distance of two\nright images of a caption",
    }
    columns = [(scale, steps) for scale in ("images", "CPU seconds") for steps in (10, 20)]
    figure = Figure(figsize=(13, 7.5), dpi=110, layout="constrained")
    axes = figure.subplots(len(measures), len(columns), sharey="row", squeeze=False)
    for column, (scale, steps) in enumerate(columns):
        curves = [
            (best(results, algorithm, steps, fraction), color, style)
            for algorithm, color in zip(PAIR, ("tab:blue", "tab:orange"))
            for fraction, style in ((0.25, "-"), (1.0, "--"))
        ]
        colors = {
            "FDFO, fast": "black",
            "DiffusionNFT": "tab:green",
            "AWM": "tab:red",
            "RAM": "tab:purple",
            "Flow-GRPO, CPS": "tab:brown",
        }
        others = [
            setting
            for setting in race(results, RACE if steps == TUNED_STEPS else RACE_20)
            if setting.algorithm in colors
        ]
        styles = {0.2: ":", 0.4: ":", 0.25: "-", 1.0: "--"}
        curves += [(setting, colors[setting.algorithm], styles[setting.fraction]) for setting in others]
        for setting, color, style in curves:
            members = [member for member in of_setting(results, setting) if "failed" not in member]
            if not members:
                continue
            unit = IMAGES if scale == "images" else seconds[setting.cell]
            x = [rollout * unit for rollout in members[0]["rollouts"]]
            name = label(setting, results).replace(f" {steps} steps,", "")
            for ax, measure in zip(axes[:, column], measures):
                values = list(zip(*(member[measure] for member in members)))
                ax.fill_between(x, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, lw=0)
                ax.plot(x, list(map(statistics.median, values)), style, color=color, label=name)
        axes[0, column].set_title(f"{steps} steps")
        axes[-1, column].set_xlabel(scale)
    for ax, title in zip(axes[:, 0], measures.values()):
        ax.set_ylabel(title)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    # Inside a panel the legend would hide a curve.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Only report; run nothing.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Runs at a time, a core each.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="Begin no run after this time.")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    if not args.report:
        run_missing(grid(), train, RUNS, args.workers, deadline)
        results = load(RUNS)
        runs = [*comparison(results), *(replace(soonest(results), seed=seed) for seed in SEEDS)]
        first = [run for run in runs if (run.steps, run.fraction) != CELLS[-1]]
        # The most expensive cell comes last.
        for part in (first, ablations(results), runs):
            run_missing(part, train, RUNS, args.workers, deadline)
        cells = {run.cell: run for run in runs}
        costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
        if not cells.keys() <= costs.get("seconds_per_rollout", {}).keys():
            trainers = {cell: functools.partial(make_trainer, run, rollouts=1) for cell, run in cells.items()}
            COSTS.write_text(json.dumps(measure_costs(trainers, costs), indent=2) + "\n")
    text = report(load(RUNS))
    REPORT.write_text(text)
    print(text)
    draw(load(RUNS), PICTURE)


if __name__ == "__main__":
    main()
