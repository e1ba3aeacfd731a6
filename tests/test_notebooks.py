"""The notebooks run, and show what a notebook is for: rewards and pictures."""

import re
from pathlib import Path

import pytest


NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.slow
def test_quickstart_notebook_runs_and_shows_rewards_and_pictures(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "pictures stay out of the repository"
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = {cell.source.splitlines()[0]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = [output["text"] for outputs_of_cell in outputs.values() for output in outputs_of_cell if "text" in output]
    assert "No LoRA keys" not in "".join(said)
    shown = outputs["trainer.train();"]
    [table] = [text for text in _html_of(shown) if "reward_std" in text]
    heads = re.findall(r"<th>(.*?)</th>", table)
    rows = re.findall(r"<td>(.*?)</td>", table)
    assert heads == ["rollout", "reward", "reward_std", "branch_distance"]
    assert rows[:: len(heads)] == [str(number) for number in range(1, 9)]
    rewards = [float(value) for value in rows[1 :: len(heads)]]
    assert rewards[-1] > rewards[0] + 0.02
    # The first and the last rollout.
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    after = outputs['trainer.comparison.sample("after")']
    result = "".join(output["text"] for output in after if output.get("name") == "stdout")
    assert "before" in result and "pixel_distance" in result and 'pipeline.load_lora_weights("out")' in result
    for cell in (
        'Image("out/reward_curve.png", width=600)',
        'Image("out/before_after.png")',
        "pipeline = shapes.load_pipeline()",
    ):
        assert "image/png" in outputs[cell][-1]["data"]


def _html_of(outputs):
    return [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
