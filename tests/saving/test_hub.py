"""Real pushes to a server that speaks the Hub's API (fake_hub.py), and what comes back from it (hub_run.py)."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
from fake_hub import FakeHub
from PIL import Image

from trl_fdfo import FDFOConfig


TOKEN = "hf_secret_of_me"
CARD = "---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE.md\n---\n# Tiny\n"
BOTH_FORMATS = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server after all scenarios, and what each returned."""
    folder = tmp_path_factory.mktemp("home") / "of-a-user"
    tiny_pipelines.sd3().save_pretrained(folder / "tiny-sd3")
    (folder / "tiny-sd3" / "README.md").write_text(CARD)
    with FakeHub(TOKEN) as hub:
        hub.add("me/tiny-sd3", folder / "tiny-sd3")
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.url, "FAKE_HUB_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"HOME": str(folder), "HF_HOME": str(folder / "cache")}
        script = Path(__file__).parents[1] / "helpers" / "hub_run.py"
        done = subprocess.run(
            [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        results = {}
        for file in folder.glob("*/results.json"):
            results |= json.loads(file.read_text())
    hub.folder = folder
    raised = [result["raised"] for result in results.values() if "raised" in result]
    assert not raised, "\n".join(raised)
    return hub, results


@pytest.mark.parametrize("name", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_either_library_makes_the_images_that_were_trained(pushed, name):
    hub, results = pushed
    result = results[name]
    assert result["changed"] and result["by_diffusers"] and result["by_peft"]
    revision = "trained" if name == "every_save" else "main"
    files = hub.files(f"me/{name.replace('_', '-')}", revision)
    assert files.keys() > BOTH_FORMATS | {"README.md", "before_after.png", "reward_curve.png", "images/0.png"}


def test_what_each_strategy_pushes(pushed):
    hub, _ = pushed
    epochs = [f"Training in progress, epoch {n}" for n in (1, 2, 3)]
    with_checkpoints = [message for epoch in epochs for message in (epoch, f"{epoch}, checkpoint")]
    assert hub.messages("me/end") == ["Model save", "End of training"]
    assert hub.messages("me/every-save", "trained") == [*epochs, "Model save"]
    assert hub.messages("me/every-save") == []
    assert hub.repos["me/every-save"].private and not hub.repos["me/end"].private
    folders = {
        name: {file.split("/")[0] for file in hub.files(f"me/{name}")} for name in ("checkpoint", "all-checkpoints")
    }
    for name in folders:
        assert hub.messages(f"me/{name}") == [*with_checkpoints, "Model save"]
    assert "last-checkpoint" in folders["checkpoint"] and "checkpoint-3" not in folders["checkpoint"]
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3"} < folders["all-checkpoints"]
    # TensorBoard's logs come along when nobody writes them any more.
    assert any("tfevents" in file for file in hub.files("me/end"))


def test_run_goes_on_from_the_pushed_checkpoint(pushed):
    assert pushed[1]["resume"]["last-checkpoint"] == pushed[1]["resume"]["checkpoint-2"] == [3, True]


def test_page_of_what_was_pushed(pushed):
    page = pushed[1]["page"]
    assert page["equal"] and page["changed"]


def test_pushed_adapter_is_continued_by_its_hub_id(pushed):
    result = pushed[1]["adapter"]
    assert result["me/checkpoint"] and result["me/diffusers-only"]
    assert "adapter='me/nothing' is no folder or file here, and was not found on the Hub" in result["missing"]


def test_push_without_the_option(pushed):
    assert pushed[1]["late"]["equal"]


def test_whole_pipeline_is_pushed_without_an_adapter(pushed):
    hub, results = pushed
    assert results["full"]["equal"] and results["full"]["call_options"]
    files = hub.files("me/full")
    weights = {file for file in files if file.endswith(".safetensors")}
    parts = ("text_encoder/model", "text_encoder_2/model")
    parts += ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    assert weights == {f"{part}.safetensors" for part in parts}  # and no second copy of the transformer
    assert "model_index.json" in files


def test_card_is_valid_and_its_snippet_runs_as_printed(pushed):
    hub, results = pushed
    card = results["card"]["end"]
    assert card["size"] == [16, 16] and card["written"] == ["image.png"] and card["equal"]
    assert 'load_lora_weights("me/end")' in card["text"] and "num_inference_steps=4" in card["text"]
    data = card["data"]
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert (data["base_model"], data["base_model_relation"]) == ("me/tiny-sd3", "adapter")
    assert {"lora", "trl", "fdfo", "diffusers", "text-to-image"} == set(data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "tiny-license")
    assert data["license_link"] == "https://huggingface.co/me/tiny-sd3/blob/main/LICENSE.md"
    assert [sample["text"] for sample in data["widget"]] == ["a cat", "two dogs", "the sea", "red", "a box", "old man"]
    for sample in data["widget"]:
        assert Image.open(io.BytesIO(hub.files("me/end")[sample["output"]["url"]])).size == (16, 16)
    full = results["card"]["full"]
    assert full["size"] == [16, 16] and full["data"]["base_model_relation"] == "finetune"
    assert '"me/full"' in full["text"] and "load_lora" not in full["text"] and "lora" not in full["data"]["tags"]


@pytest.mark.parametrize(("name", "branch"), [("every-save", "trained"), ("late", "second")])
def test_card_of_a_branch_loads_the_branch(pushed, name, branch):
    hub, results = pushed
    card = results["card"][name]
    assert f'load_lora_weights("me/{name}", revision="{branch}")' in card["text"] and card["equal"]
    # What stands at `main` is another adapter, or none.
    file = "pytorch_lora_weights.safetensors"
    assert hub.files(f"me/{name}", branch)[file] != hub.files(f"me/{name}").get(file)


def test_no_pushed_file_has_a_secret(pushed):
    hub, _ = pushed
    secrets = {TOKEN, str(hub.folder), str(Path.home()), os.environ["PATH"]}
    count = 0
    for name, repo in hub.repos.items():
        for branch in repo.branches.values():
            for commit in branch:
                for file, content in commit.files.items():
                    count += 1
                    for secret in secrets:
                        assert secret.encode() not in content, (name, file, secret)
    assert count > 300


@pytest.mark.parametrize("name", ["commit-401", "commit-403", "commit-409"])
def test_hub_that_refuses_in_the_middle(pushed, name):
    hub, results = pushed
    result = results[name]
    assert result["step"] == 3 and result["saved"]
    status = name.removeprefix("commit-")
    failed = [w for w in result["warnings"] if w.startswith("Training goes on, but a push failed.") and status in w]
    assert len(failed) == 3, "each checkpoint waits for the push before it: none is left out"
    # save_model warns, push_to_hub raises; both say what to do.
    for message in (result["warnings"][-1], result["error"]):
        assert status in message and "Everything is in" in message and f"hf upload me/{name}" in message
    assert result["error"].startswith("PushError: ") and TOKEN not in str(result)
    assert hub.messages(f"me/{name}") == ["Training in progress, epoch 1"]


def test_hub_that_goes_away_or_fails_in_the_middle(pushed):
    hub, results = pushed
    for name, reason in (("away", ""), ("command", "500"), ("commit-429", "429")):
        result = results[name]
        assert result["step"] == 3 and result["saved"]
        (failed,) = [warning for warning in result["warnings"] if "Training goes on, but a push failed." in warning]
        assert reason in failed and "hf upload me/" in failed
    # The command that was printed brings the work to the Hub when it is back.
    assert results["command"]["status"] == 0, results["command"]["said"]
    assert results["command"]["equal"]
    assert not any(file.startswith(("checkpoint-", "_")) for file in hub.files("me/later"))


def test_hub_that_is_busy_for_a_moment(pushed):
    hub, results = pushed
    result = results["once-429"]
    assert result["step"] == 3 and "error" not in result
    assert not any("failed" in warning for warning in result["warnings"])
    assert hub.messages("me/once-429")[-2:] == ["Model save", "End of training"]


def test_slow_hub_does_not_hold_up_training(pushed):
    hub, results = pushed
    commits = hub.repos["me/slow"].branches["main"][1:]
    # It answered when the last rollout was being trained, and the checkpoint before that was not pushed.
    assert results["slow"]["released"] <= commits[0].time <= results["slow"]["end"]
    assert commits[0].message == "Training in progress, epoch 1"
    assert "Training in progress, epoch 2" not in hub.messages("me/slow")


@pytest.mark.parametrize("name", ["create-401", "create-403"])
def test_hub_that_lets_nobody_write_is_told_before_training(pushed, name):
    error = pushed[1][name]["error"]
    assert "push_to_hub=True, but the Hub refuses: " in error and name.removeprefix("create-") in error
    assert "hf auth login" in error and TOKEN not in error


def test_hub_that_is_away_at_the_start_is_tried_again(pushed):
    hub, results = pushed
    (warning,) = results["unreachable"]["at_start"]
    assert warning.startswith("The Hub cannot be reached now; each push will try again.")
    assert not any("failed" in warning for warning in results["unreachable"]["later"])
    assert hub.messages("me/back")[-1] == "Model save"


def test_options_are_scrubbed_of_paths_and_token(tmp_path):
    config = FDFOConfig(
        output_dir=str(tmp_path / "out"),
        dataset_name=str(tmp_path / "p.csv"),
        hub_token=TOKEN,
        report_to=[],
        use_cpu=True,
    )
    config.hold()  # as a trainer does, whose trackers write it into files
    for options in (config.to_dict(), vars(config.redacted())):
        assert (options["output_dir"], options["dataset_name"]) == ("out", "p.csv")
        assert str(tmp_path) not in repr(options) and TOKEN not in repr(options)
