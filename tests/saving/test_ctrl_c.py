"""Ctrl-C in the README's first example: the same command goes on, and ends in the bytes of the run that was not stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_contents import assert_equal, contents
from warm_python import WarmPython

from trl_fdfo.saving.checkpoint_files import fault


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
ROLLOUTS = 4
CHANGES = {
    "num_rollouts=10": f"num_rollouts={ROLLOUTS}",
    "prompts_per_rollout=54": "prompts_per_rollout=12",
    "per_device_prompt_batch_size=27": "per_device_prompt_batch_size=6",
    "trainer.train()": "trainer.train(resume_from_checkpoint=True)",
}


def start(script: Path, folder: Path, processes: int, python: WarmPython) -> subprocess.Popen:
    """The command, by a Python that starts at once. It passes Ctrl-C on, and the launcher passes it to the processes of the run."""
    folder.mkdir(exist_ok=True)
    command = [python.path]
    if processes > 1:
        config = str(ROOT / "trl_fdfo" / "accelerate_configs" / "ddp.yaml")
        command += ["-m", "accelerate.commands.launch", "--config_file", config]
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command.append(str(script))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= python.environment
    # A process group of its own, as a terminal has, which sends Ctrl-C to all of it.
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_a_rollout(run: subprocess.Popen, folder: Path) -> None:
    """Until the first rollout is logged."""
    log = folder / "out" / "metrics.jsonl"
    while not (log.is_file() and '"reward"' in log.read_text()):
        assert run.poll() is None, run.communicate()[0][-4000:]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_the_second_rollout_loses_nothing(tmp_path, processes, warm_python):
    script = tmp_path / "example.py"
    example = EXAMPLE
    on_cpus = {"epsilon=0.2,": 'epsilon=0.2,\n    use_cpu=True,\n    ddp_backend="gloo",'} if processes > 1 else {}
    for name, value in {**CHANGES, **on_cpus}.items():
        assert name in example
        example = example.replace(name, value)
    script.write_text(example)
    whole = start(script, tmp_path / "whole", processes, warm_python)
    printed, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, printed[-4000:]

    stopped = start(script, tmp_path / "stopped", processes, warm_python)
    try:
        wait_for_a_rollout(stopped, tmp_path / "stopped")
        os.killpg(stopped.pid, signal.SIGINT)
        printed, _ = stopped.communicate(timeout=100)
    finally:
        if stopped.poll() is None:
            os.killpg(stopped.pid, signal.SIGKILL)
    assert stopped.returncode != 0
    assert "SIGINT received: the run saves a checkpoint" in printed and "--resume_from_checkpoint true" in printed
    [checkpoint] = (tmp_path / "stopped" / "out").glob("checkpoint-*")
    # In the second rollout: before its updates, or after them. On a busy machine it may be the third.
    assert checkpoint.name in ("checkpoint-4", "checkpoint-8", "checkpoint-12") and fault(checkpoint) is None

    resumed = start(script, tmp_path / "stopped", processes, warm_python)
    printed, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, printed[-4000:]
    found, expected = (
        contents(tmp_path / name / "out" / f"checkpoint-{4 * ROLLOUTS}") for name in ("stopped", "whole")
    )
    # PyTorch's own generator, from which a run takes nothing, has also seen the batch that the signal cut off.
    result = lambda of: {name: value for name, value in of.items() if not name.startswith("rng_state")}
    assert len(result(expected)) > 20
    assert_equal(result(found), result(expected))
