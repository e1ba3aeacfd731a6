"""
A first look at options, in a fraction of a second: a config's class, its checks and the table of rewards, without torch and
transformers, which take seconds to import.

[`load`] executes a module of the package with stand-ins for what it imports from other packages. A class that it makes has the
options, docstrings and checks of the real one. A check that needs more than these, such as whether there is a GPU, ends at
its first use of a stand-in, by [`Undecided`]. The real classes then decide: nothing here lets a run start.
"""

import argparse
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from .errors import raised_by_package


PACKAGE = __package__.split(".")[0]
INHERITED = "Options of transformers.TrainingArguments"
# Imported as they are: they are soon there.
_REAL = {*sys.stdlib_module_names, "numpy", "yaml"}
# Names of other packages whose module is executed too.
_EXECUTED = {
    ("transformers", "TrainingArguments"): "transformers.training_args",
    ("accelerate.utils", "get_int_from_env"): "accelerate.utils.environment",
}
_SILENT = ("warning", "warning_once", "warn", "info")  # methods of a logger: what they say is said by the real one

_modules: dict[str, ModuleType] = {}
_executing: list[str] = []


class Undecided(BaseException):
    """A check needs more than its options. No `except Exception` of a check takes it for an error of the user."""


class StandIn:
    """
    What a module has from another package. While modules are executed it can be called, subscripted, derived from and used as
    a decorator, with no effect; later all this raises [`Undecided`].
    """

    def __init__(self, name: str):
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")

    def _used(self, *_: Any) -> "StandIn":
        if not _executing:
            raise Undecided(self._name)
        return self

    __getitem__ = __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = _used
    __hash__ = object.__hash__

    def __call__(self, *args: Any, **_: Any) -> Any:
        if self._name.rpartition(".")[2] in _SILENT:
            return None
        self._used()
        return args[0] if len(args) == 1 and inspect.isroutine(args[0]) else self

    def __eq__(self, other: object) -> bool:
        return self is other or (not isinstance(other, type) and bool(self._used()))

    def __bool__(self) -> bool:
        return self._used() is self

    def __iter__(self) -> Iterator[Any]:
        return iter(() if self._used() else ())

    def __instancecheck__(self, instance: object) -> bool:
        return bool(self._used())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[()]:
        return ()


def load(name: str) -> ModuleType:
    """The module `name`, such as "trl_fdfo.fdfo.config", executed with stand-ins. It is not put into `sys.modules`."""
    if name not in _modules:
        path = _path(name)
        module = _modules[name] = ModuleType(name)
        module.__file__ = str(path)
        module.__package__ = name if path.name == "__init__.py" else name.rpartition(".")[0]
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        _executing.append(name)
        try:
            exec(SourceFileLoader(name, str(path)).get_code(name), vars(module))
        except BaseException:
            del _modules[name]
            raise
        finally:
            _executing.pop()
    return _modules[name]


def load_or_import(name: str) -> ModuleType:
    """As [`load`]; the real module where stand-ins do not do, as those of another version of a package may not."""
    try:
        return load(name)
    except Exception:
        return importlib.import_module(name)


