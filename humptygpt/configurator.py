"""Config files and command lines -> checked dataclasses.

    python train.py config/a.py config/b.py --learning_rate=1e-3

A config file is plain Python, `key = value  # why`. Sources apply from left to right, so the last one wins. The keys,
their types and their defaults are the fields of the dataclasses that a script names; the comment behind a field is
its line in --help, and a comment `# --- title` starts a group.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import runpy
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path

TEXTS = tuple[str, ...]  # the type of a key that takes several texts


class UserError(ValueError):
    """A mistake that the user can mend. Shown as one line: the value, the rule, the way out."""


def read(argv: list[str], *classes: type, positional: str | None = None) -> dict[str, object]:
    """What the user set: {key: value} from config files and --key=value, every key known and every type right.

    positional: the key that a bare argument sets, or adds to where it takes several texts; None: a bare argument is a
    config file.
    Raises UserError. Prints help and exits where --help is among the arguments.
    """
    hints = {key: hint for cls in classes for key, hint in typing.get_type_hints(cls).items()}
    if "--help" in argv or "-h" in argv:
        print(help_text(*classes, positional=positional))
        sys.exit(0)
    given = {}
    for argument in argv:
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            check_key(key, hints, "")
            if not equals:
                raise UserError(f"{argument} has no value; write --{key}=VALUE")
            given[key] = parse(key, text, hints[key])
        elif positional is not None and hints[positional] == TEXTS:
            given[positional] = (*given.get(positional, ()), argument)
        elif positional is not None:
            given[positional] = argument
        else:
            given.update(read_file(argument, hints))
    return given


def make(cls: type, values: dict[str, object]):
    """An instance of a config class from those of the values that are its fields. Raises UserError for a bad value."""
    names = {field.name for field in dataclasses.fields(cls)}
    try:
        return cls(**{key: value for key, value in values.items() if key in names})
    except ValueError as error:
        raise UserError(str(error)) from error


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(argv) and exit with its code; a UserError becomes one line on stderr and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has seen enough: python sample.py ... | head
        sys.stdout = None  # or Python would fail once more when it flushes at exit
        sys.exit(128 + 13)  # 13: SIGPIPE


def check_key(key: str, hints: dict[str, object], where: str) -> None:
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all keys"
        raise UserError(f"{where}unknown key {key}; {hint}")


def read_file(path: str, hints: dict[str, object]) -> dict[str, object]:
    """Run a config file and return its keys. Names that start with _, modules and functions are the file's own."""
    try:
        Path(path).read_bytes()
    except OSError as error:
        key = f"; for a key write --{path.lstrip('-')}" if "=" in path else ""
        raise UserError(f"cannot read config file {path}: {error.strerror}{key}") from error
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        raise UserError(f"{path}:{lines[-1] if lines else 0}: {type(error).__name__}: {error}") from error
    given = {}
    for key, value in names.items():
        helper = isinstance(value, types.ModuleType) or callable(value)
        if key.startswith("_") or (helper and key not in hints):
            continue
        check_key(key, hints, f"{path}: ")
        given[key] = convert(key, value, hints[key])
    return given


def parse(key: str, text: str, hint: object) -> object:
    """The value that a command line's text stands for: text as it is where the key takes text, else a literal."""
    kinds = typing.get_args(hint) or (hint,)
    if text == "None" and types.NoneType in kinds:
        return None
    if hint == TEXTS:
        return (text,)
    if str in kinds:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"nan": float("nan"), "inf": float("inf"), "true": True, "false": False}.get(text.lower(), text)
    return convert(key, value, hint)


def convert(key: str, value: object, hint: object) -> object:
    """The value, if it has the key's type: a whole number passes as a float, and True is not a number."""
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{key}={value!r} must be {type_name(hint)}")
    return value


def type_name(hint: object) -> str:
    if hint == TEXTS:
        return "texts"
    names = {int: "int", float: "float", bool: "True or False", str: "text", types.NoneType: "None"}
    return " or ".join(names[kind] for kind in typing.get_args(hint) or (hint,))


def comments(cls: type) -> dict[str, tuple[str, str]]:
    """{key: (group, comment)} of a config class, from its source."""
    found, group = {}, cls.__name__
    for line in inspect.getsource(cls).splitlines():
        if title := re.fullmatch(r"    # --- (.+)", line):
            group = title[1]
        elif field := re.fullmatch(r"    (\w+): [^#]+#\s*(.+)", line):
            found[field[1]] = (group, field[2])
    return found


def help_text(*classes: type, positional: str | None = None) -> str:
    """Every key with its type, default and one line, by group, under the first paragraphs of the script's docstring."""
    script = sys.modules[classes[-1].__module__]
    several = positional is None or any(typing.get_type_hints(cls).get(positional) == TEXTS for cls in classes)
    bare = f"[{(positional or 'config_file').upper()}{' ...' if several else ''}]"
    lines = [f"usage: python {Path(script.__file__).name} {bare} [--key=value ...]", "", script.__doc__.strip()]
    shown = None
    for cls in classes:
        notes, hints = comments(cls), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            group, note = notes[field.name]
            if group != shown:
                lines += ["", f"{group}:"]
                shown = group
            kind = type_name(hints[field.name]).replace("True or False", "bool").replace(" or ", "|")
            lines.append(f"  --{field.name}={field.default}".ljust(42) + f" {kind:<11}{note}")
    return "\n".join(lines)
