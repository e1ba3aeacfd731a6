"""The families of pipelines that are tested, with the calls of each: those that the modules beside this one list."""

import importlib
import pkgutil

import tiny_pipelines

from .family import Family


def _listed(table: str) -> dict[str, Family]:
    names = [module.name for module in pkgutil.iter_modules(tiny_pipelines.__path__) if module.name != "families"]
    modules = [importlib.import_module(f"tiny_pipelines.{name}") for name in names]
    rows = [row for module in modules for row in getattr(module, table, {}).items()]
    assert len(rows) == len(dict(rows)), "two families have one name"
    return dict(sorted(rows, key=lambda row: row[0].lower()))


FAMILIES = _listed("FAMILIES")
REFUSED = _listed("REFUSED")
CALLS = [(name, call) for name in FAMILIES for call in FAMILIES[name].calls]


def num_prompts(name):
    """Prompts of a call: one if it takes images."""
    return 1 if FAMILIES[name].images is not None else 2


def columns_of(name, count):
    """Arguments beside the prompt: the images that the pipeline edits, if it does."""
    return columns_for(FAMILIES[name], count)


def columns_for(family, count):
    columns = family.images(count) if family.images is not None else {}
    return columns if isinstance(columns, dict) else {"image": columns}


def first_call(name):
    return next(iter(FAMILIES[name].calls.values()))
