"""What test_generate.py and test_evaluate.py do not see of it."""

import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch

from trl_fdfo.cli.models import BASE, each_model, sample


OPTIONS = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0}


@pytest.mark.parametrize("make_pipeline", [tiny_pipelines.sd3, tiny_pipelines.flux])
def test_the_batch_does_not_matter(make_pipeline):
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    words = {"negative_prompt": "blue"} if make_pipeline is tiny_pipelines.sd3 else {"prompt_2": "blue"}
    options = OPTIONS | words | {"max_sequence_length": 8}
    one_by_one = sample(pipeline, "a cat", range(5), options)
    assert one_by_one.shape == (5, 3, 16, 16) and one_by_one.dtype == torch.float32
    assert 0 <= one_by_one.min() and one_by_one.max() <= 1
    assert (one_by_one[1:] - one_by_one[:1]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    torch.testing.assert_close(
        sample(pipeline, "a cat", range(5), options, batch_size=2), one_by_one, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(sample(pipeline, "a cat", [3], options)[0], one_by_one[3], rtol=0, atol=0)
    assert options == OPTIONS | words | {"max_sequence_length": 8}


def test_each_model_leaves_the_base_as_it_was(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=1, learning_rate=0.05, output_dir=str(tmp_path / "both"))
    trainer.train()
    trainer.save_model()
    shutil.copytree(tmp_path / "both", tmp_path / "peft", ignore=lambda *_: ["pytorch_lora_weights.safetensors"])
    adapters = {name: Path(tmp_path, name) for name in ("both", "peft")}
    pipeline = tiny_pipelines.sd3()
    options = OPTIONS | {"max_sequence_length": 8}
    before = sample(pipeline, "a cat", [0], options)
    images = {name: sample(pipeline, "a cat", [0], options) for name in each_model(pipeline, adapters)}
    assert list(images) == [BASE, "both", "peft"]
    assert torch.equal(images[BASE], before) and torch.equal(images["both"], images["peft"])
    assert not torch.equal(images["both"], before)
    assert torch.equal(sample(pipeline, "a cat", [0], options), before)
