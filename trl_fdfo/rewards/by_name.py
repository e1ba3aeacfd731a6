"""Loads rewards by name, for YAML files and command lines. In Python, pass the objects themselves."""

import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from .aesthetic_score import AestheticScore
from .clap_score import CLAPScore
from .clip_score import CLIPScore
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
        raise ValueError(
            f"{kind} '{spec}' is neither one of {', '.join(names)}, nor of the form module:callable, such as "
            f"my_module:my_{kind}."
        )
    return path, options


def _check_options(found: Callable, spec: str, options: dict[str, Any] | None, kind: str) -> None:
    signature = inspect.signature(found)
    try:
        signature.bind(**(options or {}))
    except TypeError as error:
        raise ValueError(f"{kind} '{spec}': {error}. It takes {signature}.") from None


def load_object(path: str, kind: str) -> Any:
    """Import `"module:name"` from the Python path or the working directory; a ValueError if it does not exist."""
    module_name, separator, name = path.partition(":")
    if not (module_name and separator and name):
        raise ValueError(f"{kind} '{path}' is not of the form module:callable, such as my_module:my_{kind}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{kind} '{path}': there is no module '{error.name}' on the Python path or in the working directory."
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"{kind} '{path}': module '{module_name}' has no '{name}'.")
    return getattr(module, name)


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
