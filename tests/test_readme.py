import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_first_example_runs_as_printed_and_raises_its_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0], namespace)
    rewards = [log["reward"] for log in namespace["trainer"].state.log_history if "reward" in log]
    assert len(rewards) == 10
    assert rewards[-1] > rewards[0] + 0.02


def test_links_and_files_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    folders = {}
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        folders[indent] = name
        path = ROOT / "".join(folders[i] for i in sorted(folders) if i < indent and folders[i].endswith("/")) / name
        folders = {i: folder for i, folder in folders.items() if i <= indent}
        assert path.exists(), path
