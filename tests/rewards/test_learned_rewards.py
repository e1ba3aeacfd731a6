"""The rewards that are published models, each with a tiny random model of the same kind, loaded from a folder."""

import os

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from conftest import EACH_DEVICE
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import LETTERS, SIZE, WIDTH, clip_model, clip_tokenizer, vary
from torch import nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
    CLIPProcessor,
)

from trl_fdfo.rewards.aesthetic_score import AestheticScore
from trl_fdfo.rewards.clip_score import CLIPHScore, CLIPScore
from trl_fdfo.rewards.hpsv2 import HPSv2
from trl_fdfo.rewards.image_reward import ImageReward
from trl_fdfo.rewards.pickscore import PickScore


PROMPTS = ["a cat", "two dogs on a boat", "the sea", "red", "zzz", "an old man", "a box of tea"]


def picture(index: int, width: int = 48, height: int = 48) -> Image.Image:
    """Stripes, waves, noise: not one like another."""
    y, x = np.mgrid[:height, :width] / 48
    random = np.random.default_rng(index)
    pixels = np.zeros((height, width, 3))
    for channel in range(3):
        a, b, phase = random.uniform(-3, 3, size=3) * (1 + index)
        pixels[..., channel] = 0.5 + 0.5 * np.sin(a * x + b * y + phase)
    pixels = (1 - index / 10) * pixels + index / 10 * random.uniform(size=pixels.shape)
    return Image.fromarray((255 * pixels).astype(np.uint8))


# Not all are square, and not all are larger than what the models see.
IMAGES = [
    picture(0),
    picture(1, 64, 40),
    picture(2, 40, 64),
    picture(3),
    picture(4, 20, 20),
    picture(5),
    picture(6, 33),
]


def pixel_values(image: Image.Image) -> torch.Tensor:
    """What CLIP sees of an image, in PIL and numpy alone: the shorter side to 32 pixels, then the middle."""
    scale = SIZE / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), dtype=np.float32) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]


def linear_head(widths: list[int]) -> dict[str, torch.Tensor]:
    """Layers of the improved aesthetic predictor and of ImageReward: dropout takes up numbers between them."""
    torch.manual_seed(1)
    numbers = [0, 2, 4, 6, 7][: len(widths) - 1]
    weights = {}
    for number, width, out in zip(numbers, widths, widths[1:]):
        weights[f"layers.{number}.weight"] = torch.randn(out, width) / width**0.5
        weights[f"layers.{number}.bias"] = torch.randn(out)
    return weights


