"""Options of the recipes, by tyro, from command lines and from files of YAML; exit codes; the
README of an output folder. Needs the extra ``recipes``.

An option is a field of the frozen dataclass ``Options`` of a recipe, said once: tyro reads its
name, type, default and the text below it, the marks here, in ``Annotated``, say the rest.
"""

import argparse
import errno
import inspect
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, get_type_hints

try:
    # says what to install if one of its packages is missing
    import sj_robust.core.recipes_installed  # noqa: F401
except ModuleNotFoundError as error:
    own = "; in the clone: pip install -e '.[recipes]'"
    sys.exit(f"error: {error}{own if error.name == 'sj_robust' else ''}")

import docstring_parser
import tyro
import yaml
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
)

from sj_robust.__main__ import CONFIGS, as_called
from sj_robust.core.datasets import check_dataset
from sj_robust.core.eps import eps_text, parse_eps, parse_radii
from sj_robust.core.folders import check_folder, read_text

MarkT = TypeVar("MarkT")
OptionsT = TypeVar("OptionsT")


@dataclass(frozen=True)
class Often:
    """An option that people change: ``--help`` shows it."""


@dataclass(frozen=True)
class NamesCode:
    """An option that can name code to run; a folder's file alone may not do so."""


@dataclass(frozen=True)
class Decides:
    """An option that weights do not depend on, so that a resumed run may change it.

    ``"figures"``: another value is another run of a sweep; ``"nothing"``: not even that.
    """

    what: Literal["figures", "nothing"]


@dataclass(frozen=True)
class Idle:
    """An option that changes nothing if this is true of all options, which have values where None
    stands for one.
    """

    when: Callable[[Any], bool]


@dataclass(frozen=True)
class Needs:
    """An option for whose value, or each of a tuple, something may have to be installed: ``check``
    raises ModuleNotFoundError then.
    """

    check: Callable[[str], None]


class Radius(float):
    """A radius, parsed where it is typed: a number or a fraction.

    >>> Radius("8/255") == 8 / 255, str(Radius("8/255"))
    (True, '8/255')
    """

    def __new__(cls, written: str | float) -> Self:
        """Parse it; ValueError if it is none."""
        return super().__new__(cls, parse_eps(written))

    def __str__(self) -> str:
        return eps_text(self)


class Radii(tuple[Radius, ...]):
    """One radius or several between commas, in increasing order.

    >>> Radii("8/255,0.01")[1] == 8 / 255, str(Radii("8/255,0.01"))
    (True, '0.01,8/255')
    """

    def __new__(cls, written: str) -> Self:
        """Parse them; ValueError if one is none."""
        return super().__new__(cls, map(Radius, parse_radii(written.split(","))))

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Word(PrimitiveConstructorSpec[Any]):
    """A type whose value is one word, which a function parses or refuses with ValueError."""

    def __init__(
        self, parse: Callable[[str], Any], metavar: str, text: Callable[[Any], str] = str
    ) -> None:
        """The metavar stands for the value in help and errors, the text is that of a default."""
        super().__init__(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: parse(words[0]),
            is_instance=lambda value: value is not None,
            str_from_instance=lambda value: [text(value)],
        )

    def __repr__(self) -> str:
        return self.metavar


class Yaml(Word):
    """A value of these types, written as YAML or JSON in one word."""

    def __init__(self, *kinds: type) -> None:
        """Take the types."""
        self.kinds = kinds
        super().__init__(self._read, "YAML", json.dumps)

    def _read(self, word: str) -> Any:
        try:
            value = yaml.safe_load(word)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from error
        if not isinstance(value, self.kinds):
            names = " or ".join(kind.__name__ for kind in self.kinds)
            raise ValueError(f"must be a {names} in YAML, got {word}")
        return value


def _at_least(least: int, word: str) -> int:
    if not word.removeprefix("-").isdigit() or int(word) < least:
        raise ValueError(f"must be an integer >= {least}, got {word}")
    return int(word)


def _share(word: str) -> float:
    number = float(word)
    if not 0 < number < 1:
        raise ValueError(f"must be a number > 0 and < 1, got {word}")
    return number


def _dataset(word: str) -> str:
    check_dataset(word)
    return word


def _output(word: str) -> str:
    return str(check_folder("output", word))


PositiveInt = Annotated[int, Word(partial(_at_least, 1), "INT>=1")]
NonNegativeInt = Annotated[int, Word(partial(_at_least, 0), "INT>=0")]
AtLeastTwo = Annotated[int, Word(partial(_at_least, 2), "INT>=2")]
OpenUnitInterval = Annotated[float, Word(_share, "0<FLOAT<1")]
DatasetName = Annotated[str, Word(_dataset, "NAME")]
"""A name that ``load_images`` takes."""
OutputFolder = Annotated[str, Word(_output, "FOLDER")]
"""A folder that is there or can be made, and takes files."""
YamlDict = Annotated[dict[str, Any], Yaml(dict)]


def marked(kind: type[Any], mark: type[MarkT]) -> dict[str, MarkT]:
    """Options that have a mark, by name.

    >>> @dataclass(frozen=True)
    ... class Options:
    ...     T: int = 4
    ...     norm: Annotated[str, Idle(lambda options: options.T == 1)] = "l2"
    >>> list(marked(Options, Idle))
    ['norm']
    """
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for one in getattr(hint, "__metadata__", ()):
            if isinstance(one, mark):
                found[name] = one
    return found


