"""
Measures whether the alarms of rollouts tell hacked rewards from honest ones, on the packaged pipeline.

    python benchmarks/alarms.py             # the runs that results/alarms.jsonl lacks, then the report
    python benchmarks/alarms.py --report    # the report alone: results/alarms.md
    python benchmarks/alarms.py --cost      # the time that the signs take

Honest runs train on the demo's own reward, by each algorithm; hacked ones on rewards that something else than the caption
satisfies. All runs take about 15 minutes on an idle core; a run that has a result is not repeated. The file has the signs of
each rollout, so the report is of the thresholds as they are now.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.runs import append
from benchmarks.runs import load as load_results


RESULTS = Path(__file__).parent / "results"
RUNS, REPORT = RESULTS / "alarms.jsonl", RESULTS / "alarms.md"
SIGNS = ("velocity_rms", "high_frequency", "saturation", "contrast", "prompt_distance")


def brightness(images):
    """Any white image."""
    return images.mean(dim=(1, 2, 3))


def saturation(images):
    """Any image of pure colours."""
    return (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))


def noise(images):
    """Any image whose neighbouring pixels differ."""
    return images.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + images.diff(dim=-2).abs().mean(dim=(1, 2, 3))


def one_image(images):
    """One image, whatever the caption says."""
    import torch

    from trl_fdfo import shapes

    target = shapes.render(["a red circle on a white background"], torch.Generator().manual_seed(0))
    return -(images - target.to(images)).square().mean(dim=(1, 2, 3)).sqrt()


HACKS = {reward.__name__: reward for reward in (brightness, saturation, noise, one_image)}


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        name (`str`): Its name in the report.
        algorithm (`str`): Name of its trainer's class without "Trainer".
        reward (`str`): "shapes", the honest one, or a name in `HACKS`.
        options (`dict`): Options of its config.
    """

    name: str
    algorithm: str = "FDFO"
    reward: str = "shapes"
    options: dict[str, Any] = field(default_factory=dict)


FDFO = {"num_generations": 2, "learning_rate": 6e-4, "epsilon": 0.2, "timestep_fraction": 0.25}
FDFO |= {"churn_schedule": "prior", "churn": 0.26, "churn_kwargs": {"spread": 0.0}}
# The demo in four steps, as the recipe `shapes_4_steps`.
SHORT = {"num_inference_steps": 4, "timestep_fraction": 0.5, "images": 48, "num_rollouts": 25}
GROUPS = {**SHORT, "num_generations": 8}
DEMO = {"beta": 0.025, "ema_decay": 0.8}


def runs() -> list[Run]:
    short = {**FDFO, **SHORT}
    return [
        Run("FDFO, noise", reward="noise", options={**FDFO, "num_rollouts": 20}),
        Run("FDFO, one_image", reward="one_image", options={**FDFO, "num_rollouts": 20}),
        Run("FDFO, a quarter of the levels, rollouts of 24 images", options={**FDFO, "images": 24, "num_rollouts": 60}),
        Run("FDFO, a quarter of the levels, seed 1", options={**FDFO, "seed": 1}),
        Run("FDFO, brightness", reward="brightness", options={**FDFO, "num_rollouts": 20}),
        Run("AWM, 4 steps", "AWM", options={**GROUPS, "learning_rate": 1.2e-3, "images": 72}),
        Run("DiffusionNFT, 4 steps", "DiffusionNFT", options={**GROUPS, "learning_rate": 1.2e-3}),
        Run("Flow-GRPO, 4 steps", "FlowGRPO", options={**GROUPS, "learning_rate": 1.2e-3, "epsilon": 1e-3}),
        Run("FDFO, all levels, 4 steps", options={**short, "timestep_fraction": 1.0, "num_rollouts": 20}),
        Run("FDFO, 4 steps, seed 1", options={**short, "seed": 1}),
        Run("FDFO, 4 steps, learning rate 1.2e-3", options={**short, "learning_rate": 1.2e-3, "num_rollouts": 20}),
        Run("FDFO, 4 steps, beta and average of the demo", options={**short, **DEMO}),
        Run("FDFO, 4 steps, seed 2", options={**short, "seed": 2}),
        Run("FDFO, saturation, 4 steps", reward="saturation", options={**short, "num_rollouts": 15}),
        Run("AWM, 4 steps, long", "AWM", options={**GROUPS, "learning_rate": 1.2e-3, "num_rollouts": 60}),
    ]


