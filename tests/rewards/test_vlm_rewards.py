import asyncio
import base64
import io
import json
import math
import random
import threading
import time

import numpy as np
import pytest
import tiny_vlms
import torch
from conftest import free_port
from faulty_server import FaultyServer
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    Qwen2VLImageProcessor,
    SmolVLMConfig,
)
from transformers.utils import is_torchvision_available

from trl_fdfo.media import Outputs
from trl_fdfo.rewards import RewardFunctions
from trl_fdfo.rewards.edit_judge import vlm_edit
from trl_fdfo.rewards.pairwise_judge import unified_reward, vlm_judge
from trl_fdfo.rewards.questions import QUESTIONS, Question, get_question
from trl_fdfo.rewards.vlm_score import VLMScore
from trl_fdfo.rewards.vlm_server import VLMServer, VLMServerError


ALIGNMENT = 'Does this image match the caption "{prompt}"? Answer Yes or No.'
PROMPTS = ["a cat", "two dogs on the beach at night", "", 'the "sea" in {braces} and {prompt}']


def image(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    blocks = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


# Different sizes: for Qwen2.5-VL different numbers of tokens.
IMAGES = [image(0), image(1, width=128), image(2, height=96), image(3)]


class Reference:
    """The next token of a model by a forward pass on one input without padding, whose text is written out by hand."""

    def __init__(self, name: str, folder):
        self.name = name
        self.model = AutoModelForImageTextToText.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = Qwen2VLImageProcessor if name == "qwen2_5_vl" else CLIPImageProcessor
        self.image_processor = image_processor.from_pretrained(folder)
        self.lock = threading.Lock()

    @torch.no_grad()
    def log_probabilities(self, images: list[Image.Image], question: str, begun: str = "") -> torch.Tensor:
        pixels = self.image_processor(images, return_tensors="pt")
        if self.name == "qwen2_5_vl":
            # Four patches are a token.
            counts = [grid.prod().item() // 4 for grid in pixels["image_grid_thw"]]
            shown = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
            text = f"<|im_start|>user\n{shown}{question}<|im_end|>\n<|im_start|>assistant\n"
        else:
            text = "USER: " + ("<image>" * 16 + "\n") * len(images) + f"{question} ASSISTANT:"
        ids = self.tokenizer(text + begun, return_tensors="pt").input_ids
        if self.name == "qwen2_5_vl":
            pixels["mm_token_type_ids"] = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        with self.lock:
            return self.model(input_ids=ids, **pixels).logits[0, -1].log_softmax(dim=-1)

    def log_odds(self, images, question: str, target: str = "Yes", contrast: str = "No") -> float:
        logprobs = self.log_probabilities(list(images), question)
        return sum(
            sign * logprobs[self.tokenizer.convert_tokens_to_ids(word)].item()
            for sign, word in ((1, target), (-1, contrast))
        )

    def scores(self, images, prompts, template: str = ALIGNMENT) -> torch.Tensor:
        questions = [template.replace("{prompt}", prompt) for prompt in prompts]
        odds = [self.log_odds([each], question) for each, question in zip(images, questions)]
        return 100 * torch.tensor(odds).sigmoid()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava"])
def vlm(request, tmp_path_factory):
    """Folder of a tiny VLM, and what it answers."""
    folder = tmp_path_factory.mktemp(request.param)
    getattr(tiny_vlms, request.param)(folder)
    return folder, Reference(request.param, folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    tiny_vlms.qwen2_5_vl(folder)
    return folder, Reference("qwen2_5_vl", folder)


def assert_equal(actual, expected, tolerance=5e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Questions


def test_question_is_filled_in_without_a_look_at_the_prompt():
    assert QUESTIONS["alignment"] == Question(ALIGNMENT, target="Yes", contrast="No", about="image")
    question = get_question("{prompt} or {prompt}?", contrast="Maybe")
    assert question.ask("a {prompt} {0} {") == "a {prompt} {0} { or a {prompt} {0} {?"
    assert (question.target, question.contrast) == ("Yes", "Maybe")
    assert get_question("comparison").target == "A" and get_question("comparison", target="1").target == "1"
    assert get_question("画像は綺麗ですか？").template == "画像は綺麗ですか？"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "Is it {nice}?"}, r"question='Is it \{nice\}\?' has other braces than \{prompt\}"),
        ({"question": "Is {prompt} {?"}, "has other braces"),
        ({"question": "aligment"}, "question='aligment' is no preset.*'alignment', 'quality'"),
        ({"question": " "}, "question=' ' is empty"),
        ({"question": "quality", "contrast": "Yes"}, "target='Yes' and contrast='Yes' are the same word"),
    ],
)
def test_questions_that_cannot_be_asked(arguments, message):
    # Before anything is loaded: there is no such model.
    for reward in (lambda: VLMScore("no/model", **arguments), lambda: VLMServer("http://localhost:1", **arguments)):
        with pytest.raises(ValueError, match=message):
            reward()


