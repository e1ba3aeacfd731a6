"""Runs of a second of the algorithms of the forward process, for the tests of each."""

import pytest
import tiny_pipelines
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
