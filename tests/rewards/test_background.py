"""Rewards that end in unusual ways, in the foreground and in the background; none of them hangs a run."""

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch
from tiny_runs import redness
from transformers import TrainerState

from trl_fdfo.rewards import RewardFunctions
from trl_fdfo.rewards.reward_functions import RewardError
from trl_fdfo.training.surrogate import in_float32


PROMPTS = ["a cat", "two dogs"]


def raising(error, kind):
    def plain(images):
        raise error

    async def asynchronous(images):
        raise error

    async def in_a_task(images):
        await asyncio.create_task(asynchronous(images))

    reward = {"plain": plain, "background": plain, "async": asynchronous, "task": in_a_task}[kind]
    reward.background = kind == "background"
    reward.__name__ = "broken"
    return reward


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["plain", "background", "async", "task"])
@pytest.mark.parametrize(
    "error",
    [
        StopIteration("done"),
        SystemExit(3),
        asyncio.CancelledError(),
        GeneratorExit(),
        TimeoutError(),
        OSError(5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_reward_raises_ends_the_run_by_name(kind, error):
    functions = RewardFunctions(raising(error, kind))
    with pytest.raises(Exception) as raised:
        functions(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})
    told = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert "the reward 'broken' on a batch of 2 images, the first for 'a cat'" in told
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        assert type(raised.value) is type(error)
    elif kind != "task":
        assert isinstance(raised.value, RewardError)
        assert type(error).__name__ in told
    # The others go on.
    later = RewardFunctions(raising(ValueError("later"), kind))
    with pytest.raises(ValueError, match="later"):
        later(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})


def test_a_keyboard_interrupt_is_the_users():
    with pytest.raises(KeyboardInterrupt):
        RewardFunctions(raising(KeyboardInterrupt(), "plain"))(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})


