"""Config files and command lines -> dataclasses.

    python train.py config/a.py config/b.py --learning_rate=1e-3

A config file is plain Python, `key = value  # why`. Files and keys apply from left to right, so the last one wins. The
keys of a script are the fields of its dataclasses, and the comment behind a field is its help:

    n_head: int = 4  # attention heads in a block

A comment on a line of its own begins a group of keys. A config class has two methods: choices() returns {key: the
variants that it can name}, and validate() raises ValueError.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import runpy
import shlex
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from humptygpt.schema import parse_json

CONFIGS = Path(__file__).parent.parent / "config"
Fields = dict[str, dataclasses.Field]  # of several config classes, by key
# The type of a key that takes several texts: --key=ONE --key=ANOTHER
TEXTS = tuple[str, ...]


class UserError(Exception):
    """A mistake that the user can fix. Shown as one line: the value, the rule, the fix.

    It is no ValueError, so that no `except ValueError` takes a finished message for the reason of another one.
    """


@contextmanager
def refuse(start: str = "") -> Iterator[None]:
    """Turn a ValueError of the block into a UserError that begins with `start`, which says where; also a UserError.

    Call no code that users write in the block, except for the validation of settings: a bug must keep its traceback.
    """
    try:
        yield
    except (ValueError, UserError) as error:
        raise UserError(start + one_line(error)) from error


def one_line(error: BaseException | str) -> str:
    """Return the message of an error in one line of printable characters: it may quote an untrusted file."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:1000])


def find(entry: str) -> typing.Any:
    """Import what an entry of a table names, such as "model:GPT"."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def note(text: str) -> None:
    """Print a note to stderr: something unexpected that needs no fix. Of several processes, only the first prints."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Values -> dataclasses


def make(cls: type, values: dict[str, object]):
    """Return a validated instance of a config class from those of the values that are its fields. Raises UserError."""
    config = cls(**{name: values[name] for name in fields_of(cls) if name in values})
    with refuse():
        config.validate()
    return config


def restore(cls: type, values: dict[str, object]):
    """Like make(), but for values from a file: every key must be known and have its type. Raises UserError."""
    fields = fields_of(cls)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"it has the key {name}, which this code lacks")
        convert(name, value, fields[name].type)
    return make(cls, values)


def fields_of(*classes: type) -> Fields:
    return {field.name: field for cls in classes for field in dataclasses.fields(cls)}


def check_choices(config: object) -> None:
    """Raise ValueError if a key that names a variant names none that exists."""
    for name, choices in config.choices().items():
        value = getattr(config, name, None)
        if value is not None and value not in choices:
            raise ValueError(f"{name}={value} is not one of: {', '.join(choices)}")


def check_least(config: object, least: float, *names: str) -> None:
    """Raise ValueError unless each of these numbers is at least this large and finite. None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"{name}={value} must be at least {least:g}")


def check_above_0(config: object, *names: str) -> None:
    """Raise ValueError unless each of these numbers is above 0 and finite. None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be above 0")


def check_fraction(config: object, *names: str) -> None:
    """Raise ValueError unless each of these numbers is at least 0 and below 1. None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be at least 0 and below 1")


def in_vain(
    given: Collection[str], settings: dict, table: dict[str, tuple[str, tuple]]
) -> dict[str, str]:
    """Return {key: why} of the given keys that do nothing in these settings.

    table: {key: (another key, the values of that with which the first does nothing)}.
    """
    return {
        key: f"{key}={settings[key]} has no effect with {other}={settings[other]}"
        for key, (other, values) in table.items()
        if key in given and settings[other] in values
    }


# --------------------------------------------------------------------------------------
# The command line


def read(
    argv: list[str], *classes: type, positional: str | None = None
) -> dict[str, object]:
    """Return what the user set, {key: value}, from config files and --key=value. Raises UserError.

    positional: the key that a bare argument sets, or adds to if it takes several texts; None: a bare argument is a
    config file. Prints the help and exits if --help is among the arguments.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(*classes, positional=positional))
        sys.exit(0)
    fields = fields_of(*classes)
    given = {}
    for argument in argv:
        if argument.startswith("--"):
            name, value = read_option(argument, fields)
        elif positional:
            name = positional
            value = parse(name, argument, fields[name].type)
        else:
            given |= read_config(argument, fields, given)
            continue
        if fields[name].type == TEXTS:
            value = given.get(name, ()) + value
        elif name == positional and given.get(name, value) != value:
            both = f"{shlex.quote(given[name])} and {shlex.quote(value)}"
            raise UserError(f"{name} is given twice, as {both}; leave one out")
        given[name] = value
    return given


def read_option(argument: str, fields: Fields) -> tuple[str, object]:
    """Return key and value of --key=value."""
    name, equals, text = argument[2:].partition("=")
    check_key(name, fields)
    if not equals:
        value = "True" if bool in kinds_of(fields[name].type) else "VALUE"
        raise UserError(f"{argument} has no value; write {argument}={value}")
    return name, parse(name, text, fields[name].type)


def check_key(name: str, fields: Fields, where: str = "") -> None:
    if name in fields:
        return
    near = nearest(name, fields)
    advice = f"did you mean {near}?" if near else "--help lists all keys"
    if name == "config":
        advice = "a config file is named without a key: config/mine.py"
    raise UserError(f"{where}unknown key {name}; {advice}")


def kinds_of(hint: object) -> tuple[type, ...]:
    """Return the types that a type hint allows, such as (int, NoneType)."""
    return typing.get_args(hint) or (hint,)


