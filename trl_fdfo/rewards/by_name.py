"""Loads rewards by name, for YAML files and command lines. In Python, pass the objects themselves."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from .aesthetic_score import AestheticScore
from .clap_score import CLAPScore
from .clip_score import CLIPHScore, CLIPScore
from .edit_judge import vlm_edit
from .geneval import GenEval
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
from .http_reward import HTTPReward
from .human_preference import HumanPreference, human
from .image_reward import ImageReward
from .jpeg_compressibility import JPEGCompressibility, JPEGIncompressibility
from .motion import Motion, TemporalSmoothness
from .object_count import ObjectCount
from .pairwise_judge import PairwiseJudge, unified_reward, vlm_judge
from .pickscore import PickScore
from .reward_functions import RewardFunction
from .text_rendering import TextRendering
from .vlm_score import VLMScore
from .vlm_server import VLMServer


def _human(url: str | None = None, stand_in: str | None = None, **options: Any) -> PairwiseJudge:
    """People, who say on a page which image of a prompt is better: 1, 0 or -1."""
    return human(url, stand_in=None if stand_in is None else load_reward(stand_in), **options)


_human.__signature__ = inspect.signature(HumanPreference)

# Each value is called with the options in parentheses behind the name.
REWARDS = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "hpsv3": HPSv3,
    "image_reward": ImageReward,
    "clip": CLIPScore,
    "clip_h": CLIPHScore,
    "clap": CLAPScore,
    "aesthetic": AestheticScore,
    "vlm": VLMScore,
    "vlm_server": VLMServer,
    "vlm_judge": vlm_judge,
    "unified_reward": unified_reward,
    "vlm_edit": vlm_edit,
    "human": _human,
    "http": HTTPReward,
    "text_rendering": TextRendering,
    "geneval": GenEval,
    "object_count": ObjectCount,
    "jpeg_compressibility": JPEGCompressibility,
    "jpeg_incompressibility": JPEGIncompressibility,
    "temporal_smoothness": TemporalSmoothness,
    "motion": Motion,
}
_WITHOUT_A_MODEL = (VLMServer, JPEGCompressibility, JPEGIncompressibility, TemporalSmoothness, Motion)


def load_reward(spec: str) -> RewardFunction:
    """
    Load the reward that a string names.

    Args:
        spec (`str`): A name in `REWARDS`, or `module:name` of a callable on the Python path or in the working
            directory. Options may follow in parentheses, as literals: `"vlm_server(url='http://host:8000/v1')"`. A
            class is constructed with its options. A function with parentheses is called, and returns the reward.

    Raises:
        ValueError: `spec` has another form, names nothing that exists, or has unknown options.
    """
    return load_by_name(spec, REWARDS, "reward")


def reward_without_weights(spec: str) -> RewardFunction | None:
    """
    The packaged reward that a string names, for a plan: with a model that has shapes and no weights. None if that is not
    known: a reward of one's own, or a model of another size.

    Raises:
        ValueError: As [`check_by_name`] raises it.
    """
    path, options = check_by_name(spec, REWARDS, "reward")
    reward, options = REWARDS.get(path), options or {}
    if reward is None:
        return None
    if reward in _WITHOUT_A_MODEL:
        return reward(**options)
    return reward.without_weights(**options) if hasattr(reward, "without_weights") else None


def load_by_name(spec: str, names: dict[str, Callable[..., Any]], kind: str) -> Any:
    """
    Load the object that a string names, as [`load_reward`] explains, from the packaged `names` or from a module. `kind`
    is the kind of the object, such as "reward", for errors.
    """
    path, options = check_by_name(spec, names, kind)
    found = names.get(path) or load_object(path, kind)
    if path not in names:
        if options is None and not inspect.isclass(found):
            return found
        _check_options(found, spec, options, kind)
    return found(**(options or {}))


def check_by_name(spec: str, names: dict[str, Callable[..., Any]], kind: str) -> tuple[str, dict[str, Any] | None]:
    """
    Path and options of what a string names, without importing a module or constructing anything.

    Raises:
        ValueError: `spec` has another form, or unknown options of a packaged name.
    """
    if not isinstance(spec, str):
        raise ValueError(
            f"{kind} {spec!r} is a {type(spec).__name__}, not a string with a name or module:callable, and "
            f"options in parentheses: \"{next(iter(names))}(dtype='bfloat16')\"."
        )
    path, options = _parse(spec, kind, example=next(iter(names)))
    if path in names:
        _check_options(names[path], spec, options, kind)
    elif ":" not in path:
        near = difflib.get_close_matches(path, names, n=1)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(
            f"{kind} '{spec}' is neither one of {', '.join(names)}, nor of the form module:callable, such as "
            f"my_module:my_{kind}.{meant}"
        )
    return path, options


def _check_options(found: Callable, spec: str, options: dict[str, Any] | None, kind: str) -> None:
    signature = inspect.signature(found)
    try:
        signature.bind(**(options or {}))
    except TypeError as error:
        raise ValueError(f"{kind} '{spec}': {error}. It takes {signature}.") from None


def load_object(path: str, kind: str) -> Any:
    """
    Import `"module:name"` from the Python path or the working directory.

    Raises:
        ValueError: `path` has another form, its module cannot be imported, or has no such name.
    """
    module_name, name = _split(path, kind)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of the user's module
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise _no_module(path, kind, error.name) from error
        frames = [
            f"{frame.filename}, line {frame.lineno}, "
            for frame in traceback.extract_tb(error.__traceback__)[1:]
            if "importlib" not in frame.filename
        ]
        text = f"{next(iter(frames), '')}{type(error).__name__}: {error}"
        raise ValueError(f"{kind} '{path}': module '{module_name}' cannot be imported: {text}.") from error
    if not hasattr(module, name):
        raise _no_name(path, kind, vars(module))
    return getattr(module, name)


def check_object(path: str, kind: str) -> None:
    """
    Read the source of the module that a `"module:name"` names, without importing anything. What it does not decide, such as
    names that the module makes as it runs, [`load_object`] tells.

    Raises:
        ValueError: There is no such module, it is no Python, or it has no such name.
    """
    module_name, name = _split(path, kind)
    package, *parts = module_name.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that was made without a file, such as __main__
        return
    if spec is None:
        raise _no_module(path, kind, package)
    for number in range(len(parts)):
        inner = ".".join([package, *parts[: number + 1]])
        if not spec.submodule_search_locations:  # no package
            raise _no_module(path, kind, inner)
        spec = PathFinder.find_spec(inner, spec.submodule_search_locations)
        if spec is None:
            return
    if not (spec.origin or "").endswith(".py"):
        return
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except SyntaxError as error:
        text = f"{spec.origin}, line {error.lineno}: {error.msg}"
        raise ValueError(f"{kind} '{path}': module '{module_name}' is no Python: {text}.") from error
    names = set(_bound(tree))
    if name not in names and not names & {"*", "__getattr__", "globals", "setattr"}:
        raise _no_name(path, kind, names)


def _split(path: str, kind: str) -> tuple[str, str]:
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise ValueError(f"{kind} '{path}' is not of the form module:callable, such as my_module:my_{kind}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return module_name, name


def _bound(tree: ast.AST) -> Iterator[str]:
    """Names that a module may have, and those that tell that it may have others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id


def _no_module(path: str, kind: str, missing: str) -> ValueError:
    module_name, name = _split(path, kind)
    plain = module_name.removesuffix(".py").strip("./").replace("/", ".")
    meant = "" if plain == module_name else f" Name it without a folder or .py: {plain}:{name}."
    return ValueError(
        f"{kind} '{path}': there is no module '{missing}' on the Python path or in the working directory.{meant}"
    )


def _no_name(path: str, kind: str, names: Iterable[str]) -> ValueError:
    module_name, name = _split(path, kind)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean '{near[0]}'?" if near else ""
    return ValueError(f"{kind} '{path}': module '{module_name}' has no '{name}'.{meant}")


def _parse(spec: str, kind: str, example: str) -> tuple[str, dict[str, Any] | None]:
    """Split a spec into its path and its options; the options are None without parentheses."""
    path, parenthesis, rest = spec.strip().partition("(")
    if not parenthesis:
        return path, None
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("options have names")
        return path.strip(), {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(
            f"{kind} '{spec}': cannot read its options ({error}). Write them as literals with their names, such as "
            f"{example}(dtype='bfloat16', batch_size=8)."
        ) from None
