"""Config files and command lines -> checked dataclasses.

    python train.py config/a.py config/b.py --learning_rate=1e-3

A config file is plain Python, `key = value  # why`. Sources apply from left to right, so the last one wins. The keys,
their types, defaults, help and rules are the fields of the dataclasses that a script names, each declared by setting().
"""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import operator
import os
import runpy
import shlex
import sys
import traceback
import types
import typing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "config"
Fields = dict[str, dataclasses.Field]  # of several config classes, by key
# the type of a key that takes several texts: --key=ONE --key=ANOTHER
TEXTS = tuple[str, ...]
BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


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
    """Return the message of an error in one line of printable characters: it may quote a stranger's file."""
    return "".join(char if char.isprintable() else " " for char in str(error)[:1000])


def note(text: str) -> None:
    """Print a note to stderr: what the user may not expect, and need not fix. Of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


# --------------------------------------------------------------------------------------
# Keys and their rules


def setting(
    default: object,
    help: str,
    group: str | None = None,
    *,
    choices: Collection[str] | None = None,
    path: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    only_with: dict[str, object] | None = None,
    not_with: dict[str, object] | None = None,
) -> typing.Any:
    """Return a field of a config class, with its line in --help and the rules of check() and without_effect().

    group: the title under which it and the keys after it stand in --help. choices: the values that are allowed, often
    the dictionary of variants itself. path: it names files or folders, so that ~ stands for the home folder; with
    choices, so does a value that is none of them. only_with, not_with: {other key: value, or a tuple of values}; where
    the other key has none of them, or one of them, this key does nothing.
    """
    rules = dict(locals())
    for key in ("only_with", "not_with"):
        rules[key] = {
            other: values if isinstance(values, tuple) else (values,)
            for other, values in (rules[key] or {}).items()
        }
    return dataclasses.field(default=rules.pop("default"), metadata=rules)


def check(config: object) -> None:
    """Raise ValueError for the first value that breaks a rule of its key. None passes; inf and nan obey no limit."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        rules = field.metadata
        if value is None:
            continue
        choices = rules["choices"]
        if choices and value not in choices and not rules["path"]:
            raise ValueError(f"{field.name}={value} is not one of: {', '.join(choices)}")
        bounds = {name: rules[name] for name in BOUNDS if rules[name] is not None}
        obeyed = all(BOUNDS[name](value, bound) for name, bound in bounds.items())
        if bounds and not (obeyed and math.isfinite(value)):
            rule = " and ".join(
                f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items()
            )
            raise ValueError(f"{field.name}={value} must be {rule}")


def fields_of(classes: tuple[type, ...]) -> Fields:
    return {field.name: field for cls in classes for field in dataclasses.fields(cls)}


def without_effect(settings: dict[str, object], *classes: type) -> dict[str, str]:
    """Return {key: why} of the keys that do nothing in these settings, as {"rope_base": "without position=rotary"}.

    Nor does a key do anything whose only_with names a key that does nothing; a not_with of such a key says nothing.
    """
    rules = {name: field.metadata for name, field in fields_of(classes).items()}

    def reason(name: str) -> str | None:
        if name not in rules:
            return None
        for other, values in rules[name]["only_with"].items():
            if why := reason(other):
                return why
            if settings[other] not in values:
                return f"without {other}={' or '.join(map(str, values))}"
        for other, values in rules[name]["not_with"].items():
            if settings[other] in values and not reason(other):
                return f"with {other}={settings[other]}"
        return None

    reasons = {name: reason(name) for name in rules}
    return {name: why for name, why in reasons.items() if why}


def note_without_effect(settings: dict, given: dict, *classes: type) -> None:
    """Report the keys that the user set, given, and that do nothing in these settings."""
    for key, why in without_effect(settings, *classes).items():
        if key in given:
            note(f"{key}={settings[key]} has no effect {why}")


def make(cls: type, values: dict[str, object]):
    """Return an instance of a config class from those of the values that are its fields. Raises UserError."""
    values = {name: values[name] for name in fields_of((cls,)) if name in values}
    with refuse():
        return cls(**values)


def restore(cls: type, values: dict[str, object]):
    """As make(), from what a file holds: keys must be known, types right; a missing key has its default."""
    fields = fields_of((cls,))
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"it has the key {name}, which this code lacks")
        convert(name, value, fields[name].type)
    return make(cls, values)


# --------------------------------------------------------------------------------------
# The command line


