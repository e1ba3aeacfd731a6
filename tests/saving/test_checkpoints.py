"""A checkpoint is whole or is not there, a run resumes from the newest whole one, and only its own run does."""

import json
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from checkpoint_contents import assert_equal, contents
from conftest import trained_weights
from datasets import Dataset
from safetensors.torch import load_file
from tiny_runs import PROMPTS, redness
from transformers import TrainerCallback, TrainerState

from trl_fdfo import FDFOTrainer
from trl_fdfo.saving.checkpoint_files import MANIFEST, fault, is_whole, newest_good_checkpoint
from trl_fdfo.saving.checkpointer import TrainingTime
from trl_fdfo.saving.weight_averaging import WeightAveraging


ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def trained(make_trainer, tmp_path, tmp_path_factory):
    """The folder of a run of two rollouts with a checkpoint after each, at steps 2 and 4: trained once, and copied."""
    folder, kept = tmp_path / "out", tmp_path_factory.getbasetemp() / "run_of_two_rollouts"
    if kept.exists():
        return shutil.copytree(kept, folder)
    make_trainer(num_rollouts=2, save_strategy="epoch").train()
    shutil.copytree(folder, kept)
    return folder


def resume(make_trainer, checkpoint=True, rollouts=3, **options):
    trainer = make_trainer(num_rollouts=rollouts, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_the_option_resumes_as_the_argument_does(make_trainer, trained):
    begun = []

    class Rollouts(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

    options = {"num_rollouts": 3, "resume_from_checkpoint": True, "callbacks": [Rollouts()]}
    make_trainer(**options).train()
    assert begun == [4]
    make_trainer(**options).train(resume_from_checkpoint=False)
    assert begun == [4, 0, 2, 4]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def test_a_resumed_run_ends_in_the_checkpoint_of_the_whole_run(make_trainer, capsys):
    options = {"save_strategy": "epoch", "ema_decay": 0.5, "lr_scheduler_type": "cosine", "num_rollouts": 4}
    options |= {"eval_dataset": None, "logging_steps": 1}
    whole = make_trainer(**options)
    whole.train()
    out = Path(whole.args.output_dir)
    expected = contents(out / "checkpoint-8")
    for step in (4, 6, 8):
        shutil.rmtree(out / f"checkpoint-{step}")
    resumed = make_trainer(**options)
    assert "Going on from" not in capsys.readouterr().out
    resumed.train(resume_from_checkpoint=True)
    assert f"Going on from {out / 'checkpoint-2'}.\n" in capsys.readouterr().out
    found = contents(out / "checkpoint-8")
    assert len(expected) > 20
    assert_equal(found, expected)


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_resumed_run_ends_in_the_weights_and_images_of_the_whole_run(make_trainer, use_peft):
    options = {"num_rollouts": 3, "save_strategy": "epoch", "ema_decay": 0.5, "use_peft": use_peft}
    whole = make_trainer(**options)
    whole.train()
    averaged = whole.generate(PROMPTS, range(6))
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 6
    expected = trained_weights(whole)
    for name, weight in trained_weights(resumed).items():
        assert torch.equal(weight, expected[name]), name
    assert torch.equal(resumed.generate(PROMPTS, range(6)), averaged)


def test_the_decay_of_an_average_rises_to_its_value():
    average = WeightAveraging(torch.nn.Linear(1, 1), decay=0.9).average
    assert [average.get_decay(rollout) for rollout in (1, 2, 81, 500)] == pytest.approx([0, 2 / 11, 81 / 90, 0.9])


def test_averaging_can_start_with_a_resumed_run_which_is_resumed_too(make_trainer, trained, caplog):
    options = {"rollouts": 4, "ema_decay": 0.9, "save_strategy": "epoch"}
    begun = resume(make_trainer, trained / "checkpoint-4", resume_with_changed_options=True, **options)
    assert begun.state.global_step == 8
    assert "the average over rollouts starts from its weights" in caplog.text
    assert "with changes: ema_decay: None -> 0.9" in caplog.text
    # After one rollout: its decay still rises with the number of rollouts averaged, not with those of the run.
    again = resume(make_trainer, trained / "checkpoint-6", **options)
    expected = begun.averaging.state_dict()
    for name, weight in again.averaging.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def saved(folder) -> list[str]:
    """The names in a folder, without the logs."""
    found = Path(folder).iterdir() if Path(folder).exists() else ()
    return sorted(path.name for path in found if path.name not in ("metrics.jsonl", "pictures"))


def test_checkpoint_is_committed_whole(trained):
    assert fault(trained / "checkpoint-4") is None
    assert saved(trained) == ["checkpoint-2", "checkpoint-4"]
    manifest = json.loads((trained / "checkpoint-4" / MANIFEST).read_text())
    on_disk = {path.name for path in (trained / "checkpoint-4").iterdir()} - {MANIFEST}
    assert manifest["files"].keys() == on_disk and {ADAPTER, "optimizer.pt", "rng_state.pth"} < on_disk
    assert newest_good_checkpoint(trained) == trained / "checkpoint-4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(folder / ADAPTER), rf"{ADAPTER} has \d+ bytes instead of \d+"),
        (lambda folder: flip_a_bit(folder / ADAPTER), rf"{ADAPTER} is damaged: its checksum is another"),
        (lambda folder: (folder / "optimizer.pt").unlink(), r"optimizer.pt is missing"),
        (lambda folder: truncate(folder / "trainer_state.json"), r"trainer_state.json has \d+ bytes"),
        (lambda folder: (folder / MANIFEST).unlink(), r"it has no manifest.json, so it was never completed"),
        (lambda folder: truncate(folder / MANIFEST), r"its manifest.json is damaged"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], r"it has no manifest.json"),
    ],
)
def test_newest_good_checkpoint_is_taken(make_trainer, trained, caplog, damage, message):
    damage(trained / "checkpoint-4")
    resumed = resume(make_trainer, save_strategy="epoch")
    assert f"Not resuming from {trained / 'checkpoint-4'}: " in caplog.text
    (reported,) = [record.message for record in caplog.records if "Not resuming" in record.message]
    assert re.search(message, reported)
    # The run resumed from checkpoint-2 and has replaced the bad checkpoint.
    assert resumed.state.global_step == 6 and fault(trained / "checkpoint-4") is None
    damage(trained / "checkpoint-4")
    with pytest.raises(ValueError, match=f"Cannot resume from .*checkpoint-4: {message}"):
        resume(make_trainer, trained / "checkpoint-4")