# VLMScore


def test_score_is_that_of_one_forward_pass_in_any_batch(vlm):
    folder, reference = vlm
    reward = VLMScore(str(folder), device="cpu", batch_size=4)
    expected = reference.scores(IMAGES, PROMPTS)
    assert expected.max() - expected.min() > 5  # or nothing is compared
    for reward.batch_size in (4, 3, 1):
        scores = reward(images=IMAGES, prompts=PROMPTS)
        assert scores.dtype == torch.float32
        assert_equal(scores, expected)


@pytest.mark.parametrize("preset", ["quality", "photorealism"])
def test_presets(qwen, preset):
    folder, reference = qwen
    template = QUESTIONS[preset].template
    assert "{prompt}" not in template
    scores = VLMScore(str(folder), question=preset, device="cpu")(IMAGES, PROMPTS)
    assert_equal(scores, reference.scores(IMAGES, PROMPTS, template))


def test_words_of_ones_own(qwen):
    folder, reference = qwen
    reward = VLMScore(str(folder), question="Which letter?", target="B", contrast=" Good", device="cpu")
    expected = reference.log_odds(IMAGES[:1], "Which letter?", "B", "ĠGood")
    assert_equal(reward.log_odds([IMAGES[:1]], ["Which letter?"]), torch.tensor([expected]))


def test_compare_shows_both_images_in_their_order(vlm):
    folder, reference = vlm
    reward = VLMScore(str(folder), question="comparison", device="cpu", batch_size=3)
    template = QUESTIONS["comparison"].template
    first, second = IMAGES, IMAGES[1:] + IMAGES[:1]
    expected = [
        reference.log_odds(pair, template.replace("{prompt}", prompt), "A", "B")
        for *pair, prompt in zip(first, second, PROMPTS)
    ]
    assert reward.compare.image_type == "pil"
    forward, backward = reward.compare(first, second, PROMPTS), reward.compare(second, first, PROMPTS)
    assert_equal(forward, torch.tensor(expected))
    assert (forward - backward).abs().min() > 1e-3


def test_an_answer_that_is_begun_for_the_model(qwen):
    folder, reference = qwen
    words = {"target": "Yes", "contrast": "No"}  # which a tiny model answers with, instead of 1 and 2
    reward = VLMScore(str(folder), question="unified_reward", device="cpu", batch_size=3, **words)
    question = QUESTIONS["unified_reward"].ask("a cat")
    ids = [reference.tokenizer.convert_tokens_to_ids(word) for word in words.values()]
    expected, begun = [], []
    for first, second in zip(IMAGES, IMAGES[1:]):
        for odds, start in ((begun, "Image "), (expected, "")):
            logprobs = reference.log_probabilities([first, second], question, start)
            odds.append((logprobs[ids[0]] - logprobs[ids[1]]).item())
    scores = reward.compare(IMAGES[:-1], IMAGES[1:], ["a cat"] * 3)
    assert_equal(scores, torch.tensor(begun))
    assert (scores - torch.tensor(expected)).abs().min() > 1e-2
    body = VLMServer("http://localhost:1", question="unified_reward")._body(IMAGES[:2], question)
    assert (
        body["messages"][1] == {"role": "assistant", "content": "Image "} and len(body["messages"][0]["content"]) == 3
    )
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    judge = unified_reward("http://localhost:1")
    assert judge.pairwise and judge.__name__ == "unified_reward"
    preset = QUESTIONS["unified_reward"]
    assert (preset.target, preset.contrast, preset.answer) == ("1", "2", "Image ")
    assert preset.ask("a dog").endswith("Text Caption: [a dog]")


