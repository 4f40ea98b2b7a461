"""Turn config files and command lines into dataclasses.

    python train.py config/a.py config/b.py --learning_rate=1e-3

A config file is plain Python, with lines such as `key = value  # why`. Files and keys apply from left to right; if a
key is set more than once, the last value wins. The keys of a script are the fields of its dataclasses, and the comment
after a field is its help text:

    n_head: int = 4  # attention heads in a block

A comment on a line of its own is the title of a group of keys. A config class has two methods: choices() returns
{key: its allowed values}, and validate() raises ValueError if a value is invalid.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import os
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "config"
Fields = dict[str, dataclasses.Field]  # {key: its field}, for one or more config classes
# [(keys, another setting, the values of that other setting for which the keys have no effect)]
Vain = list[tuple[str, str, Collection]]
# type of a key that can be repeated: --key=ONE --key=ANOTHER
TEXTS = tuple[str, ...]


class Except(tuple):
    """All values but these."""

    def __contains__(self, value: object) -> bool:
        return not super().__contains__(value)


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line that gives the value, the rule and the fix.

    It is not a ValueError, so code that catches a ValueError and extends its message leaves this message alone.
    """


@contextmanager
def as_user_error(start: str = "") -> Iterator[None]:
    """Turn a ValueError, OSError or UserError raised in the block into a UserError whose message begins with `start`.

    The block must not call user-written code, except to validate settings: a bug in that code would lose its traceback.
    """
    try:
        yield
    except (ValueError, OSError, UserError) as error:
        raise UserError(start + one_line(error)) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message. In torch's errors, a stack trace follows on later lines."""
    return str(error).strip().partition("\n")[0]


def one_line(error: BaseException | str) -> str:
    """Cut a message to one line of printable characters, because it may quote an untrusted file."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:1000])


def note(text: str) -> None:
    """Print a note to stderr about something unexpected that does not stop the run. Only rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Values -> dataclasses


def make(cls: type, values: dict[str, object]):
    """Make a config from {key: value}, ignoring keys that cls does not have. Raises UserError if a value is invalid."""
    config = cls(**{name: values[name] for name in fields_of(cls) if name in values})
    with as_user_error():
        config.validate()
    return config


def restore(cls: type, values: dict[str, object]):
    """Make a config from a file's {key: value}. Raises UserError if a key is unknown or a value is invalid."""
    fields = fields_of(cls)
    found = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"it has the key {name}, which this code does not know")
        found[name] = convert(name, value, fields[name].type)
    return make(cls, found)


def fields_of(*classes: type) -> Fields:
    return {field.name: field for cls in classes for field in dataclasses.fields(cls)}


def check_choices(config: object) -> None:
    """Raise ValueError if the value of a key is not among its choices."""
    for name, choices in config.choices().items():
        value = getattr(config, name, None)
        if value is not None and value not in choices:
            raise ValueError(f"{name}={value} is not one of: {', '.join(choices)}")


def check_least(config: object, least: float, *names: str, below: float = 2**63) -> None:
    """Raise ValueError unless each of these values is None, or at least `least` and less than `below`.

    By default, an integer must fit in 64 bits.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < below:
            limit = "" if value < least else f" and below {below:g}"
            raise ValueError(f"{name}={value} must be at least {least:g}{limit}")


def check_above_0(config: object, *names: str) -> None:
    """Raise ValueError unless each of these values is None, or above 0 and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0")


def check_effects(given: dict, typed: Collection[str], settings: dict, table: Vain) -> None:
    """Raise UserError for a key that was typed and has no effect with these settings, and note one that a file sets.

    given: {key: value} of both. settings: what the table's other settings are.
    """
    for keys, other, values in table:
        for key in keys.split():
            if key in given and settings[other] in values:
                why = f"{key}={given[key]} has no effect with {other}={settings[other]}"
                if key in typed:
                    raise UserError(f"{why}; leave it out")
                note(why)


# --------------------------------------------------------------------------------------
# The command line