def test_checkpoint_of_another_name_is_resumed_from(make_trainer, trained):
    """Trainer pushes a folder `last-checkpoint` to the Hub."""
    shutil.copytree(trained / "checkpoint-2", trained.parent / "last-checkpoint")
    assert resume(make_trainer, str(trained.parent / "last-checkpoint")).state.global_step == 6
    assert (trained / "_abandoned" / "checkpoint-4").is_dir()


def test_no_checkpoint_to_resume_from(make_trainer, trained):
    for step in (2, 4):
        truncate(trained / f"checkpoint-{step}" / ADAPTER)
    with pytest.raises(ValueError, match=r"no checkpoint to resume from in .*checkpoint-4: .* bytes.*checkpoint-2: "):
        resume(make_trainer)


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(make_trainer, caplog):
    """A job that is started again after each preemption needs only one command."""
    resumed = resume(make_trainer, "true", rollouts=1)
    assert resumed.state.global_step == 2 and "yet: the run starts from the beginning" in caplog.text


def test_a_resumed_run_takes_its_new_learning_rate(make_trainer, trained):
    changed = {"learning_rate": 1e-2, "weight_decay": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-4}
    resumed = resume(make_trainer, resume_with_changed_options=True, save_strategy="epoch", **changed)
    (group,) = torch.load(trained / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"][:1]
    assert (group["lr"], group["weight_decay"], group["betas"][1], group["eps"]) == (1e-2, 0.5, 0.9, 1e-4)
    assert [log["learning_rate"] for log in resumed.state.log_history if "learning_rate" in log] == [1e-3, 1e-3, 1e-2]


def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(make_trainer, trained):
    first = TrainingTime.seconds(TrainerState.load_from_json(str(trained / "checkpoint-4" / "trainer_state.json")))
    start = time.monotonic()
    resumed = resume(make_trainer)
    assert 0 < first < TrainingTime.seconds(resumed.state) < first + time.monotonic() - start


@pytest.mark.parametrize(("step", "kept", "seconds"), [(2, 3600.0, 3600), (0, 3600.0, 0), (2, None, None)])
def test_the_time_of_a_new_run_is_its_own_and_that_of_an_older_checkpoint_unknown(step, kept, seconds):
    state = TrainerState(
        global_step=step, stateful_callbacks={"TrainingTime": {"attributes": {"kept": kept}}} if kept else {}
    )
    timer = TrainingTime()
    timer.on_train_begin(None, state, None)
    timer.on_step_end(None, state, None)
    assert TrainingTime.seconds(state) == (seconds if seconds is None else pytest.approx(seconds, abs=60))


def test_checkpoints_of_an_abandoned_run_are_set_aside(make_trainer, trained, caplog):
    options = {"resume_with_changed_options": True, "save_strategy": "epoch", "save_total_limit": 1}
    resume(make_trainer, str(trained / "checkpoint-2"), churn=0.1, **options)
    assert saved(trained) == ["_abandoned", "checkpoint-6"]
    assert fault(trained / "_abandoned" / "checkpoint-4") is None
    assert "checkpoint-4 is not of the run that begins at step 2: moved to" in caplog.text
    # A new run begins at step 0, so the checkpoints after it are set aside too.
    make_trainer(num_rollouts=1, save_strategy="epoch").train()
    names = sorted(path.name for path in (trained / "_abandoned").iterdir())
    assert (
        names == ["checkpoint-4", "checkpoint-6", "logs"]
        and newest_good_checkpoint(trained) == trained / "checkpoint-2"
    )


@pytest.mark.parametrize(
    "manifest",
    ['{"files": [], "run": {}}', '{"files": {}, "run": {}, "crc32": 0}', "[]", "null", '{"files": {"a": {"siz": 1}}}'],
)
def test_damaged_manifest_is_skipped(make_trainer, trained, caplog, manifest):
    (trained / "checkpoint-4" / MANIFEST).write_text(manifest)
    assert resume(make_trainer).state.global_step == 6
    assert "checkpoint-4: its manifest.json is damaged" in caplog.text
    whole = json.loads((trained / "checkpoint-2" / MANIFEST).read_text())
    whole["run"]["epsilon"] = 0.5
    (trained / "checkpoint-2" / MANIFEST).write_text(json.dumps(whole))
    assert fault(trained / "checkpoint-2") == "its manifest.json is damaged"


def test_reward_of_another_setting_or_another_column_is_another_run(make_config, trained):
    class Scaled:
        def __init__(self, scale):
            self.scale = scale

        def __call__(self, images, label):
            return redness(images, None) * self.scale

    def train(scale, labels, **arguments):
        dataset = Dataset.from_dict({"prompt": ["a", "b"], "label": labels})
        config = make_config(num_rollouts=1, save_strategy="epoch", output_dir=str(trained / "scaled"))
        FDFOTrainer(config, tiny_pipelines.sd3(), Scaled(scale), dataset).train(**arguments)

    train(1.0, [1, 2])
    with pytest.raises(
        ValueError, match=r"rewards: \{'Scaled': '1 \(scale=1.0\)'\} -> \{'Scaled': '1 \(scale=-1.0\)'\}"
    ):
        train(-1.0, [1, 2], resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"dataset \(checksum of all its text and numbers\)"):
        train(1.0, [1, 3], resume_from_checkpoint=True)


def shifted(pipeline):
    pipeline.scheduler.set_shift(8.0)
    return pipeline


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"churn": 0.1, "beta": 0.5}, r"beta: 0.0 -> 0.5; churn: 0.2 -> 0.1"),
        ({"adam_beta2": 0.9}, r"adam_beta2: 0.999 -> 0.9"),
        ({"lora_r": 8}, r"weights and optimizer of another run: adapter.r: 4 -> 8\. No run can go on"),
        ({"prompts": ["other"] * 6}, r"dataset \(checksum of all its text and numbers\)"),
        ({"reward_fn": lambda images: [0.0] * len(images)}, r"rewards: \{'redness': '1'\} -> \{'<lambda>': '1'\}"),
        ({"reward_weights": [2.0]}, r"rewards: \{'redness': '1'\} -> \{'redness': '2'\}"),
        ({"pipeline": lambda: tiny_pipelines.flux()}, r"pipeline: 'StableDiffusion3Pipeline' -> 'FluxPipeline'"),
        ({"pipeline": lambda: tiny_pipelines.sd3(seed=1)}, r"run: transformer \(checksum of its frozen weights\)"),
        ({"pipeline": lambda: tiny_pipelines.sd3(with_t5=True)}, r"run: components: .*'text_encoder_3'"),
        ({"pipeline": lambda: shifted(tiny_pipelines.sd3())}, r"run: scheduler \(checksum of its config\)"),
        ({"lr_scheduler_type": "linear"}, r"lr_scheduler_type: 'constant' -> 'linear'"),
    ],
)
def test_run_that_differs_is_refused(make_trainer, trained, changed, message):
    if "pipeline" in changed:
        changed = {**changed, "pipeline": changed["pipeline"]()}
    with pytest.raises(ValueError, match=message):
        resume(make_trainer, **changed)


