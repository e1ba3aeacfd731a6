"""What is written beside a result is the same in each process, and a result is written whole or not at all."""

import functools
import itertools
import json
import os
import pickle
import tempfile
import time
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from checkpoint_contents import assert_equal, contents
from datasets import Dataset
from diffusers import SD3Transformer2DModel
from peft import LoKrConfig
from PIL import Image
from tiny_runs import redness

from trl_fdfo import FDFOConfig
from trl_fdfo.pipeline.adapter_files import find_adapter
from trl_fdfo.rewards.learned_reward import LearnedReward
from trl_fdfo.rewards.reward_functions import RewardFunctions
from trl_fdfo.rewards.vlm_server import VLMServer
from trl_fdfo.saving.checkpoint_files import MANIFEST, SAVING, changes, commit, removed_on_error, written_whole
from trl_fdfo.saving.checkpointer import Checkpointer
from trl_fdfo.saving.fingerprint import fingerprint
from trl_fdfo.saving.identity import identity
from trl_fdfo.training.config_checks import check_pipeline_kwargs


class Colour(Enum):
    RED = "red"


def make_callback():
    """A function that pickle refuses, at a new address each time."""

    def callback(pipeline, step, timestep, tensors):
        return tensors

    return callback


# Identity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "a", [1, [2]], {"a": {"b": None}}])
def test_json_values_are_their_own_identity(value):
    assert identity(value) == value and type(identity(value)) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2,)), [1, [2]]),
        ({3, 1}, [1, 3]),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (Colour.RED, "red"),
        (torch.bfloat16, "torch.bfloat16"),
        ("/home/somebody/model", "model"),
        (Path("/home/somebody/model"), "model"),
        ({1: "a"}, {"1": "a"}),
        (make_callback(), "<function make_callback.<locals>.callback>"),
        (functools.partial(make_callback(), 1), "functools.partial(<function make_callback.<locals>.callback>, 1)"),
    ],
)
def test_identity_of_other_values(value, expected):
    assert identity(value) == expected
    json.dumps(identity(value))


@pytest.mark.parametrize(
    "make",
    [
        lambda number: torch.full((2, 3), number),
        lambda number: torch.full((200, 300), number, dtype=torch.bfloat16),
        lambda number: np.full((2, 3), number),
        lambda number: Image.new("RGB", (4, 4), (number, 0, 0)),
        lambda number: [{"tensor": torch.tensor([number])}],
    ],
)
def test_contents_have_an_identity(make):
    assert identity(make(1)) == identity(make(1)) != identity(make(2))
    json.dumps(identity(make(1)))


def test_an_object_is_known_by_its_class():
    assert identity(object()) == identity(object()) == "<object object>"


# Fingerprint ----------------------------------------------------------------------------------------------------------


def test_every_row_of_the_dataset_counts(make_trainer):
    trainer = make_trainer(prompts=["a"] * 20)
    of = lambda prompts: fingerprint({}, trainer.pipeline, Dataset.from_dict(prompts), {}, None, False)
    same, other_row, longer = (of({"prompt": p}) for p in (["a"] * 20, ["a"] * 19 + ["b"], ["a"] * 21))
    assert same == of({"prompt": ["a"] * 20})
    assert same != other_row and same != longer


def test_options_of_any_kind_are_json(make_trainer):
    trainer = make_trainer()
    made = [
        fingerprint(
            {"callback": make_callback(), "scale": torch.ones(2)},
            trainer.pipeline,
            trainer.train_dataset,
            {},
            None,
            False,
        )
        for _ in range(2)
    ]
    assert made[0] == made[1] == json.loads(json.dumps(made[0]))


# Rewards --------------------------------------------------------------------------------------------------------------


class Busy:
    """A reward with one setting, and much that each process has anew."""

    started = itertools.count()

    def __init__(self, scale=1.0, cache=None):
        self.scale = scale
        self.cache = cache or tempfile.mkdtemp()
        self.pid, self.began, self.number = os.getpid(), time.time(), next(self.started)
        self.calls, self.folder = 0, tempfile.gettempdir() + f"/run-{self.number}"

    def __call__(self, images, prompts):
        self.calls += 1
        return redness(images, prompts) * self.scale