def read(argv: list[str], *classes: type, positional: str | None = None) -> dict[str, object]:
    """Read config files and --key=value arguments. Returns {key: value} for the keys that are set.

    If --help is among the arguments, prints the help and exits. Raises UserError if an argument is not valid.
    positional: the key that a bare argument sets, or adds to if the key can be repeated. None: a bare argument is a
    config file.
    """
    fields = fields_of(*classes)
    if "--help" in argv or "-h" in argv:
        from humptygpt.help import help_text

        several = " ..." if positional is None or fields[positional].type == TEXTS else ""
        bare = f"[{(positional or 'config_file').upper()}{several}]"
        print(help_text(*classes, bare=bare))
        sys.exit(0)
    given = {}
    for argument in argv:
        if not argument.startswith("--"):
            if not positional:
                given |= read_config(argument, fields)
                continue
            argument = f"--{positional}={argument}"
        name, value = read_option(argument, fields)
        if fields[name].type == TEXTS:
            value = (*given.get(name, ()), *value)
        elif name == positional and name in given:
            raise UserError(f"{name} is given twice, as {given[name]} and {value}; give only one")
        given[name] = value
    return given


def typed_keys(argv: list[str]) -> set[str]:
    """Return the keys that a command sets itself rather than by a config file."""
    return {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}


def read_option(argument: str, fields: Fields) -> tuple[str, object]:
    """Split --key=value into the key and its value."""
    name, equals, text = argument[2:].partition("=")
    check_key(name, fields)
    if not equals:
        value = "True" if bool in kinds_of(fields[name].type) else "VALUE"
        raise UserError(f"{argument} has no value; write {argument}={value}")
    return name, parse(name, text, fields[name].type)


def check_key(name: str, fields: Fields, more: str = "") -> None:
    """Raise UserError if no field has this name. more: the end of the message."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists all keys"
        raise UserError(f"unknown key {name}; {advice}{more}")


def kinds_of(hint: object) -> tuple[type, ...]:
    """List the types that a type hint allows, such as (int, NoneType)."""
    return typing.get_args(hint) or (hint,)


def parse(name: str, text: str, hint: object) -> object:
    """Convert the text after --key= to a value. It is parsed as a Python literal unless the key takes strings."""
    kinds = kinds_of(hint)
    if text == "None" and types.NoneType in kinds:
        return None
    if text == "":
        raise UserError(f"{name}= must not be empty; write --{name}=VALUE, or leave it out")
    if str in kinds:
        return convert(name, text, hint)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    return convert(name, value, hint)


def convert(name: str, value: object, hint: object) -> object:
    """Return a value, or raise UserError if its key does not accept values of this type.

    If the key takes a float, an int of up to 64 bits becomes one, and if it can be repeated, a single text becomes a
    tuple. A bool does not count as a number. A ~ that the shell did not expand is replaced by the home folder.
    """
    if hint == TEXTS:
        texts = value if type(value) in (tuple, list) else (value,)
        return tuple(convert(name, text, str) for text in texts)
    kinds = kinds_of(hint)
    if float in kinds and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{name}={value!r} must be {inspect.formatannotation(hint)}")
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)  # noqa: PTH111, since pathlib.Path drops the trailing slash of "folder/"
    return value


# --------------------------------------------------------------------------------------
# Config files


def read_config(path: str, fields: Fields) -> dict[str, object]:
    """Run a config file, or read the config.json of a run. Returns {key: value} for the keys that it sets.

    Modules, functions and names that start with _ are the file's own helpers, not keys.
    """
    is_json = path.endswith(".json")
    if not (is_json or path.endswith(".py")) or not os.path.isfile(path):
        raise UserError(f"{path} is not a config file; a key is set with --key=value")
    if not is_json:
        names = run_config(path)
    found = {}
    with as_user_error(f"{path}: "):
        if is_json:
            names = dict(json.loads(Path(path).read_bytes()))
        for name, value in names.items():
            helper = isinstance(value, types.ModuleType) or callable(value)
            if name.startswith("_") or (helper and name not in fields):
                continue
            own = "" if is_json else " (a variable of your own begins with _)"
            check_key(name, fields, own)
            found[name] = convert(name, value, fields[name].type)
    return found


def run_config(path: str) -> dict[str, object]:
    """Run a config file and return all names that it defines. If it fails, raises UserError with the line number."""
    try:
        return runpy.run_path(path)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = max(lines, default=getattr(error, "lineno", 0))  # a SyntaxError has lineno
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error