def _path(name: str) -> Path:
    package, *parts = name.split(".")
    path = Path(importlib.util.find_spec(package).origin).parent.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _import(name: str, globals: Mapping[str, Any], locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """What an `import` statement calls in a module that is executed here."""
    if level:
        base = globals["__package__"].split(".")
        name = ".".join([*base[: len(base) - level + 1], *([name] if name else [])])
    package = name.split(".")[0]
    if package in _REAL:
        return builtins.__import__(name, globals, locals, fromlist, 0)
    if package == PACKAGE and _executing:
        module = load(name)
        for each in fromlist or ():
            if not hasattr(module, each):
                setattr(module, each, load(f"{name}.{each}"))
        return module
    stand_in = StandIn(name if fromlist else package)
    for each in fromlist or ():
        if (name, each) in _EXECUTED:
            setattr(stand_in, each, getattr(load(_EXECUTED[name, each]), each))
    return stand_in


def config_class(name: str, is_plan: bool = False) -> type:
    """A public config of the package, such as "FDFOConfig", or that of its plan."""
    config = getattr(load_or_import(f"{PACKAGE}.{load(PACKAGE)._MODULES[name]}"), name)
    return load_or_import(f"{PACKAGE}.planning.without_weights").planned(config) if is_plan else config


def sections(config: type, show_inherited: bool = True) -> list[type]:
    """
    The options of a config as dataclasses, one for each heading in the docstrings of its class and its bases. A list of options
    does not show those that are idle in the algorithm.

    Args:
        config (`type`): A class that was loaded here.
        show_inherited (`bool`): Show the options of `TrainingArguments` in a list of options.
    """
    headings: dict[str, dict[str, str]] = {}  # of each heading its options and their paragraphs
    for each in config.__mro__:
        for heading, name, text in () if each.__name__ == "TrainingArguments" else _paragraphs(each):
            if not any(name in texts for texts in headings.values()):
                headings.setdefault(heading, {})[name] = argparse.SUPPRESS if name in config.idle_options else text
    described = {name for texts in headings.values() for name in texts}
    options = {field.name: field for field in dataclasses.fields(config) if field.init}
    own = {n: f.metadata.get("help", "") for n, f in options.items() if n not in described and n in _own(config)}
    others = {n: f.metadata.get("help", "") for n, f in options.items() if n not in described and n not in own}
    if own:
        headings = {f"Options of {config.__name__}": own, **headings}
    if others:
        headings[INHERITED] = others if show_inherited else dict.fromkeys(others, argparse.SUPPRESS)
    made = []
    for heading, texts in headings.items():
        fields = [(name, _type(options[name]), _described(options[name], text)) for name, text in texts.items()]
        made.append(dataclasses.make_dataclass(config.__name__, fields, namespace={"_argument_group_name": heading}))
    made[0].renamed_options = config.renamed_options
    return made


def check(config: type, values: Mapping[str, Any], processes: int | None = None) -> None:
    """
    Checks of a config that was loaded here, as far as its options alone decide them.

    Args:
        config (`type`): The class.
        values (`Mapping[str, Any]`): Options, and others that are passed over.
        processes (`int`, *optional*): Processes that will be launched. Default: as the environment has them.

    Raises:
        ValueError: As the config raises it.
    """
    if processes is not None:
        config = type(config.__name__, (config,), {"_announced_processes": lambda self: processes})
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = {name: value for name, value in values.items() if name in defaults and value is not defaults[name]}
    _as_far_as_decided(lambda: config(**given))


def check_prompts(name: str | None, column: str, option: str = "dataset_name") -> None:
    """
    Args:
        name (`str`, *optional*): A prompt set, Hub id or file.
        column (`str`): Column of the prompts.
        option (`str`): Name of the option in errors.

    Raises:
        FileNotFoundError: `name` is that of a file, and there is none.
        ValueError: The file is of another format.
    """
    _as_far_as_decided(lambda: load_or_import(f"{PACKAGE}.training.prompts").load_prompts(name, column, option))


def _as_far_as_decided(check: Callable[[], Any]) -> None:
    try:
        check()
    except (ValueError, FileNotFoundError) as error:
        # An operation that failed on a stand-in can be the context of an error that is none.
        if raised_by_package(error) and not isinstance(error.__context__, (TypeError, AttributeError)):
            raise
    except (Undecided, Exception):
        pass  # undecided, or an operation failed on a stand-in: the real classes check again


def check_rewards(specs: list[str], has_modules: bool = True) -> None:
    """
    Args:
        specs (`list[str]`): Names of rewards.
        has_modules (`bool`): Also look for the modules of `module:callable`.

    Raises:
        ValueError: A reward has a name that does not exist, or unknown options.
    """
    by_name = load_or_import(f"{PACKAGE}.rewards.by_name")
    for spec in specs:
        path, _ = by_name.check_by_name(spec, by_name.REWARDS, "reward")
        if has_modules and path not in by_name.REWARDS:
            by_name.check_object(path, "reward")


def check_object(path: str, kind: str) -> None:
    """
    Raises:
        ValueError: There is no `module:name` of this path.
    """
    load_or_import(f"{PACKAGE}.rewards.by_name").check_object(path, kind)


def reward_table() -> str:
    """A table of the rewards by name with the first lines of their docstrings, for `--help`."""
    rewards = load_or_import(f"{PACKAGE}.rewards.by_name").REWARDS
    rows = {name: inspect.getdoc(reward).splitlines()[0] for name, reward in rewards.items()}
    rows["module:callable"] = "A reward of your own, on the Python path or in the working directory."
    width = max(map(len, rows))
    options = "options follow in parentheses: --reward \"pickscore(dtype='bfloat16', offload=True)\""
    return "\n".join(["rewards:", *(f"  {name:{width}}  {text}" for name, text in rows.items()), options])


def prompt_set_table() -> str:
    """The same of the prompt sets."""
    return load_or_import(f"{PACKAGE}.training.prompt_sets").prompt_set_table()


def _own(config: type) -> set[str]:
    """Options that a class of the package has."""
    classes = [each for each in config.__mro__ if each.__module__.split(".")[0] == PACKAGE]
    return {name for each in classes for name in each.__dict__.get("__annotations__", {})}


def _type(field: dataclasses.Field) -> Any:
    """The type of an option; a string in the place of an enumeration of another package, or of a stand-in."""
    kinds = [*get_args(field.type), field.type]
    is_known = all(get_args(kind) or getattr(kind, "__module__", None) in ("builtins", "typing") for kind in kinds)
    return field.type if is_known else str


def _described(field: dataclasses.Field, text: str) -> dataclasses.Field:
    metadata = {**field.metadata, "help": text if text == argparse.SUPPRESS else text.replace("%", "%%")}
    metadata.pop("changes_result", None)
    default = None if isinstance(field.default, StandIn) else field.default
    return dataclasses.field(default=default, default_factory=field.default_factory, metadata=metadata)


def _paragraphs(config: type) -> Iterator[tuple[str, str, str]]:
    """Heading, name and paragraph of each option in the docstring of a config."""
    docstring = inspect.cleandoc(config.__dict__.get("__doc__") or "") + "\n"
    heading = f"Options of {config.__name__}"
    pattern = r"^ {4}> (?P<heading>.+)$|^ {4}(?P<name>\w+) \(.*\):\n(?P<text>(?: {8}.*\n)+)"
    for match in re.finditer(pattern, docstring, re.MULTILINE):
        heading = match["heading"] or heading
        if match["name"]:
            yield heading, match["name"], " ".join(match["text"].split())
