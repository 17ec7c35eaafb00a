"""Options of a recipe from the words of its command line, by tyro, and from files of YAML."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

from lab.command_line.declared import (
    NamesCode,
    Needs,
    Often,
    Radii,
    Radius,
    Word,
    Yaml,
    marked,
    plain,
    texts_of,
)
from sj_robust.core.commands import CONFIGS, as_called
from sj_robust.core.folders import read_text

OptionsT = TypeVar("OptionsT")


class WrongUse(ValueError):  # noqa: N818  # the name of what was done, as SystemExit's
    """A recipe was called wrongly: it has done nothing, and ends with the exit code 2."""


def read_options(kind: type[OptionsT], arguments: Sequence[str]) -> OptionsT:
    """Options from the words of a command line; those of the files of ``--config`` are read first,
    and the words replace them.

    tyro answers ``--help`` and wrong options, and ends the process.
    """
    common, words = _common_options(arguments)
    if common.help or common.help_all:
        _cli(kind, ["--help"], brief=not common.help_all)
    options = None
    for path in common.config:
        options = from_values(kind, read_file(path), str(path), options)
    # None, True and False may also be written as YAML has them
    as_python = {"null": "None", "true": "True", "false": "False"}
    options = _cli(kind, [as_python.get(word, word) for word in words], options)
    if common.print_config:
        print(yaml.safe_dump(plain(options), sort_keys=False), end="")
        sys.exit(0)
    for name, needs in marked(kind, Needs).items():
        value = getattr(options, name)
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            needs.check(part)
    return options


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Files of ``--config`` in the words of a command line."""
    common, _ = _common_options(arguments)
    return list(common.config)


def from_values(
    kind: type[OptionsT], values: Mapping[str, Any], where: str, default: OptionsT | None = None
) -> OptionsT:
    """Options from plain data, checked like words of a command line.

    Options that are not given are those of ``default``, or the recipe's defaults. A wrong one ends
    the process, after a message that says ``where`` it stands.
    """
    try:
        return _cli(kind, _as_words(kind, values), default)
    except SystemExit:
        print(f"(in {where})", file=sys.stderr)
        raise


def parse_options(
    kind: type[OptionsT],
    arguments: Sequence[str],
    stem: Callable[[OptionsT], str],
    *,
    mark: str = "*/last.pt",
) -> OptionsT:
    """Options of a recipe with ``output`` and ``resume``; where a run is resumed, the file in its
    folder is read first.

    ``stem`` names a run's folder up to its number, ``mark`` the files that tell a run with
    something to continue with, as :func:`lab.run_folder.run_to_resume` takes them.
    """
    options: Any = read_options(kind, arguments)
    if not options.resume:
        return options  # type: ignore[no-any-return]  # what read_options returned
    from lab.run_folder import CONFIGURATION_FILE, run_to_resume  # imports torch

    folder = run_to_resume(options.output, stem(options), mark=mark)
    path = folder / CONFIGURATION_FILE
    resumed: Any = read_options(kind, ["--config", str(path), *arguments])
    check_code(resumed, options, path)
    return replace(resumed, output=str(folder))  # type: ignore[no-any-return]  # as above


def check_code(options: Any, given: Any, path: Path) -> None:
    """Raise WrongUse if a file names code to run that the command line does not name.

    Args:
        options: Options of the file and the command line together.
        given: Options of the command line alone.
        path: The file.
    """
    for name in marked(type(options), NamesCode):
        value = getattr(options, name)
        runs_code = value is True or _names_code(value)
        if runs_code and value != getattr(given, name):
            raise WrongUse(
                f"{path} names code that would be run; if you trust it, name it here as well: "
                f"{_as_typed(name, value)}"
            )


def _as_typed(name: str, value: object) -> str:
    """An option in the words of a command line."""
    if value is True:
        return _flag(name)
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{_flag(name)} {shlex.quote(text)}"


def _names_code(value: object) -> bool:
    """Whether a value is a Python file or ``module:function``, or holds such a value."""
    if isinstance(value, dict):
        return _names_code(list(value.values()))
    if isinstance(value, list | tuple):
        return any(map(_names_code, value))
    text = str(value)
    return text.endswith(".py") or (":" in text and not text.startswith(("zoo:", "image_folder:")))


def _common_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that every recipe has, and the words that are left for tyro."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", type=Path, default=[])
    parser.add_argument("--print-config", "--print_config", action="store_true")
    parser.add_argument("--help-all", "--help_all", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_known_args(arguments)


def _cli(
    kind: type[OptionsT],
    words: Sequence[str],
    default: OptionsT | None = None,
    *,
    brief: bool = False,
) -> OptionsT:
    """Options parsed by tyro; a brief help shows only those that are marked ``Often``, if any
    are.
    """
    texts = texts_of(kind)  # type: ignore[arg-type]  # a class is hashable
    often = marked(kind, Often) if brief else {}
    usual = kind() if default is None else default
    fields = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        shown = hint
        if often and name not in often:
            shown = tyro.conf.Suppress[hint]  # type: ignore[misc, valid-type]  # made at run time
        text = texts.get(name, "")
        fields.append(StructFieldSpec(name, shown, getattr(usual, name), helptext=text))
    options = StructConstructorSpec(kind, tuple(fields))
    registry = ConstructorRegistry()
    registry.struct_rule(lambda info: options if info.type is kind else None)
    registry.primitive_rule(lambda info: Word(Radius, "RADIUS") if info.type is Radius else None)
    registry.primitive_rule(lambda info: Word(Radii, "RADII") if info.type is Radii else None)
    module = sys.modules[kind.__module__]
    script = Path(getattr(module, "__file__", None) or "recipe.py")
    text_of_module = (module.__doc__ or "").strip()
    return tyro.cli(
        kind,
        args=words,
        prog=as_called(f"recipes/{script.name}"),
        description=as_called(f"{text_of_module}\n\n{_COMMON}"),
        registry=registry,
    )


_COMMON = (
    "--config FILE reads options from a YAML file or the preset of that name; the command line "
    "overrides them. --print-config prints all options as YAML; --help-all shows every option."
)


def _as_words(kind: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Plain data as words of a command line: switches, the positional option first, YAML in one
    word, lists in several.
    """
    switches = {name for name, hint in get_type_hints(kind).items() if hint is bool}
    positional = marked(kind, type(tyro.conf.Positional))
    trees = marked(kind, Yaml)
    words: list[str] = []
    for name, value in values.items():
        flag = _flag(name)
        if name in trees:
            words.append(f"{flag}={json.dumps(value)}")
        elif name in positional:
            words.insert(0, str(value))
        elif name in switches and isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)]
        elif str(value).startswith("-"):
            words.append(f"{flag}={value}")
        else:
            words += [flag, str(value)]
    return words


def read_file(path: Path) -> dict[str, Any]:
    """Options in a YAML file, or in the preset of that name; WrongUse if there is none or it holds
    something else.
    """
    preset = CONFIGS / f"{path}.yaml"
    if not path.is_file() and not preset.is_file():
        raise WrongUse(
            f"{path} must be a file of options, such as epochs: 15, or a preset, such as digits; "
            "it is not there"
        )
    if not path.is_file():
        path = preset
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise WrongUse(f"{path} must be YAML, got {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise WrongUse(str(error)) from error
    if not isinstance(content, dict):
        raise WrongUse(f"{path} must hold options, such as epochs: 15")
    for name in content:
        if not isinstance(name, str):
            raise WrongUse(
                f"{path} must hold options by name, such as epochs: 15, got the key {name!r}; "
                "write an option's name"
            )
    return content


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")
