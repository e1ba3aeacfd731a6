import tiny_pipelines
import torch
from tiny_pipelines import wan

from trl_fdfo.media import makes_video, mean_over_frames, middle_frame, split_frames, spread_frames, to_pil


def test_which_pipelines_make_videos():
    assert makes_video(wan.build()) and not makes_video(tiny_pipelines.sd3())


def test_pil_images_and_lists_of_frames():
    videos = torch.rand(2, 4, 3, 8, 6)
    as_pil = to_pil(videos)
    assert [len(frames) for frames in as_pil] == [4, 4] and as_pil[1][2].size == (6, 8)
    assert as_pil[1][2].getpixel((5, 7)) == tuple((videos[1, 2, :, 7, 5] * 255).round().int().tolist())
    assert [image.tobytes() for image in to_pil(videos[1])] == [frame.tobytes() for frame in as_pil[1]]


def test_stills_of_videos():
    videos = torch.rand(2, 3, 5, 3, 4, 4)
    assert torch.equal(middle_frame(videos), videos[:, :, 2])
    assert torch.equal(middle_frame(videos[:, :, :4]), videos[:, :, 2])
    images = videos[:, :, 0]
    assert middle_frame(images) is images
    assert [frame.tolist() for frame in spread_frames(videos[0, 0], 3)] == videos[0, 0, [0, 2, 4]].tolist()
    assert len(spread_frames(videos[0, 0], 9)) == 5
    assert torch.equal(*spread_frames(images[0, 0], 3), images[0, 0])


def test_a_video_scores_the_mean_over_its_frames():
    counts, frames, prompts, labels = split_frames(["a1", ["b1", "b2", "b3"]], ["a", "b"], iter([1, None]))
    assert counts == [1, 3] and frames == ["a1", "b1", "b2", "b3"]
    assert prompts == ["a", "b", "b", "b"] and labels == [1, None, None, None]
    assert mean_over_frames([0.1, 1.0, 2.0, 6.0], counts) == [0.1, 3.0]
    assert mean_over_frames([0.1, None, None, None], counts) == [0.1, None]
    assert mean_over_frames(torch.tensor([0.1, 1.0, 2.0, 6.0]), counts).tolist() == torch.tensor([0.1, 3.0]).tolist()
