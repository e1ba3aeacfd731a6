"""Every pipeline class of the installed diffusers that denoises a flow by a transformer, from prompts."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable

import diffusers.pipelines
from diffusers import DiffusionPipeline


# Schedulers of models that predict noise, or denoise by EDM.
_OF_NO_FLOW = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "KarrasDiffusionSchedulers",
    "PNDMScheduler",
}
# Schedulers of both kinds: a pipeline's file says `flow` somewhere if it is one.
_OF_EITHER = {"DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}


def is_flow(pipeline_class: type) -> bool:
    """
    Tell if a pipeline denoises a flow. One whose constructor names a scheduler that nobody has told apart here counts as a
    flow: a new pipeline is looked at, not passed over.
    """
    parts = inspect.signature(pipeline_class.__init__).parameters
    takes_prompts = "prompt" in inspect.signature(pipeline_class.__call__).parameters
    if "transformer" not in parts or "scheduler" not in parts or not takes_prompts:
        return False
    schedulers = set(re.findall(r"\w+Schedulers?\b", str(parts["scheduler"].annotation))) - {"SchedulerMixin"}
    if schedulers and schedulers <= _OF_NO_FLOW:
        return False
    if schedulers and schedulers <= _OF_NO_FLOW | _OF_EITHER:
        return "flow" in inspect.getsource(inspect.getmodule(pipeline_class)).lower()
    return True


def flow_pipelines() -> dict[str, type]:
    """The classes by name; those that diffusers has deprecated are left out."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if ".deprecated" in module.name or not module.name.rpartition(".")[2].startswith("pipeline_"):
            continue
        names = vars(importlib.import_module(module.name))
        classes = [value for value in names.values() if inspect.isclass(value) and value.__module__ == module.name]
        found |= {c.__name__: c for c in classes if issubclass(c, DiffusionPipeline) and is_flow(c)}
    return dict(sorted(found.items()))


def check(classes: Iterable[str], checked: Iterable[str], refused: Iterable[str]) -> None:
    """
    Raises:
        AssertionError: A class of `classes` is in neither of the others.
    """
    classes, checked, refused = set(classes), set(checked), set(refused)
    missing = sorted(classes - checked - refused)
    assert not missing, (
        f"diffusers {diffusers.__version__} has pipelines of a flow that no row of docs/pipelines.md tells of: "
        f"{', '.join(missing)}. Build each at tiny size in tests/helpers/tiny_pipelines/ and list it in `FAMILIES` of its "
        "module; if its replay cannot be exact, in `REFUSED`, with the reason in the pipeline or in diffusers."
    )
