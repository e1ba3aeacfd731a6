"""
README and docs: what they print can be typed. Snippets run, or say in a comment of the page why not; commands exist with their
options, recipes and files.
"""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import trl_fdfo
from trl_fdfo.cli.main import COMMANDS, main


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
# Programs of others, which are not started here.
OTHERS = ("docker", "git", "hf", "pip", "python -m sglang.launch_server", "sbatch", "srun", "vllm", "torchrun", "cd")
PROGRAMS = tuple(f"{each.split()[0]} " for each in ("make", "trl-fdfo", "python", "accelerate", *OTHERS))
SCRIPTS = {"examples/train_sd3.py": "train", "examples/generate.py": "generate", "examples/evaluate.py": "evaluate"}


def snippets() -> list:
    """Each block of Python on the pages: its page, its code, and why it is not run, if it is not."""
    found = []
    for page in PAGES:
        pattern = r"(?:<!-- not run: ([^>]*) -->\n)?```python\n(.*?)```"
        for number, (why, code) in enumerate(re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL), 1):
            found.append(pytest.param(code, why, id=f"{page.stem}-{number}"))
    return found


@pytest.mark.parametrize("code, why", snippets())
def test_a_snippet_runs_or_is_marked(code, why, tmp_path, monkeypatch):
    """A marked one has at least imports that work and configs whose options are valid."""
    monkeypatch.chdir(tmp_path)
    if not why:
        namespace: dict = {"__name__": "snippet"}
        exec(compile(code, "snippet", "exec"), namespace)
        if "trainer" in namespace:
            rewards = [log["reward"] for log in namespace["trainer"].state.log_history if "reward" in log]
            assert rewards[-1] > rewards[0] + 0.02
        return
    tree = ast.parse(code)
    namespace: dict = {}
    ours = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module.startswith("trl_fdfo")]
    exec(compile(ast.Module(ours, type_ignores=[]), "snippet", "exec"), namespace)
    for node in ast.walk(tree):
        name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if name.endswith("Config") and name in trl_fdfo.__all__:
            namespace[name] = getattr(trl_fdfo, name)
            node.keywords.append(ast.keyword("use_cpu", ast.Constant(True)))
            exec(ast.unparse(node), namespace)


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


def commands() -> list:
    """Each command on the pages, with its continued lines and without its comment."""
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).replace("\\\n", " ")
        for line in re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE):
            if line.startswith(PROGRAMS):
                found.append(pytest.param(shlex.split(line, comments=True), id=f"{page.stem}-{len(found)}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_a_command_exists_with_its_options(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word not in ("...", "&")]
    if " ".join(words).startswith(OTHERS):
        return
    if words[0] == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in words[1:2])
        return
    if words[1].startswith("benchmarks/"):
        benchmark = (ROOT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in benchmark for word in words[2:] if word.startswith("--")), words
        return
    if words[0] != "trl-fdfo":  # accelerate launch -m trl_fdfo ..., python examples/train_sd3.py ...
        place = next(place for place, word in enumerate(words) if word in SCRIPTS or word == "trl_fdfo")
        words = ["trl-fdfo", *([SCRIPTS[words[place]]] if words[place] in SCRIPTS else []), *words[place + 1 :]]
    command, *arguments = words[1:]
    assert command in COMMANDS, command
    if command in ("train", "plan", "demo", "generate", "evaluate"):
        # All options that do not exist are named, so this is the only one.
        with pytest.raises(SystemExit):
            main([command, *arguments, "--no_such_option", "1"])
        error = capsys.readouterr().err
        assert re.search(r"has no option no_such_option(='1')?\.", error) or "no_such_option" in error.split("\n")[0], (
            error
        )


@pytest.mark.slow
def test_the_site_has_every_page_and_no_broken_link(tmp_path):
    subprocess.run(
        ["make", "-o", f"{sys.prefix}/installed", "docs", f"VENV={sys.prefix}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    site = ROOT / "build" / "site"
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / ("index.html" if page.stem == "index" else f"{name}/index.html")).is_file(), page
        assert f"{name}.md" in (ROOT / "zensical.toml").read_text(encoding="utf-8"), f"{page} is in no menu"
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html"))
    # What the docstrings' extension is for.
    for text in ("num_rollouts", "churn_schedule", "PickScore", "surrogate_loss"):
        assert text in reference
    assert "option(" not in reference and "[<code>" not in reference and "*optional*" not in reference