def test_options_that_do_not_change_the_result_may_change(make_trainer, trained):
    resumed = resume(make_trainer, logging_steps=1, save_strategy="no", rollouts=4, disable_tqdm=False)
    assert resumed.state.global_step == 8
    resumed = resume(make_trainer, learning_rate=1e-4, resume_with_changed_options=True)
    assert resumed.state.global_step == 6


def test_moved_folder_keeps_its_best_checkpoint(make_trainer, tmp_path):
    options = {
        "eval_dataset": Dataset.from_dict({"prompt": ["a", "b"]}),
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "eval_reward",
    }
    trainer = make_trainer(num_rollouts=2, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).is_dir()
    trainer.save_state()
    assert trainer.state.best_model_checkpoint == best
    for folder in ("checkpoint-4", "."):
        # The folders of this machine may name its user.
        assert str(tmp_path) not in Path(trainer.args.output_dir, folder, "trainer_state.json").read_text()
    moved = tmp_path / "moved"
    shutil.move(trainer.args.output_dir, moved)
    resumed = make_trainer(num_rollouts=2, output_dir=str(moved), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(moved / Path(best).name)


CONTROLS = {0: 0.0, 2: 0.1, 4: 0.5, 6: 0.9, 8: 0.2, 10: 0.3}
WITH_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_control"}


def evaluated(make_trainer, rollouts, **options):
    """A trainer of a run whose evaluations after 0, 1, ... rollouts give `CONTROLS`."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "ema_decay": 0.5, **options}
    return make_trainer(
        num_rollouts=rollouts,
        eval_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        eval_reward_fn=lambda images, trainer_state: [CONTROLS[trainer_state.global_step]] * len(images),
        **options,
    )


def assert_has_weights_of(trainer, checkpoint):
    saved_weights = load_file(checkpoint / ADAPTER)
    average = load_file(checkpoint / "averaged_weights.safetensors")
    weights = trained_weights(trainer)
    assert weights.keys() == {name.replace(".weight", ".default.weight") for name in saved_weights}
    for name, weight in saved_weights.items():
        assert torch.equal(weights[name.replace(".weight", ".default.weight")], weight), name
    for name, weight in trainer.averaging.state_dict().items():
        assert torch.equal(average[name], weight), name


def test_the_best_evaluation_has_a_checkpoint_and_is_loaded_at_the_end(make_trainer, tmp_path, capsys):
    trainer = evaluated(make_trainer, 4, save_steps=4, **WITH_BEST)
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 6)
    # That of step 2 was saved as the best one so far, and left when a better one came. The others are those of `save_steps`.
    assert saved(tmp_path / "out") == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert_has_weights_of(trainer, tmp_path / "out" / "checkpoint-6")
    # The result says so: whoever trains for as many rollouts as it counts has other weights.
    capsys.readouterr()
    trainer.save_model()
    assert "  weights  after rollout 3 of 4, the best by eval_control\n" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 rollouts, 32 images, of" in card and "the weights after rollout 3, the best by `eval_control`." in card
    trainer.args.load_best_model_at_end = False
    trainer.train(resume_from_checkpoint=True)
    assert trainer.best_rollout is None


@pytest.mark.parametrize("before", [{}, {"metric_for_best_model": "eval_reward"}])
def test_a_resumed_run_finds_the_best_of_all_evaluations_that_have_a_checkpoint(make_trainer, tmp_path, before):
    evaluated(make_trainer, 4, save_steps=2, **before).train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    resumed = evaluated(make_trainer, 5, save_steps=2, **WITH_BEST)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.state.best_metric, resumed.state.best_global_step) == (0.5, 4)
    assert_has_weights_of(resumed, tmp_path / "out" / "checkpoint-4")


def test_full_disk_ends_the_run_and_leaves_the_older_checkpoints(make_trainer, tmp_path):
    class FillDisk(TrainerCallback):
        """From the second save on no file may exceed 4 kB: a write fails as on a full disk."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(num_rollouts=3, save_strategy="epoch", callbacks=[FillDisk()])
    out = Path(trainer.args.output_dir)
    try:
        with pytest.raises(RuntimeError, match=r"could not be written to .*out \(.*the newest is .*checkpoint-2: "):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(out) == ["checkpoint-2"]
    assert resume(make_trainer).state.global_step == 6


def test_read_only_folder_ends_the_run_and_leaves_the_older_checkpoints(make_trainer):
    folder = tempfile.mkdtemp()  # other users cannot enter tmp_path
    os.chmod(folder, 0o755)

    class Lock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                out.chmod(0o555)
                if os.geteuid() == 0:  # no permission stops root
                    os.seteuid(65534)

    trainer = make_trainer(num_rollouts=3, save_strategy="epoch", callbacks=[Lock()], output_dir=f"{folder}/out")
    out = Path(trainer.args.output_dir)
    user = os.geteuid()
    try:
        with pytest.raises(RuntimeError, match=r"could not be written to .*Permission.*make the folder writable"):
            trainer.train()
    finally:
        os.seteuid(user)
        out.chmod(0o755)
    assert saved(out) == ["checkpoint-2"]
    assert resume(make_trainer, output_dir=str(out)).state.global_step == 6
    shutil.rmtree(folder)


def test_nothing_is_saved_inside_a_rollout(make_trainer, caplog):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    trainer = make_trainer(num_rollouts=2, callbacks=[Save()])
    trainer.train()
    assert saved(trainer.args.output_dir) == ["checkpoint-2", "checkpoint-4"]
    assert "Not saved at step 1: it is inside a rollout" in caplog.text


def test_old_checkpoints_by_the_clock(make_trainer, tmp_path):
    options = {"num_rollouts": 4, "save_strategy": "steps", "save_steps": 6, "save_minutes": 0}
    trainer = make_trainer(**options)
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(saved(args.output_dir))

    trainer.add_callback(Look())
    trainer.train()
    # Each replaces the interim one before it; those of `save_steps` and of the end stay.
    assert seen == [["checkpoint-2"], ["checkpoint-4"], ["checkpoint-6"], ["checkpoint-6", "checkpoint-8"]]
    shutil.rmtree(trainer.args.output_dir)
    for changes in ({"save_minutes": 30}, {"save_minutes": None}):
        trainer = make_trainer(**{**options, **changes})
        trainer.train()
        assert saved(trainer.args.output_dir) == ["checkpoint-6", "checkpoint-8"]
        shutil.rmtree(trainer.args.output_dir)
    trainer = make_trainer(num_rollouts=1, save_minutes=0)  # save_strategy="no"
    trainer.train()
    assert saved(trainer.args.output_dir) == []


# Signals --------------------------------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    """Sends this process a signal at the end of an optimizer step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def killing_reward(number, calls, times=1):
    """Redness that sends a signal in some of its calls, while a rollout is sampled: `times` signals, a second apart."""
    counted = []

    def redness_and_signal(images, prompts):
        counted.append(1)
        if len(counted) in calls:
            for n in range(times):
                time.sleep(n and 1.1)
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # a launcher passes the same signal on
        return redness(images, prompts)

    redness_and_signal.__name__ = "redness"
    return redness_and_signal


def checkpoints(trainer):
    return saved(trainer.args.output_dir)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("where", ["rollout", "update"])
def test_a_run_that_a_signal_ended_goes_on(make_trainer, number, error, where, caplog):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 4}
    expected = make_trainer(**options)
    expected.train()
    shutil.rmtree(expected.args.output_dir)
    # The third call of the reward is in the second rollout, and so is the third step.
    stop = {"reward_fn": killing_reward(number, [3])} if where == "rollout" else {"callbacks": [Kill(number, 3)]}
    killed = make_trainer(**options, **stop)
    with pytest.raises(error) as raised:
        killed.train()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    if number == signal.SIGTERM:
        assert raised.value.code == 128 + signal.SIGTERM
    message = str(raised.value) if number == signal.SIGINT else caplog.text
    assert f"{number.name} ended the run after step" in message and "--resume_from_checkpoint true" in message
    # Until all images are sampled the weights hold nothing of the rollout, so they are saved at once.
    assert checkpoints(killed) == (["checkpoint-2"] if where == "rollout" else ["checkpoint-4"])
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in trained_weights(expected).items():
        assert torch.equal(trained_weights(resumed)[name], weight), name


