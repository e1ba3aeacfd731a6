import subprocess
import sys
from pathlib import Path

import distributed_run
import pytest
import torch


def test_two_processes_end_in_the_weights_of_one(tmp_path):
    file = tmp_path / "two.pt"
    script = Path(__file__).with_name("distributed_run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, script, file], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    two = torch.load(file, weights_only=True)
    assert two["processes"] == 2 and two["wrapper"] == "DistributedDataParallel"

    _, one = distributed_run.run(str(tmp_path / "one"))
    assert one["processes"] == 1 and one["wrapper"] == "PeftModel"
    # The wrapper's prefix aside, the same weights.
    assert one["weights"].keys() == two["weights"].keys()
    moved = 0.0
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-5)
        moved = max(moved, weight.abs().max().item() if "lora_B" in name else 0.0)
    assert moved > 1e-3, "nothing was trained, and the comparison is empty"
    torch.testing.assert_close(two["images"], one["images"], rtol=0, atol=1e-4)
    assert two["eval_reward"] == pytest.approx(one["eval_reward"], abs=1e-5)
    assert two["rewards"] == pytest.approx(one["rewards"], abs=1e-5)