def test_bfloat16_ranks_as_float32_and_does_not_tie(vlm):
    folder, _ = vlm
    exact = VLMScore(str(folder), device="cpu")
    rough = VLMScore(str(folder), dtype="bfloat16", device="cpu")
    assert (exact.model.dtype, rough.model.dtype) == (torch.float32, torch.bfloat16)
    assert rough(IMAGES, PROMPTS).argsort().tolist() == exact(IMAGES, PROMPTS).argsort().tolist()
    # Logits of 30 in bfloat16 have steps of 1/8. These images differ by less.
    alike = [IMAGES[0].point([min(255, value + step) for value in range(256)] * 3) for step in range(12)]
    assert len(set(rough(alike, [""] * 12).tolist())) == 12


def frames_of(first: int, last: int) -> str:
    return f"Images {first} to {last} are frames of one video in their order: they count as one image. "


def test_a_video_is_some_frames_in_one_question(qwen):
    folder, reference = qwen
    reward = VLMScore(str(folder), device="cpu", num_frames=3)
    video = [image(seed) for seed in range(5)]
    question = ALIGNMENT.replace("{prompt}", "a")
    odds = [
        reference.log_odds([video[0], video[2], video[4]], frames_of(1, 3) + question),
        reference.log_odds(video[:2], frames_of(1, 2) + question),
        reference.log_odds(video[:1], question),
    ]
    assert_equal(reward([video, video[:2], video[:1]], ["a"] * 3), 100 * torch.tensor(odds).sigmoid())
    assert torch.equal(reward([video[:1]], ["a"]), reward(video[:1], ["a"]))
    # Frames of another order are another video.
    assert abs(reward([video[:2]], ["a"]) - reward([video[1::-1]], ["a"])) > 1e-3


def test_a_judge_compares_videos(qwen):
    folder, reference = qwen
    reward = VLMScore(str(folder), question="comparison", device="cpu", num_frames=2)
    first, second = [image(seed) for seed in range(3)], [image(seed) for seed in range(3, 5)]
    notes = frames_of(1, 2) + frames_of(3, 4)
    question = notes + QUESTIONS["comparison"].template.replace("{prompt}", "a")
    expected = reference.log_odds([first[0], first[2], *second], question, "A", "B")
    assert_equal(reward.compare([first], [second], ["a"]), torch.tensor([expected]))


# Edits


def test_a_judge_of_edits_sees_the_source_the_result_and_the_instruction(qwen):
    folder, reference = qwen
    judge = vlm_edit(model=str(folder), device="cpu", num_frames=2)
    template = QUESTIONS["edit"].template
    video = [image(seed) for seed in range(3)]
    results, prompts = [IMAGES[0], video], ["make it red", "melt it"]
    sources = [IMAGES[1].convert("RGBA"), [IMAGES[2], IMAGES[3]]]  # of one, and of two reference images
    odds = [
        reference.log_odds([IMAGES[1], IMAGES[0]], template.replace("{prompt}", "make it red")),
        reference.log_odds(
            [IMAGES[2], IMAGES[3], video[0], video[2]], frames_of(3, 4) + template.replace("{prompt}", "melt it")
        ),
    ]
    expected = 100 * torch.tensor(odds).sigmoid()
    assert_equal(judge(images=results, prompts=prompts, image=sources), expected)
    with Server(reference) as server:
        served = vlm_edit(server.url, num_frames=2)
        assert_equal(asyncio.run(served(images=results, prompts=prompts, image=sources)), expected)