def described(function):
    return list(RewardFunctions(function).describe().values())[0]


def test_only_settings_tell_a_reward_apart():
    assert described(Busy()) == described(Busy()) == "1 (scale=1.0)"
    assert described(Busy(scale=2.0)) == "1 (scale=2.0)"
    assert described(Busy(cache="/data/somebody/scores")) == "1 (cache='scores', scale=1.0)"


def test_a_reward_says_which_settings_have_no_effect():
    class Served(Busy):
        no_effect = ("cache",)

    assert described(Served(cache="/a/b")) == described(Served(cache="/a/c")) == "1 (scale=1.0)"

    def reward(images):
        return [0.0] * len(images)

    reward.url, reward.scale, reward.no_effect = "http://localhost:1", 2, ("url",)
    assert described(reward) == "1 (scale=2)"


def test_how_long_a_server_is_waited_for_has_no_effect():
    patient = {"timeout": 600.0, "max_retries": 9, "backoff": 3.0, "max_concurrency": 2}
    here = described(VLMServer("http://localhost:1"))
    assert (
        described(VLMServer("http://localhost:1", **patient))
        == here
        != described(VLMServer("http://localhost:1", num_frames=4))
    )
    learned = [described(LearnedReward(torch.nn.Identity(), **options)) for options in ({}, {"offload": True})]
    assert learned[0] == learned[1] != described(LearnedReward(torch.nn.Identity(), batch_size=3))


def test_settings_of_every_kind_of_reward():
    class Listed:
        threshold = 0.5

        def __init__(self, weights, score=redness):
            self.weights, self.score = weights, score

        def __call__(self, images):
            return [0.0] * len(images)

        def method(self, images):
            return [0.0] * len(images)

    class Loose:
        def __call__(self, images):
            return [0.0] * len(images)

    listed = Listed([1, 2])
    assert described(listed) == described(listed.method) == "1 (score=redness, weights=[1, 2])"
    listed.threshold = 0.7
    assert described(listed) == "1 (score=redness, threshold=0.7, weights=[1, 2])"
    loose = Loose()
    loose.scale = 2
    assert described(loose) == "1 (scale=2)"

    def scored(images, scale):
        return [scale] * len(images)

    assert described(functools.partial(scored, scale=3)) == "1 (scale=3)"
    assert described(functools.partial(scored, scale=4)) == "1 (scale=4)"


# A run with what cannot be pickled ------------------------------------------------------------------------------------