def parse(name: str, text: str, hint: object) -> object:
    """Turn the text behind --key= into a value: text if the key takes text, otherwise a Python literal."""
    kinds = kinds_of(hint)
    if text == "None" and types.NoneType in kinds:
        return None
    if text == "":
        raise UserError(f"{name}= must not be empty; write --{name}=VALUE, or leave it out")
    if hint == TEXTS:
        return (convert(name, text, str),)
    if str in kinds:
        return convert(name, text, hint)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(value, tuple):  # as 1,000 is
        value = text
    return convert(name, value, hint)


def convert(name: str, value: object, hint: object) -> object:
    """Return the value as its key takes it. Raises UserError if it has another type.

    A whole number passes as a float, and True is not a number. ~ is the home folder, also where the shell leaves it.
    """
    kinds = kinds_of(hint)
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{name} must be a number of at most 64 bits")
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{name}={value!r} must be {inspect.formatannotation(hint)}")
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)  # noqa: PTH111, since a pathlib.Path loses the end of "folder/"
    return value


# --------------------------------------------------------------------------------------
# Config files


def read_config(path: str, fields: Fields, given: dict[str, object]) -> dict[str, object]:
    """Run a config file, or read a training's config.json, and return the keys that it sets.

    Names that start with _, modules and functions are the file's own. given: what is set before it.
    """
    endings = (".py", ".json") if "max_iters" in fields else ".py"
    if not path.endswith(endings) or not os.path.isfile(path):
        advice = other_argument(path, fields, given)
        raise UserError(f"{path} is not a config file{advice}")
    if path.endswith(".json"):
        with refuse(f"{path}: "):
            names = parse_json(Path(path).read_bytes(), {})
    else:
        names = run_config(path)
    found = {}
    for name, value in names.items():
        helper = isinstance(value, types.ModuleType) or callable(value)
        if name.startswith("_") or (helper and name not in fields):
            continue
        check_key(name, fields, f"{path}: ")
        found[name] = convert(name, value, fields[name].type)
    return found


def run_config(path: str) -> dict[str, object]:
    """Run a config file and return all its names. An error is told with its line."""
    try:
        return runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}:{max(lines, default=0)}: {problem}") from error


def other_argument(path: str, fields: Fields, given: dict[str, object]) -> str:
    """Suggest what to write instead of an argument that is not a config file: "; write ...", or ""."""
    if "=" in path:
        return f"; for a key write {shlex.quote('--' + path.lstrip('-'))}"
    if "input" in given and os.path.isfile(path):
        return "; for several files of text name their folder, or a pattern in quotes: --input='texts/*.txt'"
    if os.path.exists(path) and "out_dir" in fields:
        resume = "" if fields["init_from"].default == "resume" else "--init_from=resume "
        folder = Path(path).parent if os.path.isfile(path) else path
        return f"; for the run in it write {resume}{shlex.quote(f'--out_dir={folder}')}"
    if "start" in fields and " " in path:
        return f"; for a prompt write {shlex.quote(f'--start={path}')}"
    ours = our_configs()
    near = nearest_path(path, ".py")
    if not near and (name := nearest(Path(path).stem, ours)):
        near = f"; did you mean {shlex.quote(ours[name])}?"
    return near


def our_configs() -> dict[str, str]:
    """Return {name: path} of the config files of this project."""
    return {file.stem: os.path.relpath(file) for file in sorted(CONFIGS.rglob("*.py"))}


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that a mistyped one is probably meant to be."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def nearest_path(path: str, ending: str = "") -> str:
    """Return "; did you mean ...?" with the name in its folder nearest to a path that does not exist, or ""."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        names = os.listdir(folder or ".")  # noqa: PTH208, since the path is to be written as the user did
    except (OSError, ValueError):
        return ""
    near = nearest(name, [known for known in names if known.endswith(ending)])
    return f"; did you mean {shlex.quote(os.path.join(folder, near))}?" if near else ""  # noqa: PTH118


# --------------------------------------------------------------------------------------
# Help


def help_text(*classes: type, positional: str | None = None) -> str:
    """Return every key with its type, default and comment, by group, below the docstring of the script."""
    fields = fields_of(*classes)
    several = " ..." if positional is None or fields[positional].type == TEXTS else ""
    bare = f"[{(positional or 'config_file').upper()}{several}]"
    about = sys.modules["__main__"].__doc__ or ""
    lines = [f"usage: python {script_name()} {bare} [--key=value ...]", "", about.strip()]
    choices = {name: names for cls in classes for name, names in cls.choices().items()}
    group = None
    for name, (title, text) in comments_of(*classes).items():
        if title != group:
            lines += ["", f"{title}:"]
            group = title
        if name in choices:
            text += f"; one of: {', '.join(choices[name])}"
        key = f"--{name}={fields[name].default}"
        kind = inspect.formatannotation(fields[name].type)
        lines.append(f"  {key:<40} {kind:<16}{text}")
    return "\n".join(lines)


def comments_of(*classes: type) -> dict[str, tuple[str, str]]:
    """Return {field: (the title of its group, the comment behind it)} from the source of dataclasses."""
    comments = {}
    for cls in classes:
        names = fields_of(cls)
        source = inspect.getsource(cls)
        title = cls.__name__
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT:
                continue
            text = token.string.lstrip("# ")
            name = token.line.split(":")[0].strip()
            if name in names:
                comments[name] = title, text
            elif token.line.strip() == token.string:
                title = text
    return comments


def script_name() -> str:
    return Path(sys.argv[0]).name


def as_written_here(command: str) -> str:
    """Return a command such as "python train.py", with the folder that the user wrote before the present script."""
    script = command.split()[1]
    path = os.path.join(os.path.dirname(sys.argv[0]), script)  # noqa: PTH118, PTH120, since "" stays ""
    return (
        command.replace(script, shlex.quote(path), 1) if os.path.exists(path) else command
    )