def test_a_judge_of_edits_is_called_with_its_column():
    judge = vlm_edit("http://localhost:1", column="photo")
    functions = RewardFunctions(judge)
    functions.check_columns(["photo"])
    functions.expect(Outputs(("images",)))
    assert functions.names == ["vlm_edit"] and judge.image_type == "pil"
    with pytest.raises(ValueError, match="'vlm_edit' needs the argument 'photo', and train_dataset has no such column"):
        functions.check_columns(["image"])
    with pytest.raises(ValueError, match="The column 'photo' has 'cat.png', a str, where an image was edited"):
        judge(images=IMAGES[:1], prompts=["a"], photo=["cat.png"])
    with pytest.raises(ValueError, match="is about one image, and a judge of edits shows.*take.*question='edit'"):
        vlm_edit("http://localhost:1", question="quality")
    with pytest.raises(ValueError, match="num_frames=0 of VLMServer: show at least one frame of a video"):
        VLMServer("http://localhost:1", num_frames=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"target": "YES"}, r"target='YES' is not one token of .* but \['Y', 'E', 'S'\].*'Yes', ' Yes'"),
        ({"contrast": "Very Good"}, r"contrast='Very Good' is not one token of .*\['Very', ' Good'\].*another word"),
        ({"contrast": ""}, r"contrast='' is not one token of .* but \[\]"),
    ],
)
def test_words_of_several_tokens_are_refused(qwen, words, message):
    with pytest.raises(ValueError, match=message):
        VLMScore(str(qwen[0]), **words)


