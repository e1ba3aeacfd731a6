"""A trainer of a pipeline that makes audio: a tiny SD3 whose decoded images are read as stereo sound and one more channel."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import logged, trained_weights
from datasets import Dataset
from PIL import Image
from tiny_runs import PROMPTS

from trl_fdfo.reporting.clips import read_wav
from trl_fdfo.rewards import JPEGCompressibility, PairwiseJudge


class ReadAsAudio:
    """In the place of an image processor. [N, 3, 16, 16] becomes [N, 3, 256]."""

    def postprocess(self, image, output_type):
        return image.flatten(2).clamp(-1, 1)


def audio_pipeline():
    pipeline = tiny_pipelines.sd3()
    pipeline.image_processor = ReadAsAudio()
    pipeline.sample_rate = 2000
    return pipeline


def loudness(audio, sampling_rate):
    assert audio.shape[1:] == (3, 256) and sampling_rate == 2000
    return audio.square().mean(dim=(1, 2))


def test_audio_is_trained_evaluated_shown_and_published(make_trainer):
    async def peak(audio):
        return audio.amax(dim=(1, 2))

    trainer = make_trainer(
        audio_pipeline(),
        [loudness, peak, PairwiseJudge(lambda a, b, prompts: (a - b).mean(dim=(1, 2)), of="audio")],
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        eval_reward_fn=peak,
        logging_images_steps=2,
    )
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())
    assert logged(trainer, "replay_error") == [0.0, 0.0]
    audio = trainer.generate(PROMPTS[:2], [0, 1])
    assert audio.shape == (2, 3, 256) and audio.abs().max() <= 1
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/loudness/mean"] > 0 and metrics["eval_control"] == metrics["eval_controls/peak/mean"]
    pictures = Path(trainer.args.output_dir, "pictures")
    assert all(Image.open(pictures / f"{name}.png").width > 300 for name in ("train_000000", "eval_000004"))
    sounds = sorted(path.name for path in pictures.glob("*.wav"))
    assert sounds[:2] == ["eval_000004_0.wav", "eval_000004_1.wav"]
    assert sounds[2:6] == [f"train_000000_{prompt}_{branch}.wav" for prompt in range(2) for branch in range(2)]
    assert read_wav(pictures / "eval_000004_0.wav").shape == (3, 256)
    trainer.comparison = trainer.compare(num_prompts=2)
    trainer.comparison.complete()
    assert trainer.comparison.images["after"].shape == (2, 2, 3, 256)
    assert "pixel_distance" not in trainer.comparison.results["after"]
    trainer.create_model_card()
    output = Path(trainer.args.output_dir)
    assert Image.open(output / "before_after.png").width > 300
    torch.testing.assert_close(
        read_wav(output / "images" / "0.wav"), trainer.comparison.images["after"][0, 0], rtol=0, atol=1e-4
    )


def test_gradients_go_through_the_decoder_of_audio(make_trainer):
    trainer = make_trainer(audio_pipeline(), loudness, direction="reward_gradient", num_rollouts=1)
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(w, before[n]) for n, w in trained_weights(trainer).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_fn": JPEGCompressibility()}, "'JPEGCompressibility' scores images, and the pipeline makes audio"),
        ({"reward_fn": loudness, "eval_reward_fn": JPEGCompressibility()}, "'JPEGCompressibility' scores images"),
        (
            {"reward_fn": loudness, "eval_diversity": "pixels", "eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
            "eval_diversity='pixels' is a distance between images, and the pipeline makes audio: leave it out",
        ),
    ],
)
def test_what_is_of_images_is_refused_at_construction(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(audio_pipeline(), **options)