def make_trainer(run: Run, **options: Any):
    from datasets import Dataset
    from transformers import PrinterCallback

    import trl_fdfo
    from benchmarks.common import PACKAGED
    from trl_fdfo import shapes

    options = {"images": 72, "num_rollouts": 30, "num_inference_steps": 8, **run.options, **options}
    prompts = options.pop("images") // options["num_generations"]

    class Trainer(getattr(trl_fdfo, f"{run.algorithm}Trainer")):
        def run_plan(self):
            return ""  # to work it out takes seconds

    config = Trainer.config_class(
        output_dir="outputs/alarms",
        prompts_per_rollout=prompts,
        per_device_prompt_batch_size=prompts // 3,
        optimizer_steps_per_rollout=6,
        **PACKAGED,
        **options,
    )
    reward = shapes.reward if run.reward == "shapes" else HACKS[run.reward]
    trainer = Trainer(config, shapes.load_pipeline(), reward, Dataset.from_dict({"prompt": shapes.captions()}))
    trainer.pop_callback(PrinterCallback)
    return trainer


def train(run: Run) -> dict[str, Any]:
    """The reward and the signs of each rollout of a run."""
    import torch

    torch.set_num_threads(1)
    trainer = make_trainer(run)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "velocity_rms" in log]
    return {"name": run.name, **{name: [round(log[name], 5) for log in logs] for name in ("reward", *SIGNS)}}


def cost(rollouts: int = 5) -> str:
    """The share of the demo's rollouts, in CPU seconds on one thread, that the signs take."""
    import torch

    torch.set_num_threads(1)
    trainer = make_trainer(Run("the demo", options={**FDFO, **DEMO, "images": 216}), num_rollouts=rollouts)
    seconds = {"rollout": 0.0, "signs": 0.0}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            start = time.process_time()
            result = function(*args)
            seconds[name] += time.process_time() - start
            return result

        return call

    trainer._roll_out = timed("rollout", trainer._roll_out)
    trainer.metrics.see = timed("signs", trainer.metrics.see)
    trainer.metrics.add_signs = timed("signs", trainer.metrics.add_signs)
    trainer.train()
    return f"The signs take {seconds['signs'] / seconds['rollout']:.2%} of the demo's rollouts."


def load() -> dict[str, dict[str, Any]]:
    return {result["name"]: result for result in load_results(RUNS)}


# The report -----------------------------------------------------------------------------------------------------------


def report(results: dict[str, dict[str, Any]]) -> str:
    from trl_fdfo.training.rollout_alarms import SIGNS, WINDOW

    shown = [run for run in runs() if run.name in results]
    honest = [run for run in shown if run.reward == "shapes"]
    hacked = [run for run in shown if run.reward != "shapes"]
    found = [run for run in hacked if alarms(results[run.name])]
    false = [run for run in honest if alarms(results[run.name])]
    names = list(dict.fromkeys(sign.metric for sign in SIGNS))
    thresholds = ", ".join(f"{sign.metric} {sign.change:+.0%}" for sign in SIGNS)
    lines = [
        "# Alarms of rollouts on the packaged pipeline",
        "",
        f"{len(false)} of {len(honest)} honest runs raise an alarm, and {len(found)} of {len(hacked)} hacked ones. The columns "
        f"of the signs have the change between the mean of the first {WINDOW} rollouts and the farthest mean of {WINDOW} later "
        f"ones; alarms are raised from these changes on: {thresholds}.",
    ]
    for title, group in (("Honest", honest), ("Hacked", hacked)):
        lines += ["", f"## {title}", "", f"| run | rollouts | reward | {' | '.join(names)} | alarms |"]
        lines += ["|" + " --- |" * (len(names) + 4)]
        for run in group:
            result = results[run.name]
            rewards = result["reward"]
            changes = [f"{farthest(result[name], WINDOW):+.0%}" for name in names]
            raised = "; ".join(f"{name} after {number}" for name, number in alarms(result)) or "none"
            reward = f"{statistics.fmean(rewards[:WINDOW]):.2f} to {statistics.fmean(rewards[-WINDOW:]):.2f}"
            lines += [f"| {run.name} | {len(rewards)} | {reward} | {' | '.join(changes)} | {raised} |"]
    return "\n".join(lines) + "\n"


def alarms(result: dict[str, Any]) -> list[tuple[str, int]]:
    """The metrics that raise an alarm, and after how many rollouts, the first first."""
    from trl_fdfo.training.rollout_alarms import SIGNS, raised_at

    raised = [(sign.metric, raised_at(sign, result[sign.metric])) for sign in SIGNS]
    return sorted(((name, number) for name, number in raised if number is not None), key=lambda alarm: alarm[1])


def farthest(values: list[float], window: int) -> float:
    """The largest relative change, up or down, of a mean over `window` values from that of the first."""
    first = statistics.fmean(values[:window])
    changes = [statistics.fmean(values[end - window : end]) / first - 1 for end in range(2 * window, len(values) + 1)]
    return max(changes, key=abs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="no runs: the report of those in the file")
    parser.add_argument("--cost", action="store_true", help="no runs: the time that the signs take")
    args = parser.parse_args()
    if args.cost:
        print(cost())
        return
    missing = [] if args.report else [run for run in runs() if run.name not in load()]
    for run in missing:
        result = train(run)
        append(result, RUNS)
        print(time.strftime("%H:%M:%S"), run.name, result["reward"][-1], flush=True)
    REPORT.write_text(report(load()))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
