"""Calls a user's reward functions and checks what they return."""

import ast
import asyncio
import contextlib
import dataclasses
import functools
import inspect
import math
import queue
import tempfile
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerState

from ..media import Media, Outputs, by_kind, to_pil
from ..redaction import without_folders


RewardFunction = Callable[..., Any]

# What a reward can take of a pipeline, if the pipeline makes it.
SAMPLES = ("images", "videos", "audio")
RATES = ("frame_rate", "sampling_rate")

# A reward can take these arguments, and the columns of the dataset.
ARGUMENTS = ("images", "prompts", "trainer_state", "num_generations", "videos", "audio", *RATES)


class RewardError(RuntimeError):
    """
    A reward changed something that is not its own (its images, a setting of PyTorch), or ended with something that is no
    error of its own, such as SystemExit.
    """


class RewardFunctions:
    """
    One or several reward functions as one.

    Args:
        functions (`Callable` or `list[Callable]`): Rewards as described in [`trl_fdfo.rewards`].
        weights (`list[float]`, *optional*): Weight of each reward in the sum. Default: 1 each.
        argument (`str`): Name of the argument `functions` in error messages.

    Attributes:
        gradients_of (`Sequence[str]`): Names of the functions that `gradient` will ask. One of tensors that returns none is
            refused by its first scores: not after a rollout of people's votes beside it.

    Raises:
        ValueError: There is no reward, a reward is not callable, has an unknown `image_type` or hides its arguments, or
            the number of weights differs from the number of rewards.
    """

    def __init__(
        self,
        functions: RewardFunction | list[RewardFunction],
        weights: list[float] | None = None,
        argument: str = "reward_fn",
    ):
        self.functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
        if not self.functions:
            raise ValueError(f"{argument} is empty: give at least one reward function.")
        for function in self.functions:
            if inspect.isclass(function):
                raise ValueError(
                    f"{argument} has the class {function.__name__}: construct it, {function.__name__}(...)."
                )
            if not callable(function):
                by_name = f" By name: trl_fdfo.rewards.load_reward({function!r})." if isinstance(function, str) else ""
                raise ValueError(
                    f"{argument}={function!r} is a {type(function).__name__}, not a callable "
                    f"`(images, prompts, **columns) -> one float per image`.{by_name}"
                )
        if weights is not None and len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} values for {len(self.functions)} reward function(s): give one each."
            )
        self.weights = torch.tensor(weights or [1.0] * len(self.functions), dtype=torch.float64)
        self.names = _unique([attribute_of(f, "__name__", type(f).__name__) for f in self.functions])
        for name, function in zip(self.names, self.functions):
            image_type = attribute_of(function, "image_type", "pt")
            if image_type not in ("pt", "pil"):
                raise ValueError(f"Reward '{name}' has image_type={image_type!r}; it must be 'pt' or 'pil'.")
            parameters_of(name, function)
        # Each reward has a single thread, so it need not be thread-safe.
        self._workers = {
            name: _Worker(name)
            for name, function in zip(self.names, self.functions)
            if attribute_of(function, "background", False)
        }
        self._rates: dict[str, float] = {}
        self.gradients_of: Sequence[str] = ()
        self.on_run_begin()

    def expect(self, outputs: Outputs) -> None:
        """
        Note what the pipeline makes, and check that each function takes some of it and needs nothing else.

        Raises:
            ValueError: A function needs what the pipeline does not make, or takes nothing that it makes.
        """
        self._rates = {name: rate for name in RATES if (rate := getattr(outputs, name)) is not None}
        kinds, makes = outputs.kinds, " and ".join(outputs.kinds)
        for name, function in zip(self.names, self.functions):
            parameters = parameters_of(name, function)
            for parameter in parameters:
                is_needed = parameter.default is parameter.empty
                if is_needed and parameter.name in RATES and parameter.name not in self._rates:
                    raise ValueError(
                        f"Reward '{name}' needs '{parameter.name}', and the pipeline, which makes {makes}, does not say it in "
                        f"its call or in the config of a part: give the argument a default, {parameter.name}=None."
                    )
                if is_needed and parameter.name in SAMPLES and parameter.name not in kinds:
                    raise ValueError(
                        f"Reward '{name}' scores {parameter.name}, and the pipeline makes {makes}: take a reward of that, "
                        "or another pipeline."
                    )
            takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
            if not takes_all and not any(parameter.name in kinds for parameter in parameters):
                taken = ", ".join(parameter.name for parameter in parameters) or "nothing"
                raise ValueError(
                    f"Reward '{name}' takes {taken}, and so sees nothing of what the pipeline makes, {makes}: the samples of "
                    f"a prompt would have one reward. Name one of these in its signature: `def {name}({kinds[0]}, prompts): ...`."
                )

    @property
    def scores(self) -> list[str]:
        """Names of the functions that score an image by itself: those without `pairwise = True`."""
        return [name for name, f in zip(self.names, self.functions) if not attribute_of(f, "pairwise", False)]

    @property
    def differentiable(self) -> list[str]:
        """
        Names of the functions that `gradient` asks. Unless its attribute `differentiable` says so, a function is one if it
        scores tensors, each by itself, when it is called: not PIL images, pairs, `async` or in the background.
        """

        def is_plain(function: RewardFunction) -> bool:
            call = function.func if isinstance(function, functools.partial) else function
            call = call if inspect.isroutine(call) else type(call).__call__
            is_other = attribute_of(function, "pairwise", False) or attribute_of(function, "background", False)
            takes_tensors = attribute_of(function, "image_type", "pt") == "pt"
            return takes_tensors and not is_other and not inspect.iscoroutinefunction(call)

        return [
            name
            for name, function in zip(self.names, self.functions)
            if attribute_of(function, "differentiable", is_plain(function))
        ]

    def check_columns(
        self, columns: Sequence[str], dataset: str = "train_dataset", sampled_columns: Sequence[str] = ()
    ) -> None:
        """
        Check that the dataset has every column that a reward needs.

        Args:
            columns (`Sequence[str]`): Columns of the dataset.
            dataset (`str`): Its name in error messages.
            sampled_columns (`Sequence[str]`): Those that the pipeline's call takes. Such a one may have a name in `ARGUMENTS`:
                it is the pipeline's alone.

        Raises:
            ValueError: A reward needs an argument that is no column, takes an argument by position only, or another column
                has one of the names in `ARGUMENTS`.
        """
        taken = [column for column in columns if column in ARGUMENTS and column not in sampled_columns]
        if taken:
            raise ValueError(
                f"{dataset} has a column '{taken[0]}', a name that rewards get something else by: rename it."
            )
        known = [*ARGUMENTS, *columns]
        for name, function in zip(self.names, self.functions):
            for parameter in parameters_of(name, function):
                if parameter.kind is parameter.POSITIONAL_ONLY:
                    raise ValueError(
                        f"Reward '{name}' takes '{parameter.name}' by position only, but rewards are called by "
                        f"keyword. Wrap it: `def {name}(images, prompts): ...`."
                    )
                variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                if not variable and parameter.default is parameter.empty and parameter.name not in known:
                    raise ValueError(
                        f"Reward '{name}' needs the argument '{parameter.name}', and {dataset} has no such column. A "
                        f"reward can have: {', '.join(known)}."
                    )

    def check_rows(self, dataset: Dataset, name: str = "train_dataset") -> None:
        """
        Let each function that has a method `check_rows` read the columns of the dataset that its signature names. Rows that a
        transform makes are read when they are scored.

        Raises:
            ValueError: A function cannot score a row.
        """
        if dataset.format["type"] == "custom":
            return
        for function_name, function in zip(self.names, self.functions):
            check = attribute_of(function, "check_rows", None)
            taken = inspect.signature(check).parameters if check is not None else ()
            columns = {column: dataset[column][:] for column in dataset.column_names if column in taken}
            try:
                if columns:
                    check(**columns)
            except ValueError as error:
                raise ValueError(f"Reward '{function_name}' cannot score {name}: {error}") from error

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call `submit`, which explains the arguments, and wait for the result."""
        return self.submit(*args, **kwargs).result()

    def submit(
        self,
        made: Tensor | Media,
        prompts: Sequence[str],
        trainer_state: TrainerState,
        columns: dict[str, Sequence],
        num_generations: int = 1,
    ) -> "PendingRewards":
        """
        Score each sample with each function. `async` functions and those with `background = True` run in the background.

        Args:
            made (`Tensor` or [`Media`]): N images, videos or sounds, laid out as in [`trl_fdfo.media`].
            prompts (`Sequence[str]`): N prompts.
            columns (`dict[str, Sequence]`): Columns of the dataset, N values each.
            num_generations (`int`): Images per prompt. The images of a prompt are adjacent.

        Raises:
            ValueError: A function did not return one finite number (or None) per image.
        """
        prompts, samples = list(prompts), by_kind(made)
        of = next((kind for kind in ("videos", "images") if kind in samples), "sounds")
        arguments = self._all_arguments(samples, prompts, trainer_state, columns, num_generations)
        pil_images = functools.cache(lambda: to_pil(samples["images"]))
        device, results = _current_device(), []
        for name, function in zip(self.names, self.functions):
            call = functools.partial(_unchanged, function, _arguments(name, function, arguments, pil_images))
            if name in self._workers:
                result = _in_thread(self._workers[name], device, call)
            else:
                # Another may score PIL images by a list.
                takes_tensors = attribute_of(function, "image_type", "pt") == "pt"
                with _blamed(name, prompts, of):
                    result = call()
                    if name in self.gradients_of and takes_tensors and not isinstance(result, Tensor):
                        raise _without_gradient(name, result, of, len(prompts))
            if inspect.isawaitable(result):
                task = _awaited(name, result, prompts, of)
                results.append(asyncio.run_coroutine_threadsafe(task, _background_loop(device)))
            else:
                results.append(checked_rewards(name, result, prompts, of))
        return PendingRewards(results)

    def gradient(
        self,
        made: Tensor | Media,
        prompts: Sequence[str],
        trainer_state: TrainerState,
        columns: dict[str, Sequence],
        num_generations: int,
    ) -> Tensor | Media:
        """
        The gradient of the weighted sum of the rewards in `differentiable` at what was made, of its shape. The arguments are as
        in `submit`. One function computes at a time, and nothing of it is kept but its gradient.

        Raises:
            ValueError: The result of a function has no gradient.
        """
        made = recursively_apply(lambda samples: samples.detach().requires_grad_(), made)
        samples, prompts = by_kind(made), list(prompts)
        of = next(iter(samples))
        arguments = self._all_arguments(samples, prompts, trainer_state, columns, num_generations)
        inputs = tree_leaves(made)
        gradients = [torch.zeros_like(each) for each in inputs]
        differentiable = self.differentiable
        for name, function, weight in zip(self.names, self.functions, self.weights.tolist()):
            if name not in differentiable:
                continue
            # PIL images carry no gradient: a function of them that is differentiable takes tensors too.
            own = _arguments(name, function, arguments, lambda: samples["images"])
            with _blamed(name, prompts, of):
                result = function(**own)
                if not isinstance(result, Tensor) or not result.requires_grad or result.shape != (len(prompts),):
                    raise _without_gradient(name, result, of, len(prompts))
                parts = torch.autograd.grad(weight * result.sum(), inputs, allow_unused=True)
            for gradient, part in zip(gradients, parts):
                if part is not None:
                    gradient += part
        return Media(*gradients) if isinstance(made, Media) else gradients[0]

    def _all_arguments(
        self,
        samples: dict[str, Tensor],
        prompts: list[str],
        trainer_state: TrainerState,
        columns: dict[str, Sequence],
        num_generations: int,
    ) -> dict[str, Any]:
        own = {"prompts": prompts, "trainer_state": trainer_state, "num_generations": num_generations}
        return columns | samples | self._rates | own

    def describe(self) -> dict[str, str]:
        """The weight of each function, and the settings that it was made with; nothing that each process has anew."""
        described = {}
        for name, function, weight in zip(self.names, self.functions, self.weights.tolist()):
            settings = settings_of(function)
            described[name] = f"{weight:g}" + (f" ({settings})" if settings else "")
        return described

    def on_run_begin(self) -> None:
        """Note PyTorch's default dtype, which no function may change for good."""
        self._default_dtype = torch.get_default_dtype()

    def on_rollout_end(self) -> None:
        """
        Call the method of this name of each function that has one: a rollout (or evaluation) is scored.

        Raises:
            RewardError: PyTorch has another default dtype than when the run or evaluation began.
        """
        # Only now: while a reward loads a model in the background, another default may be right.
        dtype = torch.get_default_dtype()
        if dtype != self._default_dtype:
            torch.set_default_dtype(self._default_dtype)
            raise RewardError(
                f"torch.set_default_dtype({dtype}) was called while the images were scored by {', '.join(self.names)}, and not "
                f"undone: the pipeline would compute in another type. A reward says `dtype={dtype}` where it makes a tensor."
            )
        for function in self.functions:
            hook = attribute_of(function, "on_rollout_end", None)
            if hook is not None:
                hook()

    def waiting(self) -> dict[str, int]:
        """For how many answers each function waits in this process; only those that say so by a method of this name."""
        methods = {name: attribute_of(f, "waiting", None) for name, f in zip(self.names, self.functions)}
        return {name: method() for name, method in methods.items() if method is not None}

    def total(self, rewards: Tensor, of: Sequence[str] | None = None) -> Tensor:
        """
        Weighted sum over R functions, [P, G, R] -> [P, G], for G branches of each of P prompts. NaN: does not apply.

        A function counts for a prompt only if it applies to all its branches, and if its name is in `of` (default: all);
        without such a function they are NaN.
        """
        applies = rewards.isfinite().all(dim=1, keepdim=True)
        if of is not None:
            applies = applies & torch.tensor([name in of for name in self.names], device=rewards.device)
        total = (rewards * self.weights.to(rewards)).where(applies, 0).sum(dim=-1)
        return total.where(applies.any(dim=-1), torch.nan)