def read(
    argv: list[str], *classes: type, positional: str | None = None
) -> dict[str, object]:
    """Return what the user set: {key: value} from config files and --key=value, with known keys and the right types.

    positional: the key that a bare argument sets, or adds to where it takes several texts; None: a bare argument is a
    config file.
    Raises UserError. Prints help and exits where --help is among the arguments.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(*classes, positional=positional))
        sys.exit(0)
    fields = fields_of(classes)
    given = {}
    for argument in argv:
        if argument.startswith("--"):
            name, value = read_option(argument, fields)
        elif positional:
            name = positional
            value = parse(name, argument, fields[name].type)
        elif "input" in given and os.path.isfile(argument) and argument[-3:] != ".py":
            raise UserError(
                f"input is one file or folder, and {argument} another one; for several files name their folder,"
                " or a pattern in quotes, as --input='texts/*.txt'"
            )
        else:
            given |= read_config(argument, fields)
            continue
        if fields[name].type == TEXTS:
            value = given.get(name, ()) + value
        elif name == positional and given.get(name, value) != value:
            both = f"{shlex.quote(given[name])} and {shlex.quote(value)}"
            raise UserError(f"{name} is given twice, as {both}; leave one out")
        given[name] = value
    for name in given:
        if fields[name].metadata["path"]:
            given[name] = check_path(f"{name}=", given[name])
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


def check_path(
    before: str, value: str | tuple[str, ...] | None
) -> str | tuple[str, ...] | None:
    """Return the path, or each of several, with the home folder in place of ~, which shells leave alone in --key=~/x.

    before: what the user wrote before it. Raises UserError where it is empty.
    """
    if isinstance(value, tuple):
        return tuple(check_path(before, path) for path in value)
    if value == "":
        raise UserError(f"{before} must not be empty; write --{before}PATH")
    return value and os.path.expanduser(value)  # noqa: PTH111, since a pathlib.Path loses the end of "folder/"


def kinds_of(hint: object) -> tuple[type, ...]:
    """Return the types that a key's type hint allows, such as (int, NoneType)."""
    return typing.get_args(hint) or (hint,)


def parse(name: str, text: str, hint: object) -> object:
    """Return the value that a command line's text stands for: the text where the key takes text, else a literal."""
    kinds = kinds_of(hint)
    if text == "None" and types.NoneType in kinds:
        return None
    if hint == TEXTS:
        return (text,)
    if str in kinds:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(value, tuple):  # 1,000
        value = text
    return convert(name, value, hint)


def convert(name: str, value: object, hint: object) -> object:
    """Return the value, if it has the key's type: a whole number passes as a float, and True is not a number."""
    kinds = kinds_of(hint)
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{name} must be a number of at most 64 bits")
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{name}={value!r} must be {inspect.formatannotation(hint)}")
    return value


def help_text(*classes: type, positional: str | None = None) -> str:
    """Return every key with its type, default and one line, by group, below the docstring of the script."""
    fields = fields_of(classes)
    several = " ..." if positional is None or fields[positional].type == TEXTS else ""
    bare = f"[{(positional or 'config_file').upper()}{several}]"
    about = sys.modules["__main__"].__doc__ or ""
    lines = [f"usage: python {script_name()} {bare} [--key=value ...]", "", about.strip()]
    for name, field in fields.items():
        rules = field.metadata
        if rules["group"]:
            lines += ["", f"{rules['group']}:"]
        kind = inspect.formatannotation(field.type)
        choices = f"; one of: {', '.join(rules['choices'])}" if rules["choices"] else ""
        key = f"--{name}={field.default}"
        lines.append(f"  {key:<40} {kind:<16}{rules['help']}{choices}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# Config files


def read_config(path: str, fields: Fields) -> dict[str, object]:
    """Run a config file, or read a training's config.json, and return the keys that it sets.

    Names that start with _, modules and functions are the file's own.
    """
    endings = (".py", ".json") if "max_iters" in fields else ".py"
    if not path.endswith(endings) or not os.path.isfile(path):
        raise UserError(f"{path} is not a config file{other_argument(path, fields)}")
    if path.endswith(".json"):
        with refuse(f"{path}: "):
            names = parse_json(Path(path).read_bytes(), {})
    else:
        try:
            names = runpy.run_path(path)
        except SyntaxError as error:
            raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == path]
            problem = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}:{max(lines, default=0)}: {problem}") from error
    given = {}
    for name, value in names.items():
        helper = isinstance(value, types.ModuleType) or callable(value)
        if name.startswith("_") or (helper and name not in fields):
            continue
        check_key(name, fields, f"{path}: ")
        given[name] = convert(name, value, fields[name].type)
    return given


