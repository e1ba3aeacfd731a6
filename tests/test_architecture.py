"""The rooms of the package: imports run downward, without circles, and an algorithm's name stays in its folder."""

import ast
import re
from pathlib import Path

import pytest

import trl_fdfo


PACKAGE = Path(__file__).parents[1] / "trl_fdfo"

# From the bottom up. Rooms of one floor know nothing of each other.
FLOORS = [
    ["noise", "seeds", "media", "offload", "redaction", "metric_names", "preference"],
    ["rewards"],
    ["pipeline"],
    ["reporting"],
    ["saving"],
    ["evaluation"],
    ["planning"],
    ["training"],
    ["fdfo", "flow_grpo", "diffusion_nft", "awm", "ram"],
    ["algorithm", "comparison", "diversity", "pipeline_flow"],  # tables of public names
    ["shapes"],
    ["cli"],
    ["serve", "__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ALGORITHMS = ("fdfo", "flow_grpo", "diffusion_nft", "awm", "ram")
# The other files that may name an algorithm: tables of names.
TABLES = ("__init__", "algorithm", "comparison", "diversity", "pipeline_flow", "cli.algorithms")
CLASS_OF_ALGORITHM = r"(FDFO|FlowGRPO|DiffusionNFT|AWM|RAM|Churn|SDE)[A-Z]"
# trl-fdfo is the command
NAME_OF_ALGORITHM = r"\b(FDFO|Flow-GRPO|DiffusionNFT|AWM|RAM|(?<!trl-)fdfo|flow_grpo|diffusion_nft|awm|ram)\b"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
FOLDERS = {module_name(path) for path in PACKAGE.rglob("*/__init__.py")}


def imports_of(name: str, source: str) -> set[str]:
    """Modules of the package that a module imports, also within functions and conditions."""
    package = name.split(".") if name in FOLDERS else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "trl_fdfo"):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = node.module or ""
            base = [*base, *(module if node.level else module.removeprefix("trl_fdfo")).strip(".").split(".")]
            for alias in node.names:
                inner = ".".join(filter(None, [*base, alias.name]))
                found.add(inner if inner in SOURCES else ".".join(filter(None, base)))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("trl_fdfo.") for a in node.names if a.name.startswith("trl_fdfo.")}
    return found - {""}


def room(module: str) -> str:
    return module.partition(".")[0]


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports between rooms that do not run downward."""
    return [
        f"{name} -> {imported}"
        for name, modules in imports.items()
        for imported in modules
        if room(name) != room(imported) and FLOOR[room(imported)] >= FLOOR[room(name)]
    ]


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (visit(imported, [*path, name]) for imported in imports.get(name, ()))), [])

    return next(filter(None, (visit(name, []) for name in imports)), [])


def algorithms_named(source: str) -> set[str]:
    """Names of algorithms in the code: as classes and in text that is no documentation."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            found |= {name} if re.match(CLASS_OF_ALGORITHM, name) else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            found |= {match.group() for match in re.finditer(NAME_OF_ALGORITHM, node.value)}
    return found


IMPORTS = {name: imports_of(name, source) for name, source in SOURCES.items() if name != "__init__"}


def test_every_file_is_in_a_room():
    assert {room(name) for name in SOURCES} - {"__init__"} == FLOOR.keys()
    assert {imported for modules in IMPORTS.values() for imported in modules} <= SOURCES.keys()


def test_imports_run_downward_without_a_circle():
    assert sum(map(len, IMPORTS.values())) > 150, "imports were not read"
    assert upward(IMPORTS) == []
    assert circle(IMPORTS) == []


def test_a_planted_fault_is_found():
    planted = "def f():\n    from ..training.trainer import RolloutTrainer\n    from . import checks\n"
    imports = {"pipeline.flow": imports_of("pipeline.flow", planted)}
    assert imports["pipeline.flow"] == {"training.trainer", "pipeline.checks"}
    assert upward(IMPORTS | imports) == ["pipeline.flow -> training.trainer"]
    assert circle(IMPORTS | imports)[0] == circle(IMPORTS | imports)[-1]
    assert upward({"fdfo.trainer": {"flow_grpo.sde"}}) == ["fdfo.trainer -> flow_grpo.sde"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert algorithms_named('"""FDFO."""\nraise ValueError("cannot be trained with FDFO")') == {"FDFO"}
    assert algorithms_named("x = isinstance(config, FlowGRPOConfig)") == {"FlowGRPOConfig"}


@pytest.mark.parametrize(
    "name", sorted(name for name in SOURCES if room(name) not in ALGORITHMS and name not in TABLES)
)
def test_an_algorithm_is_named_in_its_folder_alone(name):
    assert algorithms_named(SOURCES[name]) == set()


def test_no_mock_and_no_false_annotation():
    for name, source in SOURCES.items():
        assert "unittest" not in source, name
        assert "TYPE_CHECKING" not in source or name == "__init__", name


def test_public_names_import():
    for name in trl_fdfo.__all__:
        assert getattr(trl_fdfo, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        trl_fdfo.Trainer  # noqa: B018
