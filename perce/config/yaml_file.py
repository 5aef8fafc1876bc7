"""Flat YAML files of options and of a run: read, with what would be ambiguous refused, and written."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perce.errors import UserError, in_one_line
from perce.files.paths import did_you_mean
from perce.visible import ACTING


def read_yaml(path: str, option: str = "--config") -> dict[str, Any]:
    """A flat YAML mapping; `option` names the file. To YAML 1.1 `1e-5` is a text, which `convert` makes a number."""
    import yaml

    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _yaml_loader())
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror}).{did_you_mean(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: not valid YAML: {in_one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {path}: cannot be read ({in_one_line(error)}).") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        words = {type(None): "none", list: "a list", str: "a text", dict: "a name that is no text"}
        got = words.get(type(content), type(content).__name__)
        raise UserError(f"{option} {path}: expected `name: value` lines, got {got}.")
    return by_new_names(content, lambda name: name.replace("-", "_"), f"{option} {path}")


def by_new_names(values: Mapping[str, Any], new: Callable[[str], str], where: str) -> dict[str, Any]:
    """The values by their names here. UserError for two of them with one name: the order would decide."""
    renamed = {new(name): value for name, value in values.items()}
    if len(renamed) < len(values):
        names = [new(name) for name in values]
        raise UserError(f"{where}: {next(x for x in names if names.count(x) > 1)} is there twice, in two spellings.")
    return renamed


@functools.cache
def _yaml_loader() -> Any:
    """PyYAML's loader, except that a repeated key is an error; PyYAML itself takes the last of them."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key, _ in node.value if isinstance(key.value, str) and keys.count(key.value) > 1]:
                problem = f"{twice[1].value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, twice[1].start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML with the letters of all alphabets as they are; all are escaped if any character acts (see visible.py)."""
    import yaml

    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    acts = ACTING.search(text.replace("\n", ""))
    return yaml.safe_dump(dict(values), sort_keys=False) if acts else text
