import wave

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from trl_fdfo.media import Media, Outputs
from trl_fdfo.reporting.clips import _save_webp, read_wav, save_clips


RATES = Outputs(("images", "videos", "audio"), frame_rate=8.0, sampling_rate=4000)


def test_audio_is_a_wav_of_16_bits(tmp_path):
    audio = torch.tensor([[0.0, 0.5, 1.0, -1.0, 2.0], [0.25, 0.0, -0.5, float("nan"), -3.0]])
    [path] = save_clips(audio, tmp_path / "sound", RATES)
    assert path.name == "sound.wav"
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (2, 2, 4000, 5)
        values = np.frombuffer(file.readframes(5), dtype="<i2").reshape(5, 2).T
    assert values.tolist() == [[0, 16384, 32767, -32767, 32767], [8192, 0, -16384, 0, -32767]]
    assert read_wav(path)[0].tolist() == pytest.approx([0.0, 0.5, 1.0, -1.0, 1.0], abs=1e-4)


def test_an_animation_has_the_frames_and_their_pace(tmp_path):
    frames = [Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 0, 255), (128, 128, 128))]
    with Image.open(_save_webp(frames, tmp_path / "video.webp", 8.0)) as file:
        for frame, shown in zip(frames, ImageSequence.Iterator(file), strict=True):
            assert np.abs(np.asarray(shown.convert("RGB"), dtype=int) - np.asarray(frame)).max() < 12
            assert shown.info["duration"] == 125 and shown.info["loop"] == 0


def test_files_of_each_kind(tmp_path):
    video, audio = torch.rand(3, 3, 16, 16), torch.rand(1, 50)
    names = lambda sample, outputs: [path.suffix for path in save_clips(sample, tmp_path / "clip", outputs)]
    assert names(video[0], RATES) == [] and names(audio, Outputs(("audio",))) == []
    assert names(video, Outputs(("images", "videos"))) in ([".webp"], [".mp4"])
    [moving, sounding] = save_clips(Media(video, audio), tmp_path / "both", RATES)
    dotted = [save_clips(Media(video, audio), tmp_path / f"wan2.2_{n}", RATES) for n in (0, 1)]
    assert [path.name.startswith(f"wan2.2_{n}.") for n, paths in enumerate(dotted) for path in paths] == 4 * [True]
    assert sounding.name == "both.wav" and moving.stem == "both" and moving.stat().st_size > 100
