"""Every pipeline class of the installed diffusers that denoises a flow has a row in docs/pipelines.md."""

import re
from pathlib import Path

import census
import pytest
from diffusers import (
    CogVideoXPipeline,
    DiffusionPipeline,
    FluxPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusionPipeline,
)
from tiny_pipelines.families import FAMILIES, REFUSED


DOCS = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")


def class_names(families) -> set[str]:
    return {type(family.build()).__name__ for family in families.values()}


def test_every_flow_pipeline_of_diffusers_is_checked_or_refused():
    checked, refused = class_names(FAMILIES), class_names(REFUSED)
    census.check(census.flow_pipelines(), checked, refused)
    tables = DOCS[DOCS.index("<!-- exact") : DOCS.index("<!-- end of refused")]
    shown = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", tables, flags=re.MULTILINE))
    assert shown == checked | refused


def test_a_new_pipeline_and_a_missing_row_fail():
    classes = set(census.flow_pipelines())
    refused = {"SanaSprintPipeline"}
    checked = classes - refused
    census.check(classes, checked, refused)

    class NextPipeline(FluxPipeline):
        """A model of next year."""

    assert census.is_flow(NextPipeline)
    with pytest.raises(AssertionError, match="no row of docs/pipelines.md tells of: NextPipeline. Build each at tiny"):
        census.check(classes | {NextPipeline.__name__}, checked, refused)
    with pytest.raises(AssertionError, match="tells of: FluxPipeline"):
        census.check(classes, checked - {"FluxPipeline"}, refused)


@pytest.mark.parametrize(
    ("pipeline_class", "flow"),
    [
        (FluxPipeline, True),
        (SanaPipeline, True),
        (CogVideoXPipeline, False),
        (PixArtSigmaPipeline, False),
        (StableDiffusionPipeline, False),
    ],
)
def test_what_denoises_a_flow(pipeline_class, flow):
    assert census.is_flow(pipeline_class) == flow


def test_an_unknown_scheduler_counts_as_a_flow():
    class Pipeline(DiffusionPipeline):
        def __init__(self, transformer, scheduler: "ASchedulerOfNextYear"): ...  # noqa: F821

        def __call__(self, prompt): ...

    assert census.is_flow(Pipeline)
