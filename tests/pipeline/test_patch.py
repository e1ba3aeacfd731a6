from pathlib import Path

import pytest
import tiny_pipelines
import torch
from torch.nn import functional

from trl_fdfo.pipeline.loading import base_model_name, folder_name
from trl_fdfo.pipeline.patch import Encoding, shadowed
from trl_fdfo.redaction import without_folders, without_origin


@pytest.mark.parametrize(
    "owner", [functional, torch.nn.Linear(2, 2), tiny_pipelines.sd3()], ids=lambda o: type(o).__name__
)
def test_shadowed_attributes_are_back_afterwards_and_new_ones_are_gone(owner):
    before = dict(owner.__dict__)
    present = next(iter(before))
    with pytest.raises(ZeroDivisionError), shadowed(owner, **{present: 1, "forward": 2}):
        assert getattr(owner, present) == 1 and owner.forward == 2
        with shadowed(owner, forward=3):
            assert owner.forward == 3
        assert owner.forward == 2
        raise ZeroDivisionError
    assert owner.__dict__ == before and list(owner.__dict__) == list(before)


def test_a_submodule_is_shadowed():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with shadowed(model, training=False, **{"0": "another"}):
        assert getattr(model, "0") == "another" and not model.training
    assert isinstance(getattr(model, "0"), torch.nn.Linear) and model.training


@pytest.mark.parametrize(
    "latents_of",
    [
        lambda output: output.latent_dist.sample(),
        lambda output: output[0].sample(),
        lambda output: output[0].mode(),
        lambda output: output[0].mean,
    ],
)
def test_an_encoding_gives_once_more_what_was_taken_from_it_in_any_way(latents_of):
    vae, taken = tiny_pipelines.vae(), {}
    images = torch.rand(1, 3, 16, 16).repeat(2, 1, 1, 1)
    with torch.no_grad():
        latents = latents_of(Encoding(taken, vae.encode(images)))
    assert latents.shape == (2, 4, 8, 8) and torch.equal(latents[0], latents[1])
    assert latents_of(Encoding(taken)) is latents
    with pytest.raises(AttributeError):
        Encoding(taken)[1]


def test_files_get_no_folder_and_no_origin(tmp_path):
    assert without_folders(str(tmp_path / "a.csv")) == without_folders(tmp_path / "a.csv") == "a.csv"
    for value in ("me/prompts", "data/a.csv", 3, None):
        assert without_folders(value) is value
    assert without_origin({"_name_or_path": str(tmp_path), "shift": 3.0}) == {"shift": 3.0}
    tiny_pipelines.sd3().save_pretrained(tmp_path / "tiny")
    for name, expected in ((tmp_path / "tiny", ("tiny", False)), ("me/tiny", ("me/tiny", True)), (None, (None, False))):
        pipeline = tiny_pipelines.sd3()
        if name is not None:
            pipeline.register_to_config(_name_or_path=str(name))
        assert base_model_name(pipeline) == expected
    assert folder_name("runs/mine") == "runs/mine" and folder_name("../mine") == "mine"
    assert folder_name(".") == Path.cwd().name
