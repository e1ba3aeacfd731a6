"""
What all tests share. Nothing here imports libraries at once: the process that starts pytest's workers would import them too, and
all would wait for it.
"""

import contextlib
import gc
import socket

import pytest
from warm_python import WarmPython


# A test of what a GPU does runs on the CPU too, so that it cannot rot on machines without one.
EACH_DEVICE = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu("the same test, on the CPU, has run"))]
)


# The file that takes longest by far. Its tests share nothing.
SPREAD = "test_pipelines.py"


@pytest.fixture
def make_config(tmp_path):
    """A config of a run of a second on a tiny pipeline, without sheets; keyword arguments replace its options."""
    from trl_fdfo import FDFOConfig

    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "num_rollouts": 2,
            "prompts_per_rollout": 4,
            "per_device_prompt_batch_size": 2,
            "num_inference_steps": 4,
            "height": 16,
            "width": 16,
            "pipeline_kwargs": {"max_sequence_length": 8},
            "churn": 0.2,
            "optimizer_steps_per_rollout": 2,
            "learning_rate": 1e-3,
            "lora_r": 4,
            "save_strategy": "no",
            "logging_images_steps": 0,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return FDFOConfig(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(make_config):
    """
    A trainer of a tiny SD3, which prints no plan unless its class is `FDFOTrainer` itself; keyword arguments of the trainer
    by name, all others are options of the config.
    """
    import tiny_pipelines
    from datasets import Dataset
    from tiny_runs import PROMPTS, UnplannedTrainer, redness

    def make(pipeline=None, reward_fn=redness, prompts=PROMPTS, trainer_class=UnplannedTrainer, **options):
        names = ("eval_dataset", "eval_reward_fn", "callbacks", "optimizers", "peft_config")
        arguments = {name: options.pop(name) for name in names if name in options}
        return trainer_class(
            make_config(**options),
            pipeline if pipeline is not None else tiny_pipelines.sd3(),
            reward_fn,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            **arguments,
        )

    return make


@pytest.fixture
def start_server(tmp_path):
    """Starts preference servers, which end with the test."""
    pytest.importorskip("uvicorn")
    from preference_server import Running

    with contextlib.ExitStack() as stack:

        def start(token=None, name="votes.sqlite"):
            running = Running(tmp_path / name, token)
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture(scope="session")
def warm_python():
    """A Python that starts at once, for programs on CPUs."""
    with WarmPython() as python:
        yield python


def warnings_of_the_package(caplog) -> list[str]:
    """Messages of its own logger: trackers that other tests have started log too, in threads of theirs."""
    return [record.message for record in caplog.records if record.name.startswith("trl_fdfo")]


def logged(trainer, name) -> list[float]:
    """Values of a metric in the order of the logs."""
    return [log[name] for log in trainer.state.log_history if name in log]


def trained_weights(trainer) -> dict:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def pytest_collectstart():
    import tiny_runs  # noqa: F401  before any test: it sets the environment for torch and huggingface_hub


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU: {marker.args[0]}"))
    # Files with slow tests first, and tests that are spread last: with several workers, all then end at about one time.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    last = lambda item: item.path.name == SPREAD and not item.get_closest_marker("slow")
    items.sort(key=lambda item: 2 if last(item) else item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        """A worker takes a file, whose tests may share fixtures, or one of the tests that are spread."""

        def _split_scope(self, nodeid):
            scope = super()._split_scope(nodeid)
            return nodeid if scope.endswith(f"/{SPREAD}") else scope

    return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def _garbage_collector_skips_what_stays():
    # Each start of a run collects garbage, which walks all objects: leave out what earlier files imported and keep.
    gc.collect()
    gc.freeze()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
