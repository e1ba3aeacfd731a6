import json
import os
import subprocess
from pathlib import Path

import pytest
from checkpoint_contents import assert_equal, contents

from trl_fdfo.saving.checkpoint_files import fault


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_end_in_the_bytes_of_the_run_that_was_not(tmp_path, processes, warm_python):
    script = Path(__file__).parents[1] / "helpers" / "kill_run.py"
    command = [warm_python.path, script, tmp_path, str(processes), "20", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    # Where it was meant to be killed, or just after.
    assert sum(result["kills"].values()) == 20 and min(result["kills"].values()) >= 1, result
    assert set(result["exit_codes"]) == {0}, done.stderr[-4000:]
    whole, killed = (tmp_path / name / "checkpoint-16" for name in ("whole", "killed"))
    assert fault(killed) is None and not (tmp_path / "killed" / "_saving").exists()
    expected = contents(whole)
    assert len(expected) > 20 and len(expected["log"]) == 16
    assert_equal(contents(killed), expected)