def _without_gradient(name: str, result: Any, of: str, count: int) -> ValueError:
    return ValueError(
        f"direction='reward_gradient' takes the gradient of '{name}', which returned a {type(result).__name__} without a gradient "
        f"to its {of}: it must return a tensor of shape [{count}] that is computed from them. For its finite difference beside "
        "the gradients of other rewards, set differentiable = False on it; direction='finite_difference' needs no gradient at all."
    )


class PendingRewards:
    """Rewards of one batch of images, N by each function. Some may still be computed in the background."""

    def __init__(self, results: list[Tensor | Future]):
        self._results = results  # a future's result is the rewards, or the error

    def done(self) -> bool:
        """True if every function has finished."""
        return all(result.done() for result in self._results if isinstance(result, Future))

    def raise_errors(self) -> None:
        """Raise the error of a function that has failed, without waiting for the others."""
        for result in self._results:
            if not isinstance(result, Future) or result.done():
                _rewards_of(result)

    def result(self) -> Tensor:
        """Wait for the rewards: float64 on the CPU, shape [N, R] for R functions; NaN where a function does not apply."""
        return torch.stack([_rewards_of(result) for result in self._results], dim=1)


def _rewards_of(result: Tensor | Future) -> Tensor:
    rewards = result.result() if isinstance(result, Future) else result
    if isinstance(rewards, Exception):
        raise rewards
    return rewards


