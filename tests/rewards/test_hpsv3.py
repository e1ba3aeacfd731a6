"""HPSv3, by a tiny random Qwen2-VL whose checkpoint has the names of the published one."""

import numpy as np
import pytest
import tiny_vlms
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel

from trl_fdfo.rewards.hpsv3 import QUESTION, HPSv3


WIDTHS = (12, 6)


class TinyHPSv3(HPSv3):
    head_widths = WIDTHS


def image(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    blocks = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [image(0), image(1, width=128), image(2, height=96)]
PROMPTS = ["a cat", "two dogs on the beach at night, and {braces}", "what is <|Reward|>?"]


def checkpoint(model: Qwen2VLModel) -> dict[str, torch.Tensor]:
    """The weights with the names of transformers 4.45, a head of tokens, and the layers of the reward in float32."""
    torch.manual_seed(1)
    weights = {}
    for name, tensor in model.state_dict().items():
        old = name.replace("language_model.", "model.") if name.startswith("language_model.") else name
        assert old.startswith(("model.", "visual."))
        weights[old] = tensor
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    for number, width, out in ((0, 16, WIDTHS[0]), (3, *WIDTHS), (5, WIDTHS[1], 2)):
        weights[f"rm_head.{number}.weight"] = torch.randn(out, width)
        weights[f"rm_head.{number}.bias"] = torch.randn(out)
    return weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder of the checkpoint and of the processor, and the model in it."""
    folder = tmp_path_factory.mktemp("hpsv3")
    model = tiny_vlms.qwen2_vl(folder)
    weights = checkpoint(model)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "HPSv3.safetensors")
    return str(folder), model, weights


@pytest.fixture(scope="module")
def make(published):
    def make(**options):
        return TinyHPSv3(
            **{"model": published[0], "processor": published[0], "dtype": "float32", "device": "cpu", **options}
        )

    return make


@torch.no_grad()
def expected_score(published, picture: Image.Image, prompt: str) -> float:
    """By a forward pass on one input, whose text is written out by hand, at the positions 0, 1, 2, ... of plain text."""
    folder, model, weights = published
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    pixels = Qwen2VLImageProcessor.from_pretrained(folder, size={"shortest_edge": 200704, "longest_edge": 200704})(
        [picture], return_tensors="pt"
    )
    count = pixels["image_grid_thw"].prod().item() // 4
    assert 240 < count < 300  # of about 448 x 448 pixels, whatever the size of the image
    question = QUESTION.replace("{prompt}", prompt)
    text = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{question}<|im_end|>\n"
    ids = tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt").input_ids
    embedded = model.get_input_embeddings()(ids)
    embedded[ids == model.config.image_token_id] = model.get_image_features(**pixels).pooler_output[0]
    hidden = model.language_model(inputs_embeds=embedded).last_hidden_state[0]
    place = (ids[0] == len(tokenizer) - 1).nonzero()[-1, 0]
    values = hidden[place]
    for number in (0, 3, 5):
        values = weights[f"rm_head.{number}.weight"] @ values + weights[f"rm_head.{number}.bias"]
        values = values.relu() if number < 5 else values
    return values[0].item()


def test_score_is_the_mean_that_the_checkpoint_predicts_in_any_batch(make, published):
    expected = torch.tensor([expected_score(published, *each) for each in zip(IMAGES, PROMPTS)])
    assert expected.std() > 0.05
    for batch_size in (3, 1):
        scores = make(batch_size=batch_size)(images=IMAGES, prompts=PROMPTS)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_question_is_that_of_the_training_to_the_blank():
    assert QUESTION.startswith(
        "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Align"
    )
    assert "being the best. \n\n**Visual Quality:**  \nEvaluate" in QUESTION and QUESTION.count("{prompt}") == 1
    assert QUESTION.endswith(
        "\nTextual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    )


def test_bfloat16_keeps_the_last_layers_in_float32(make):
    reward = make(dtype="bfloat16", batch_size=2)
    exact = make()(IMAGES, PROMPTS)
    assert reward.model["vlm"].dtype == torch.bfloat16
    assert {p.dtype for p in reward.model["head"].parameters()} == {torch.float32}
    assert (reward(IMAGES, PROMPTS) - exact).abs().max() < exact.std()


def test_a_video_is_the_mean_of_its_frames_and_the_rng_is_left_alone(make):
    state = torch.get_rng_state()
    reward = make()
    assert torch.equal(torch.get_rng_state(), state)
    frames = reward(IMAGES[:2], ["a"] * 2)
    torch.testing.assert_close(reward([IMAGES[:2]], ["a"])[0], frames.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("rm_head.3.bias"), "Missing key.*head.3.bias"),
        (lambda w: w.update({"value_head.weight": torch.zeros(2)}), "Unexpected key.*value_head.weight"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(3, 16)}), "size mismatch.*embed_tokens"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_checkpoints_are_refused(make, published, tmp_path, change, message):
    weights = dict(published[2])
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)other.safetensors' does not have the weights of HPSv3 on .*{message}"):
        make(model=str(tmp_path / "other.safetensors"))


def test_the_published_size():
    """Of Qwen2-VL-7B with one token more, in bfloat16, and the layers of the reward: the file has 16.6 GB."""
    with torch.device("meta"):
        model = Qwen2VLModel(
            Qwen2VLConfig(
                text_config={
                    "vocab_size": 151_658,
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                },
                vision_config={"hidden_size": 3584},
            )
        )
        head = nn.Linear(3584, 151_658, bias=False)
    size = 2 * sum(p.numel() for module in (model, head) for p in module.parameters())
    assert 16.5e9 < size < 16.65e9