def test_a_run_that_keeps_weights_alone_goes_on_after_a_signal(make_trainer):
    options = {"num_rollouts": 2, "save_strategy": "epoch", "save_only_model": True}
    # In the second rollout, after the weights of step 2 were saved.
    killed = make_trainer(**options, reward_fn=killing_reward(signal.SIGINT, [3]))
    with pytest.raises(KeyboardInterrupt, match=r"To go on from .*checkpoint-2"):
        killed.train()
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert [Path(resumed.args.output_dir, name, "optimizer.pt").exists() for name in checkpoints(resumed)] == [
        True,
        False,
    ]
    unsaved = make_trainer(**options, save_on_signal=False, callbacks=[Kill(signal.SIGINT, 3)])
    with pytest.raises(
        KeyboardInterrupt, match=r"checkpoint-2 has weights alone \(save_only_model=True\): no run can go on"
    ):
        unsaved.train()


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_signal_without_saving_ends_the_run_at_once(make_trainer, where):
    stop = {"reward_fn": killing_reward(signal.SIGTERM, [3])} if where == "rollout" else {}
    stop = stop or {"callbacks": [Kill(signal.SIGTERM, 3)]}
    trainer = make_trainer(num_rollouts=3, save_strategy="epoch", save_on_signal=False, **stop)
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert raised.value.code == 143 and checkpoints(trainer) == ["checkpoint-2"]
    assert trainer.state.global_step == (2 if where == "rollout" else 3)


