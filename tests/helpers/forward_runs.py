"""Runs of a second of the algorithms of the forward process, and a flow in one dimension, for the tests of each."""

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from tiny_runs import PROMPTS, redness


OPTIONS = {
    "num_rollouts": 2,
    "prompts_per_rollout": 4,
    "per_device_prompt_batch_size": 2,
    "num_generations": 3,
    "num_inference_steps": 4,
    "optimizer_steps_per_rollout": 2,
    "height": 16,
    "width": 16,
    "pipeline_kwargs": {"max_sequence_length": 8},
    "learning_rate": 1e-3,
    "lora_r": 4,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def make_forward(tmp_path):
    """A trainer of a class of the forward process on a tiny pipeline; keyword arguments are options."""

    def make(trainer_class, pipeline=None, reward_fn=redness, columns=(), plan=False, **options):
        class Trainer(trainer_class):
            def run_plan(self):  # counting takes longer than the run
                return super().run_plan() if plan else ""

        config = trainer_class.config_class(**{"output_dir": str(tmp_path / "out"), **OPTIONS, **options})
        prompts = Dataset.from_dict({"prompt": PROMPTS, **dict(columns)})
        return Trainer(config, pipeline if pipeline is not None else tiny_pipelines.sd3(), reward_fn, prompts)

    return make


class Gaussian:
    """
    The flow of x_0 ~ N(mean, std^2), of which the mean is learned: v(x_t, t) = (x_t - E[x_0 | x_t]) / t.
    """

    std = 0.5

    def velocity(self, mean: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        return (x_t - mean - gain * (x_t - (1 - t) * mean)) / t

    def train(self, loss, rollouts: int = 40, images: int = 256) -> float:
        """The mean after training toward samples near 1; `loss(velocity, old, target, t, rewards)` is one per sample."""
        generator = torch.Generator().manual_seed(0)
        mean = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([mean], lr=0.1)
        for _ in range(rollouts):
            old = mean.detach().clone()
            x_0, noise = torch.randn(2, images, 1, generator=generator, dtype=torch.float64)
            x_0 = old + self.std * x_0
            for t in (0.9, 0.5):
                x_t, target = (1 - t) * x_0 + t * noise, noise - x_0
                new, before = (self.velocity(each, x_t, t) for each in (mean, old))
                optimizer.zero_grad()
                loss(new, before, target, t, -((x_0 - 1) ** 2).T).mean().backward()
                optimizer.step()
        return mean.item()
