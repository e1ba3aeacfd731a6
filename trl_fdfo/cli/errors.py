"""Errors that the user can mend, and bugs."""

import dis
import traceback
from pathlib import Path


def is_of_the_user(error: BaseException) -> bool:
    """
    Whether an error tells the user what to mend: one that this package raises, or a file, model or address that cannot be
    read. All others are bugs, of the package or of what it calls.
    """
    return isinstance(error, OSError) or raised_by_package(error) or raised_by_reward(error)


def raised_by_reward(error: BaseException) -> bool:
    """Tell if an error comes from a reward that was called: the call adds a note to it."""
    return any(note.startswith("Raised by the reward") for note in getattr(error, "__notes__", ()))


def details(error: BaseException) -> list[str]:
    """The notes of an error and, of one that a reward raised, a line for each of its calls."""
    frames = traceback.extract_tb(error.__traceback__) if raised_by_reward(error) else []
    package = str(Path(__file__).parents[1])
    last = max((place for place, frame in enumerate(frames) if frame.filename.startswith(package)), default=-1)
    calls = [f"  {each.filename}, line {each.lineno}, in {each.name}: {each.line}" for each in frames[last + 1 :]]
    middle = ["  ..."] if len(calls) > 4 else []
    return [*getattr(error, "__notes__", ()), *calls[:3], *middle, *calls[max(3, len(calls) - 1) :]]


def raised_by_package(error: BaseException) -> bool:
    """Whether a `raise` of this package is where an error comes from, and not an operation that failed."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    module = place.tb_frame.f_globals.get("__name__", "")
    operation = place.tb_frame.f_code.co_code[place.tb_lasti]
    return module.split(".")[0] == __package__.split(".")[0] and dis.opname[operation] == "RAISE_VARARGS"
