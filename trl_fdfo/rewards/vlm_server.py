"""A vision-language model (VLM) on a server as a reward: [`VLMScore`] by HTTP, from vLLM, SGLang or alike."""

import base64
import io
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .http_client import Answer, RetryingClient, ServerError, TemporaryFailure, all_or_none
from .questions import MIN_PROBABILITY, VLMReward


# At these log odds the score is within 0.01 of 0 or 100.
_SETTLED = math.log(100 / 0.01 - 1)


class VLMServer(VLMReward, RetryingClient):
    """
    The answer of a VLM on a server to a question about each image or video: 0 to 100, higher is better.

    This is the score of [`VLMScore`], from the server's log probabilities of the first token of the answer. Start a
    server by

    ```sh
    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000 --limit-mm-per-prompt '{"image": 2}'
    python -m sglang.launch_server --model-path Qwen/Qwen2.5-VL-7B-Instruct --port 8000
    ```

    and pass `url="http://host:8000/v1"`. The limit of two images is for [`~VLMServer.compare`] and [`EditJudge`]; videos need
    `num_frames` for each. The log probabilities
    are float32, but their logits have the data type of the server: bfloat16 rounds logits between 16 and 32 to
    multiples of 1/8, so two similar images can tie here that [`VLMScore`] tells apart.

    A request is retried, at the next URL and after a wait that doubles each time, if its failure can be temporary: no
    connection, no answer in time, an error of the server, or an answer without the words.

    A word is matched by the text that the server shows. If several tokens read the same, as SentencePiece's with and
    without a leading space, the likeliest counts. Servers list the 20 likeliest tokens. A word that is missing there is
    taken to be as likely as the last of them if that settles the score to 0.01; otherwise the answer lacks the word.

    Args:
        url (`str` or `list[str]`): Base URL(s) of servers of the same model, which take turns. A URL without a path
            gets `/v1`.
        model (`str`): The name under which the model is served.
        question, target, contrast, num_frames: As in [`VLMScore`].
        max_concurrency (`int`): Requests in flight at a time, at most 100, over all calls on an event loop.
        timeout (`float`): Seconds to wait for an answer to a request.
        max_retries (`int`): Number of retries of a request.
        backoff (`float`): Seconds before the first retry. The wait doubles with each retry, up to a minute.
        api_key (`str`, *optional*): Key of the server. Default: the environment variable `OPENAI_API_KEY`.
        extra_body (`dict[str, Any]`, *optional*): More fields of the request, such as `{"chat_template_kwargs":
            {"enable_thinking": False}}`. None removes a field: servers other than vLLM and SGLang may need
            `{"top_k": None, "repetition_penalty": None}`.

    Raises:
        ValueError: [`get_question`] refuses the question, or an argument is out of range.
        VLMServerError: In a call: the server refused a request, or did not answer in `max_retries + 1` attempts.
    """

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
        num_frames: int = 8,
    ):
        self.ask_about(question, target, contrast, num_frames)
        super().__init__(
            url,
            owner="VLMServer",
            advice=f"Is it up (`vllm serve {model} --port 8000`)?",
            refusal_advice=f"Check the url, which ends in /v1, the api_key, and that model={model!r} is a name that it serves: "
            "{url}/models lists them.",
            error=VLMServerError,
            default_path="/v1",
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            backoff=backoff,
            api_key=os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key,
        )
        self.model = model
        self.extra_body = extra_body or {}

    async def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Score N images, or N videos as lists of frames, from 0 to 100: float32, shape [N]."""
        self.question.check("image")
        return 100 * (await self.log_odds(*self.asked(prompts, images))).sigmoid()

    async def log_odds(self, images: Sequence[Sequence[Image.Image]], questions: Sequence[str]) -> Tensor:
        async with self.session() as session:
            return torch.tensor(
                await all_or_none(
                    self.post(session, "/chat/completions", partial(self._body, *each), self._read)
                    for each in zip(images, questions)
                )
            )

    def _read(self, answer: Answer) -> float:
        """The log odds of an answer."""
        try:
            completion = answer.json()
            if completion["choices"][0]["logprobs"] is None:
                raise TemporaryFailure(
                    f"no log probabilities (logprobs: null) in {answer}",
                    advice="The score is made of them: serve the model with vLLM or SGLang, whose servers give them.",
                )
            return self._odds_of(completion)
        except (ValueError, LookupError, TypeError):
            raise TemporaryFailure(f"no log probabilities in {answer}") from None

    def _odds_of(self, completion: Any) -> float:
        odds, logprobs = _log_odds(completion, self.question.target, self.question.contrast)
        probabilities = {token: math.exp(logprob) for token, logprob in logprobs.items()}
        probability = sum(probabilities.get(word, 0.0) for word in (self.question.target, self.question.contrast))
        if probability < MIN_PROBABILITY:
            likeliest = dict(list(reversed(probabilities.items()))[:5])
            raise VLMServerError(f"{self.__name__}: {self.unanswered(probability, likeliest)}.")
        return odds

    def _body(self, images: Sequence[Image.Image], question: str) -> dict[str, Any]:
        content = []
        for image in images:
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": question})
        messages, begun = [{"role": "user", "content": content}], self.question.answer
        if begun:
            messages.append({"role": "assistant", "content": begun})
        fields = {
            "model": self.model,
            "messages": messages,
            **({"continue_final_message": True, "add_generation_prompt": False} if begun else {}),
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            # Some servers apply these options to the log probabilities, with defaults from the model's
            # generation_config. These values leave the distribution of the model itself.
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
            **self.extra_body,
        }
        return {name: value for name, value in fields.items() if value is not None}


class VLMServerError(ServerError):
    """A [`VLMServer`] got no answer to a question."""


def _log_odds(answer: Any, target: str, contrast: str) -> tuple[float, dict[str, float]]:
    """
    log p(target) - log p(contrast) of a chat completion, and the log probabilities of the listed tokens, the likeliest
    last; a ValueError, LookupError or TypeError for any other answer.

    Raises:
        TemporaryFailure: A word is not among the listed tokens, and its likelihood could matter.
    """
    token = answer["choices"][0]["logprobs"]["content"][0]
    listed = [(each["token"], float(each["logprob"])) for each in token["top_logprobs"]]
    sampled = (token["token"], float(token["logprob"]))
    # Sort the likeliest last: a dict keeps the last of equal keys.
    logprobs = dict(sorted([*listed, sampled], key=lambda each: each[1]))
    # A token that is not listed is less likely than all listed ones but the sampled token, which vLLM always lists.
    bound = min((logprob for text, logprob in listed if (text, logprob) != sampled), default=math.inf)
    odds = logprobs.get(target, bound) - logprobs.get(contrast, bound)
    missing = [word for word in (target, contrast) if word not in logprobs]
    # If the target is missing, these are the highest possible log odds; if the contrast is missing, the lowest.
    settled = odds <= -_SETTLED if missing == [target] else odds >= _SETTLED
    if missing and (len(missing) == 2 or not settled):
        likeliest = {text: round(logprob, 2) for text, logprob in list(reversed(logprobs.items()))[:10]}
        raise TemporaryFailure(
            f"an answer that lacks the token {' and '.join(map(repr, missing))}, whose likeliest tokens are {likeliest}",
            advice="The question must ask for its words: change `question`, `target` or `contrast`.",
        )
    if not math.isfinite(odds):
        raise ValueError
    return odds, logprobs
