"""
Options of configs and names of rewards as their source files have them. Importing those files imports torch, which takes
seconds, too long for a list of options or for an error in one.

What is read here decides nothing: the same options are parsed again by their classes before a run.
"""

import argparse
import ast
import builtins
import dataclasses
import enum
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).parents[1]
INHERITED = "Options of transformers.TrainingArguments"
# Where a package has a name that it loads lazily.
_LAZY = {("transformers", "TrainingArguments"): "training_args.py"}


class Source:
    """A source file, and the names that its module would have."""

    def __init__(self, path: Path):
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))

    def find(self, name: str) -> tuple["Source", ast.AST]:
        """
        The definition of a name and the file where it is.

        Raises:
            LookupError: There is none, or it is in a file that is not followed.
        """
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return self, node
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return self, node.value
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(node, alias.name).find(alias.name)
        raise LookupError(f"{self.path} has no {name}.")

    def _imported(self, node: ast.ImportFrom, name: str) -> "Source":
        if node.level:
            folder = self.path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            file = folder.with_suffix(".py")
            return source(file if file.is_file() else folder / "__init__.py")
        if (node.module, name) in _LAZY:
            return source(folder_of(node.module) / _LAZY[node.module, name])
        raise LookupError(f"{node.module} is not followed.")

    def value(self, name: str) -> Any:
        """The value of a constant, a class of the standard library, or an Enum. Raises what stands in the way."""
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and not node.level and node.module in sys.stdlib_module_names:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return getattr(importlib.import_module(node.module), alias.name)
        where, node = self.find(name)
        if isinstance(node, ast.ClassDef):
            members = {each.targets[0].id: each.value for each in node.body if isinstance(each, ast.Assign)}
            return enum.Enum(name, {member: ast.literal_eval(value) for member, value in members.items()})
        if isinstance(node, ast.Dict):
            # A table: who asks for its names needs no values that cannot be read.
            return {ast.literal_eval(key): where.evaluate(value, None) for key, value in zip(node.keys, node.values)}
        return where.evaluate(node)

    def evaluate(self, node: ast.AST | None, *default: Any) -> Any:
        """The value of an expression, or `default` if it cannot be read."""
        try:
            names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} - vars(builtins).keys()
            bound = {
                each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            }
            values = {name: self.value(name) for name in names - bound}
            return eval(compile(ast.Expression(node), str(self.path), "eval"), values)
        except Exception:
            if not default:
                raise
            return default[0]

    def classes(self, name: str) -> Iterator[tuple["Source", ast.ClassDef]]:
        """A class and its bases, the class first."""
        try:
            where, node = self.find(name)
        except LookupError:
            return
        yield where, node
        for base in node.bases:
            if isinstance(base, ast.Name):
                yield from where.classes(base.id)


@functools.cache
def source(path: Path) -> Source:
    return Source(path)


def folder_of(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    return Path(importlib.util.find_spec(package).origin).parent


@dataclasses.dataclass
class _Option:
    kind: Any
    default: Any
    metadata: dict[str, Any]

    def field(self, text: str) -> dataclasses.Field:
        metadata = {**self.metadata, "help": text if text == argparse.SUPPRESS else text.replace("%", "%%")}
        if isinstance(self.default, (list, dict, set)):
            return dataclasses.field(default_factory=lambda: self.default, metadata=metadata)
        return dataclasses.field(default=self.default, metadata=metadata)


def module_of(name: str) -> Path:
    """The source file of a public name of the package."""
    return PACKAGE.joinpath(*source(PACKAGE / "__init__.py").value("_MODULES")[name].split(".")).with_suffix(".py")


def sections(file: Path, name: str, show_inherited: bool = True) -> list[type]:
    """
    A config as dataclasses, one for each heading of the docstrings of its class and its bases, with the options below it.

    Args:
        file (`Path`): Source file of the class.
        name (`str`): The class.
        show_inherited (`bool`): Give the options of `TrainingArguments` a text for a list of options.
    """
    options: dict[str, _Option] = {}
    renamed: dict[str, str] = {}
    classes = list(source(file).classes(name))
    for where, node in reversed(classes):
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and not _is_class_variable(each):
                options[each.target.id] = _option(where, each)
            targets = each.targets if isinstance(each, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == "renamed_options" for target in targets):
                renamed = where.evaluate(each.value, {})
    headings: dict[str, dict[str, str]] = {}  # of each heading its options and their paragraphs
    for _, node in classes:
        if node.name != "TrainingArguments":
            for heading, option, text in _paragraphs(node):
                if not any(option in names for names in headings.values()):
                    headings.setdefault(heading, {})[option] = text
    described = {option for names in headings.values() for option in names}
    for option, read in options.items():
        if option not in described:
            text = read.metadata.get("help", "") if show_inherited else None
            headings.setdefault(INHERITED, {})[option] = text
    if INHERITED in headings:  # the last, whatever it is called
        headings[INHERITED] = headings.pop(INHERITED)
    return [
        _dataclass(name, heading, names, options, {"renamed_options": renamed} if place == 0 else {})
        for place, (heading, names) in enumerate(headings.items())
    ]


def _dataclass(name: str, heading: str, texts: dict[str, str | None], options: dict[str, _Option], more: dict) -> type:
    """`texts` has for each option its paragraph, or None for one that is left out of a list of options."""
    fields = [
        (option, options[option].kind, options[option].field(argparse.SUPPRESS if text is None else text))
        for option, text in texts.items()
        if option in options
    ]
    return dataclasses.make_dataclass(name, fields, namespace={"_argument_group_name": heading, **more})


def _is_class_variable(node: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.dump(node.annotation)


def _option(where: Source, node: ast.AnnAssign) -> _Option:
    """An option; a type that cannot be read is a string, and a default None."""
    kind = where.evaluate(node.annotation, str)
    value, metadata = node.value, {}
    if isinstance(value, ast.Call):  # field(default=..., metadata=...) or option(default, choices=...)
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        metadata = where.evaluate(given.get("metadata"), {})
        choices = where.evaluate(given.get("choices"), None)
        if choices:
            metadata["choices"] = list(choices)
        factory = where.evaluate(given.get("default_factory"), None)
        default = value.args[0] if value.args else given.get("default")
        default = factory() if callable(factory) else where.evaluate(default, None)
    else:
        default = where.evaluate(value, None)
    return _Option(kind, default, metadata)


def _paragraphs(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Heading, name and paragraph of each option in the docstring of a config."""
    docstring = inspect.cleandoc(ast.get_docstring(node) or "") + "\n"
    heading = f"Options of {node.name}"
    pattern = r"^ {4}> (?P<heading>.+)$|^ {4}(?P<name>\w+) \(.*\):\n(?P<text>(?: {8}.*\n)+)"
    for match in re.finditer(pattern, docstring, re.MULTILINE):
        heading = match["heading"] or heading
        if match["name"]:
            yield heading, match["name"], " ".join(match["text"].split())


def reward_table() -> str:
    """The rewards by name with the first lines of their docstrings, for `--help`."""
    where, table = source(PACKAGE / "rewards" / "by_name.py").find("REWARDS")
    rows = {}
    for key, value in zip(table.keys, table.values):
        rows[key.value] = ast.get_docstring(where.find(value.id)[1]).splitlines()[0]
    rows["module:callable"] = "A reward of your own, on the Python path or in the working directory."
    width = max(map(len, rows))
    options = "options follow in parentheses: --reward \"pickscore(dtype='bfloat16', offload=True)\""
    return "\n".join(["rewards:", *(f"  {name:{width}}  {text}" for name, text in rows.items()), options])
