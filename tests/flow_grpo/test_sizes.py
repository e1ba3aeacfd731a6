"""Flow-GRPO of images of several sizes, whose noise levels differ under dynamic shifting."""

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from tiny_runs import PROMPTS

from trl_fdfo import FlowGRPOConfig, FlowGRPOTrainer


def test_each_batch_has_the_noise_levels_of_its_size(tmp_path):
    config = FlowGRPOConfig(
        output_dir=str(tmp_path),
        num_rollouts=1,
        prompts_per_rollout=2,
        per_device_prompt_batch_size=1,
        num_generations=2,
        num_inference_steps=4,
        optimizer_steps_per_rollout=1,
        pipeline_columns=["height"],
        width=16,
        pipeline_kwargs={"max_sequence_length": 8},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    pipeline = tiny_pipelines.flux()
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=32)
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2], "height": [16, 32]})
    trainer = FlowGRPOTrainer(
        config, pipeline, lambda images, prompts: images.flatten(1).mean(dim=1), train_dataset=dataset
    )
    buffer = trainer._roll_out(0)
    levels = {}
    for index in range(config.gradient_accumulation_steps):
        batch, level = buffer[index].batch, buffer[index].level
        levels[batch.sampled.endpoints is None and batch.sampled.x_t[level].shape[1]] = batch.sampled.sigmas
        # The recorded step and the distribution that the loss takes it from are one: standard normal noise.
        old = trainer._arrival(batch.sampled.velocities[level], batch, level)
        noise = (batch.sampled.x_s[level] - old.mean) / old.std
        assert noise.std().item() == pytest.approx(1, abs=0.25)
    assert len(levels) == 2 and not torch.equal(*levels.values())
