"""Finds slips in a config: a misspelt key, a value of a wrong type, a line that YAML misreads.

Detectron2's own messages name neither the file nor the nearest key, and it misses some slips: of a
section that stands twice in a file, YAML keeps the second.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.utils.file_io import PathManager
from yaml import MappingNode, MarkedYAMLError, SafeLoader, YAMLError, load

BASE = "_BASE_"
# A name is suggested if it is at least this alike, and at most this much less alike than the best.
_ALIKE, _LESS_ALIKE = 0.6, 0.1


class ConfigError(ValueError):
    """A config that cannot be read; the message names the file, the key and the remedy."""


def nearest(word: str, names: Sequence[str]) -> list[str]:
    """Finds at most three names that a misspelt word may mean, the nearest first."""
    # A word may also mean the last part of a name with dots.
    last = word.rpartition(".")[2]
    # If the whole path alone counted, all names of a long section would be near.
    ends = {name: _likeness(last, name.rpartition(".")[2]) for name in names}
    scores = {
        name: max(_likeness(word, name), 0.95 * end) if end >= _ALIKE else 0.0
        for name, end in ends.items()
    }
    best = max(scores.values(), default=0)
    near = [name for name in names if scores[name] >= max(_ALIKE, best - _LESS_ALIKE)]
    # Of equally near names, the one whose whole path is the most alike comes first.
    near.sort(key=lambda name: (scores[name], _likeness(word, name)), reverse=True)
    return near[:3]


def check_file(file: str, known: CN, within: Sequence[str] = ()) -> None:
    """Checks a config file, to which the files ``within`` led by ``_BASE_``, and its own bases."""
    if within and not PathManager.isfile(file):
        raise ConfigError(f"{within[-1]}: its {BASE} is {file}, and there is no such file")
    mapping = _read_mapping(file)
    bases = mapping.pop(BASE, [])
    if mapping.get("VERSION", known.VERSION) == known.VERSION:  # Detectron2 renames older keys
        for key, value in _leaves(mapping, known, file):
            _check_value(key, value, known, file)
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ConfigError(f"{file}: its {BASE} is {base!r}, and takes the path of a file")
        address = base.startswith(("https://", "http://"))
        path = base if address else str(Path(file).parent / Path(base).expanduser())
        if Path(path).resolve() in [Path(each).resolve() for each in (*within, file)]:
            raise ConfigError(f"{file}: its {BASE} {base} leads back to itself")
        check_file(path, known, (*within, file))


def check_options(options: Sequence[Any], known: CN) -> None:
    """Checks the keys and values, in turn, of a command line; ``known`` has all keys."""
    keys = dict(dotted_items(known))
    for place in range(0, len(options), 2):
        key, *value = options[place : place + 2]
        if str(key).startswith("-"):
            raise ConfigError(
                f"{key} stands among the keys of the config: options of a command go before them"
            )
        name, equals, rest = str(key).partition("=")
        if equals:
            raise ConfigError(
                f"{key} is no key: write keys and values in turn, as {name} {rest or 'VALUE'}"
            )
        if not value or (str(value[0]) in keys and key in keys):
            instead = f", but the key {value[0]}" if value else ""
            raise ConfigError(
                f"no value stands after {key}{instead}: write keys and values in turn"
            )
        if key == BASE:
            raise ConfigError(f"{BASE} works in files only: name that file as --config-file")
        _check_value(key, value[0], known, "")


def _read_mapping(file: str) -> dict[str, Any]:
    """Reads the keys of one file, and refuses one that is no YAML, no mapping, or repeats a key."""
    if file.endswith(".py"):
        raise ConfigError(f"{file} is Python, as of LazyConfig: name a yaml file")
    try:
        with PathManager.open(file, "r") as stream:
            mapping = load(stream, _Loader)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = str(getattr(error, "problem", None) or error)
        if "'\\t'" in problem:
            problem = "a tab: YAML takes spaces alone"
        if "tag:yaml.org,2002:python" in problem:
            problem += ": tags of Python could run anything"
        raise ConfigError(f"{file} is no YAML that can be read: {where}{problem}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is no text: name a config file, such as OUTPUT_DIR/config.yaml"
        ) from error
    if not isinstance(mapping, dict):
        found = "is empty" if mapping is None else f"holds a {type(mapping).__name__}"
        raise ConfigError(f"{file} {found}, not keys and values such as SOLVER: {{MAX_ITER: 100}}")
    return mapping


class _Loader(SafeLoader):
    """PyYAML's safe loader, but refuses a key that stands twice in one section."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = "stands twice, and YAML would keep the second alone: write one"
                raise MarkedYAMLError(None, None, f"{key.value} {problem}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _leaves(mapping: Mapping, known: CN, file: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields keys with their dotted paths, and values, from the sections that ``known`` has."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        section = known.get(name)
        if "." in str(name) and name in dict(dotted_items(known)):  # as on a command line
            *path, last = str(name).split(".")
            nested = "".join(f"{part}: {{" for part in path) + f"{last}: ...{'}' * len(path)}"
            raise ConfigError(f"{file}: {key} is nested in a file: write {nested}")
        if isinstance(section, CN) and isinstance(value, dict):
            yield from _leaves(value, section, file, f"{key}.")
        else:
            yield key, value


def _check_value(key: str, value: Any, known: CN, file: str) -> None:
    """Refuses a key that does not exist, and a value of another type than the key's."""
    where = f"{file}: " if file else ""
    default: Any = known
    for part in str(key).split("."):
        if not isinstance(default, CN) or part not in default:
            names = nearest(str(key), [name for name, _ in dotted_items(known)])
            near = f"; nearest: {', '.join(names)}" if names else ""
            raise ConfigError(f"{where}{key} is no key{near}")
        default = default[part]
    if isinstance(default, CN):
        raise ConfigError(
            f"{where}{key} is a section, and got {value!r}: set keys in it, as "
            f"{key}.{next(iter(default), '...')}"
        )
    error = None
    try:
        CN({"KEY": default}).merge_from_list(["KEY", value])
    except (AssertionError, ValueError) as refused:  # AssertionError: a type that YAML alone has
        error = refused
    decoded = CN._decode_cfg_value(value)
    if error is not None or (decoded is None and default is not None):
        raise ConfigError(
            f"{where}{key} is {value!r}, {_kind(decoded)}, and takes {_kind(default)}: write "
            f"{_example(decoded, default)}"
        ) from error


_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number with a point",
    str: "text",
    list: "a list",
    tuple: "a list",
    type(None): "no value",
}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a section" if isinstance(value, dict) else type(value).__name__)


def _example(value: Any, default: Any) -> str:
    """The value as it should be written, or else the default as an example."""
    if isinstance(default, float) and type(value) is int:
        return f"{float(value)}"
    if isinstance(default, str) and isinstance(value, (int, float)):
        return f"\"'{value}'\" (with both quotation marks)"
    if isinstance(default, (list, tuple)) and not default and isinstance(value, str):
        return f"\"['{value}']\""
    return f"{default!r}, for example"


def dotted_items(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each key with its dotted path, and its value."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _likeness(word: str, name: str) -> float:
    return SequenceMatcher(None, word.upper(), name.upper(), autojunk=False).ratio()
