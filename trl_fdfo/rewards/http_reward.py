"""A reward on another machine, or in another process or environment, that is asked by HTTP."""

import asyncio
import inspect
import keyword
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import quote

from torch import Tensor

from .http_client import Answer, RetryingClient, ServerError, TemporaryFailure, all_or_none
from .http_protocol import RATES, SHAPES, encode, numbers_of


TOKEN = "REWARD_SERVER_TOKEN"  # environment variable
_OWN = ("prompts", "num_generations", "trainer_state", *RATES, *SHAPES)


class HTTPReward(RetryingClient):
    """
    A reward that `trl-fdfo serve`, or another server of the same protocol, computes.

    It has the name, the arguments and the attributes of the served reward, which it asks the server for, and returns the
    same values: images travel as their float32 values, or as 8 bits if the reward takes PIL images. It is `async`, so it runs
    in the background, and sends a batch in several requests, which the URLs share.

    A request is retried, at the next URL and after a wait that doubles each time, if its failure can be temporary: no
    connection, no answer in time, a server that is busy (429) or fails (5xx), or an answer without rewards.

    Args:
        url (`str` or `list[str]`): Base URL(s) of servers of the same reward, which take turns.
        name (`str`, *optional*): Name of the reward on the server. Default: the only one.
        batch_size (`int`): Most samples in a request. The samples of a prompt stay together if the reward compares them, or
            takes `num_generations`.
        max_concurrency (`int`): Requests in flight at a time, at most 100, over all calls on an event loop.
        timeout (`float`): Seconds to wait for an answer to a request, which may wait in the server's queue meanwhile.
        max_retries (`int`): Number of retries of a request.
        backoff (`float`): Seconds before the first retry. The wait doubles with each retry, up to a minute.
        api_key (`str`, *optional*): Token of the server. Default: the environment variable `REWARD_SERVER_TOKEN`.

    Raises:
        ValueError: An argument is out of range, or the server has no reward of this name, or several and none is named.
        HTTPRewardError: The server does not say which rewards it has. In a call: it refused a request, did not answer in
            `max_retries + 1` attempts, or did not answer with one finite number (or null) per sample.
    """

    served = ""  # the settings of the served reward, which a run's description shows

    def __init__(
        self,
        url: str | list[str],
        name: str | None = None,
        *,
        batch_size: int = 16,
        max_concurrency: int = 4,
        timeout: float = 120.0,
        max_retries: int = 5,
        backoff: float = 1.0,
        api_key: str | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} of HTTPReward must be at least 1, the samples in a request.")
        super().__init__(
            url,
            owner="HTTPReward",
            advice="Is it up (`trl-fdfo serve REWARD --port 8200`)?",
            refusal_advice=f"Check the url, the name of the reward ({{url}}/rewards lists them) and the api_key ({TOKEN}).",
            error=HTTPRewardError,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
            api_key=os.environ.get(TOKEN, "") if api_key is None else api_key,
        )
        self.batch_size = batch_size
        # In a thread: in a notebook, this one runs an event loop already.
        with ThreadPoolExecutor(1) as thread:
            rewards = thread.submit(asyncio.run, self._ask_for_rewards()).result()
        names = [reward["name"] for reward in rewards]
        if name is None and len(names) > 1:
            raise ValueError(f"{self.urls[0]} serves {', '.join(names)}: say which, HTTPReward(url, {names[0]!r}).")
        if name is not None and name not in names:
            raise ValueError(f"{self.urls[0]} serves no reward {name!r}: take one of {', '.join(names)}.")
        served = rewards[0 if name is None else names.index(name)]
        self.name = self.__name__ = served["name"]
        self.pairwise = bool(served.get("pairwise", False))
        self.served = str(served.get("settings", ""))
        self._as_bytes = served.get("image_type") == "pil"
        # Prompts name the request in an error of the server, also of a reward that does not take them.
        needs = list(dict.fromkeys(served["needs"]))
        takes = [name for name in dict.fromkeys([*served.get("takes", []), "prompts"]) if name not in needs]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(each, kind) for each in needs]
        parameters += [inspect.Parameter(each, kind, default=None) for each in takes]
        if served.get("takes_all"):
            parameters.append(inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD))
        self._whole_prompts = self.pairwise or "num_generations" in [*needs, *takes] or bool(served.get("takes_all"))
        # A reward is called with the arguments that its signature names.
        self.__signature__ = inspect.Signature(parameters)

    @classmethod
    def without_weights(cls, *args: Any, **options: Any) -> "HTTPReward":
        """The reward for a plan: it holds no model, and no server is asked."""
        return cls.__new__(cls)

    async def __call__(self, **arguments: Any) -> list[float | None]:
        """
        Score N samples: N finite floats, or None where the reward does not apply.

        Args:
            **arguments: What `__signature__` names: tensors laid out as in [`trl_fdfo.media`], also for a reward that sees PIL
                images on its server; prompts; `num_generations`; columns of the dataset, N values each.
        """
        self.__signature__.bind(**arguments)
        given = {name: value for name, value in arguments.items() if value is not None}
        # Not in this thread, which reads the answers of all servers, and would wait for what the GPU computes.
        samples = {
            name: await asyncio.to_thread(given[name].cpu) for name in SHAPES if isinstance(given.get(name), Tensor)
        }
        if "images" in samples and samples["images"].ndim == 5:
            samples["videos"] = samples.pop("images")
        if not samples:
            raise ValueError(
                f"{self.name} was called with {', '.join(given) or 'nothing'}: give it a tensor of samples."
            )
        count = len(next(iter(samples.values())))
        groups = given.get("num_generations", 1)
        size = max(1, self.batch_size // groups) * groups if self._whole_prompts else self.batch_size
        head = {name: given[name] for name in RATES if name in given}
        if "trainer_state" in given:
            head["trainer_state"] = numbers_of(given["trainer_state"])
        if self._whole_prompts:
            head["num_generations"] = groups
        columns = {name: list(values) for name, values in given.items() if name not in _OWN}
        prompts = list(given["prompts"]) if "prompts" in given else None

        def body(start: int) -> bytes:
            part = slice(start, start + size)
            lists = {"columns": {name: values[part] for name, values in columns.items()}} if columns else {}
            lists |= {"prompts": prompts[part]} if prompts is not None else {}
            sent = {name: tensor[part] for name, tensor in samples.items()}
            return encode(sent, head | lists, self._as_bytes)

        del arguments, given  # the samples on the GPU, while the server is awaited
        path = f"/score/{quote(self.name, safe='')}"
        async with self.session() as session:
            answers = await all_or_none(
                self.post(session, path, partial(body, start), self._reader(min(size, count - start)))
                for start in range(0, count, size)
            )
        return [value for answer in answers for value in answer]

    def _reader(self, count: int) -> Callable[[Answer], list[float | None]]:
        def read(answer: Answer) -> list[float | None]:
            try:
                values = answer.json()["rewards"]
            except (ValueError, LookupError, TypeError):
                raise TemporaryFailure(f"no rewards in {answer}") from None
            if not isinstance(values, list) or len(values) != count:
                found = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
                raise HTTPRewardError(
                    f"The server of {self.name} answered {found} for {count} samples ({answer}): it must answer one number, or "
                    "null, for each in their order."
                )
            for value in values:
                number = type(value) in (int, float) and math.isfinite(value)
                if value is not None and not number:
                    raise HTTPRewardError(
                        f"The server of {self.name} answered {value!r}, which is no finite number ({answer}): it must answer null "
                        "where the reward does not apply."
                    )
            return values

        return read

    async def _ask_for_rewards(self) -> list[dict[str, Any]]:
        async with self.session() as session:
            return await self.get(session, "/rewards", _descriptions)


def _descriptions(answer: Answer) -> list[dict[str, Any]]:
    try:
        rewards = answer.json()["rewards"]
        valid = rewards and all(isinstance(each["name"], str) and _are_names(each["needs"]) for each in rewards)
        valid = valid and all(_are_names(each.get("takes", [])) for each in rewards)
    except (ValueError, LookupError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise TemporaryFailure(f"no list of rewards in {answer}")
    return rewards


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value) for value in values
    )


class HTTPRewardError(ServerError):
    """An [`HTTPReward`] got no rewards."""
