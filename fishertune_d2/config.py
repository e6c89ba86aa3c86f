"""Reads configs, of this package and of users; `config_keys.py` explains every key."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .config_keys import add_fishertune_config
from .config_slips import ConfigError, check_file, check_options, nearest
from .renamed_configs import current_config

# The configs that come with the package: inside of it in a wheel, else at the top of the checkout.
CONFIGS = Path(__file__).resolve().parent / "configs"
if not CONFIGS.is_dir():
    CONFIGS = CONFIGS.parents[1] / "configs"
# The config that every config starts from, whether its file names it as _BASE_ or not.
RECIPE = "Base-recipe.yaml"


def default_config() -> CN:
    """Detectron2's and FisherTune's keys with the recipe's values, as a node that can change."""
    cfg = get_cfg()
    add_fishertune_config(cfg)
    cfg.merge_from_file(get_config_file(RECIPE), allow_unsafe=False)
    return cfg


def get_config_file(name: str) -> str:
    """Finds a config that comes with the package, as Detectron2's model_zoo does.

    Args:
        name: its path below configs/, such as "demo.yaml" or "camvid/freeze.yaml".

    Returns:
        Its path.

    Raises:
        FileNotFoundError: if there is none; it names the folder of the configs.
    """
    path = CONFIGS / current_config(name)[0]
    if not path.is_file():
        raise FileNotFoundError(f"no config {name!r} comes with FisherTune: they lie in {CONFIGS}")
    return str(path)


def find_config(file: str) -> str:
    """The path of a config that a path or a name for :func:`get_config_file` gives."""
    if PathManager.isfile(file):
        return file
    if file and PathManager.isdir(file):
        raise FileNotFoundError(
            f"the config file {file!r} is a folder: name the file in it, as {file}/config.yaml"
        )
    try:
        return get_config_file(file)
    except FileNotFoundError as error:
        # Of files with one name, the one in the outermost folder.
        paths = sorted(CONFIGS.rglob("*.yaml"), key=lambda path: (-len(path.parts), path))
        shipped = {path.stem: str(path.relative_to(CONFIGS)) for path in paths}
        near = [shipped[stem] for stem in nearest(Path(file).stem, list(shipped))]
        raise FileNotFoundError(
            f"the config file {file!r} does not exist, and {error}"
            + (f"; nearest: {', '.join(near)}" if near else "")
        ) from None


def read_config(file: str, options: Sequence[str] = ()) -> CN:
    """Reads a config file on top of the recipe.

    Args:
        file: its path, or the name of one that comes with the package, see :func:`find_config`.
        options: keys and values in turn, which override those of the file.

    Returns:
        The config, frozen.

    Raises:
        ConfigError: if a key or a value in the file, in its ``_BASE_`` or among the options is
            wrong; it names the nearest keys.
    """
    cfg = default_config()
    file, former = current_config(file)
    path = find_config(file)
    check_file(path, cfg)
    check_options(options, cfg)
    try:
        # Detectron2's default would let a config that was downloaded run any Python.
        cfg.merge_from_file(path, allow_unsafe=False)
    except (AssertionError, KeyError) as error:  # of an older VERSION, or of sections in _BASE_
        raise ConfigError(f"{path}: {error.args[0] if error.args else error}") from error
    cfg.merge_from_list([*former, *options])
    cfg.freeze()
    return cfg


def changed(cfg: CN, options: Sequence[Any]) -> CN:
    """A copy of a config, not frozen, with other values, given as keys and values in turn."""
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list(list(options))
    return copy


def equal_values(one: Any, other: Any) -> bool:
    """Whether two values of a key are equal; YAML and JSON make lists of tuples."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal_values, one, other))
    return one == other


def require_choice(key: str, value: Any, known: Iterable[str]) -> None:
    """Refuses a value that is not among the known values of a key."""
    choices = list(known)
    if value not in choices:
        raise ValueError(f"{key} is {value!r}: choose from {', '.join(choices)}")
