"""
Pushes to a Hub and loads from it, for test_hub.py:

    HF_ENDPOINT=http://127.0.0.1:PORT FAKE_HUB_TOKEN=... python tests/helpers/hub_run.py FOLDER

It is a process of its own, because huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported. It forks for
those scenarios that wait for the Hub, and writes the results of each process into FOLDER/SCENARIO/results.json.
"""

import gc
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
import urllib.request
from functools import partial
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "0"  # tiny_runs would set it to 1

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download  # noqa: E402
from peft import PeftModel  # noqa: E402
from read_sheet import panels  # noqa: E402

from trl_fdfo import FDFOConfig, FDFOTrainer  # noqa: E402
from trl_fdfo.cli import generate  # noqa: E402
from trl_fdfo.cli.models import model_options  # noqa: E402
from trl_fdfo.pipeline.loading import load_pipeline  # noqa: E402


torch.set_num_threads(1)
gc.collect()
gc.freeze()  # each run collects when it starts
FOLDER = Path(sys.argv[1])
BASE = "me/tiny-sd3"
PROMPTS = ["a cat", "two dogs", "the sea", "red", "a box", "old man"]
CALL = {"num_inference_steps": 4, "height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 1.0}


def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2))


class Warnings(logging.Handler):
    """Keeps the messages that users see."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


warnings = Warnings()
logging.getLogger("transformers").addHandler(warnings)
logging.getLogger("trl_fdfo").addHandler(warnings)


def build(name, **options):
    config = {
        "output_dir": str(FOLDER / name),
        "hub_model_id": f"me/{name}",
        "push_to_hub": True,
        "hub_token": os.environ["FAKE_HUB_TOKEN"],
        "hub_always_push": True,
        "num_rollouts": 3,
        "prompts_per_rollout": 2,
        "num_inference_steps": CALL["num_inference_steps"],
        "height": 16,
        "width": 16,
        "pipeline_kwargs": {"max_sequence_length": 8},
        "churn": 0.2,
        "optimizer_steps_per_rollout": 1,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "save_strategy": "epoch",
        "logging_images_steps": 0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    config = FDFOConfig(**{**config, **options})
    return FDFOTrainer(config, BASE, redness, Dataset.from_dict({"prompt": PROMPTS}))


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipeline("a cat", generator=generator, output_type="pt", return_dict=False, **CALL)[0]


def strategy(name, then_push=False, **options):
    """Train with a strategy, save, which also pushes, and load the result from the Hub with diffusers and with PEFT."""
    trainer = build(name, **options)
    trainer.train()
    trainer.save_model()
    if then_push:
        trainer.push_to_hub()
    with trainer.averaged_weights():
        expected = image(trainer.pipeline)
    base = load_pipeline(BASE)
    changed = not torch.equal(image(base), expected)
    revision = {"revision": options["hub_revision"]} if "hub_revision" in options else {}
    base.load_lora_weights(f"me/{name}", **revision)
    by_peft = load_pipeline(BASE)
    PeftModel.from_pretrained(by_peft.transformer, f"me/{name}", **revision)
    return {
        "changed": changed,
        "by_diffusers": torch.equal(image(base), expected),
        "by_peft": torch.equal(image(by_peft), expected),
    }


def end():
    """Push at the end, with everything that a run can write: averaged weights, TensorBoard's logs, a token."""
    return strategy("end", hub_strategy="end", ema_decay=0.5, report_to=["tensorboard"], then_push=True)


def every_save():
    return strategy(
        "every-save", hub_strategy="every_save", hub_revision="trained", hub_private_repo=True, ema_decay=0.5
    )


def checkpoint():
    return strategy("checkpoint", hub_strategy="checkpoint", save_total_limit=1)


def all_checkpoints():
    return strategy("all-checkpoints", hub_strategy="all_checkpoints")


