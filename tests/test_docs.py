"""
README and docs: what they print can be typed. Snippets run, or say in a comment of the page why not; commands exist with their
options, recipes and files, and run, made shorter, or `NOT_RUN` says why not.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_pipelines

import trl_fdfo
from trl_fdfo.cli.main import COMMANDS, main


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
# Programs of others, which are not started here.
OTHERS = ("hf", "pip", "srun", "vllm")
PROGRAMS = tuple(f"{each.split()[0]} " for each in ("make", "trl-fdfo", "python", "accelerate", *OTHERS))
# What else stands in blocks without a language: options, formulas, and a paragraph of a list.
NO_COMMANDS = ("--", "weight = ", "max(FLOPs ", "first. Images")
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


# Why a command is not run, by its first words.
INSTALLS = "it installs packages"
DOWNLOADS = "it downloads a model, which takes a GPU"
SERVES = "it serves until it is ended"
ABRIDGED = "the reader fills in the dots"
HOURS = "it takes hours"
VOTES = "it waits for people, or reads their votes"
NOT_RUN = {
    "pip install": INSTALLS,
    "make lint": INSTALLS,
    "make test": "it runs this test",
    "make benchmark": HOURS,
    "python benchmarks/convergence.py": HOURS,
    "python benchmarks/counts/comparison.py": HOURS,
    "make vote": VOTES,
    "trl-fdfo train --config shapes_vote": VOTES,
    "trl-fdfo vote": VOTES,
    "hf download": DOWNLOADS,
    "trl-fdfo train --config combined": DOWNLOADS,
    "trl-fdfo train --config sd35_24gb": DOWNLOADS,
    "trl-fdfo train --config pickscore": DOWNLOADS,
    "trl-fdfo train --algorithm flow_grpo --model stabilityai/stable-diffusion-3.5-medium": DOWNLOADS,
    "trl-fdfo generate --model stabilityai/stable-diffusion-3.5-medium": DOWNLOADS,
    "trl-fdfo generate --model Wan-AI/Wan2.2-TI2V-5B-Diffusers": DOWNLOADS,
    "trl-fdfo merge --model stabilityai/stable-diffusion-3.5-medium": DOWNLOADS,
    "accelerate launch -m trl_fdfo evaluate --model stabilityai/stable-diffusion-3.5-medium": DOWNLOADS,
    "accelerate launch -m trl_fdfo evaluate --config evaluate_paper": DOWNLOADS,
    "trl-fdfo plan --gpu h100": "it counts 14 or 19 billion parameters for half a minute",
    "srun": SERVES,
    "vllm serve": SERVES,
    "trl-fdfo serve": SERVES,
    "trl-fdfo train --config shapes --reward http(url='http://localhost:8200', name='reward')": "it asks such a server",
    "trl-fdfo train ...": ABRIDGED,
    "trl-fdfo train --dataset_name geneval_train": ABRIDGED,
    "trl-fdfo evaluate --prompts drawbench": ABRIDGED,
}


@dataclass(frozen=True)
class Run:
    """A command that is run here: options that make it short, and what it must leave or print."""

    shorter: str = ""
    leaves: tuple[str, ...] = ()
    prints: str = ""
    after: tuple[str, ...] = ()  # commands whose files it reads


_FEW = "--num_rollouts 1 --num_report_prompts 2 --images_per_report_prompt 1 --optimizer_steps_per_rollout 2"
_PAIRS = f"{_FEW} --prompts_per_rollout 8 --per_device_prompt_batch_size 4"
_RESULT = ("README.md", "adapter_model.safetensors", "before_after.png", "generation_config.json", "results.json")
# `sd35` is a tiny pipeline here.
_TINY = "--height 16 --width 16 --dataset_name prompts.txt --dataset_prompt_column prompt"
_SOME_IMAGES = (
    "--images_per_prompt 2 --prompts 'a red circle on a white background' 'a cyan cross on a gray background'"
)
_EVALUATED = ("evaluation/results.json", "evaluation/grid.png")
# The commands that are run, by their first words.
RUN = {
    "trl-fdfo demo": Run(_PAIRS, tuple(f"outputs/shapes/{name}" for name in _RESULT), "strict_accuracy"),
    "trl-fdfo train --config shapes_4_steps": Run(_PAIRS, tuple(f"outputs/shapes_4_steps/{name}" for name in _RESULT)),
    "trl-fdfo train --config shapes_fast": Run(_PAIRS, tuple(f"outputs/shapes_fast/{name}" for name in _RESULT)),
    "trl-fdfo train --config shapes_flow_grpo": Run(
        f"{_FEW} --prompts_per_rollout 2 --per_device_prompt_batch_size 1",
        tuple(f"outputs/shapes_flow_grpo/{name}" for name in _RESULT),
    ),
    "trl-fdfo evaluate --model shapes --adapter outputs/shapes --reward": Run(
        _SOME_IMAGES, _EVALUATED, "| strict ", after=("trl-fdfo demo",)
    ),
    "trl-fdfo evaluate --model shapes --adapter outputs/shapes --adapter outputs/shapes_4_steps": Run(
        f"{_SOME_IMAGES} --output four",
        ("four/results.json", "four/grid.png"),
        "outputs/shapes_4_steps - base",
        after=("trl-fdfo demo", "trl-fdfo train --config shapes_4_steps"),
    ),
    "trl-fdfo generate --model shapes": Run("--seeds 1", ("grid.png",), after=("trl-fdfo demo",)),
    "trl-fdfo plan --config sd35_24gb --model sd35": Run(_TINY, prints="in short: rtx4090: "),
    "trl-fdfo plan --config combined --model sd35": Run(_TINY, prints="in short: h100: "),
    "python benchmarks/published_configs.py": Run(
        leaves=tuple(
            f"configs/{name}/model_index.json" for name in ("Lightricks/LTX-2", "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
        )
    ),
}


def commands() -> list:
    """Each command on the pages, with its continued lines and without its comment."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        # A block that begins with #! is a file: tests/training/test_engines.py runs the one for Slurm.
        in_shells = "".join(re.findall(r"```(?:sh|bash)\n(?!#!)(.*?)```", text, flags=re.DOTALL)).splitlines()
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for line in [*re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE), *in_shells]:
            if line.strip() and not line.startswith(NO_COMMANDS):
                found.append(pytest.param(shlex.split(line, comments=True), id=f"{page.stem}-{len(found)}"))
    return found