def test_signal_in_the_first_rollout_saves_the_start(make_trainer, tmp_path):
    options = {"num_rollouts": 2, "ema_decay": 0.5}
    expected = make_trainer(**options, output_dir=str(tmp_path / "expected"))
    expected.train()
    killed = make_trainer(**options, reward_fn=killing_reward(signal.SIGTERM, [1]))
    with pytest.raises(SystemExit):
        killed.train()
    assert checkpoints(killed) == ["checkpoint-0"]
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in trained_weights(expected).items():
        assert torch.equal(trained_weights(resumed)[name], weight), name


def test_second_signal_ends_the_run_at_once(make_trainer):
    reward = killing_reward(signal.SIGINT, [3], times=2)
    trainer = make_trainer(num_rollouts=3, save_strategy="epoch", reward_fn=reward)
    with pytest.raises(KeyboardInterrupt, match="a second signal"):
        trainer.train()
    assert checkpoints(trainer) == ["checkpoint-2"]


def test_weights_alone_take_no_place_of_a_checkpoint_that_a_run_can_go_on_from(make_trainer, tmp_path, caplog):
    """`save_minutes` is for the run that is killed: its whole checkpoint outlives the next one of weights alone."""
    options = {"save_strategy": "steps", "save_steps": 6, "save_only_model": True, "num_rollouts": 3}
    trainer = make_trainer(save_minutes=0, **options)
    trainer.train()
    out = tmp_path / "out"
    assert {path.name: is_whole(path) for path in out.glob("checkpoint-*")} == {
        "checkpoint-4": True,
        "checkpoint-6": False,
    }
    assert "To go on from " in (advice := trainer.checkpointer.how_to_resume()) and "checkpoint-4: train(" in advice
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert "Not resuming from" in caplog.text and "checkpoint-6: it was saved with save_only_model=True" in caplog.text
    assert resumed.state.global_step == 6
    for name, weight in trained_weights(resumed).items():
        assert torch.equal(weight, trained_weights(trainer)[name]), name