def other_argument(path: str, fields: Fields) -> str:
    """Return what to write instead of an argument that is not a config file: "; write ...", or ""."""
    if "=" in path:
        return f"; for a key write {shlex.quote('--' + path.lstrip('-'))}"
    if os.path.exists(path) and "out_dir" in fields:
        resume = "" if fields["init_from"].default == "resume" else "--init_from=resume "
        folder = Path(path).parent if os.path.isfile(path) else path
        return f"; for the run in it write {resume}{shlex.quote(f'--out_dir={folder}')}"
    ours = our_configs()
    near = nearest_path(path, ".py")
    if not near and (name := nearest(Path(path).stem, ours)):
        near = f"; did you mean {shlex.quote(ours[name])}?"
    if not near and "start" in fields and " " in path:
        near = f"; for a prompt write {shlex.quote(f'--start={path}')}"
    return near


def our_configs() -> dict[str, str]:
    """Return {name: path} of the config files of this project."""
    return {file.stem: os.path.relpath(file) for file in sorted(CONFIGS.rglob("*.py"))}


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the one of the known names that a mistyped one is probably meant to be."""
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
# What a file must hold, declared as data: a file may be damaged, foreign or hostile


def parse_json(text: str | bytes, schema: object) -> dict:
    """Return the content of a JSON file, which fits the schema. Raises ValueError, in one line, where it does not."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_schema(content, schema)
    return content


def check_schema(value: object, schema: object, name: str = "") -> None:
    """Raise ValueError, which names the entry, unless value fits schema.

    A schema is
        a type               the value's own; an integer of 64 bits is a float, too, but a boolean is no integer
        None                 None
        {"a", "b"}           one of these strings
        range(1, 10)         an integer in the range
        [schema]             a list of any length
        {str: schema}        a dictionary with any strings as keys
        {"a": schema, ...}   a dictionary with these keys and perhaps others; a key written "a?" may be missing
        (schema, ...)        one of several schemas of different types
    """
    options = schema if isinstance(schema, tuple) else (schema,)
    fitting = [option for option in options if is_kind(value, option)]
    if not fitting:
        raise ValueError(
            f"{name or 'the content'} must be {' or '.join(map(describe, options))}"
        )
    form = fitting[0]
    if isinstance(form, dict) and any(type(key) is not str for key in value):
        raise ValueError(f"{name or 'the content'} must have strings as keys")
    if isinstance(form, list):
        for number, item in enumerate(value):
            check_schema(item, form[0], f"{name}[{number}]")
    elif isinstance(form, dict) and str in form:
        for key, item in value.items():
            check_schema(
                item, form[str], f"{name}.{key if key.isprintable() else repr(key)}"
            )
    elif isinstance(form, dict):
        for declared, rule in form.items():
            key = declared.removesuffix("?")
            path = f"{name}.{key}" if name else key
            if key in value:
                check_schema(value[key], rule, path)
            elif key == declared:
                raise ValueError(f"{path} is missing")


def is_kind(value: object, schema: object) -> bool:
    """Whether value fits the schema as far as can be seen without looking into lists and dictionaries."""
    if isinstance(schema, set | range):
        return type(value) is (str if isinstance(schema, set) else int) and value in schema
    kind = kind_of(schema)
    whole_number = type(value) is int and abs(value) < 2**63
    return type(value) is kind or (kind is float and whole_number)


def describe(schema: object) -> str:
    if isinstance(schema, set):
        return " or ".join(sorted(schema))
    if isinstance(schema, range):
        return f"an int from {schema.start:,} to {schema.stop - 1:,}"
    return "None" if schema is None else kind_of(schema).__name__


def kind_of(schema: object) -> type:
    return schema if isinstance(schema, type) else type(schema)


def script_name() -> str:
    return Path(sys.argv[0]).name


def as_written_here(command: str) -> str:
    """Return a command such as "python train.py", with the folder that the user wrote before the present script."""
    script = command.split()[1]
    path = os.path.join(os.path.dirname(sys.argv[0]), script)  # noqa: PTH118, PTH120, since "" stays ""
    return (
        command.replace(script, shlex.quote(path), 1) if os.path.exists(path) else command
    )