class _Worker:
    """
    Runs the calls of one reward in a thread, one after the other. Unlike an executor's, this thread never holds the exit
    of the process.
    """

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_run, args=(self._calls,), name=f"reward {name}", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, device: int | None, call: Callable[[], Any]) -> Future:
        """A future of the pair (return value, what was raised): a future cannot hold every exception."""
        future: Future = Future()
        self._calls.put((future, device, call))
        return future


def _run(calls: queue.SimpleQueue) -> None:
    while (each := calls.get()) is not None:
        _finish(*each)
        del each  # with its samples, which would stay on the device until the next call


def _finish(future: Future, device: int | None, call: Callable[[], Any]) -> None:
    try:
        _set_current_device(device)
        outcome = call(), None
    except BaseException as error:
        outcome = None, error
    future.set_result(outcome)


def _arguments(name: str, function: RewardFunction, arguments: dict[str, Any], pil_images: Callable) -> dict[str, Any]:
    """Select the arguments that the function's signature names."""
    if attribute_of(function, "image_type", "pt") == "pil" and "images" in arguments:
        arguments = {name: pil_images() if name in ("images", "videos") else value for name, value in arguments.items()}
    parameters = parameters_of(name, function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


def _unchanged(function: RewardFunction, arguments: dict[str, Any]) -> Any:
    """
    The function's result. Other rewards and the pictures have the same samples, so it must not write to them; and the
    update, in the same thread, takes gradients.
    """
    samples = {name: arguments[name] for name in SAMPLES if isinstance(arguments.get(name), Tensor)}
    versions, has_gradients = {name: tensor._version for name, tensor in samples.items()}, torch.is_grad_enabled()
    result = function(**arguments)
    if torch.is_grad_enabled() != has_gradients:
        torch.set_grad_enabled(has_gradients)
        raise RewardError(
            f"torch.set_grad_enabled({not has_gradients}) was called and not undone, and nothing could be trained with it: "
            "a reward works in `with torch.no_grad():`, which ends by itself."
        )
    for name, tensor in samples.items():
        if tensor._version != versions[name]:
            was = "was" if name == "audio" else "were"
            raise RewardError(f"The {name} {was} changed in place: a reward works on `{name}.clone()`.")
    return result


def _current_device() -> int | None:
    """
    The number of the accelerator that this thread computes on, for threads that this one starts: there "cuda" would be the
    first GPU of the machine, in each process. Asked at each call, because rewards may be made before the device is chosen.
    """
    return torch.accelerator.current_device_index() if torch.accelerator.is_available() else None


def _set_current_device(index: int | None) -> None:
    if index is not None:
        torch.accelerator.set_device_index(index)


async def _in_thread(worker: _Worker, device: int | None, call: Callable[[], Any]) -> Any:
    result, error = await asyncio.wrap_future(worker.submit(device, call))
    if error is not None:
        raise error
    return await result if inspect.isawaitable(result) else result


async def _awaited(name: str, result: Awaitable, prompts: list[str], of: str) -> Tensor | Exception:
    """The rewards, or the error: asyncio makes anew, without their notes, some errors that it passes between threads."""
    try:
        with _blamed(name, prompts, of):
            values = await result
        return checked_rewards(name, values, prompts, of)
    except Exception as error:
        return error


@contextlib.contextmanager
def _blamed(name: str, prompts: list[str], of: str) -> Iterator[None]:
    """Name the reward in any error raised. Its SystemExit, StopIteration and the like become a [`RewardError`]."""
    where = f"the reward '{name}' on a batch of {len(prompts)} {of}, the first for {prompts[0]!r}"
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # the user's
        if isinstance(error.__cause__, StopIteration) and str(error) == "coroutine raised StopIteration":
            error = error.__cause__
        if not isinstance(error, Exception) or isinstance(error, StopIteration):
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            # `contextlib` would let a StopIteration through that is the cause of a RuntimeError.
            cause = None if isinstance(error, StopIteration) else error
            raise RewardError(f"{text} was raised by {where}. A reward raises an error, or returns None.") from cause
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"Raised by {where}.")
        raise


