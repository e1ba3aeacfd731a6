"""The contents of a checkpoint, to be compared to the bit."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


_OF_THE_MACHINE = ("time", "per_second", "peak_memory")


def contents(checkpoint: Path) -> dict[str, object]:
    """Everything that a run resumes from: tensors by name, and the state without times and memory."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors":
            found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
        elif path.suffix in (".pt", ".pth"):
            found[path.name] = torch.load(path, weights_only=False)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    found["state"] = {name: state[name] for name in ("global_step", "epoch", "best_metric", "best_model_checkpoint")}
    found["log"] = [
        {name: value for name, value in log.items() if not any(part in name for part in _OF_THE_MACHINE)}
        for log in state["log_history"]
    ]
    return found


def assert_equal(one: object, other: object, where: str = "") -> None:
    """Compare dicts, lists and tensors to the bit. `where` is the path to the values, for the message."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_equal(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert (one == other) if not hasattr(one, "shape") else (one == other).all(), where