def test_a_callback_is_called_saved_and_resumed_with(make_trainer, tmp_path):
    """To the bit, in processes that have another function object of the same name."""
    options = {"num_rollouts": 2, "save_strategy": "epoch"}
    call = lambda: {"max_sequence_length": 8, "callback_on_step_end": make_callback()}
    whole = make_trainer(pipeline_kwargs=call(), reward_fn=Busy(), **options)
    whole.train()
    out = Path(whole.args.output_dir)
    expected = contents(out / "checkpoint-4")
    whole.save_model(str(tmp_path / "result"))
    assert {"adapter_model.safetensors", "pytorch_lora_weights.safetensors", "training_args.bin", "README.md"} <= {
        path.name for path in (tmp_path / "result").iterdir()
    }
    arguments = torch.load(tmp_path / "result" / "training_args.bin", weights_only=False)
    assert arguments.pipeline_kwargs == identity(call())
    for path in (out / "checkpoint-4").iterdir():
        path.unlink()
    (out / "checkpoint-4").rmdir()
    resumed = make_trainer(pipeline_kwargs=call(), reward_fn=Busy(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(contents(out / "checkpoint-4"), expected)
    assert "0x" not in (out / "checkpoint-4" / MANIFEST).read_text()
    with pytest.raises(ValueError, match=r"another run: .*scale=1.0.* -> .*scale=2.0"):
        make_trainer(pipeline_kwargs=call(), reward_fn=Busy(scale=2.0), **options).train(resume_from_checkpoint=True)


def test_trackers_get_json(make_config):
    config = make_config(pipeline_kwargs={"max_sequence_length": 8, "callback_on_step_end": make_callback()})
    assert json.loads(config.to_json_string())["pipeline_kwargs"] == identity(config.pipeline_kwargs)


def test_what_no_file_can_hold_is_refused(make_config):
    config = make_config()
    config.__dict__["pipeline_kwargs"] = {"attention_kwargs": {(1, 2): "a"}}
    with pytest.raises(
        ValueError, match=r"pipeline_kwargs has attention_kwargs=.* cannot be written beside the result"
    ):
        check_pipeline_kwargs(config, ())


# Writing --------------------------------------------------------------------------------------------------------------


def test_a_result_is_written_whole(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "kept").write_text("kept")
    with written_whole(tmp_path, True, lambda: None) as folder:
        (folder / "old").write_text("new")
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text("new")
        assert (tmp_path / "old").read_text() == "old"
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"old": "new", "kept": "kept", "inside/file": "new"} and not (tmp_path / SAVING).exists()


def test_weights_in_other_shards_are_not_left_for_loaders(tmp_path):
    transformer, folder = tiny_pipelines.sd3().transformer, tmp_path / "transformer"
    for value, shard_size in ((1.0, "20KB"), (2.0, "1GB"), (3.0, "20KB")):
        for weight in transformer.parameters():
            weight.data.fill_(value)
        with written_whole(tmp_path, True, lambda: None) as staged:
            transformer.save_pretrained(staged / "transformer", max_shard_size=shard_size)
        (folder / "mine.safetensors").touch()
        assert {w.mean().item() for w in SD3Transformer2DModel.from_pretrained(folder).parameters()} == {value}
    assert (folder / "mine.safetensors").exists() and not (folder / "diffusion_pytorch_model.safetensors").exists()
    aside = tmp_path / "_abandoned"
    assert sorted(path.name for path in aside.iterdir()) == ["result", "result.2"]
    assert (aside / "result" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()


def test_a_run_takes_over_no_file_of_an_earlier_one(make_trainer, tmp_path, caplog):
    out, options = tmp_path / "out", {"num_rollouts": 1, "logging_images_steps": 2}
    make_trainer(**options).train()
    (out / "results.json").touch()
    for name in ("notes.txt", "pictures/mine.png"):
        (out / name).touch()
    earlier = (out / "metrics.jsonl").read_bytes()
    trainer = make_trainer(**options, eval_dataset=Dataset.from_dict({"prompt": ["new"]}))
    trainer.evaluate()
    trainer.train()
    aside = out / "_abandoned" / "logs"
    assert (aside / "metrics.jsonl").read_bytes() == earlier and (aside / "pictures" / "train_000000.png").exists()
    assert (aside / "results.json").exists() and "such as metrics.jsonl, were moved to" in caplog.text
    kept = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and aside not in path.parents}
    sheets = {"pictures/eval_000000.png", "pictures/train_000000.png"}
    assert kept == {"metrics.jsonl", "notes.txt", "pictures/mine.png"} | sheets


def test_a_result_of_another_kind_is_not_taken_for_the_new_one(make_trainer, tmp_path):
    out = tmp_path / "out"
    make_trainer().save_model()
    (out / "notes.txt").touch()
    make_trainer(peft_config=LoKrConfig(r=4, alpha=4, target_modules=["to_q"])).save_model()
    assert (out / "_abandoned" / "result" / "pytorch_lora_weights.safetensors").exists()
    assert not (out / "pytorch_lora_weights.safetensors").exists() and find_adapter(str(out)) == out
    make_trainer(use_peft=False).save_model()
    with pytest.raises(ValueError, match="has neither pytorch_lora_weights.safetensors"):
        find_adapter(str(out))
    aside = out / "_abandoned" / "result.2"
    names = {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    assert {path.name for path in aside.iterdir()} == names and (out / "notes.txt").exists()
    make_trainer(use_peft=False).save_model()
    assert len(list((out / "_abandoned").iterdir())) == 2, "a result of the same kind is replaced"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, "No space left on device"), "Make room or make the folder writable"),
        (RuntimeError("PytorchStreamWriter failed"), "Make room or make the folder writable"),
        (pickle.PicklingError("no function"), "The disk is not at fault: leave out what the error names"),
    ],
)
def test_half_a_result_is_not_left(tmp_path, error, advice):
    (tmp_path / "old").write_text("old")
    with pytest.raises(RuntimeError, match=f"left as it was. {advice}, and save again"):
        with written_whole(tmp_path, True, lambda: None) as folder:
            (folder / "old").write_text("new")
            raise error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "old")]
    with pytest.raises(RuntimeError, match=f"There is none before it. {advice}, and resume"):
        with removed_on_error(tmp_path / SAVING):
            raise error