def resume():
    """Another machine resumes from a pushed checkpoint: the last of a stopped run, or an earlier one of a whole run."""
    stopped = build("stopped", hub_strategy="checkpoint", num_rollouts=2)
    stopped.train()
    whole = load_pipeline(BASE)
    whole.load_lora_weights("me/checkpoint")
    results = {}
    for repo, checkpoint in (("me/stopped", "last-checkpoint"), ("me/all-checkpoints", "checkpoint-2")):
        folder = snapshot_download(repo, allow_patterns=f"{checkpoint}/*", local_dir=FOLDER / "download")
        trainer = build("resumed", push_to_hub=False)
        trainer.train(resume_from_checkpoint=str(Path(folder, checkpoint)))
        results[checkpoint] = [trainer.state.global_step, torch.equal(image(trainer.pipeline), image(whole))]
    return results


def page():
    """A page of images of the base and the pushed adapter, by their Hub ids."""
    os.chdir(FOLDER)
    generate.main(["--model", BASE, "--adapter", "me/end", "--prompts", "a cat", "--seeds", "1", "--output", "hub.png"])
    generate.main(["--model", BASE, "--adapter", str(FOLDER / "end"), "--prompts", "a cat", "--seeds", "1"])
    pages = [panels(file, rows=2, columns=1) for file in ("hub.png", "grid.png")]
    return {"equal": bool(np.array_equal(*pages)), "changed": not np.array_equal(*pages[0])}


def adapter():
    """Continue a pushed adapter, by its Hub id, from both formats and from the format of diffusers alone."""
    files = snapshot_download(
        "me/checkpoint", allow_patterns="pytorch_lora_weights.safetensors", local_dir=FOLDER / "d"
    )
    api = HfApi(token=os.environ["FAKE_HUB_TOKEN"])
    api.create_repo("me/diffusers-only")
    api.upload_folder(repo_id="me/diffusers-only", folder_path=files, allow_patterns="*.safetensors")
    expected = load_pipeline(BASE)
    expected.load_lora_weights("me/checkpoint")
    results = {}
    for name in ("me/checkpoint", "me/diffusers-only"):
        trainer = build("continued", adapter=name, lora_r=32, push_to_hub=False)
        results[name] = torch.equal(image(trainer.pipeline), image(expected))
    try:
        build("continued", adapter="me/nothing", push_to_hub=False)
    except ValueError as error:
        results["missing"] = str(error)
    return results


def full():
    """Push the whole pipeline of a run without an adapter."""
    trainer = build("full", use_peft=False, hub_strategy="every_save", learning_rate=1e-3, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    with trainer.averaged_weights():
        expected = image(trainer.pipeline)
    is_equal = torch.equal(image(load_pipeline("me/full")), expected)
    return {"equal": is_equal, "call_options": model_options("me/full") == trainer.eval_call_kwargs()}


def late():
    """Push after the training, without the option, under the name of the folder."""
    trainer = build("late", push_to_hub=False, hub_model_id=None, num_rollouts=1)
    trainer.train()
    trainer.push_to_hub()
    loaded = load_pipeline(BASE)
    loaded.load_lora_weights("me/late")
    equal = torch.equal(image(loaded), image(trainer.pipeline))
    trainer.train(resume_from_checkpoint=False)
    trainer.push_to_hub("A second run", revision="second")
    return {"equal": equal}


def card():
    """Let the Hub validate each model card, and run its snippet as printed."""
    results = {}
    for name, revision in {"end": "main", "full": "main", "every-save": "trained", "late": "second"}.items():
        text = ModelCard.load(hf_hub_download(f"me/{name}", "README.md", revision=revision))
        text.validate()
        snippet = re.search(r"```python\n(.*?)```", text.text, flags=re.DOTALL).group(1)
        folder = FOLDER / f"snippet-{name}"
        folder.mkdir()
        os.chdir(folder)
        namespace = {}
        torch.manual_seed(3)
        exec(snippet, namespace)
        results[name] = {"data": text.data.to_dict(), "text": text.text, "size": namespace["image"].size}
        results[name]["written"] = os.listdir(folder)
        if name != "full":
            expected = load_pipeline(BASE)
            PeftModel.from_pretrained(expected.transformer, f"me/{name}", revision=revision)
            results[name]["equal"] = torch.equal(image(namespace["pipeline"]), image(expected))
    return results


def failing(name, save=True, **options):
    """The Hub fails in the middle of a run: its steps, the warnings and the saved weights."""
    warnings.messages.clear()
    trainer = build(name, **{"hub_strategy": "checkpoint", "hub_always_push": False, **options})
    trainer.train()
    result = {"step": trainer.state.global_step}
    if save:
        trainer.save_model()
        try:
            trainer.push_to_hub()
        except RuntimeError as error:
            result["error"] = f"{type(error).__name__}: {error}"
    result["warnings"] = list(warnings.messages)
    saved = load_pipeline(BASE)
    saved.load_lora_weights(str(FOLDER / name / ("" if save else "checkpoint-3")))
    result["saved"] = torch.equal(image(saved), image(trainer.pipeline))
    return result


def command():
    """Run the command that a warning gives when the Hub is back, here for a repo of another name."""
    failed = failing("commit-500", save=False)
    line = next(message for message in failed["warnings"] if "hf upload" in message)
    words = shlex.split(line[line.index("hf upload") :].replace("me/commit-500", "me/later"))
    environment = {**os.environ, "HF_TOKEN": os.environ["FAKE_HUB_TOKEN"]}
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, env=environment)
    loaded, expected = load_pipeline(BASE), load_pipeline(BASE)
    expected.load_lora_weights(str(FOLDER / "commit-500"))
    if done.returncode == 0:
        loaded.load_lora_weights("me/later")
    equal = torch.equal(image(loaded), image(expected))
    return {**failed, "status": done.returncode, "said": done.stdout + done.stderr, "equal": equal}


