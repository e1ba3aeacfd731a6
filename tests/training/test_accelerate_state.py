"""Accelerate's state is shared by the process: a trainer trains as it was built, whatever configs come after it."""

import json
from dataclasses import replace

import torch
from conftest import logged
from datasets import Dataset
from tiny_runs import PROMPTS
from torch.overrides import TorchFunctionMode
from transformers import TrainingArguments

from trl_fdfo.saving import checkpoint_files


class Autocasts(TorchFunctionMode):
    """Notes whether autocast was on, and its dtype, in each matrix product of a linear layer."""

    def __init__(self):
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            self.seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return func(*args, **(kwargs or {}))


def test_a_trainer_keeps_its_precision_when_others_are_built(make_trainer, tmp_path):
    trainer = make_trainer(bf16=True, num_rollouts=1)  # of a pipeline in float32, which needs autocast
    other = make_trainer(output_dir=str(tmp_path / "other"), bf16=False, num_rollouts=1)
    TrainingArguments(output_dir=str(tmp_path / "third"), report_to=[], use_cpu=True)
    for each, dtype in ((trainer, torch.bfloat16), (other, None), (trainer, torch.bfloat16)):
        with Autocasts() as autocasts:
            each.train()
        assert dtype in autocasts.seen and autocasts.seen <= {dtype, None}
        assert each.accelerator.mixed_precision == ("bf16" if dtype else "no")


def test_a_trainer_trains_when_a_config_was_made_of_its_own(make_trainer):
    trainer = make_trainer(num_rollouts=1)
    replace(trainer.args, learning_rate=1e-4)
    trainer.train()
    replace(trainer.args, learning_rate=1e-4)
    assert trainer.generate(["a cat"], [0]).shape == (1, 3, 16, 16)
    assert logged(trainer, "replay_error") == [0.0]


def test_a_checkpoint_of_an_older_version_is_resumed(make_trainer, tmp_path):
    """Its manifest lacks an option that came since, whose default is that of a config made for the comparison."""
    options = {"save_strategy": "epoch", "bf16": True}
    make_trainer(**options).train()
    file = tmp_path / "out" / "checkpoint-2" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["crc32"], manifest["run"]["scale_rewards"]
    file.write_text(json.dumps(manifest | {"crc32": checkpoint_files._own_crc32(manifest)}))
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(file.parent))
    assert resumed.state.global_step == 4 and resumed.accelerator.mixed_precision == "bf16"


def test_a_transform_is_not_asked_for_the_fingerprint(make_config):
    from tiny_pipelines import sd3
    from tiny_runs import UnplannedTrainer, redness

    asked = []

    def transform(rows):
        asked.append(len(rows["prompt"]))
        return {name: [f"{value} {len(asked)}" for value in values] for name, values in rows.items()}

    dataset = Dataset.from_dict({"prompt": PROMPTS, "caption": PROMPTS}).with_transform(transform)
    one, two = (UnplannedTrainer(make_config(), sd3(), redness, dataset) for _ in range(2))
    assert one._fingerprint() == two._fingerprint() and max(asked) == 1