def test_save_model_leaves_no_half_folder(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.args.__dict__["deepspeed"] = lambda: None  # which pickle refuses
    (tmp_path / "result").mkdir()
    with pytest.raises(RuntimeError, match=r"could not be written to .*result .*The disk is not at fault"):
        trainer.save_model(str(tmp_path / "result"))
    assert list((tmp_path / "result").iterdir()) == []


def test_a_checkpoint_of_an_older_version_had_the_defaults_of_newer_options(make_config, tmp_path):
    newer = ("timestep_selection", "prompt_sampling", "num_candidates", "bf16", "churn")
    before = make_config(timestep_fraction=0.5).result_options()
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_text("")
    commit(tmp_path / "staged", tmp_path / "checkpoint", {n: v for n, v in before.items() if n not in newer})

    def found(config) -> list[str]:
        return changes(tmp_path / "checkpoint", config.result_options(), config.is_default)

    same = {"timestep_fraction": 0.5, "churn": None}
    assert found(make_config(**same)) == []
    # Defaults that are given are defaults, also if they follow from other options.
    given = {"num_candidates": 2, "bf16": False, "churn": 0.0025, "prompt_sampling": "uniform"}
    assert found(make_config(**(same | given))) == []
    changed = make_config(**same, timestep_selection="first", num_candidates=3, seed=7)
    expected = ["num_candidates: its default -> 3", "seed: 42 -> 7", "timestep_selection: its default -> 'first'"]
    assert found(changed) == expected == found(changed.redacted())

    # What a subclass makes its default is as new as the option.
    @dataclass
    class Mine(FDFOConfig):
        prompt_sampling: str = "informative"
        words: list[str] = field(default_factory=list)

    mine = Mine(**{name: value for name, value in make_config(**same)._given.items() if name != "prompt_sampling"})
    assert found(mine) == ["prompt_sampling: its default -> 'informative'"]
    assert found(replace(mine, words=["a"]))[-1] == "words: its default -> ['a']"
    # Another schedule is one change, though this option has come with it.
    assert found(make_config(**same, lr_scheduler_type="linear")) == ["lr_scheduler_type: 'constant' -> 'linear'"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"output_dir='.*out' cannot be written to .*no checkpoint could be saved"):
        Checkpointer(str(tmp_path / "out"), {}, False, None, bool).begin(None)
    Checkpointer(str(tmp_path / "new"), {}, False, None, bool).begin(None)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "may_be_longer"),
    [
        ("constant", 0, True),
        ("constant_with_warmup", 5, True),
        ("constant_with_warmup", 0.2, False),  # of the whole run
        ("cosine", 0, False),
    ],
)
def test_which_runs_may_be_made_longer(make_config, schedule, warmup_steps, may_be_longer):
    options = {"lr_scheduler_type": schedule, "warmup_steps": warmup_steps}
    short, long = (make_config(num_rollouts=rollouts, **options).result_options() for rollouts in (2, 4))
    assert (short == long) == may_be_longer