@cache
def texts_of(kind: type[Any]) -> dict[str, str]:
    """Help text of each option by name; lines that begin with a dash stay lines."""
    found = {}
    for one in docstring_parser.parse_from_object(kind).params:
        text = inspect.cleandoc(one.description or "")
        found[one.arg_name] = re.sub(r"\n(?!- )", " ", text)
    return found


def deciding(options: Any) -> dict[str, Any]:
    """Names and values of the options that weights depend on, radii as plain numbers."""
    decided = marked(type(options), Decides)
    values = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in decided:
            values[field.name] = float(value) if isinstance(value, Radius) else value
    return values


def plain(options: Any) -> dict[str, Any]:
    """All options as a file of YAML has them: lists for tuples, and 8/255 as it is written."""
    return {field.name: _plain(getattr(options, field.name)) for field in fields(options)}


def _plain(value: Any) -> Any:
    if isinstance(value, Radii) and len(value) == 1:
        return _plain(value[0])
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Radius):
        return str(value) if "/" in str(value) else float(value)
    return value


def idle(options: Any) -> frozenset[str]:
    """Names of the options that change nothing, given the others, which have values where None
    stands for one.

    An option ``mode`` is a training mode: :data:`sj_robust.training.MODES` says what it leaves
    idle (of ``trained_mode`` if the options have that).
    """
    found = {name for name, mark in marked(type(options), Idle).items() if mark.when(options)}
    names = {field.name for field in fields(options)}
    if "mode" in names:
        from sj_robust.training import MODES  # imports torch

        found |= names & set(MODES[getattr(options, "trained_mode", options.mode)].idle)
    return frozenset(found)


def changed(options: Any) -> list[str]:
    """Names of the options that differ from their defaults, sorted."""
    values, defaults = plain(options), plain(type(options)())
    return sorted(name for name, value in values.items() if value != defaults[name])


def unused(options: Any, complete: Any) -> list[str]:
    """Names of the options that are given and change nothing; ``complete`` are the same ones with
    values where None stands for one.
    """
    without_effect = idle(complete)
    return [name for name in changed(options) if name in without_effect]


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


_READMES = Path(__file__).with_name("readmes.md")
_BROKEN_PIPE = 141
"""Exit code: 128 plus the number of SIGPIPE, as other commands have it."""


@contextmanager
def checked() -> Iterator[None]:
    """What a ValueError refuses inside is wrong use, since nothing but options is looked at
    there.
    """
    try:
        yield
    except WrongUse:
        raise
    except ValueError as error:
        raise WrongUse(str(error)) from error


def check_options(options_type: type[Any], arguments: Sequence[str] | None = None) -> None:
    """Answer ``--help`` and wrong options, before a script imports what takes seconds.

    The words are those of this process unless others are given. If nobody reads the output
    any more, as in ``--help | head``, the process ends without a message.
    """
    try:
        try:
            read_options(options_type, sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:  # as it is where the console is closed
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(_BROKEN_PIPE)
    except WrongUse as error:
        _refuse(error)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")


def run_recipe(
    main: Callable[[list[str]], None], *, stopped: str = "continue with --resume"
) -> None:
    """Run a recipe as a script: errors in a line on stderr, the conventional exit codes.

    0 after success, 1 if the work failed, 2 after wrong use, 130 after Ctrl-C (``stopped`` says
    what to do then), and 128 plus its number after another signal that left a checkpoint. What the
    terminal has no character for is shown as a question mark.
    """
    from sj_robust.core.host import quiet_triton  # imports torch, which --help does not wait for

    quiet_triton()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print(f"stopped; what is finished is kept, {stopped}", file=sys.stderr)
        sys.exit(130)
    except WrongUse as error:
        _refuse(error)
    except Exception as error:
        # what imports the training is not waited for where none runs
        from sj_robust.training import NonFiniteLossError, TrainingInterrupted

        if isinstance(error, TrainingInterrupted):
            print(error, file=sys.stderr)
            sys.exit(128 + error.signal_number)
        if not isinstance(error, OSError | ValueError | ModuleNotFoundError | NonFiniteLossError):
            raise
        full = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
        )
        remedy = f"; free some space there: {stopped}" if full else ""
        sys.exit(as_called(f"error: {error}{remedy}"))


def describe_folder(folder: Path, recipe: str, arguments: Sequence[str]) -> None:
    """Write the README of an output folder, from ``readmes.md``; commands that wrote into it before
    stay in it.
    """
    from sj_robust.core.saved import write_whole  # imports torch

    path = folder / "README.md"
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    commands = earlier.partition("```text\n")[2].partition("\n```")[0].splitlines()
    commands.append(
        " ".join(shlex.join(["python", f"recipes/{recipe}.py", *arguments]).splitlines())
    )
    readmes = _READMES.read_text(encoding="utf-8")
    text = readmes.partition(f"<!-- {recipe} -->\n")[2].partition("<!-- ")[0]
    text = text.replace("FOLDER", shlex.quote(str(folder)))
    text = text.replace("COMMANDS", "\n".join(dict.fromkeys(commands)), 1)
    write_whole(path, as_called(text))


def _refuse(error: WrongUse) -> NoReturn:
    print(as_called(f"error: {error}"), file=sys.stderr)
    sys.exit(2)
