from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import concatenate, recursively_apply
from diffusers import AutoencoderOobleck
from tiny_pipelines import wan

from trl_fdfo.media import (
    Media,
    Outputs,
    by_kind,
    frame_rate,
    made_by,
    middle_frame,
    over_frames,
    sampling_rate,
    split_frames,
    spread_frames,
    to_pil,
    unbind,
    unsigned,
)


VIDEO, AUDIO = torch.rand(2, 4, 3, 8, 6), torch.rand(2, 1, 50)


def test_pil_images_and_lists_of_frames():
    videos = torch.rand(2, 4, 3, 8, 6)
    as_pil = to_pil(videos)
    assert [len(frames) for frames in as_pil] == [4, 4] and as_pil[1][2].size == (6, 8)
    assert as_pil[1][2].getpixel((5, 7)) == tuple((videos[1, 2, :, 7, 5] * 255).round().int().tolist())
    assert [image.tobytes() for image in to_pil(videos[1])] == [frame.tobytes() for frame in as_pil[1]]


def test_signed_images_beside_audio():
    made = unsigned(Media(2 * VIDEO - 1, AUDIO))
    torch.testing.assert_close(made.images, VIDEO)
    assert made.audio is AUDIO


def test_stills_of_videos():
    videos = torch.rand(2, 3, 5, 3, 4, 4)
    assert torch.equal(middle_frame(videos), videos[:, :, 2])
    assert torch.equal(middle_frame(videos[:, :, :4]), videos[:, :, 2])
    images = videos[:, :, 0]
    assert middle_frame(images) is images
    assert [frame.tolist() for frame in spread_frames(videos[0, 0], 3)] == videos[0, 0, [0, 2, 4]].tolist()
    assert len(spread_frames(videos[0, 0], 9)) == 5
    assert torch.equal(*spread_frames(images[0, 0], 3), images[0, 0])


def test_a_video_scores_the_mean_or_the_minimum_over_its_frames():
    counts, frames, prompts, labels = split_frames(["a1", ["b1", "b2", "b3"]], ["a", "b"], iter([1, None]))
    assert counts == [1, 3] and frames == ["a1", "b1", "b2", "b3"]
    assert prompts == ["a", "b", "b", "b"] and labels == [1, None, None, None]
    images, videos = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 3, 4, 4)
    assert split_frames(images)[0] == [1, 1] and torch.equal(torch.stack(split_frames(images)[1]), images)
    assert split_frames(videos)[0] == [5, 5] and torch.equal(torch.stack(split_frames(videos)[1]), videos.flatten(0, 1))
    assert over_frames([0.1, 1.0, 2.0, 6.0], counts) == [0.1, 3.0]
    assert over_frames([0.1, None, None, None], counts) == [0.1, None]
    scores = torch.tensor([0.1, 1.0, 2.0, 6.0])
    assert over_frames(scores, counts).tolist() == torch.tensor([0.1, 3.0]).tolist()
    assert over_frames(scores, counts, "min").tolist() == torch.tensor([0.1, 1.0]).tolist()
    assert over_frames([0.1, 2.0, 1.0, 6.0], counts, "min") == [0.1, 1.0]
    assert over_frames([0.1, None, 1.0, 6.0], counts, "min") == [0.1, None]


@pytest.mark.parametrize(
    ("output", "kinds"),
    [
        ((VIDEO[:, 0],), {"images": VIDEO[:, 0]}),
        ((VIDEO.double(), None), {"images": VIDEO, "videos": VIDEO}),
        ((list(VIDEO[:, 0]), [False, True]), {"images": VIDEO[:, 0]}),
        (([list(video.numpy()) for video in VIDEO],), {"images": VIDEO, "videos": VIDEO}),
        ((AUDIO.bfloat16(),), {"audio": AUDIO.bfloat16().float()}),
        ((AUDIO[:, 0].numpy(),), {"audio": AUDIO}),
        ((list(AUDIO.numpy()),), {"audio": AUDIO}),
        ((AUDIO, VIDEO), {"images": VIDEO, "videos": VIDEO, "audio": AUDIO}),
        # Of several, the first: others are key frames, say.
        ((VIDEO, AUDIO, VIDEO[:, :1], torch.zeros(3)), {"images": VIDEO, "videos": VIDEO, "audio": AUDIO}),
    ],
)
def test_what_a_call_made(output, kinds):
    made = by_kind(made_by(output))
    assert made.keys() == kinds.keys()
    for name, tensor in kinds.items():
        assert made[name].dtype == torch.float32 and torch.equal(made[name], tensor)


@pytest.mark.parametrize("output", [(), (None,), (torch.zeros(3),), ([AUDIO[0], AUDIO[0, :, 1:]],), (["a cat"],)])
def test_a_call_that_made_nothing_to_score(output):
    with pytest.raises(ValueError, match=r"the call returned .*, and a reward needs a tensor: images \[N, 3, H, W\]"):
        made_by(output)


def test_videos_with_their_sound_are_mapped_over_and_taken_apart():
    both = Media(VIDEO, AUDIO)
    twice = concatenate([recursively_apply(lambda made: made + 1, both), both])
    assert isinstance(twice, Media) and torch.equal(twice.audio, torch.cat([AUDIO + 1, AUDIO]))
    first, second = unbind(both)
    assert isinstance(first, Media) and torch.equal(second.images, VIDEO[1]) and torch.equal(first.audio, AUDIO[0])
    assert [image.tolist() for image in unbind(VIDEO)] == VIDEO.tolist()


def part(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    ("attributes", "components", "rate"),
    [
        ({}, {"vae": part(sampling_rate=44100)}, 44100),
        ({}, {"audio_vae": part(sample_rate=16000), "vocoder": part(input_rate=1, output_sampling_rate=24000)}, 24000),
        ({"sample_rate": 48000}, {"vae": part(scaling_factor=1.0), "text_encoder": part(sampling_rate=8000)}, 48000),
        ({}, {"vae": part(sample_size=32), "tokenizer": object(), "vocoder": None}, None),
    ],
)
def test_sampling_rate_is_that_of_the_part_that_makes_the_audio(attributes, components, rate):
    assert sampling_rate(SimpleNamespace(components=components, **attributes)) == rate


def test_rates_of_real_parts():
    vae = AutoencoderOobleck(encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_channels=4, sampling_rate=32000)
    assert sampling_rate(SimpleNamespace(components={"vae": vae})) == 32000
    videos = wan.build()
    assert frame_rate(videos, {}) is None and sampling_rate(videos) is None
    assert Outputs.of(videos, {}, VIDEO) == (("images", "videos"), None, None)


def test_frame_rate_is_given_or_the_default_of_the_call():
    class Pipeline:
        components = {"vocoder": part(sampling_rate=8000)}

        def __call__(self, prompt, frame_rate=24.0): ...

    assert frame_rate(Pipeline(), {}) == frame_rate(Pipeline(), {"frame_rate": None}) == 24.0
    assert frame_rate(Pipeline(), {"frame_rate": 12}) == 12
    # Without videos there is no frame rate.
    assert Outputs.of(Pipeline(), {}, AUDIO) == (("audio",), None, 8000)
    assert Outputs.of(Pipeline(), {}, Media(VIDEO, AUDIO)) == (("images", "videos", "audio"), 24.0, 8000)
