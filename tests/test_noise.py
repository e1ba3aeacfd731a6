"""What a run writes on stderr: progress bars alone. Libraries that say something of themselves are in `trl_fdfo/noise.py`."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trl_fdfo import shapes
from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.noise import say_once_what_is_cut
from trl_fdfo.pipeline_flow import PipelineFlow


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# A bar of tqdm, such as "train:  50%|█████     | 2/4 [00:01<00:01, 1.5step/s]", also one that is cut off by the next.
BAR = re.compile(r"^[\w :.]*\d+%\|.*\| *\d+/\d+ \[.*$|^[\w :.]*\d+it \[.*$")


def not_a_bar(text: str) -> list[str]:
    """The lines that are neither bars nor empty."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Z]", "\n", text)  # the cursor moves between bars
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and not BAR.match(line)]


@pytest.mark.slow
def test_a_run_says_nothing_on_stderr_but_its_progress(tmp_path):
    example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    example = example.replace("num_rollouts=10", "num_rollouts=1").replace(
        "prompts_per_rollout=54", "prompts_per_rollout=4"
    )
    example = example.replace("per_device_prompt_batch_size=27", "per_device_prompt_batch_size=2")
    # Without what tests of trackers set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not_a_bar(done.stderr) == []
    printed = done.stdout.splitlines()
    assert printed[0].startswith("FDFO on StableDiffusion3Pipeline")
    assert printed[-3:] == [
        "The result is in out/",
        '  load     pipeline.load_lora_weights("out")',
        "  look at  README.md, pictures, metrics.jsonl",
    ]
    known = r"FDFO on |  |After rollout 1: |\{'train_runtime'|The result is in "
    assert [line for line in printed if not re.match(known, line)] == []


def test_lines_that_are_no_bars_are_found():
    bars = "train:  50%|█████     | 2/4 [00:01<00:01,  1.5step/s]\r  0%|          | 0/4 [00:00<?, ?it/s]\x1b[A\n"
    assert not_a_bar(bars) == []
    assert not_a_bar(bars + "FutureWarning: 100% of this is old\n") == ["FutureWarning: 100% of this is old"]


def test_prompts_of_the_packages_own_are_not_said_to_be_cut(caplog):
    call = {"num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 0}
    flow = PipelineFlow(shapes.load_pipeline(), num_generations=2, scheduler_class=ChurnScheduler, **call)
    logger = logging.getLogger(type(flow.pipeline).__module__)
    for known in logger.filters:  # another test may have had it said
        vars(known).get("_said", set()).clear()
    logger.addHandler(caplog.handler)  # or have quieted the loggers above it
    caplog.set_level(logging.WARNING, logger.name)
    try:
        flow.axes()  # calls it with prompts that are too long for its tokenizer
        assert "truncated" not in caplog.text
        flow.rehearse(["a red circle on a white background, and a long story of it"])
    finally:
        logger.removeHandler(caplog.handler)
    assert "truncated because CLIP can only handle" in caplog.text
    assert not any(logging.getLogger(each.__module__).disabled for each in type(flow.pipeline).__mro__)


def test_a_filter_drops_its_message_and_no_other(caplog):
    logger = logging.getLogger("torchao")
    logger.warning("Failed to load %s: no such file", "_C.so")
    logger.warning("int8 is not supported")
    assert [record.getMessage() for record in caplog.records if record.name == "torchao"] == ["int8 is not supported"]


def test_long_prompts_are_said_once_per_reason(caplog):
    class Pipeline:
        pass

    Pipeline.__module__ = "a_pipeline_for_test"
    for _ in range(2):
        say_once_what_is_cut(Pipeline)
    logger = logging.getLogger("a_pipeline_for_test")
    for limit in (77, 77, 128, 77):
        logger.warning(f"The following part of your input was truncated because it has {limit} tokens: {['a', 'b']}")
    logger.warning("something else")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "77 tokens: ['a', 'b']" in said[0] and "128" in said[1] and said[2] == "something else"