def head_output(weights: dict[str, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    for name in weights:
        if name.endswith("weight"):
            values = values @ weights[name].T + weights[name.replace("weight", "bias")]
    return values[..., 0]


HEAD = linear_head([WIDTH, 20, 10, 8, 6, 1])


class TinyImageReward(ImageReward):
    vision_config = {
        **ImageReward.vision_config,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    text_config = {
        **ImageReward.text_config,
        "vocab_size": 5 + 2 * len(LETTERS) + 2,
        "hidden_size": 16,
        "encoder_hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }


BLIP_HEAD = linear_head([16, 20, 10, 8, 6, 1])


def bert_tokenizer() -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer({token: i for i, token in enumerate(tokens)})


def blip_models() -> tuple[BlipVisionModel, BlipTextModel]:
    torch.manual_seed(0)
    vision = BlipVisionModel(BlipVisionConfig(**TinyImageReward.vision_config))
    text = BlipTextModel(BlipTextConfig(**TinyImageReward.text_config), add_pooling_layer=False)
    # As large as in a trained model, or every image would look the same behind them.
    nn.init.normal_(vision.embeddings.position_embedding)
    nn.init.normal_(vision.embeddings.class_embedding)
    return vary(vision), vary(text)


def image_reward_checkpoint() -> dict[str, torch.Tensor]:
    """The tiny models with the names of BLIP's own code, as in the published file."""
    vision, text = (model.state_dict() for model in blip_models())
    checkpoint = {
        "blip.visual_encoder.cls_token": vision["embeddings.class_embedding"],
        "blip.visual_encoder.pos_embed": vision["embeddings.position_embedding"],
    }
    modules = {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    for i in range(2):
        for theirs, ours in (
            ("norm1", "layer_norm1"),
            ("attn.qkv", "self_attn.qkv"),
            ("attn.proj", "self_attn.projection"),
            ("norm2", "layer_norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            modules[f"blocks.{i}.{theirs}"] = f"encoder.layers.{i}.{ours}"
    for theirs, ours in modules.items():
        for kind in ("weight", "bias"):
            checkpoint[f"blip.visual_encoder.{theirs}.{kind}"] = vision[f"{ours}.{kind}"]
    assert len(checkpoint) == len(vision)
    checkpoint["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    checkpoint.update({f"blip.text_encoder.{name}": tensor for name, tensor in text.items()})
    for name, width in (("vision", 24), ("text", 16)):
        checkpoint[f"blip.{name}_proj.weight"] = torch.randn(8, width)
        checkpoint[f"blip.{name}_proj.bias"] = torch.randn(8)
    checkpoint.update({f"mlp.{name}": tensor for name, tensor in BLIP_HEAD.items()})
    return checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Published models, tiny: CLIP without a processor, one with a processor of its own, the aesthetic head, ImageReward."""
    root = tmp_path_factory.mktemp("models")
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    for name in ("clip", "bare"):
        clip_model().save_pretrained(root / name)
    processor.save_pretrained(root / "clip")
    clip_tokenizer().save_pretrained(root / "clip")
    CLIPProcessor(processor, clip_tokenizer()).save_pretrained(root / "processor")
    (root / "head").mkdir()
    torch.save(HEAD, root / "head" / "aesthetic-model.pth")
    bert_tokenizer().save_pretrained(root / "bert")
    (root / "image_reward").mkdir()
    torch.save(image_reward_checkpoint(), root / "image_reward" / "ImageReward.pt")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def make(folders):
    """A reward by the name of its class; keyword arguments are its options."""

    def make(name, **options):
        clip = {"model": folders["clip"]}
        classes = {
            "PickScore": (PickScore, {"model": folders["bare"], "processor": folders["processor"]}),
            "CLIPScore": (CLIPScore, clip),
            "CLIPHScore": (CLIPHScore, clip),
            "HPSv2": (HPSv2, clip),
            "AestheticScore": (AestheticScore, {**clip, "head": folders["head"]}),
            "ImageReward": (TinyImageReward, {"model": folders["image_reward"], "processor": folders["bert"]}),
        }
        reward_class, defaults = classes[name]
        return reward_class(**{**defaults, "device": "cpu", **options})

    return make


WITH_PROMPT = ["PickScore", "CLIPScore", "HPSv2", "ImageReward"]
ALL = [*WITH_PROMPT, "AestheticScore"]


def cosines() -> torch.Tensor:
    model, tokenizer = clip_model(), clip_tokenizer()
    cosines = []
    for image, prompt in zip(IMAGES, PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=pixel_values(image))
        cosines.append(output.logits_per_image[0, 0] / model.logit_scale.exp())
    return torch.stack(cosines)


@pytest.mark.parametrize(
    ("name", "scale"), [("PickScore", np.exp(4.6052)), ("CLIPScore", 100), ("CLIPHScore", 100), ("HPSv2", 100)]
)
def test_cosine_of_clip(make, name, scale):
    scores = make(name)(images=IMAGES, prompts=PROMPTS)
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    expected = cosines()
    assert expected.std() > 0.05
    torch.testing.assert_close(scores / scale, expected, rtol=0, atol=1e-5)


def aesthetic_scores(head: dict[str, torch.Tensor]) -> torch.Tensor:
    model = clip_model()
    with torch.no_grad():
        pooled = torch.cat([model.vision_model(pixel_values(image)).pooler_output for image in IMAGES])
        embeddings = pooled @ model.visual_projection.weight.T
    return head_output(head, embeddings / embeddings.norm(dim=-1, keepdim=True))


def test_aesthetic_score(make):
    expected = aesthetic_scores(HEAD)
    assert expected.std() > 0.05
    torch.testing.assert_close(make("AestheticScore")(images=IMAGES, prompts=PROMPTS), expected, rtol=0, atol=1e-5)


def test_heads_of_the_aesthetic_score(make, tmp_path):
    # Of more than nine layers: safetensors has layers.10 before layers.2.
    deep = {}
    for i in range(11):
        deep[f"layers.{i}.weight"] = torch.randn(1 if i == 10 else WIDTH, WIDTH) / WIDTH**0.5
        deep[f"layers.{i}.bias"] = torch.randn(1 if i == 10 else WIDTH)
    save_file(deep, tmp_path / "deep.safetensors")
    first = {"weight": torch.randn(1, WIDTH), "bias": torch.randn(1)}
    torch.save(first, tmp_path / "first.pt")
    for path, head in (("deep.safetensors", deep), ("first.pt", first)):
        scores = make("AestheticScore", head=str(tmp_path / path))(IMAGES, PROMPTS)
        torch.testing.assert_close(scores, aesthetic_scores(head), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "head",
    [
        linear_head([WIDTH + 1, 8, 1]),
        linear_head([WIDTH, 8, 2]),
        {**linear_head([WIDTH, 8, 1]), "layers.2.weight": torch.zeros(1, 9)},
        {**linear_head([WIDTH, 8, 1]), "layers.2.bias": torch.zeros(2)},
        {name: tensor for name, tensor in linear_head([WIDTH, 8, 1]).items() if name != "layers.0.bias"},
        {**linear_head([WIDTH, 8, 1]), "layers.1.running_mean": torch.zeros(8)},
        {"conv.weight": torch.zeros(1, WIDTH, 1), "conv.bias": torch.zeros(1)},
        {"weight": torch.zeros(()), "bias": torch.zeros(())},
        {"scale": torch.zeros(3)},
        {},
    ],
    ids=[
        "input",
        "output",
        "chain",
        "bias shape",
        "no bias",
        "other tensors",
        "no linear layer",
        "scalars",
        "no weights",
        "empty",
    ],
)
def test_other_heads_are_refused(make, tmp_path, head):
    path = tmp_path / "head.pth"
    torch.save(head, path)
    found = next((f"{name} {list(tensor.shape)}" for name, tensor in head.items()), "no tensors")
    with pytest.raises(ValueError) as raised:
        make("AestheticScore", head=str(path))
    assert f"'{path}' must have linear layers" in str(raised.value)
    assert f"from the {WIDTH} numbers of the embedding to 1; it has {found}" in str(raised.value)


def test_a_whole_model_is_no_head(make, tmp_path):
    torch.save(clip_model().state_dict(), tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"it has logit_scale \[\], .* and 68 more.$"):
        make("AestheticScore", head=str(tmp_path / "clip.pth"))


class Unsafe:
    """Unpickling it would create a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_of_something_else_is_refused(make, tmp_path):
    torch.save({"state_dict": HEAD, "epoch": 3}, tmp_path / "training.pth")
    torch.save({**HEAD, "extra": Unsafe(tmp_path / "created")}, tmp_path / "unsafe.pth")
    (tmp_path / "text.pt").write_text("not found")
    (tmp_path / "text.safetensors").write_text("not found")
    for path in ("training.pth", "unsafe.pth", "text.pt", "text.safetensors"):
        with pytest.raises(
            ValueError, match=rf"{path}' has something else than a dict of tensors. It must be the state"
        ):
            make("AestheticScore", head=str(tmp_path / path))
    assert not (tmp_path / "created").exists()


def test_image_reward(make):
    vision, text = blip_models()
    expected = []
    for image, prompt in zip(IMAGES, PROMPTS):
        # Alone and without padding.
        ids = bert_tokenizer()(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            seen = vision(pixel_values(image)).last_hidden_state
            first = text(input_ids=ids, encoder_hidden_states=seen).last_hidden_state[0, 0]
        expected.append((head_output(BLIP_HEAD, first) - 0.16717362830052426) / 1.0333394966054072)
    expected = torch.stack(expected)
    assert expected.std() > 0.05
    torch.testing.assert_close(make("ImageReward")(images=IMAGES, prompts=PROMPTS), expected, rtol=0, atol=1e-5)


def test_image_reward_has_the_size_of_the_published_file():
    with init_empty_weights():
        vision = BlipVisionModel(BlipVisionConfig(**ImageReward.vision_config))
        text = BlipTextModel(BlipTextConfig(**ImageReward.text_config), add_pooling_layer=False)
    unused = (1024 * 256 + 256) + (768 * 256 + 256) + 2 * 512  # two projections, 512 numbers of 8 bytes
    widths = [768, 1024, 128, 64, 16, 1]
    head = sum(width * out + out for width, out in zip(widths, widths[1:]))
    numbers = unused + head + sum(p.numel() for model in (vision, text) for p in model.parameters())
    # The rest is what 625 tensors need for their names: not one layer more or less.
    assert 0 < 1_786_880_927 - 4 * numbers < 625 * 350


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blip.visual_encoder.blocks.1.norm2.bias"), "Missing key.*vision.encoder.layers.1.layer_norm2.bias"),
        (lambda w: w.update({"blip.itm_head.weight": torch.zeros(2)}), "Unexpected key.*blip.itm_head.weight"),
        (lambda w: w.update({"blip.visual_encoder.pos_embed": torch.zeros(1, 9, 24)}), "size mismatch.*position_embedding"),
    ],
    ids=["missing", "unexpected", "shape"],
)  # fmt: skip
def test_other_checkpoints_than_image_reward_are_refused(make, tmp_path, change, message):
    weights = image_reward_checkpoint()
    change(weights)
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"(?s)other.pt' does not have the weights of ImageReward.*{message}"):
        make("ImageReward", model=str(tmp_path / "other.pt"))
    # A CLIP or a whole BLIP has no layers to a number at all.
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="clip.pt' must have linear layers, .* it has no tensors"):
        make("ImageReward", model=str(tmp_path / "clip.pt"))


@pytest.mark.parametrize("name", ALL)
def test_batches_do_not_matter(make, name):
    whole = make(name, batch_size=len(IMAGES))(IMAGES, PROMPTS)
    for batch_size in (1, 3):
        torch.testing.assert_close(make(name, batch_size=batch_size)(IMAGES, PROMPTS), whole, rtol=0, atol=2e-5)
    reverse = make(name, batch_size=3)(IMAGES[::-1], PROMPTS[::-1])
    torch.testing.assert_close(reverse.flip(0), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_bfloat16_ranks_alike(make, name, dtype):
    exact = make(name)(IMAGES, ["a cat"] * 7)
    reward = make(name, dtype=dtype)
    scores = reward(IMAGES, ["a cat"] * 7)
    assert scores.dtype == torch.float32
    assert scores.argsort().tolist() == exact.argsort().tolist()
    # It did compute in bfloat16, and compared in float32: those of bfloat16 would be multiples of powers of 2.
    assert 1e-5 < (scores - exact).abs().max() < 0.1 * exact.std()
    assert (scores != scores.bfloat16()).any()
    if name == "PickScore":
        assert reward.logit_scale == pytest.approx(np.exp(4.6052), rel=1e-6)


@pytest.mark.parametrize("name", WITH_PROMPT)
def test_image_and_prompt_count(make, name):
    reward = make(name)
    same_prompt = reward(IMAGES, ["a cat"] * 7)
    same_image = reward(IMAGES[:1] * 7, PROMPTS)
    for scores in (same_prompt, same_image):
        assert (scores[:, None] - scores).abs().fill_diagonal_(1).min() > 1e-4
    torch.testing.assert_close(reward(IMAGES[:1] * 7, ["a cat"] * 7).std(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_the_aesthetic_score_does_not_see_the_prompt(make):
    reward = make("AestheticScore")
    scores = reward(IMAGES, PROMPTS)
    assert torch.equal(scores, reward(IMAGES, PROMPTS[::-1]))
    assert (scores[:, None] - scores).abs().fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize(("name", "tokens"), [("CLIPScore", 77), ("ImageReward", 35)])
def test_long_prompts_are_cut(make, name, tokens):
    reward = make(name)
    kept = ["abcde"[i % 5] for i in range(tokens - 2)]  # all but the first and the last token
    ends = [" ".join(kept), " ".join([*kept, "x", "y"]), " ".join([*kept, *"z" * 300]), " ".join([*kept[:-1], "x"])]
    scores = reward(IMAGES[:1] * 4, ends)
    torch.testing.assert_close(scores[1:3], scores[0].expand(2), rtol=0, atol=2e-5)
    assert (scores[3] - scores[0]).abs() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_videos_are_means_or_minima_of_their_frames(make, name):
    reward = make(name, batch_size=2)
    scores = reward([IMAGES[:3], IMAGES[3:4], IMAGES[4:]], PROMPTS[:3])
    frames = reward(IMAGES, [PROMPTS[i] for i in (0, 0, 0, 1, 2, 2, 2)])
    expected = torch.stack([frames[:3].mean(), frames[3], frames[4:].mean()])
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    worst = make(name, frames="min")([IMAGES[:3], IMAGES[3:4], IMAGES[4:]], PROMPTS[:3])
    torch.testing.assert_close(worst, torch.stack([frames[:3].min(), frames[3], frames[4:].min()]), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=f"frames='max' of .*{name}: a video scores the 'mean' over its frames, or"):
        make(name, frames="max")


@pytest.mark.parametrize("name", ALL)
def test_constructing_draws_no_random_numbers(make, name):
    state = torch.get_rng_state()
    reward = make(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in reward.model.parameters())
    assert not any(module.training for module in reward.model.modules())


@pytest.mark.parametrize("name", ALL)
def test_images_are_prepared_with_pil(make, name):
    # Not by what happens to be installed.
    assert type(make(name).image_processor) is CLIPImageProcessorPil


@EACH_DEVICE
@pytest.mark.parametrize("name", ALL)
def test_offload_to_the_cpu(make, name, device):
    expected = make(name, device="cpu")(IMAGES, PROMPTS)
    # A GPU's convolutions are in TF32 by default.
    tolerance = 0.05 * expected.std().item() if device == "cuda" else 0.0
    for offload in (True, False):
        reward = make(name, device=device, offload=offload)
        moves, to = [], reward.model.to
        # A reward that is on the CPU all the time is sent there too: only the call shows it.
        reward.model.to = lambda device: moves.append(torch.device(device).type) or to(device)  # noqa: B023
        for _ in range(2):
            scores = reward(IMAGES, PROMPTS)
            assert scores.device.type == "cpu"
            torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
            tensors = [*reward.model.parameters(), *reward.model.buffers()]
            assert len(tensors) > 10 and all(tensor.device.type == device for tensor in tensors)
            moves.clear()
            used = torch.cuda.memory_allocated() if device == "cuda" else 0
            reward.on_rollout_end()
            assert moves == (["cpu"] if offload else [])
            tensors = [*reward.model.parameters(), *reward.model.buffers()]
            assert all(tensor.device.type == ("cpu" if offload else device) for tensor in tensors)
            assert device == "cpu" or (torch.cuda.memory_allocated() < used) == offload


# Gradients ------------------------------------------------------------------------------------------------------------


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) / 255 for image in images])


# Of three sizes: the same as what the models see, larger, and smaller.
BATCHES = [[picture(n, *size) for n in range(4)] for size in ((SIZE, SIZE), (64, 40), (20, 26))]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("images", BATCHES, ids=["same", "larger", "smaller"])
def test_tensors_score_as_pil_images(make, name, images):
    reward = make(name, batch_size=3)
    expected = reward(images, PROMPTS[:4])
    tensors = as_tensor(images)
    for scores in (reward(tensors, PROMPTS[:4]), reward(tensors.requires_grad_(), PROMPTS[:4])):
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
        assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert scores.requires_grad and not expected.requires_grad


def gradient_of(reward, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(reward(images, prompts).sum(), images)[0]


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_what_finite_differences_measure(make, name):
    reward = make(name, dtype="float64")
    # Of the model: test_pixel_values.py knows the gradient of the preparation, which is left out, so that the levels to which
    # it rounds can be made as fine as finite differences need.
    for step in ("resize", "center_crop", "rescale", "normalize"):
        setattr(reward.image_processor, f"do_{step}", False)
    fine = 1e6
    vision = reward.model["vision"] if name == "ImageReward" else reward.model.vision_model
    vision.embeddings.patch_embedding.weight.div_(fine)
    generator = torch.Generator().manual_seed(0)
    images, change = torch.randn(2, 3, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) * fine / 255
    gradient = gradient_of(reward, images, PROMPTS[:3])
    slope = (gradient * change).sum(dim=(1, 2, 3))
    assert slope.abs().min() > 1e-3
    change = 1e-3 * change
    difference = (reward(images + change, PROMPTS[:3]) - reward(images - change, PROMPTS[:3])) / 2e-3
    torch.testing.assert_close(difference.double(), slope, rtol=5e-3, atol=5e-3 * slope.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_gradients_hold_the_activations_of_a_batch_at_a_time(make, name):
    images = as_tensor(IMAGES[:1] * 2 + [picture(3)])
    exact = gradient_of(make(name), images, PROMPTS[:3])
    reward = make(name, batch_size=1)
    calls = []
    sees = reward.model["vision"] if name == "ImageReward" else reward.model.vision_model
    sees.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    images.requires_grad_()
    scores = reward(images, PROMPTS[:3])
    assert calls == [True] * 3
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert len(calls) == 6, "the backward pass computes each batch again"
    torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())
    # Frozen, the head of the aesthetic score too.
    modules = [reward.model, *([reward.head] if name == "AestheticScore" else [])]
    assert all(p.grad is None and not p.requires_grad for module in modules for p in module.parameters())
    with torch.no_grad():
        assert not reward(images, PROMPTS[:3]).requires_grad


@pytest.mark.parametrize("name", ALL)
def test_gradient_of_a_reward_in_bfloat16(make, name):
    images = as_tensor(BATCHES[1])
    exact = gradient_of(make(name), images, PROMPTS[:4])
    gradient = gradient_of(make(name, dtype="bfloat16"), images, PROMPTS[:4])
    assert gradient.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), exact.flatten(1))
    assert cosine.min() > 0.9


@EACH_DEVICE
@pytest.mark.parametrize("name", ALL)
def test_gradient_of_a_reward_on_another_device(make, name, device):
    images = as_tensor(BATCHES[1])
    exact = gradient_of(make(name), images, PROMPTS[:4])
    gradient = gradient_of(make(name, device=device), images, PROMPTS[:4])
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), exact.flatten(1))
    assert gradient.device.type == "cpu" and cosine.min() > 0.99


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_videos_go_through_the_mean_or_the_minimum(make, name):
    videos = as_tensor(BATCHES[2]).unflatten(0, (2, 2))
    reward, repeated = make(name, batch_size=3), [PROMPTS[i] for i in (0, 0, 1, 1)]
    of_frames = gradient_of(reward, videos.flatten(0, 1), repeated).unflatten(0, (2, 2))
    scale = of_frames.abs().max().item()
    torch.testing.assert_close(gradient_of(reward, videos, PROMPTS[:2]), of_frames / 2, rtol=1e-3, atol=1e-4 * scale)
    worst = reward(videos.flatten(0, 1), repeated).unflatten(0, (2, 2)).argmin(dim=1)
    of_worst = of_frames * torch.nn.functional.one_hot(worst, 2)[..., None, None, None]
    minimum = gradient_of(make(name, frames="min"), videos, PROMPTS[:2])
    torch.testing.assert_close(minimum, of_worst, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ALL)
def test_bad_options_are_refused(make, name):
    with pytest.raises(ValueError, match="dtype='bf16' must be a floating-point type, such as 'float32' or 'bfloat16'"):
        make(name, dtype="bf16")
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be a floating-point type"):
        make(name, dtype=torch.int8)
    with pytest.raises(ValueError, match="batch_size=0 of .* must be at least 1"):
        make(name, batch_size=0)


def test_what_cannot_be_loaded_is_named(make, folders, tmp_path):
    missing = str(tmp_path / "missing")
    for name in ("PickScore", "CLIPScore", "AestheticScore"):
        with pytest.raises(
            OSError, match=r"Cannot load a CLIP.* from '.*missing', which must be a folder or a model of"
        ):
            make(name, model=missing)
    with pytest.raises(OSError, match=r"Cannot load a CLIPImageProcessorPil from '.*missing', which must be"):
        make("PickScore", processor=missing)
    with pytest.raises(OSError, match=r"Cannot load a CLIPModel from 'nobody/nothing', which must be .* the Hub"):
        make("PickScore", model="nobody/nothing")
    with pytest.raises(OSError, match=r"Cannot load a BertTokenizer from '.*missing', which must be"):
        make("ImageReward", processor=missing)
    for path in (missing, folders["clip"], "nobody/nothing"):
        with pytest.raises(OSError, match=rf"Cannot load '{path}', which must be .* with a file aesthetic-model.pth"):
            make("AestheticScore", head=path)
        with pytest.raises(OSError, match=rf"Cannot load '{path}', which must be .* with a file ImageReward.pt"):
            make("ImageReward", model=path)


def test_the_tokenizer_of_another_model_is_refused(make, folders, tmp_path):
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"The tokenizer of '{tmp_path}' has \d tokens, but the model .* has 54: give"
    ):
        make("PickScore", processor=str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"The tokenizer of processor='{tmp_path}' has \d tokens, but ImageReward has 59"
    ):
        make("ImageReward", processor=str(tmp_path))