@pytest.mark.slow
def test_a_stuck_reward_does_not_hold_the_exit():
    program = """
        import time, torch
        from transformers import TrainerState
        from trl_fdfo.rewards.reward_functions import RewardFunctions

        def stuck(images):
            time.sleep(10_000)

        stuck.background = True
        pending = RewardFunctions(stuck).submit(torch.zeros(1, 3, 4, 4), ["a"], TrainerState(), {})
        time.sleep(0.1)
        assert not pending.done()
        raise KeyboardInterrupt
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert "KeyboardInterrupt" in done.stderr


def test_calls_of_one_background_reward_follow_each_other():
    running, most = 0, 0

    def reward(images):
        nonlocal running, most
        running += 1
        most = max(most, running)
        value = float(images.mean())
        running -= 1
        return [value] * len(images)

    reward.background = True
    functions = RewardFunctions(reward)
    pending = [functions.submit(torch.full((2, 3, 4, 4), n / 8), PROMPTS, TrainerState(), {}) for n in range(8)]
    assert torch.cat([each.result() for each in pending])[:, 0].tolist() == [n / 8 for n in range(8) for _ in range(2)]
    assert most == 1


def test_rewards_in_other_threads_have_the_device_of_the_process(monkeypatch):
    # Stand-ins for eight GPUs: the current one is a thread's own, and a new thread begins with the first.
    current, seen = threading.local(), []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: getattr(current, "index", 0))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: setattr(current, "index", index))

    def plain(images):
        seen.append(torch.accelerator.current_device_index())
        return [0.0] * len(images)

    async def asynchronous(images):
        return plain(images)

    async def in_a_thread(images):
        return await asyncio.to_thread(plain, images)

    for function, is_background in ((plain, True), (asynchronous, True), (asynchronous, False), (in_a_thread, False)):
        function.background = is_background
        functions = RewardFunctions(function)
        for index in (3, 1):  # a trainer may choose the device after the rewards are made
            torch.accelerator.set_device_index(index)
            functions(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})
    assert seen == [3, 1] * 4


@pytest.mark.parametrize("kind", ["background", "async"])
def test_what_was_scored_is_not_kept(kind):
    """A worker that waits for its next call, or a reward of PIL images, would hold the tensors of a batch on the GPU."""
    may_end = threading.Event()

    def plain(images):
        may_end.wait(60)
        return [0.0] * len(images)

    async def asynchronous(images):
        await asyncio.to_thread(may_end.wait, 60)
        return [0.0] * len(images)

    function = plain if kind == "background" else asynchronous
    function.background = kind == "background"
    for image_type in ("pil", "pt"):
        function.image_type = image_type
        functions, images = RewardFunctions(function), torch.zeros(2, 3, 4, 4)
        tensor = weakref.ref(images)
        pending = functions.submit(images, PROMPTS, TrainerState(), {})
        del images
        assert (tensor() is None) == (image_type == "pil")  # while it waits
        may_end.set()
        pending.result()
        functions(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})  # now the first call has returned
        gc.collect()
        assert tensor() is None
        last = weakref.ref(images := torch.zeros(2, 3, 4, 4))
        functions(images, PROMPTS, TrainerState(), {})
        del images
        deadline = time.monotonic() + 60
        while last() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert last() is None
        may_end.clear()


# Values beyond float32 ------------------------------------------------------------------------------------------------


def test_rewards_keep_double_precision():
    functions = RewardFunctions([lambda images: [1e39, 3e39], lambda images: [1.7e9, 1.7e9 + 0.25]])
    rewards = functions(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})
    assert rewards.dtype == torch.float64
    assert rewards[:, 0].tolist() == [1e39, 3e39] and (rewards[1, 1] - rewards[0, 1]).item() == 0.25
    assert functions.total(rewards[None]).tolist() == [[1e39 + 1.7e9, 3e39 + 1.7e9 + 0.25]]


def test_a_large_offset_does_not_hide_the_difference(make_trainer):
    def offset(images):
        return images.double().mean(dim=(1, 2, 3)) + 1e6

    def plain(images):
        return images.double().mean(dim=(1, 2, 3))

    weights = []
    for reward in (plain, offset):
        trainer = make_trainer(reward_fn=reward, num_rollouts=1)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
        [reward_std] = [log["reward_std"] for log in trainer.state.log_history if "reward_std" in log]
        assert reward_std > 0
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


def test_a_difference_beyond_float32_is_told(make_trainer):
    trainer = make_trainer(reward_fn=lambda images: [1e39 * n for n in range(len(images))])
    with pytest.raises(RuntimeError, match=r"reward '<lambda>' differs by 1e\+39.*between images of a prompt.*Divide"):
        trainer.train()


def test_a_gradient_beyond_float32_is_told():
    with pytest.raises(
        RuntimeError, match=r"rewards of a prompt differ by up to inf, beyond float32: divide the reward"
    ):
        in_float32(torch.tensor([1.0, torch.inf]))


@pytest.mark.parametrize(("value", "weights", "size"), [(3e38, None, r"6e\+38"), (1e12, [1.0, -1e5], r"2e\+17")])
def test_a_difference_that_the_update_cannot_hold_is_told(make_trainer, value, weights, size):
    def huge(images):
        return [value, -value] * (len(images) // 2)

    trainer = make_trainer(reward_fn=[redness, huge], reward_weights=weights)
    with pytest.raises(RuntimeError, match=f"The reward 'huge' differs by {size}, times its weight"):
        trainer.train()
    assert trainer.state.global_step == 0


# Signatures -----------------------------------------------------------------------------------------------------------


class Brightness(torch.nn.Module):
    def forward(self, images, prompts, label=None):
        return images.mean(dim=(1, 2, 3)) + (0 if label is None else torch.tensor(label))


def test_a_module_gets_what_its_forward_names():
    functions = RewardFunctions(Brightness())
    functions.check_columns(["prompt", "other"])
    rewards = functions(torch.ones(2, 3, 4, 4), PROMPTS, TrainerState(), {"label": [1.0, 2.0], "other": [0, 0]})
    assert rewards.tolist() == [[2.0], [3.0]]


def test_hidden_and_unfit_signatures_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"takes only \*anything, but rewards are called by keyword"):
        RewardFunctions(lambda *anything: [0.0])

    class Needy(torch.nn.Module):
        def forward(self, images, pixels):
            return images

    with pytest.raises(ValueError, match="'Needy' needs the argument 'pixels', and train_dataset has no such column"):
        RewardFunctions(Needy()).check_columns(["prompt"])


def test_the_tuple_of_ddpo_is_told():
    functions = RewardFunctions(lambda images: (torch.zeros(2), {}))
    with pytest.raises(ValueError, match="returned scores and a dict, as TRL's DDPO has it: return the scores alone"):
        functions(torch.zeros(2, 3, 4, 4), PROMPTS, TrainerState(), {})


@pytest.mark.parametrize("kind", ["plain", "background"])
def test_a_reward_that_writes_to_the_images_ends_the_run_by_name(kind):
    def darkening(images, prompts):
        return images.mul_(0.5).flatten(1).mean(dim=1)

    darkening.background = kind == "background"
    with pytest.raises(RewardError, match=r"changed in place.*images.clone\(\)") as raised:
        RewardFunctions(darkening)(torch.ones(2, 3, 4, 4), PROMPTS, TrainerState(), {})
    if hasattr(raised.value, "__notes__"):  # Python 3.11
        assert "the reward 'darkening'" in raised.value.__notes__[0]


def test_a_setting_of_pytorch_that_a_reward_leaves_behind_is_refused_and_undone():
    def ungraded(images):
        torch.set_grad_enabled(False)
        return images.mean(dim=(1, 2, 3))

    def doubled(images):
        torch.set_default_dtype(torch.float64)
        return images.mean(dim=(1, 2, 3))

    with pytest.raises(RewardError, match=r"set_grad_enabled\(False\) was called and not undone.*torch.no_grad\(\)"):
        RewardFunctions(ungraded)(torch.ones(2, 3, 4, 4), PROMPTS, TrainerState(), {})
    assert torch.is_grad_enabled()
    functions = RewardFunctions([redness, doubled])
    functions(torch.ones(2, 3, 4, 4), PROMPTS, TrainerState(), {})
    with pytest.raises(RewardError, match=r"set_default_dtype\(torch.float64\).*by redness, doubled, and not undone"):
        functions.on_rollout_end()
    assert torch.get_default_dtype() == torch.float32


def test_a_default_dtype_that_the_user_sets_before_a_run_is_the_users_own(make_trainer):
    trainer = make_trainer()
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(RewardError, match="set_default_dtype"):
            trainer.reward_functions.on_rollout_end()
        torch.set_default_dtype(torch.float64)
        trainer._on_run_begin()
        trainer.reward_functions.on_rollout_end()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
