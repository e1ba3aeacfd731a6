"""The host waits for the device once per optimizer step, not once per micro-batch: on a GPU each wait leaves it idle."""

import traceback
from signal import SIGTERM
from types import SimpleNamespace

import pytest
import tiny_pipelines
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import TrainerCallback

from trl_fdfo.training.rollouts import wait_for_rewards


# Python's and PyTorch's ways to a tensor's values. All of them wait for a GPU.
READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")
}
OPERATIONS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


class Reads(TrainerCallback):
    """Counts, with the place of each, the reads of every micro-batch."""

    def __init__(self):
        self.now, self.inside, self.of_steps = [], [], []

    def read(self, name):
        self.now.append((name, "".join(traceback.format_stack(limit=12)[:-2])))

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = []

    def on_substep_end(self, args, state, control, **kwargs):
        self.inside.append(self.now)
        self.now = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.of_steps.append(self.now)
        self.now = []


class _Functions(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.reads.read(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in OPERATIONS:
            self.reads.read(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"guidance_scale": 3.0}], ids=str)
def test_a_micro_batch_does_not_wait_for_the_device(make_trainer, options):
    trainer = make_trainer(**options)
    reads = Reads()
    trainer.add_callback(reads)
    with _Functions(reads), _Operations(reads):
        trainer.train()
    args = trainer.args
    inside = args.num_rollouts * args.steps_per_rollout * (args.gradient_accumulation_steps - 1)
    assert len(reads.inside) == inside > 0
    # The first micro-batch of a rollout has sampled it.
    per_rollout = args.steps_per_rollout * (args.gradient_accumulation_steps - 1)
    waits = [found for number, found in enumerate(reads.inside) if number % per_rollout]
    assert not any(waits), next(found for found in waits if found)[0][1]
    # The losses, the replay errors and the norm of the gradient.
    assert all(len(found) <= 4 for found in reads.of_steps), [[name for name, _ in found] for found in reads.of_steps]


def test_the_schedule_is_made_once_for_all_replays(make_trainer):
    class Counting(FlowMatchEulerDiscreteScheduler):
        made = 0

        def set_timesteps(self, *args, **kwargs):
            Counting.made += 1
            super().set_timesteps(*args, **kwargs)

    pipeline = tiny_pipelines.sd3()
    pipeline.scheduler = Counting.from_config(pipeline.scheduler.config)
    trainer = make_trainer(pipeline)
    made = Counting.made
    trainer.train()
    assert Counting.made == made
    # Another size or number of steps has a schedule of its own.
    trainer.generate(["a cat"], [0], num_inference_steps=3)
    assert Counting.made == made + 1


def test_a_shift_that_the_pipeline_sets_is_part_of_the_schedule(make_trainer):
    class Shifting(StableDiffusion3Pipeline):
        def check_inputs(self, prompt, prompt_2, prompt_3, height, width, *args, **kwargs):
            self.scheduler.set_shift(height / 16)
            super().check_inputs(prompt, prompt_2, prompt_3, height, width, *args, **kwargs)

    flow = make_trainer(Shifting(**tiny_pipelines.sd3().components)).flow
    levels = {}
    for height in (16, 32):
        flow.call_kwargs["height"] = height
        levels[height] = flow.rehearse(["a cat"]).sigmas
    # A shift s takes the noise level t to s t / (1 + (s - 1) t).
    torch.testing.assert_close(levels[32], 2 * levels[16] / (1 + levels[16]))


def test_a_replay_does_not_search_the_modules_for_the_device(make_trainer):
    trainer = make_trainer()
    flow, pipeline = trainer.flow, trainer.pipeline
    own = type(pipeline)
    batch = flow.rollout(["a cat"], torch.zeros(5), [0], [1, 2], range(4))
    looked = []

    class Searching(own):
        @property
        def components(self):
            looked.append(1)
            return super().components

    object.__setattr__(pipeline, "__class__", Searching)
    flow.velocity(batch, 3)
    assert not looked
    # The pipeline is of its own class again, also after a call that failed.
    assert type(pipeline) is Searching and pipeline._execution_device == batch.device and looked

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    flow.model = fail
    with pytest.raises(ZeroDivisionError):
        flow.velocity(batch, 3)
    assert type(pipeline) is Searching


def test_a_process_that_is_told_to_end_does_not_wait_for_others_that_sample():
    class Told(KeyboardInterrupt):
        pass

    class OfTwo:
        args, signals = SimpleNamespace(world_size=2), SimpleNamespace(received=SIGTERM)

        def end_if_interrupted(self):
            raise Told

        def any_process(self, value):
            pytest.fail("The other process does not answer before it has sampled its images.")

    with pytest.raises(Told):
        wait_for_rewards(OfTwo(), [], tqdm(disable=True))