@pytest.mark.skipif(is_torchvision_available(), reason="it can be loaded")
def test_a_processor_that_insists_on_torchvision_says_so(qwen, tmp_path):
    SmolVLMConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "SmolVLMImageProcessor"}')
    qwen[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        (ImportError, ValueError), match="requires the Torchvision library|Missing optional.*torchvision"
    ):
        VLMScore(str(tmp_path))


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    tiny_vlms.qwen2_5_vl(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template, in which VLMScore asks"):
        VLMScore(str(tmp_path))


# VLMServer


class Server(FaultyServer):
    """Serves a tiny VLM on the loopback interface, as vLLM does."""

    path = "/v1/chat/completions"

    def __init__(self, reference: Reference | None = None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.url += "/v1"
        self.reference = reference

    def answer(self, body: bytes) -> str:
        body = json.loads(body)
        *shown, question = body["messages"][0]["content"]
        images = []
        for part in shown:
            header, _, data = part["image_url"]["url"].partition(",")
            assert (part["type"], header) == ("image_url", "data:image/png;base64")
            images.append(Image.open(io.BytesIO(base64.b64decode(data))))
        logprobs = self.reference.log_probabilities(images, question["text"])
        top = logprobs.topk(body["top_logprobs"])
        entries = [self.entry(*each) for each in zip(top.indices.tolist(), top.values.tolist())]
        # Like vLLM, the sampled token first, in the place of the last one: here the least likely of all.
        sampled = self.entry(logprobs.argmin().item(), logprobs.min().item())
        return json.dumps(completion(sampled, [sampled, *entries[:-1]]))

    def entry(self, token: int, logprob: float) -> dict:
        return {"token": self.reference.tokenizer.decode([token]), "logprob": logprob}


def completion(sampled: dict, top: list[dict]) -> dict:
    content = [{**sampled, "top_logprobs": top}]
    return {"choices": [{"index": 0, "message": {"content": sampled["token"]}, "logprobs": {"content": content}}]}


def ask(url, images=IMAGES[:1], prompts=PROMPTS[:1], limit=10.0, **options):
    """The reward, called within a limit of seconds; by default a request fails and is sent again in an instant."""
    reward = VLMServer(url, **{"backoff": 0.01, "timeout": 5.0, **options})
    return asyncio.run(asyncio.wait_for(reward(images=images, prompts=prompts), limit))


def test_served_score_is_that_in_process(vlm):
    folder, reference = vlm
    expected = VLMScore(str(folder), device="cpu")(IMAGES, PROMPTS)
    with Server(reference) as server:
        scores = ask(server.url, IMAGES, PROMPTS, model="tiny")
        assert scores.dtype == torch.float32
        assert_equal(scores, expected)
        videos = ask(server.url, [IMAGES[:2], IMAGES[2:3]], ["a", "b"], model="tiny")
    assert_equal(videos, VLMScore(str(folder), device="cpu")([IMAGES[:2], IMAGES[2:3]], ["a", "b"]), tolerance=1e-3)
    sent = {name: value for name, value in json.loads(server.bodies[0]).items() if name != "messages"}
    assert sent == {
        "model": "tiny",
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
    }


def test_served_comparison_is_that_in_process(vlm):
    folder, reference = vlm
    first, second = IMAGES, IMAGES[1:] + IMAGES[:1]
    expected = VLMScore(str(folder), question="comparison", device="cpu").compare(first, second, PROMPTS)
    with Server(reference) as server:
        judge = VLMServer(server.url, question="comparison")
        assert judge.compare.image_type == "pil"
        assert_equal(asyncio.run(judge.compare(first, second, PROMPTS)), expected)


def test_concurrency_is_limited_over_all_calls_of_a_loop(qwen):
    _, reference = qwen

    async def calls(reward):
        return await asyncio.gather(*(reward(images=[each] * 4, prompts=["a"] * 4) for each in IMAGES[:2]))

    with Server(reference, delay=0.05) as server:
        reward = VLMServer(server.url, max_concurrency=3)
        once = asyncio.run(calls(reward))
        assert server.peak == 3 and len(server.bodies) == 8
        # The loop of the first call is closed.
        for first, second in zip(once, asyncio.run(calls(reward))):
            assert_equal(first, second)
        assert server.peak == 3 and len(server.bodies) == 16
        assert len(reward._semaphores) == 1


def fail(*faults):
    """The first requests have these faults, the others none."""
    return lambda n: faults[n] if n < len(faults) else None


@pytest.mark.parametrize(
    "fault",
    [
        *(500, 503, 429, 408, "close", "hang"),
        *('{"choices"', "<html>", "[]", "{}", '{"choices": [{"logprobs": null}]}'),
        json.dumps(completion({"token": "Yes", "logprob": math.nan}, [{"token": "No", "logprob": -1.0}])),
    ],
)
def test_failures_that_pass_are_tried_again(qwen, fault):
    _, reference = qwen
    with Server(reference, fail(fault, fault)) as server:
        scores = ask(server.url, timeout=0.5 if fault == "hang" else 5.0, max_retries=2)
        assert len(server.bodies) == 3
    assert_equal(scores, reference.scores(IMAGES[:1], PROMPTS[:1]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "the last with HTTP 500: status 500, said to.*Is it up .`vllm serve Qwen/Qwen2.5-VL-7B-Instruct"),
        ("close", "the last with RemoteProtocolError: Server disconnected"),
        ("hang", "the last with no answer within 0.2 s.*timeout=0.2 s and max_concurrency=32"),
        ('{"choices', r"the last with no log probabilities in HTTP 200: \{\"choices"),
    ],
)
def test_failures_that_last_are_errors(fault, message):
    with Server(fault=lambda n: fault) as server:
        with pytest.raises(VLMServerError, match=message) as error:
            ask(server.url, timeout=0.2, max_retries=2)
        assert len(server.bodies) == 3
        assert f"{server.url} did not answer: 3 attempts in " in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusals_are_errors_at_once(status):
    with Server(fault=lambda n: status) as server:
        with pytest.raises(VLMServerError, match=f"refused a request with HTTP {status}: status {status}") as error:
            ask(server.url, model="other", backoff=60)
        assert len(server.bodies) == 1
        assert server.url in str(error.value) and "model='other'" in str(error.value)


def test_waits_double():
    # A run is repeatable: its random numbers are not spent on the waits.
    state = random.getstate()
    with Server(fault=lambda n: 500) as server:
        start = time.perf_counter()
        with pytest.raises(VLMServerError):
            ask(server.url, backoff=0.1, max_retries=3)
    # 0.1 + 0.2 + 0.4 s, each times 0.5 to 1.
    assert 0.35 < time.perf_counter() - start < 1.5
    assert random.getstate() == state


def test_one_failure_ends_the_call():
    with Server(fault=lambda n: 404, delay=0.05) as server:
        with pytest.raises(VLMServerError):
            ask(server.url, IMAGES[:1] * 50, ["a"] * 50, max_concurrency=2)
        assert len(server.bodies) < 10


def test_no_server_at_all():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(VLMServerError, match=f"{url}/v1 did not answer: 3 attempts in .*ConnectError"):
        ask(url, max_retries=2)


def test_servers_take_turns_and_fill_in(qwen):
    _, reference = qwen
    expected = reference.scores(IMAGES, PROMPTS)
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with Server(reference) as one, Server(reference) as other:
        assert_equal(ask([one.url, other.url], IMAGES, PROMPTS), expected)
        assert (len(one.bodies), len(other.bodies)) == (2, 2)
        assert_equal(ask([dead, other.url], IMAGES, PROMPTS, max_retries=1), expected)
        assert (len(one.bodies), len(other.bodies)) == (2, 6)


def test_api_key_is_sent_and_told_to_no_one(qwen, monkeypatch):
    key = "".join(["sk", "-", "secret"])  # not as it would stand in a traceback
    with Server(qwen[1], fail(None, 401, 500)) as server:
        ask(server.url, api_key=key)
        assert server.headers[0]["authorization"] == f"Bearer {key}"
        assert key not in repr(VLMServer(server.url, api_key=key))
        # Both answers repeat the key.
        for status in (401, 500):
            with pytest.raises(
                VLMServerError, match=rf"HTTP {status}: status {status}, said to Bearer \*\*\*"
            ) as error:
                ask(server.url, api_key=key, max_retries=0)
            assert key not in str(error.getrepr(style="long"))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-other\n")
        ask(server.url)
        assert server.headers[-1]["authorization"] == "Bearer sk-other"
        # A token of the Hub is no key of a server.
        monkeypatch.delenv("OPENAI_API_KEY")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        ask(server.url)
        assert server.headers[-1]["authorization"] is None


def test_extra_body(qwen):
    with Server(qwen[1]) as server:
        ask(server.url, extra_body={"seed": 1, "top_k": None, "top_p": 0.5})
    body = json.loads(server.bodies[0])
    assert (body["seed"], body["top_p"], "top_k" in body) == (1, 0.5, False)


def served_log_odds(top: dict[str, float] | list[tuple[str, float]], sampled: tuple[str, float]) -> float:
    """Log odds of Yes and No, from a server that answers so."""
    entries = [{"token": text, "logprob": logprob} for text, logprob in (top.items() if isinstance(top, dict) else top)]
    answer = json.dumps(completion({"token": sampled[0], "logprob": sampled[1]}, entries))
    with Server(fault=lambda n: answer) as server:
        odds = asyncio.run(VLMServer(server.url, max_retries=0).log_odds([IMAGES[:1]], ["?"])).item()
        assert len(server.bodies) == 1
        return odds


def test_words_are_matched_as_they_stand():
    top = {" Yes": -0.1, "Yes": -2.0, "yes": -2.5, "No": -3.0, "": -4.0}
    assert served_log_odds(top, (" Yes", -0.1)) == pytest.approx(1.0)
    # Two tokens that read the same.
    assert served_log_odds([("Yes", -9.0), *top.items(), ("No", -7.0)], ("Yes", -9.0)) == pytest.approx(1.0)


def test_a_word_that_is_not_listed_counts_where_that_settles_the_score():
    # The least likely token of the list is the sampled one, which says nothing of those between it and the others.
    top = {"x": -20.0, "Yes": -0.01, "yes": -5.0, "Maybe": -9.5}
    assert served_log_odds(top, ("x", -20.0)) == pytest.approx(9.49)
    assert 100 - 100 / (1 + math.exp(-9.49)) < 0.01
    assert served_log_odds({"No": -0.01, "no": -9.3}, ("No", -0.01)) == pytest.approx(-9.29)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"x": -20.0, "Yes": -0.01, "Maybe": -9.0}, "lacks the token 'No'"),
        ({"No": -0.01, "no": -9.0}, "lacks the token 'Yes'"),
        (
            {"The": -0.5, "This": -1.0, "x": -20.0},
            r"'Yes' and 'No', whose likeliest tokens are \{'The': -0.5, 'This': -1.0",
        ),
        ({}, "lacks the token 'Yes' and 'No'"),
    ],
)
def test_a_word_that_is_missed_is_an_error(top, message):
    with pytest.raises(VLMServerError, match=message + ".*The question must ask for its words"):
        served_log_odds(top, ("x", -20.0))


