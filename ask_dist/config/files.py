"""Configurations as files: YAML with overrides in, one line for every problem out."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ask_dist.config.run import Config
from ask_dist.errors import InputError

Checked = TypeVar("Checked", bound=BaseModel)


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads and validates a YAML file.

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is read as YAML.

    Raises:
        InputError: the file is missing or not a mapping, a key is unknown (the nearest is named), or a value is out of
            range.
    """
    return parse(read(path, overrides))


def parse(tree: dict[str, Any]) -> Config:
    """Validates a mapping; raises InputError with one line that names every problem."""
    return validated(Config, tree)


def read(
    path: Path, overrides: list[str] | tuple[str, ...] = (), *, example: str = "configs/quickstart.yaml"
) -> dict[str, Any]:
    """A YAML mapping with its overrides applied, before any schema looks at it.

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is read as YAML.
        example: a file of this kind, for who gave another.

    Raises:
        InputError: the file is missing, unreadable or not a mapping, or an override has another form.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no configuration file {path}; the ones shipped are in configs/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds {type(tree).__name__}, not a mapping of sections; see {example}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def validated(schema: type[Checked], tree: dict[str, Any], file: Path | None = None) -> Checked:
    """A mapping as the schema has it; raises InputError with one line that names the file and every problem."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(schema, problem) for problem in error.errors())
        raise InputError(f"{file}: {problems}" if file else problems) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in a mapping, in place."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} is not of the form section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise InputError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not YAML; quote it") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` takes."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _explain(schema: type[BaseModel], problem: Any) -> str:
    """One problem of pydantic's list, as one line with value and remedy."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        fields = _section(schema, location[:-1]).model_fields
        known = [field.alias or name for name, field in fields.items()]
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name}; {remedy}"
    if problem["type"] == "missing":
        override = "" if any(isinstance(part, int) for part in problem["loc"]) else f" or as {name}=VALUE"
        return f"{name} is missing; set it in the file{override}"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{name}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _section(schema: type[BaseModel], location: list[str]) -> type[BaseModel]:
    section: Any = schema
    for part in location:
        if get_origin(section) is None:
            section = section.model_fields[part].annotation
        else:  # a mapping's values, or a tuple's entries
            section = next(kind for kind in reversed(get_args(section)) if kind is not Ellipsis)
        if type(None) in get_args(section):  # a section that may be left out
            section = get_args(section)[0]
    return section