def classes_of(words: list[str]) -> list[str]:
    """The entries of `RUN` and `NOT_RUN` that a command begins with."""
    return [key for key in (*RUN, *NOT_RUN) if f"{' '.join(words)} ".startswith(f"{key} ")]


@pytest.mark.parametrize("words", commands())
def test_a_command_runs_or_says_why_not(words):
    assert f"{words[0]} ".startswith(PROGRAMS), f"{words}: a program that is new on the pages. Add it to PROGRAMS."
    found = classes_of(words)
    assert len(found) == 1, f"{' '.join(words)} is in {found}: put it into RUN, or into NOT_RUN with the reason."


def test_nothing_is_classified_that_no_page_has():
    on_pages = {key for param in commands() for key in classes_of(param.values[0])}
    assert on_pages == RUN.keys() | NOT_RUN.keys()


@pytest.fixture(scope="module")
def typed(warm_python, tmp_path_factory):
    """Types a command of `RUN`, as the page prints it, after those whose files it reads. A command is run once."""
    folder = tmp_path_factory.mktemp("typed")
    tiny_pipelines.sd3().save_pretrained(folder / "sd35")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    done: dict[str, str] = {}
    environment = {**os.environ, **warm_python.environment, "HF_DATASETS_CACHE": str(folder / "cache")}

    def type_it(key: str) -> None:
        if key in done:
            return
        for before in RUN[key].after:
            type_it(before)
        words = next(param.values[0] for param in commands() if classes_of(param.values[0]) == [key])
        program = ["-m", "trl_fdfo"] if words[0] == "trl-fdfo" else [ROOT / words[1]]
        own = words[1:] if words[0] == "trl-fdfo" else words[2:]
        ended = subprocess.run(
            [warm_python.path, *program, *own, *shlex.split(RUN[key].shorter)],
            **{"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 240},
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        done[key] = ended.stdout
        assert RUN[key].prints in ended.stdout
        for file in RUN[key].leaves:
            assert (folder / file).is_file(), file

    return type_it


@pytest.mark.parametrize("key", RUN)
def test_a_command_that_can_run_here_does(typed, key):
    typed(key)


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