@pytest.mark.parametrize(
    "top",
    [
        {"<think>": -1e-5, "Yes": -13.0, "No": -14.0},
        {"YES": -0.01, "Yes": -6.0, "No": -7.0},
        {"\n": -0.02, "Yes": -5.0, "No": -9.0},
    ],
)
def test_an_answer_that_begins_with_something_else_is_no_score(top):
    first = next(iter(top))
    with pytest.raises(VLMServerError, match="together have a probability of .*enable_thinking") as told:
        served_log_odds(top, (first, top[first]))
    assert repr(first) in str(told.value)


def test_a_model_that_says_something_else_is_refused(qwen):
    folder, _ = qwen
    reward = VLMScore(str(folder), device="cpu")
    head = reward.model.get_output_embeddings()
    reward(IMAGES[:2], PROMPTS[:2])
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[reward.words] = -30.0
    with pytest.raises(ValueError, match=r"'Yes' and 'No' together have a probability of .*the likeliest tokens are '"):
        reward(IMAGES[:2], PROMPTS[:2])


def test_a_busy_server_says_when_to_come_back(qwen):
    folder, reference = qwen
    with Server(reference, fail((429, "", {"Retry-After": "0.7"}))) as server:
        start = time.monotonic()
        ask(server.url, backoff=0.001)
        assert time.monotonic() - start >= 0.7 and len(server.bodies) == 2


