"""Public names: samples from a pipeline, and its velocity at a recorded sample."""

from typing import Any

from diffusers import DiffusionPipeline

from .fdfo.scheduler import ChurnScheduler
from .pipeline import flow
from .pipeline.loading import load_pipeline
from .pipeline.replay_check import ReplayError, check_replay
from .pipeline.schedulers import RolloutScheduler


__all__ = ["PipelineFlow", "ReplayError", "check_replay", "load_pipeline"]


class PipelineFlow(flow.PipelineFlow):
    __doc__ = flow.PipelineFlow.__doc__

    def __init__(
        self, pipeline: DiffusionPipeline, *, scheduler_class: type[RolloutScheduler] = ChurnScheduler, **options: Any
    ):
        super().__init__(pipeline, scheduler_class=scheduler_class, **options)