@functools.cache
def _background_loop(device: int | None) -> asyncio.AbstractEventLoop:
    """An event loop in its own thread: the main thread feeds the GPU, and in a notebook already runs a loop."""
    loop = asyncio.new_event_loop()
    threads = ThreadPoolExecutor(initializer=_set_current_device, initargs=(device,))  # of `asyncio.to_thread`
    loop.set_default_executor(threads)

    def run() -> None:
        with contextlib.suppress(Exception):  # the reward then says what is wrong with the device
            _set_current_device(device)
        while True:
            with contextlib.suppress(BaseException):  # of a task that a reward has made; its awaiter gets it too
                loop.run_forever()

    threading.Thread(target=run, name="async rewards", daemon=True).start()
    return loop


def attribute_of(function: RewardFunction, name: str, default: Any) -> Any:
    """An attribute of a callable, or of the function that a `functools.partial` or a decorator wraps."""
    while function is not None:
        if hasattr(function, name):
            return getattr(function, name)
        function = getattr(function, "func", getattr(function, "__wrapped__", None))
    return default


def parameters_of(name: str, function: RewardFunction) -> list[inspect.Parameter]:
    try:
        # The call of a module takes anything and passes it on.
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        raise ValueError(
            f"Reward '{name}' does not say which arguments it takes. Wrap it: `def {name}(images, prompts): ...`."
        ) from None
    parameters = list(signature.parameters.values())
    if parameters and all(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        raise ValueError(
            f"Reward '{name}' takes only *{parameters[0].name}, but rewards are called by keyword. Wrap it: "
            f"`def {name}(images, prompts): ...`."
        )
    return parameters


def checked_rewards(name: str, result: Any, prompts: Sequence[str], of: str = "images") -> Tensor:
    """
    The result of a reward as float64 on the CPU, shape [N], with NaN for None. `of` names the N samples in errors.

    Raises:
        ValueError: The result is not one finite number or None for each of the N prompts.
    """
    should = f"it must return one float per {of[:-1]}"
    if isinstance(result, Tensor) and result.ndim > 1:
        raise ValueError(
            f"Reward '{name}' returned a tensor of shape {list(result.shape)} for {len(prompts)} {of}: {should}, shape "
            f"[{len(prompts)}]."
        )
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        raise ValueError(
            f"Reward '{name}' returned scores and a {type(result[1]).__name__}, as TRL's DDPO has it: return the scores alone."
        )
    values = result.detach().cpu().tolist() if isinstance(result, Tensor) else result
    if isinstance(values, (str, Mapping, Set)):
        raise ValueError(f"Reward '{name}' returned a {type(values).__name__}: {should}, in their order.")
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"Reward '{name}' returned {values!r}, a {type(result).__name__}: {should}.") from None
    if len(values) != len(prompts):
        raise ValueError(
            f"Reward '{name}' returned {len(values)} values for {len(prompts)} {of}: {should}, in their order."
        )
    rewards = []
    for value, prompt in zip(values, prompts):
        try:
            if isinstance(value, str):
                raise TypeError
            reward = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"Reward '{name}' returned {value!r}, which is not a number, for the prompt {prompt!r}."
            ) from None
        if value is not None and not math.isfinite(reward):
            raise ValueError(
                f"Reward '{name}' returned {reward} for the prompt {prompt!r}: a reward must be finite. Return None where "
                "it does not apply."
            )
        rewards.append(reward)
    return torch.tensor(rewards, dtype=torch.float64)


