"""
Shows what the churn does: how far the images of a prompt are apart, and what a run learns from them.

    python benchmarks/branch_distance.py    # docs/branch_distance.png, and a row per churn

Each run has 30 rollouts of 144 images of the packaged pipeline, in 10 steps, on a quarter of the noise levels, with the
churn in the initial noise (`churn_schedule="prior"`).
"""

import os
from pathlib import Path

from datasets import Dataset


os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import PACKAGED  # noqa: E402
from trl_fdfo import FDFOConfig, FDFOTrainer, shapes  # noqa: E402
from trl_fdfo.reporting.sheets import Panel, Section, picture, sheet  # noqa: E402


PICTURE = Path(__file__).parents[1] / "docs" / "branch_distance.png"
CHURNS = (0.0002, 0.01, 0.26, 4.0)
SHOWN = 4  # pairs of images


def run(churn: float) -> tuple[list[dict[str, float]], list]:
    """The logs of a run's rollouts, and the first images that it samples, those of a pair adjacent."""
    images = []

    def reward(**arguments):
        if len(images) < 2 * SHOWN:
            images.extend(arguments["images"])
        return shapes.reward(arguments["images"], arguments["prompts"])

    config = FDFOConfig(
        output_dir="outputs/branch_distance",
        num_rollouts=30,
        prompts_per_rollout=72,
        per_device_prompt_batch_size=12,
        num_inference_steps=10,
        timestep_fraction=0.25,
        churn_schedule="prior",
        churn=churn,
        churn_kwargs={"spread": 0.0},
        optimizer_steps_per_rollout=6,
        learning_rate=6e-4,
        epsilon=0.2,
        seed=1,
        **PACKAGED,
    )
    captions = Dataset.from_dict({"prompt": shapes.captions()})
    trainer = FDFOTrainer(config, shapes.load_pipeline(), reward, captions)
    trainer.train()
    return [log for log in trainer.state.log_history if "reward" in log], images[: 2 * SHOWN]


def main() -> None:
    sections = []
    print(f"{'churn':>8} {'branch_distance':>16} {'reward_std':>11} {'reward, first 3':>16} {'last 3 rollouts':>16}")
    for churn in CHURNS:
        logs, images = run(churn)
        first, last = (sum(log["reward"] for log in part) / 3 for part in (logs[:3], logs[-3:]))
        distance, deviation = logs[0]["branch_distance"], logs[0]["reward_std"]
        print(f"{churn:8} {distance:16.3f} {deviation:11.4f} {first:16.3f} {last:16.3f}", flush=True)
        panels = [Panel(picture(image), f"pair {n // 2 + 1}") for n, image in enumerate(images)]
        sections.append(Section(f"churn {churn}: branch_distance {distance:.3f}", [panels]))
    sheet(sections).save(PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
