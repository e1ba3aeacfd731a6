"""README and docs: the first example runs, and links, files and imports exist."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


@pytest.mark.slow
def test_first_example_runs_as_printed_and_raises_its_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0], namespace)
    rewards = [log["reward"] for log in namespace["trainer"].state.log_history if "reward" in log]
    assert len(rewards) == 10
    assert rewards[-1] > rewards[0] + 0.02


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_lists_every_page_and_every_folder():
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()})" in README, page
    tree = re.search(r"## Layout\n\n```\n(.*?)```", README, flags=re.DOTALL).group(1)
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    assert shown == {path.name for path in (ROOT / "trl_fdfo").iterdir() if path.is_dir()} - {"__pycache__"}
    for line in tree.splitlines():
        assert (ROOT / ("trl_fdfo" if line.startswith("  ") else "") / line.split()[0]).exists(), line


def test_imports_of_the_examples_work():
    lines = [
        line
        for page in PAGES
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in re.findall(r"^from trl_fdfo.*$", block, flags=re.MULTILINE)
    ]
    assert len(lines) > 5
    for line in lines:
        exec(line, {})
