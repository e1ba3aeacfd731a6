"""Recipes: YAML files of options that come with the package. A command line names them without a path."""

import argparse
import difflib
import os
import shutil
from pathlib import Path

import yaml


FOLDER = Path(__file__).parents[1] / "recipes"
# Options whose value can be a file. One that is not in the working directory is looked for beside its recipe.
FILES = ("dataset_name", "prompts", "model_card_template")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """
    The file of a recipe.

    Args:
        name (`str`): Name of a packaged recipe, or path of a YAML file.

    Raises:
        FileNotFoundError: There is neither.
    """
    for path in (Path(name), FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, names(), n=1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    raise FileNotFoundError(
        f"--config {name}: there is no such file. The packaged recipes: {', '.join(names())}.{meant}"
    )


def read(path: Path) -> dict[str, object]:
    """
    The options of a recipe.

    Raises:
        ValueError: It is no YAML file of options.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(options, dict):
        found = "is empty" if options is None else f"has a {type(options).__name__}"
        raise ValueError(
            f"--config {path} {found}, and a recipe has lines `option: value`, such as `num_rollouts: 10`."
        )
    return options


def beside(path: Path, name: str, value: object) -> object:
    """The value of an option of the recipe at `path`: the whole path of a file that lies beside it."""
    # `os.path` says of a text that is too long for a name that there is no such file; `Path` raises.
    is_beside = (
        name in FILES
        and isinstance(value, str)
        and not os.path.exists(value)
        and os.path.isfile(os.path.join(path.parent, value))
    )
    return str(path.parent / value) if is_beside else value


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trl-fdfo recipes", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="the recipes, with the first line of each (the default command)")
    for command, text in (("show", "print a recipe"), ("copy", "copy a recipe and its files, to change it")):
        commands.add_parser(command, help=text).add_argument("name", help="a recipe")
    commands.choices["copy"].add_argument(
        "path", nargs="?", help="file or folder to write (default: the working directory)"
    )
    arguments = parser.parse_args(args)
    if arguments.command == "show":
        print(find(arguments.name).read_text(encoding="utf-8"), end="")
    elif arguments.command == "copy":
        print(f"{copy(arguments.name, arguments.path or '.')}")
    else:
        width = max(map(len, names()))
        for name in names():
            print(
                f"{name:{width}}  {(FOLDER / f'{name}.yaml').read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}"
            )


def copy(name: str, path: str) -> Path:
    """
    Raises:
        FileExistsError: A file of that name is there.
    """
    recipe = find(name)
    target = Path(path) / recipe.name if Path(path).is_dir() or not Path(path).suffix else Path(path)
    options = read(recipe)
    files = [recipe.parent / options[name] for name in FILES if isinstance(options.get(name), str)]
    targets = {recipe: target, **{file: target.parent / file.name for file in files if file.is_file()}}
    for each in targets.values():
        if each.exists():
            raise FileExistsError(f"{each} is there already: name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for source, each in targets.items():
        shutil.copy(source, each)
    return target