def slow():
    """Training does not wait for a slow Hub, and starts no push while one is running."""
    warnings.messages.clear()
    trainer = build("slow", hub_strategy="every_save", hub_always_push=False)
    times = []
    training_step = trainer.training_step

    def step(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        if trainer.state.global_step == 2:  # in the last of the three rollouts
            times.append(time.time())
            urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/release")
        return loss

    trainer.training_step = step
    trainer.train()
    return {"released": times[0], "end": time.time()}


def refused(name):
    try:
        build(name)
    except ValueError as error:
        return {"error": str(error)}


def unreachable():
    """The Hub does not answer when the run starts, and answers when the run ends."""
    warnings.messages.clear()
    trainer = build("create-503")
    at_start = list(warnings.messages)
    trainer.args.hub_model_id = "me/back"
    trainer.train()
    trainer.save_model()
    return {"at_start": at_start, "later": warnings.messages[len(at_start) :]}


SCENARIOS = [end, every_save, checkpoint, all_checkpoints, resume, adapter, full, late, card, page, slow, unreachable]
SCENARIOS += [partial(failing, f"commit-{status}", hub_always_push=True) for status in (401, 403, 409)]
SCENARIOS += [partial(refused, f"create-{status}") for status in (401, 403)]
# In these huggingface_hub waits, and repeats its requests. Each waits for itself.
PATIENT = [partial(failing, "once-429"), partial(failing, "away", save=False), command]
PATIENT += [partial(failing, "commit-429", save=False)]


def play(scenarios):
    """Runs scenarios one after the other in a folder of their own, and writes their results into results.json there."""
    global FOLDER
    results = {}
    FOLDER /= name_of(scenarios[0])
    FOLDER.mkdir()
    for scenario in scenarios:
        start = time.time()
        try:
            result = scenario()
        except Exception:
            result = {"raised": traceback.format_exc()}
        results[name_of(scenario)] = {**result, "seconds": time.time() - start}
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1))


def name_of(scenario):
    return scenario.args[0] if isinstance(scenario, partial) else scenario.__name__


if __name__ == "__main__":
    children = []
    for scenarios in [SCENARIOS, *([scenario] for scenario in PATIENT)]:
        children.append(os.fork())
        if children[-1] == 0:
            torch.set_num_threads(1)  # a fork has no threads, and makes the pool anew
            play(scenarios)
            os._exit(0)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(statuses))
