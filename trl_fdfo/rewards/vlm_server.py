"""A vision-language model (VLM) on a server as a reward: [`VLMScore`] by HTTP, from vLLM, SGLang or what speaks as they do."""

import asyncio
import base64
import io
import itertools
import json
import math
import os
import random
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import get_async_session
from PIL import Image
from torch import Tensor

from .questions import QUESTIONS, check_images, get_question


# Log odds at which the score is within 0.01 of 0 or 100.
_SETTLED = math.log(100 / 0.01 - 1)


class VLMServer:
    """
    The answer of a VLM on a server to a question about each image: 0 to 100, higher is better.

    The score of [`VLMScore`], from the log probabilities that the server gives of the first token of the answer.

    Start a server by

    ```sh
    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000 --limit-mm-per-prompt '{"image": 2}'
    python -m sglang.launch_server --model-path Qwen/Qwen2.5-VL-7B-Instruct --port 8000
    ```

    where the limit of two images is for [`~VLMServer.compare`], and `url="http://host:8000/v1"`. The log probabilities
    are of float32, but of logits in the data type of the server: bfloat16 rounds those between 16 and 32 to multiples of
    1/8, so two images that are much alike can tie where those of [`VLMScore`] do not.

    A request that fails for a reason that can pass (no connection, no answer in time, an error of the server, an answer
    without the words) is sent again, to the next URL, after a wait that doubles each time.

    A word is looked for as the text that the server shows for it. Where several tokens read the same, as with and without
    the space before in SentencePiece, the likeliest counts. The servers list the 20 likeliest tokens: a word that is not
    among them is taken to be as likely as the last of them where that settles the score to 0.01; otherwise the answer
    counts as one without the word.

    Args:
        url (`str` or `list[str]`): Base URL(s) of servers of the same model; requests are dealt out in turn. Without a
            path, it is `/v1`.
        model (`str`): The name that the model is served by.
        question (`str`): As for [`VLMScore`].
        target (`str`, *optional*): As for [`VLMScore`].
        contrast (`str`, *optional*): As for [`VLMScore`].
        max_concurrency (`int`): Requests in flight at a time, at most 100, over all calls on an event loop.
        timeout (`float`): Seconds to wait for an answer to a request.
        max_retries (`int`): How many more times a request is sent.
        backoff (`float`): Seconds to wait before a request is sent again, twice as long each time, up to a minute.
        api_key (`str`, *optional*): Key of the server. Default: the environment variable `OPENAI_API_KEY`.
        extra_body (`dict[str, Any]`, *optional*): More fields of the request, such as `{"chat_template_kwargs":
            {"enable_thinking": False}}`. None leaves a field out: servers that are neither vLLM nor SGLang may need
            `{"top_k": None, "repetition_penalty": None}`.

    Raises:
        ValueError: A question that cannot be asked (see [`get_question`]), or an argument out of range.
        VLMServerError: In a call: the server refused a request, or did not answer in `max_retries + 1` attempts.
    """

    image_type = "pil"

    def __init__(
        self,
        url: str | list[str],
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        question: str = "alignment",
        target: str | None = None,
        contrast: str | None = None,
        *,
        max_concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 5,
        backoff: float = 1.0,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
    ):
        self.question = get_question(question, target, contrast)
        self.__name__ = f"{type(self).__name__}_{question}" if question in QUESTIONS else type(self).__name__
        self.urls = [_base_url(each) for each in ([url] if isinstance(url, str) else url)]
        if not self.urls:
            raise ValueError("url=[] of VLMServer names no server: give one, such as http://localhost:8000/v1.")
        if not 1 <= max_concurrency <= 100:
            raise ValueError(
                f"max_concurrency={max_concurrency} of VLMServer must be between 1 and 100, the connections of a client."
            )
        if not (timeout > 0 and max_retries >= 0 and backoff >= 0):
            raise ValueError(
                f"timeout={timeout}, max_retries={max_retries}, backoff={backoff} of VLMServer: the timeout must be more "
                "than 0 seconds, the others at least 0."
            )
        self.model = model
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.extra_body = extra_body or {}
        self._api_key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        self._turns = itertools.count()
        self._semaphores: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        # Not the module's own generator, which a training run has seeded.
        self._random = random.Random()

    async def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """
        Args:
            images (`Sequence[PIL.Image.Image]`): N images, or N videos as lists of frames, each scored by the mean over
                its frames.
            prompts (`Sequence[str]`): N prompts.

        Returns:
            `Tensor`: N scores, float32.

        Raises:
            VLMServerError: The server refused a request, or did not answer.
        """
        check_images(self.question, 1)
        videos = [image if isinstance(image, (list, tuple)) else [image] for image in images]
        questions = [self.question.ask(prompt) for prompt, video in zip(prompts, videos) for _ in video]
        scores = 100 * (await self.log_odds([[frame] for video in videos for frame in video], questions)).sigmoid()
        return torch.stack([video.mean() for video in scores.split([len(video) for video in videos])])

    async def compare(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Tensor:
        """
        Ask the question about two images at once. Judges prefer a place as well as an image: ask in both orders.

        Args:
            first (`Sequence[PIL.Image.Image]`): N images, of which the target speaks in favour.
            second (`Sequence[PIL.Image.Image]`): N images, of which the contrast speaks in favour.
            prompts (`Sequence[str]`): N prompts.

        Returns:
            `Tensor`: N log odds that the first is better, float32.

        Raises:
            VLMServerError: The server refused a request, or did not answer.
        """
        check_images(self.question, 2)
        return await self.log_odds(list(zip(first, second)), [self.question.ask(prompt) for prompt in prompts])

    compare.image_type = "pil"

    async def log_odds(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> Tensor:
        """
        Args:
            images (`Sequence[Sequence[PIL.Image.Image]]`): The images that each of N questions is about.
            questions (`Sequence[str]`): N questions.

        Returns:
            `Tensor`: N times log p(target) - log p(contrast), float32.

        Raises:
            VLMServerError: The server refused a request, or did not answer.
        """
        # A client of the Hub, for its HTTP library (httpx or httpx2, by its version), but without its hooks: they forbid
        # requests where HF_HUB_OFFLINE is set, as on nodes that reach a server of their own and no Hub.
        client = get_async_session()
        client.event_hooks = {}
        async with client:
            tasks = [asyncio.ensure_future(self._ask(client, *each)) for each in zip(images, questions)]
            try:
                return torch.tensor(await asyncio.gather(*tasks))
            finally:  # one has failed, or the call was cancelled: no request outlives its client
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, images: Sequence[Image.Image], question: str) -> float:
        """The log odds of one question, asked until it is answered."""
        turn = next(self._turns)
        start = asyncio.get_running_loop().time()
        body = None
        for attempt in range(self.max_retries + 1):
            if attempt > 0:
                wait = min(60, self.backoff * 2 ** (attempt - 1))
                await asyncio.sleep(wait * self._random.uniform(0.5, 1))
            url = self.urls[(turn + attempt) % len(self.urls)]
            async with self._semaphore():
                if body is None:
                    body = await asyncio.to_thread(self._body, images, question)
                try:
                    return await self._request(client, url, body)
                except _RequestFailed as error:
                    failure = error
        seconds = asyncio.get_running_loop().time() - start
        raise VLMServerError(
            f"{url} did not answer: {attempt + 1} attempts in {seconds:.1f} s"
            + (f" over {len(self.urls)} URLs" if len(self.urls) > 1 else "")
            + f", the last with {failure}. "
            + (
                "The question must ask for its words: change `question`, `target` or `contrast`."
                if isinstance(failure, _WordMissing)
                else f"Is it up (`vllm serve {self.model} --port 8000`)? Does it keep up with timeout={self.timeout:g} s "
                f"and max_concurrency={self.max_concurrency}?"
            )
        )

    async def _request(self, client: Any, url: str, body: bytes) -> float:
        headers = {"content-type": "application/json"}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        request = client.post(f"{url}/chat/completions", content=body, headers=headers, timeout=None)
        try:
            response = await asyncio.wait_for(request, self.timeout)
        except asyncio.TimeoutError:
            raise _RequestFailed(f"no answer within {self.timeout:g} s") from None
        except Exception as error:  # the classes of the HTTP library, whichever it is
            raise _RequestFailed(self._redacted(f"{type(error).__name__}: {error}")) from None
        answer = f"HTTP {response.status_code}: {self._redacted(response.text)[:300]}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _RequestFailed(answer)
        if not response.is_success:
            raise VLMServerError(
                f"{url} refused a request with {answer}. Check the url, which ends in /v1, the api_key, and that "
                f"model={self.model!r} is a name that it serves: {url}/models lists them."
            )
        try:
            return _log_odds(response.json(), self.question.target, self.question.contrast)
        except (ValueError, LookupError, TypeError):
            raise _RequestFailed(f"no log probabilities in {answer}") from None

    def _body(self, images: Sequence[Image.Image], question: str) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        content.append({"type": "text", "text": question})
        fields = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            # The distribution of the model itself: some servers give the log probabilities after these are applied, and
            # take those that are not named from the model's generation_config.
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
            **self.extra_body,
        }
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()

    def _semaphore(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        for other in list(self._semaphores):
            if other.is_closed():
                self._semaphores.pop(other, None)
        return self._semaphores.setdefault(loop, asyncio.Semaphore(self.max_concurrency))

    def _redacted(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


class VLMServerError(RuntimeError):
    """A [`VLMServer`] got no answer to a question."""


class _RequestFailed(Exception):
    """For a reason that can pass."""


class _WordMissing(_RequestFailed):
    """A word is not among the listed tokens, and could be too likely to be left out."""


def _log_odds(answer: Any, target: str, contrast: str) -> float:
    """
    log p(target) - log p(contrast) of a chat completion.

    Raises:
        _WordMissing: See there.
        ValueError, LookupError, TypeError: It is no chat completion with log probabilities.
    """
    token = answer["choices"][0]["logprobs"]["content"][0]
    listed = [(each["token"], float(each["logprob"])) for each in token["top_logprobs"]]
    sampled = (token["token"], float(token["logprob"]))
    # Likeliest last, which is the one that a dict keeps.
    logprobs = dict(sorted([*listed, sampled], key=lambda each: each[1]))
    # What is not listed is less likely than the listed ones, but for the sampled token: vLLM lists it in any case.
    bound = min((logprob for text, logprob in listed if (text, logprob) != sampled), default=math.inf)
    odds = logprobs.get(target, bound) - logprobs.get(contrast, bound)
    missing = [word for word in (target, contrast) if word not in logprobs]
    # Without the target these are the highest log odds that there can be, without the contrast the lowest.
    settled = odds <= -_SETTLED if missing == [target] else odds >= _SETTLED
    if missing and (len(missing) == 2 or not settled):
        likeliest = {text: round(logprob, 2) for text, logprob in list(reversed(logprobs.items()))[:10]}
        raise _WordMissing(
            f"an answer that lacks the token {' and '.join(map(repr, missing))}, whose likeliest tokens are {likeliest}"
        )
    if not math.isfinite(odds):
        raise ValueError
    return odds


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url={url!r} of VLMServer must be a base URL such as http://localhost:8000/v1.")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