def _unique(names: list[str]) -> list[str]:
    """Number the names that occur again (two lambdas, two instances of a class)."""
    return [name if names.index(name) == i else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def settings_of(function: RewardFunction) -> str:
    """The settings that a reward was made with, as text; nothing that each process has anew."""
    return ", ".join(f"{name}={value}" for name, value in sorted(_settings(function).items()))


def _settings(function: RewardFunction) -> dict[str, str]:
    """
    What a reward was made with, as text: arguments of a `functools.partial`, public attributes of a function, and those of
    an object that are arguments of its constructor or attributes of its class. Others of an object, such as a counter or
    the time of its start, say nothing of the next run; nor do those that it names in `no_effect`.
    """
    if isinstance(function, functools.partial):
        bound = {f"argument {number}": value for number, value in enumerate(function.args)} | function.keywords
        return _settings(function.func) | _as_text(bound)
    if inspect.ismethod(function):
        return _settings(function.__self__)
    if isinstance(function, type):  # of a class method
        return {}
    public = {name: value for name, value in getattr(function, "__dict__", {}).items() if not name.startswith("_")}
    if not inspect.isfunction(function) and type(function).__init__ is not object.__init__:
        made_with = inspect.signature(type(function)).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in made_with.values()):
            public = {n: value for n, value in public.items() if n in made_with or hasattr(type(function), n)}
    without = ("no_effect", *getattr(function, "no_effect", ()))
    return _as_text({name: value for name, value in public.items() if name not in without})


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """The values that have a text which is the same in each process, and no folder of this machine."""
    texts = {}
    for name, value in values.items():
        if isinstance(value, (str, Path)) and Path(value).is_relative_to(tempfile.gettempdir()):
            continue
        value = without_folders(value)
        if isinstance(value, (str, int, float, type(None))) or dataclasses.is_dataclass(value) or _is_literal(value):
            texts[name] = repr(value)
        elif callable(value):
            texts[name] = f"{getattr(value, '__qualname__', type(value).__qualname__)} {_settings(value) or ''}".strip()
    return texts


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (SyntaxError, ValueError, TypeError, RuntimeError):
        return False
