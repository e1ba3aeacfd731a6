"""
Measures how much of the gradient of a reward a finite difference knows, on one rollout of the packaged pipeline: so much less does
a reward without a gradient pull beside one that has a gradient, under `direction="reward_gradient"`.

    python benchmarks/mixed_rewards.py
"""

import os

import torch
from datasets import Dataset


os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import PACKAGED  # noqa: E402
from trl_fdfo import FDFOConfig, FDFOTrainer, shapes  # noqa: E402
from trl_fdfo.algorithm import finite_difference, known_gradient  # noqa: E402


class BothWays(FDFOTrainer):
    """Keeps the length of what the finite difference knows of the gradient, relative to that of the gradient."""

    lengths: list[torch.Tensor]

    def targets(self, sampled, rewards, rows):
        known = known_gradient(finite_difference(sampled.endpoints.float(), rewards))
        gradient = self._reward_gradient(sampled, rows)
        self.lengths.append((known.flatten(2).norm(dim=2) / gradient.flatten(2).norm(dim=2)).flatten())
        return super().targets(sampled, rewards, rows)


def main() -> None:
    config = FDFOConfig(
        output_dir="outputs/mixed_rewards",
        num_rollouts=1,
        prompts_per_rollout=72,
        per_device_prompt_batch_size=12,
        num_inference_steps=10,
        timestep_fraction=0.25,
        churn_schedule="prior",
        churn=0.26,
        churn_kwargs={"spread": 0.0},
        optimizer_steps_per_rollout=6,
        seed=1,
        **PACKAGED,
    )
    trainer = BothWays(config, shapes.load_pipeline(), shapes.reward, Dataset.from_dict({"prompt": shapes.captions()}))
    trainer.lengths = []
    trainer.train()
    lengths = torch.cat(trainer.lengths)
    quartiles = ", ".join(f"{value:.2f}" for value in lengths.quantile(torch.tensor([0.25, 0.5, 0.75]).to(lengths)))
    print(f"{len(lengths)} images: a finite difference has {quartiles} of the gradient's length (quartiles)")


if __name__ == "__main__":
    main()
