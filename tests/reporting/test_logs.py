import asyncio
import json
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import trained_weights
from datasets import Dataset
from PIL import Image
from tiny_pipelines import wan
from tiny_runs import PROMPTS, redness
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from trl_fdfo.media import Outputs
from trl_fdfo.reporting.logs import PictureLogger, _labels
from trl_fdfo.reporting.sheets import GAP, MARGIN
from trl_fdfo.rewards.reward_functions import RewardFunctions


# The trackers read these when they are imported, which the first run that reports to them does.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio_for_test_")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

EVALUATED = Dataset.from_dict({"prompt": PROMPTS})


class Shown:
    """A reward that keeps what it was asked about."""

    __name__ = "shown"

    def __init__(self):
        self.asked = []

    def __call__(self, images, prompts):
        self.asked += zip(prompts, images.clone())
        return redness(images, prompts)


def pictures_of(trainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir, "pictures").iterdir())


def lines_of(trainer) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = Path(trainer.args.output_dir, "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# Without a trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [4, 0, None])
def test_a_sheet_is_due_every_so_many_steps(tmp_path, every):
    logger = PictureLogger(CallbackHandler([], None, None, None, None), str(tmp_path), every, num_prompts=1)
    functions, images, rewards = RewardFunctions(redness), torch.rand(4, 3, 16, 16), torch.rand(2, 2, 1)
    state = lambda step, is_main=True: TrainerState(global_step=step, is_world_process_zero=is_main)
    for at in (state(0), state(2), state(4), state(8, is_main=False)):
        logger.keep(at, images, ["a", "b"])
        logger.log_rollout(at, rewards, functions)
    logger.log_evaluation(state(2), images, PROMPTS[:4], [(functions, torch.rand(4, 1))])
    found = sorted(path.name for path in tmp_path.glob("pictures/*"))
    assert found == (["eval_000002.png", "train_000000.png", "train_000004.png"] if every else [])


def test_the_last_rollout_has_a_sheet(make_trainer):
    trainer = make_trainer(num_rollouts=3, logging_images_steps=None)  # by default every 10 rollouts
    trainer.train()
    assert pictures_of(trainer) == ["train_000000.png", "train_000004.png"]


def test_the_end_counts_images(make_trainer):
    trainer = make_trainer(num_rollouts=2)
    metrics = trainer.train().metrics
    # 2 rollouts of 4 prompts and 2 images.
    assert metrics["train_images_per_second"] == pytest.approx(16 / metrics["train_runtime"], rel=1e-2)
    assert "train_samples_per_second" not in lines_of(trainer)[-1] and "train_runtime" in lines_of(trainer)[-1]


# Without a tracker ----------------------------------------------------------------------------------------------------


def test_a_run_without_trackers_leaves_pictures_and_metrics(make_trainer):
    trainer = make_trainer(num_rollouts=3, logging_images_steps=4, eval_dataset=EVALUATED, eval_strategy="epoch")
    trainer.evaluate()
    trainer.train()
    assert pictures_of(trainer) == [
        *("eval_000000.png", "eval_000002.png", "eval_000004.png", "eval_000006.png"),
        *("train_000000.png", "train_000004.png"),
    ]
    lines = lines_of(trainer)
    assert [line["step"] for line in lines if "reward" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 2, 4, 6]
    assert lines[1:] == trainer.state.log_history


def test_a_resumed_run_keeps_the_evaluation_before_it(make_trainer):
    options = {"eval_dataset": EVALUATED, "save_strategy": "epoch"}
    make_trainer(num_rollouts=1, **options).train()
    resumed = make_trainer(num_rollouts=2, **options)
    resumed.evaluate()
    resumed.train(resume_from_checkpoint=True)
    lines = lines_of(resumed)
    assert "eval_reward" in lines[0] and lines[0]["step"] == 0
    assert lines[1:] == resumed.state.log_history


def test_the_sheet_shows_the_rollouts_own_images_from_the_top(make_trainer):
    reward = Shown()
    trainer = make_trainer(reward_fn=reward, num_rollouts=1, logging_images_steps=2, num_prompts_to_log=3)
    trainer.train()
    page = np.asarray(Image.open(Path(trainer.args.output_dir, "pictures", "train_000000.png")))
    # The sheet has 3 prompts of 2 images, from two batches of 2 prompts. 16 pixels are magnified 16 times.
    found = []
    for row in range(page.shape[0] - 256):
        for _, image in reward.asked:
            expected = (image * 255).round().byte().permute(1, 2, 0).numpy().repeat(16, axis=0).repeat(16, axis=1)
            for left in (MARGIN, MARGIN + 256 + GAP):
                at = page[row : row + 256, left : left + 256]
                if (at[0] == expected[0]).all() and (at == expected).all():
                    found.append((row, left, image))
    found.sort(key=lambda entry: entry[:2])
    assert len(found) == 6
    assert all(image is asked for (_, _, image), (_, asked) in zip(found, reward.asked))


def test_labels():
    functions = RewardFunctions([lambda images: 0, redness], weights=[2.0, 1.0])
    rewards = torch.tensor([[[1.0, 0.25], [2.0, 0.12345678]], [[torch.nan, 3.0], [torch.nan, 4.0]]])
    assert _labels(rewards, functions) == [
        ["total 2.25\n<lambda> 1\nredness 0.25", "total 4.123\n<lambda> 2\nredness 0.1235"],
        ["total 3\n<lambda> does not apply\nredness 3", "total 4\n<lambda> does not apply\nredness 4"],
    ]
    assert _labels(torch.tensor([[[torch.nan]]]), RewardFunctions(redness)) == [["reward does not apply"]]


def test_pictures_do_not_change_the_run(make_trainer):
    weights, rewards = [], []
    for steps in (0, 2):
        trainer = make_trainer(logging_images_steps=steps, eval_dataset=EVALUATED, eval_strategy="epoch")
        trainer.train()
        assert Path(trainer.args.output_dir, "pictures").exists() == (steps > 0)
        weights.append(trained_weights(trainer))
        rewards.append([log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log])
    assert rewards[0] == rewards[1]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_rewards_in_the_background_are_on_the_sheet(make_trainer):
    async def slow(images, prompts):
        await asyncio.sleep(0.01)
        return redness(images, prompts)

    pages = []
    for reward in (redness, slow):
        trainer = make_trainer(reward_fn=reward, num_rollouts=1, logging_images_steps=2)
        trainer.train()
        pages.append(Path(trainer.args.output_dir, "pictures", "train_000000.png").read_bytes())
    assert pages[0] == pages[1]


def test_videos_are_shown_by_some_frames(make_trainer):
    def brightness(images):
        assert images.ndim == 5
        return images.mean(dim=(1, 2, 3, 4))

    trainer = make_trainer(
        pipeline=wan.build(),
        reward_fn=brightness,
        num_rollouts=1,
        pipeline_kwargs={"max_sequence_length": 8, "num_frames": 5},
        logging_images_steps=2,
    )
    trainer.train()
    page = Image.open(Path(trainer.args.output_dir, "pictures", "train_000000.png"))
    # Two videos stand side by side, each as four frames of 16 pixels that are magnified 14 times.
    assert page.width == 2 * (4 * 16 + 3) * 14 + GAP + 2 * MARGIN
    # And they are played.
    clips = [path.stem for path in sorted(Path(trainer.args.output_dir, "pictures").iterdir())]
    assert clips == ["train_000000", *(f"train_000000_{prompt}_{branch}" for prompt in range(4) for branch in range(2))]


def test_metrics_are_valid_json_where_no_reward_applies(make_trainer):
    trainer = make_trainer(reward_fn=lambda images: [None] * len(images), num_rollouts=1)
    trainer.train()
    [line] = [line for line in lines_of(trainer) if "reward" in line]
    assert line["reward"] is None and line["replay_error"] == 0.0


def test_a_line_is_in_the_file_when_it_is_logged(make_trainer):
    class Reader(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(len(lines_of(trainer)))

    reader = Reader()
    trainer = make_trainer(num_rollouts=3, callbacks=[reader])
    trainer.train()
    assert reader.seen == [0, 0, 1, 1, 2, 2]


def test_no_step_is_there_twice_after_a_resume(make_trainer):
    options = {"num_rollouts": 4, "save_strategy": "epoch", "logging_steps": 1, "logging_images_steps": 2}
    first = make_trainer(**options)
    first.train()
    steps = lambda trainer: [line["step"] for line in lines_of(trainer) if "loss" in line]
    assert steps(first) == list(range(1, 9))
    kept = lines_of(first)[:4]
    torn = Path(first.args.output_dir, "metrics.jsonl")
    torn.write_text(torn.read_text()[:-20])
    second = make_trainer(**options)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir, "checkpoint-4")))
    assert steps(second) == list(range(1, 9))
    assert lines_of(second)[:4] == kept
    # The third run starts from the beginning, in the same folder.
    third = make_trainer(**{**options, "num_rollouts": 1})
    third.train()
    assert steps(third) == [1, 2]


