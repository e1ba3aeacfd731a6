"""Recipes by name, and the files beside them."""

import os
from pathlib import Path

import pytest
import yaml

from trl_fdfo import FDFOConfig
from trl_fdfo.cli import recipes
from trl_fdfo.cli.arguments import RunArguments, parse
from trl_fdfo.cli.main import main
from trl_fdfo.training.prompts import load_prompts


def test_list_and_show(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names() and len(lines) > 10
    assert all(line.endswith(".") for line in lines)  # a whole sentence
    main(["recipes", "show", "sd35_24gb"])
    assert capsys.readouterr().out == (recipes.FOLDER / "sd35_24gb.yaml").read_text()


def test_a_name_is_a_file_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.find("shapes") == recipes.FOLDER / "shapes.yaml"
    Path("shapes").write_text("num_rollouts: 3\n")
    assert recipes.find("shapes") == Path("shapes")
    with pytest.raises(
        FileNotFoundError, match="--config none: there is no such file. The packaged recipes: combined, "
    ):
        recipes.find("none")


def test_copy_takes_the_files_along(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipes", "copy", "shapes_vote", "mine/my.yaml"])
    assert capsys.readouterr().out == f"{Path('mine', 'my.yaml')}\n"
    assert sorted(os.listdir("mine")) == ["circles.txt", "my.yaml"]
    main(["recipes", "copy", "shapes"])
    assert Path("shapes.yaml").read_bytes() == (recipes.FOLDER / "shapes.yaml").read_bytes()
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "shapes"])
    assert "shapes.yaml is there already: name another file" in capsys.readouterr().err


def test_a_file_beside_a_recipe_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--config", "shapes_vote", "--report_to", "none"]
    _, config = parse((RunArguments, FDFOConfig), given)
    assert len(load_prompts(config.dataset_name)) == 6
    # One in the working directory comes first, and what is no file stays as it is.
    Path("circles.txt").write_text("a red circle on a white background\n")
    _, config = parse((RunArguments, FDFOConfig), given)
    assert config.dataset_name == "circles.txt"
    _, config = parse((RunArguments, FDFOConfig), [*given, "--dataset_name", "someone/prompts"])
    assert config.dataset_name == "someone/prompts"


@pytest.mark.parametrize("name", recipes.names())
def test_files_that_a_recipe_names_are_in_the_package(name):
    options = yaml.safe_load((recipes.FOLDER / f"{name}.yaml").read_text())
    for option in recipes.FILES:
        if str(options.get(option)).endswith(".txt"):
            assert (recipes.FOLDER / options[option]).is_file()


def test_a_long_prompt_in_a_recipe_is_no_file(tmp_path):
    prompt = "a red circle " * 400
    assert recipes.beside(tmp_path / "recipe.yaml", "prompts", prompt) == prompt