def test_a_proxy_that_catches_a_server_of_ones_own_is_named(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(VLMServerError, match=r"through the proxy http://127.0.0.1:\d+ .* add 127.0.0.1 to NO_PROXY"):
        ask(f"http://127.0.0.1:{free_port()}", max_retries=0)


def test_an_answer_without_log_probabilities_says_so():
    answer = json.dumps({"choices": [{"message": {"content": "Yes"}, "logprobs": None}]})
    with (
        Server(fault=lambda n: answer) as server,
        pytest.raises(VLMServerError, match="logprobs: null.*vLLM or SGLang") as told,
    ):
        ask(server.url, max_retries=0)
    assert "Is it up" not in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000' of VLMServer must be a base URL such as http://localhost"),
        ({"url": []}, r"url=\[\] of VLMServer names no server"),
        ({"max_concurrency": 0}, "max_concurrency=0 of VLMServer must be between 1 and 100"),
        ({"max_concurrency": 101}, "max_concurrency=101"),
        ({"timeout": 0}, "timeout=0, max_retries=5"),
        ({"max_retries": -1}, "max_retries=-1"),
    ],
)
def test_arguments_of_a_server(arguments, message):
    with pytest.raises(ValueError, match=message):
        VLMServer(**{"url": "http://localhost:8000", **arguments})


def test_base_urls():
    urls = ["http://a:1", "http://a:1/", "https://a/v1/", "http://a/proxy/b"]
    assert VLMServer(urls).urls == ["http://a:1/v1", "http://a:1/v1", "https://a/v1", "http://a/proxy/b"]


def test_comparison_is_no_score_and_presets_name_the_metric(qwen):
    tiny_qwen, _ = qwen
    assert VLMScore(tiny_qwen).__name__ == "VLMScore_alignment"
    assert VLMServer("http://localhost:1", question="quality").__name__ == "VLMServer_quality"
    assert VLMScore(tiny_qwen, question="Is it red? Answer Yes or No.").__name__ == "VLMScore"
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="compares two images, and a score is of one.*PairwiseJudge"):
        VLMScore(tiny_qwen, question="comparison")([image], ["a"])
    with pytest.raises(ValueError, match="is about one image, and a judge shows two: take.*question='comparison'"):
        VLMScore(tiny_qwen).compare([image], [image], ["a"])
    with pytest.raises(ValueError, match="is about one image, and a judge shows two"):
        vlm_judge(url="http://localhost:1", question="alignment")
    with pytest.raises(ValueError, match="compares two images"):
        asyncio.run(VLMServer("http://localhost:1", question="comparison")([image], ["a"]))