def test_an_evaluation_alone_leaves_the_metrics_of_the_run_as_they_are(make_trainer):
    trainer = make_trainer(num_rollouts=1)
    trainer.train()
    before = lines_of(trainer)
    make_trainer(eval_dataset=EVALUATED).evaluate()
    assert lines_of(trainer) == before


def test_a_folder_that_cannot_be_written_warns_and_ends_nothing(make_trainer, capfd):
    trainer = make_trainer(num_rollouts=1, logging_images_steps=2)
    for name in ("pictures", "metrics.jsonl"):  # a file in place of a folder, and a folder in place of a file
        path = Path(trainer.args.output_dir, name)
        path.mkdir(parents=True) if "." in name else path.write_text("")
    messages = []
    handler = logging.logging.StreamHandler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.get_logger("trl_fdfo.reporting.logs").addHandler(handler)
    trainer.train()
    logging.get_logger("trl_fdfo.reporting.logs").removeHandler(handler)
    assert any("train_000000.png could not be written" in message for message in messages)
    assert any("metrics.jsonl could not be written" in message for message in messages)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logging_images_steps": 3}, r"logging_images_steps=3 is not a multiple of the 2 optimizer steps.*: 2 and 4"),
        ({"logging_images_steps": -2}, r"logging_images_steps=-2 must be in \[0, inf\]"),
        ({"logging_images_steps": 2.5}, r"logging_images_steps=2.5 is a float"),
        ({"num_prompts_to_log": 0}, r"num_prompts_to_log=0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


# Trackers, each read back from its files ------------------------------------------------------------------------------


@pytest.fixture
def run(make_trainer, tmp_path, monkeypatch):
    """Train three rollouts that report to a tracker, and return the trainer and its logs."""
    monkeypatch.chdir(tmp_path)

    def train(tracker: str):
        trainer = make_trainer(
            num_rollouts=3,
            report_to=[tracker],
            run_name="run",
            logging_images_steps=4,
            eval_dataset=EVALUATED,
            eval_strategy="epoch",
        )
        trainer.train()
        rewards = {log["step"]: log["reward"] for log in trainer.state.log_history if "reward" in log}
        evaluations = {log["step"]: log["eval_reward"] for log in trainer.state.log_history if "eval_reward" in log}
        assert list(rewards) == list(evaluations) == [2, 4, 6]
        return trainer, rewards, evaluations

    return train


def leveldb_records(path: Path):
    """Yield the records of a LevelDB log (parts in blocks of 32 KiB) after wandb's header of 7 bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


# Steps that have a picture, by tag.
PICTURED = {"train/images": [0, 4], "eval/images": [2, 4, 6]}


def assert_is_the_file(trainer, tag: str, step: int, image) -> None:
    path = Path(trainer.args.output_dir, "pictures", f"{tag.split('/')[0]}_{step:06}.png")
    assert (np.asarray(Image.open(image).convert("RGB")) == np.asarray(Image.open(path))).all()


def test_tensorboard(run, tmp_path):
    import io

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, rewards, evaluations = run("tensorboard")
    [folder] = Path(trainer.args.output_dir, "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    for tag, values in (("train/reward", rewards), ("eval/reward", evaluations)):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx(values, rel=1e-6)
    assert set(events.Tags()["images"]) == PICTURED.keys()
    for tag, steps in PICTURED.items():
        found = {event.step: event.encoded_image_string for event in events.Images(tag)}
        assert list(found) == steps
        for step, image in found.items():
            assert_is_the_file(trainer, tag, step, io.BytesIO(image))


def test_wandb_offline(run, tmp_path):
    import wandb
    from wandb.proto import wandb_internal_pb2

    trainer, rewards, evaluations = run("wandb")
    wandb.teardown()  # `finish` returns before the whole file is written
    [folder] = Path(tmp_path, "wandb").glob("offline-run-*")
    [path] = folder.glob("*.wandb")
    rows = []
    for data in leveldb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                first, *inner = item.nested_key
                target = row.setdefault(first, {}) if inner else row
                target[(inner or [first])[0]] = json.loads(item.value_json)
            rows.append(row)
    for tag, values in (("train/reward", rewards), ("eval/reward", evaluations)):
        found = {row["train/global_step"]: row[tag] for row in rows if tag in row}
        assert found == pytest.approx(values, rel=1e-6)
    for tag, steps in PICTURED.items():
        found = {row["train/global_step"]: row[tag] for row in rows if tag in row}
        assert list(found) == steps
        for step, image in found.items():
            assert_is_the_file(trainer, tag, step, folder / "files" / image["path"])


def test_trackio_local(run):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    assert str(trackio.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]
    trainer, rewards, evaluations = run("trackio")
    rows = SQLiteStorage.get_logs(trainer.args.project, "run")
    for tag, values in (("train/reward", rewards), ("eval/reward", evaluations)):
        found = {row["train/global_step"]: row[tag] for row in rows if tag in row}
        assert found == pytest.approx(values, rel=1e-6)
    for tag, steps in PICTURED.items():
        found = {row["train/global_step"]: row[tag] for row in rows if tag in row}
        assert list(found) == steps
        for step, image in found.items():
            assert_is_the_file(trainer, tag, step, MEDIA_DIR / image["file_path"])


def test_sounds_in_tensorboard_and_wandb(tmp_path, monkeypatch):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.chdir(tmp_path)
    callbacks = [TensorBoardCallback(SummaryWriter(str(tmp_path / "runs"))), WandbCallback()]
    with wandb.init(dir=str(tmp_path)):
        pictures = PictureLogger(CallbackHandler(callbacks, None, None, None, None), str(tmp_path), 2, num_prompts=1)
        pictures.outputs = Outputs(("audio",), sampling_rate=4000)
        audio = torch.linspace(-1, 1, 4 * 2 * 50).reshape(4, 2, 50)
        functions = RewardFunctions(lambda audio: [0.0] * len(audio))
        pictures.keep(TrainerState(global_step=2), audio, ["a", "b"])
        pictures.log_rollout(TrainerState(global_step=2), torch.zeros(1, 2, 1), functions)
        pictures.log_evaluation(TrainerState(global_step=3), list(audio), ["a"], [(functions, torch.zeros(1, 1))])
    events = EventAccumulator(str(tmp_path / "runs"), size_guidance={"audio": 0}).Reload()
    assert events.Tags()["audio"] == ["train/0_0.wav", "train/0_1.wav", "eval/0.wav"]
    [sound] = events.Audio("train/0_1.wav")
    assert (sound.step, sound.sample_rate, sound.length_frames) == (2, 4000, 50)
    [folder] = Path(tmp_path, "wandb").glob("offline-run-*/files/media/audio")
    written = sorted(path.read_bytes() for path in folder.rglob("*.wav"))
    assert written == sorted(path.read_bytes() for path in Path(tmp_path, "pictures").glob("*.wav"))
