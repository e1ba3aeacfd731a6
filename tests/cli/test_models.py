"""Models on one pipeline, beyond the tests of the scripts."""

import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch

from trl_fdfo.cli.models import BASE, each_model
from trl_fdfo.evaluation.evaluator import Evaluator
from trl_fdfo.pipeline.flow import PipelineFlow
from trl_fdfo.pipeline.schedulers import RolloutScheduler
from trl_fdfo.rewards.reward_functions import RewardFunctions


OPTIONS = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0}


def make_flow(pipeline, **options):
    return PipelineFlow(pipeline, num_generations=2, scheduler_class=RolloutScheduler, **OPTIONS, **options)


@pytest.mark.parametrize("make_pipeline", [tiny_pipelines.sd3, tiny_pipelines.flux])
def test_the_batch_does_not_matter(make_pipeline):
    words = {"negative_prompt": "blue"} if make_pipeline is tiny_pipelines.sd3 else {"prompt_2": "blue"}
    flow = make_flow(make_pipeline(), **words, max_sequence_length=8)

    def sample(seeds, batch_size=1):
        evaluator = Evaluator(flow.generate, RewardFunctions(lambda images: images), batch_size=batch_size)
        return evaluator.generate(["a cat"] * len(seeds), seeds, {})

    one_by_one = sample(range(5))
    assert one_by_one.shape == (5, 3, 16, 16) and one_by_one.dtype == torch.float32
    assert 0 <= one_by_one.min() and one_by_one.max() <= 1
    assert (one_by_one[1:] - one_by_one[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    torch.testing.assert_close(sample(range(5), batch_size=2), one_by_one, rtol=0, atol=1e-4)
    torch.testing.assert_close(sample([3])[0], one_by_one[3], rtol=0, atol=0)
    assert flow.call_kwargs == OPTIONS | words | {"max_sequence_length": 8}


def test_each_model_leaves_the_base_as_it_was(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=1, learning_rate=0.05, output_dir=str(tmp_path / "both"))
    trainer.train()
    trainer.save_model()
    shutil.copytree(tmp_path / "both", tmp_path / "peft", ignore=lambda *_: ["pytorch_lora_weights.safetensors"])
    adapters = {name: Path(tmp_path, name) for name in ("both", "peft")}
    pipeline = tiny_pipelines.sd3()
    flow = make_flow(pipeline, max_sequence_length=8)
    before = flow.generate(["a cat"], [0])
    images = {name: flow.generate(["a cat"], [0]) for name in each_model(pipeline, adapters)}
    assert list(images) == [BASE, "both", "peft"]
    assert torch.equal(images[BASE], before) and torch.equal(images["both"], images["peft"])
    assert not torch.equal(images["both"], before)
    assert torch.equal(flow.generate(["a cat"], [0]), before)
