"""Config files and command lines -> checked dataclasses.

    python train.py config/a.py config/b.py --learning_rate=1e-3

A config file is plain Python, `key = value  # why`. Sources apply from left to right, so the last one wins. The keys,
their types, defaults, help and rules are the fields of the dataclasses that a script names, each declared by setting().
"""

import ast
import dataclasses
import difflib
import errno
import json
import math
import operator
import os
import runpy
import shlex
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from humptygpt.core import limits
from humptygpt.core.errors import UserError

CONFIGS = Path(__file__).parent.parent.parent / "config"
NGRAMS = "a GPT alone reaches the same loss with a twentieth of the parameters"
# {key of an earlier version: why it was removed}
REMOVED = dict.fromkeys(
    ("ngrams", "ngram_dropout", "ngram_rows", "ngram_min_count", "ngram_learning_rate"), NGRAMS
)
TEXTS = tuple[str, ...]  # the type of a key that takes several texts: --key=ONE --key=ANOTHER


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
    """A field of a config class, with its line in --help and the rules that check() and without_effect() apply.

    group: the title under which it and the keys after it stand in --help. choices: the values that are allowed, often
    the dictionary of variants itself. path: it names files or folders, so that ~ stands for the home folder; with
    choices, so does a value that is none of them. only_with, not_with: {other key: value, or a tuple of values}; where
    the other key has none of them, or one of them, this key does nothing.
    """
    rules = dict(locals())
    return dataclasses.field(default=rules.pop("default"), metadata=rules)


LIMITS = {
    "at_least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def check(config: object) -> None:
    """Raise ValueError for the first value that breaks a rule of its key. None passes; inf and nan obey no limit."""
    for field in dataclasses.fields(config):
        value, rules = getattr(config, field.name), field.metadata
        if value is None:
            continue
        if rules["choices"] is not None and value not in rules["choices"] and not rules["path"]:
            raise ValueError(f"{field.name}={value} is not one of: {', '.join(rules['choices'])}")
        limits = [
            (words, holds, rules[limit])
            for limit, (words, holds) in LIMITS.items()
            if rules[limit] is not None
        ]
        if limits and not (
            math.isfinite(value) and all(holds(value, bound) for _, holds, bound in limits)
        ):
            rule = " and ".join(f"{words} {bound}" for words, _, bound in limits)
            raise ValueError(f"{field.name}={value} must be {rule}")


def without_effect(settings: dict[str, object], *classes: type) -> dict[str, str]:
    """{key: why} of the keys that do nothing in these settings, such as {"rope_base": "without position=rotary"}.

    Nor does a key do anything whose only_with names a key that does nothing; a not_with of such a key says nothing.
    """
    rules = {field.name: field.metadata for cls in classes for field in dataclasses.fields(cls)}

    def reason(name: str) -> str | None:
        for word, others in (
            ("without", rules[name]["only_with"]),
            ("with", rules[name]["not_with"]),
        ):
            for other, values in (others or {}).items():
                values = values if isinstance(values, tuple) else (values,)
                if why := reason(other) if other in rules else None:
                    if word == "without":
                        return why
                elif (settings[other] in values) == (word == "with"):
                    shown = settings[other] if word == "with" else " or ".join(map(str, values))
                    return f"{word} {other}={shown}"
        return None

    return {name: why for name in rules if (why := reason(name))}


def read(argv: list[str], *classes: type, positional: str | None = None) -> dict[str, object]:
    """What the user set: {key: value} from config files and --key=value, with known keys and the right types.

    positional: the key that a bare argument sets, or adds to where it takes several texts; None: a bare argument is a
    config file.
    Raises UserError. Prints help and exits where --help is among the arguments.
    """
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    paths = {
        field.name for cls in classes for field in dataclasses.fields(cls) if field.metadata["path"]
    }
    if "--help" in argv or "-h" in argv:
        print(help_text(*classes, positional=positional))
        sys.exit(0)
    given, bare = {}, []
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            check_key(name, hints, "")
            if not equals:
                value = (
                    "True"
                    if bool in (typing.get_args(hints[name]) or (hints[name],))
                    else following
                )
                value = value if value and not value.startswith("--") else "VALUE"
                raise UserError(
                    f"{argument} has no value; write {shlex.quote(f'--{name}={value}')}"
                )
            value = parse(name, text, hints[name])
            given[name] = (*given.get(name, ()), *value) if hints[name] == TEXTS else value
        elif positional is not None and hints[positional] == TEXTS:
            given[positional] = (*given.get(positional, ()), argument)
        elif positional is not None:
            bare.append(argument)
        else:
            given.update(read_file(argument, hints))
    if bare:
        values = [*bare, *([given[positional]] if positional in given else [])]
        if len(set(values)) > 1:
            first, second = map(shlex.quote, values[:2])
            raise UserError(f"{positional} is given twice, as {first} and {second}; leave one out")
        given[positional] = bare[0]
    if classes[-1].__module__ == "__main__":  # a script was started, and is not imported
        note_folder(Path(sys.modules["__main__"].__file__))
    return {
        name: check_path(f"{name}=", value) if name in paths else value
        for name, value in given.items()
    }


def check_path(before: str, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """The path, or each of several, with the home folder in place of ~, which shells leave alone in --key=~/file.

    before: what the user wrote before it. Raises UserError for what cannot be a path.
    """
    if isinstance(value, tuple):
        return tuple(check_path(before, path) for path in value)
    if value is None:
        return None
    if not value:
        raise UserError(f"{before} must not be empty; write --{before}PATH")
    if "\0" in value:
        raise UserError(f"{before}{value!r} has a null byte, which no path can have")
    return os.path.expanduser(value)  # noqa: PTH111, since a pathlib.Path loses the end of "folder/"


def as_written_here(command: str) -> str:
    """A command of a script in the root, as "python train.py", with the folder that the user wrote before this one."""
    script, folder = command.split()[1], os.path.dirname(sys.argv[0])  # noqa: PTH120, since "" stays ""
    if not folder or not os.path.exists(os.path.join(folder, script)):  # noqa: PTH118
        return command
    return command.replace(script, shlex.quote(os.path.join(folder, script)), 1)  # noqa: PTH118


def note_folder(script: Path) -> None:
    """Say which data/ and out/ are meant where a script is started from another folder than its own."""
    if (here := Path.cwd()) != script.resolve().parent and os.environ.get(
        "RANK", "0"
    ) == "0":  # once, by torchrun
        print(f"note: data/, out/ and other relative paths are in {here}", file=sys.stderr)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The one of the known names that a mistyped one is probably meant to be."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def nearest_path(path: str, ending: str = "") -> str:
    """ "; did you mean ...?" with the name in the same folder that is nearest to a path that does not exist, or ""."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        names = os.listdir(folder or ".")  # noqa: PTH208, since the path is to be written as the user did
    except (OSError, ValueError):
        return ""
    near = nearest(name, [found for found in names if found.endswith(ending)])
    return f"; did you mean {shlex.quote(os.path.join(folder, near))}?" if near else ""  # noqa: PTH118


def make(cls: type, values: dict[str, object]):
    """An instance of a config class from those of the values that are its fields. Raises UserError for a bad value."""
    names = {field.name for field in dataclasses.fields(cls)}
    try:
        return cls(**{name: value for name, value in values.items() if name in names})
    except ValueError as error:
        raise UserError(str(error)) from error


def restore(cls: type, values: dict[str, object]):
    """make() from what a file holds: keys must be known, types right; a missing key has its default."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        check_key(name, hints, "")
        convert(name, value, hints[name])
    return make(cls, values)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(argv) and exit with its code; a UserError becomes one line on stderr and exit code 2.

    So does memory that could not be allocated, and a full disk where nobody else answers for it, as for the output.
    """
    if main.__module__ == "__main__":  # a script was started
        limits.start()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has seen enough: python sample.py ... | head
        sys.stdout = None  # or Python would fail once more when it flushes at exit
        sys.exit(128 + 13)  # 13: SIGPIPE
    except Exception as error:
        if limits.is_out_of_memory(error):
            complain(limits.out_of_memory_line(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.stdout = None
            complain(f"cannot write {error.filename or 'the output'}: {error.strerror}")
        raise


def complain(line: str) -> typing.NoReturn:
    """Print what is wrong and exit. torchrun ends with a report of its own, in which the line comes last."""
    line = f"{Path(sys.argv[0]).name}: {line}"
    print(line, file=sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(path).write_text(json.dumps(report))
    sys.exit(2)


def check_key(name: str, hints: dict[str, object], where: str) -> None:
    if name in REMOVED:
        raise UserError(f"{where}{name} was removed: {REMOVED[name]}; leave it out")
    if name not in hints:
        near = nearest(name, hints)
        hint = f"did you mean {near}?" if near else "--help lists all keys"
        raise UserError(f"{where}unknown key {name}; {hint}")


def read_file(path: str, hints: dict[str, object]) -> dict[str, object]:
    """Run a config file and return its keys. Names that start with _, modules and functions are the file's own."""
    try:
        with Path(path).open("rb") as file:
            zipped = file.read(2) == b"PK"  # Python would run a program in it
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else "it has a null byte"
        shown = path if path.isprintable() else repr(path)
        raise UserError(
            f"cannot read config file {shown}: {reason}{other_argument(path, hints)}"
        ) from error
    if zipped:
        raise UserError(f"{path} is no config file{other_argument(path, hints)}")
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        raise UserError(
            f"{path}:{lines[-1] if lines else 0}: {type(error).__name__}: {error}"
        ) from error
    given = {}
    for name, value in names.items():
        helper = isinstance(value, types.ModuleType) or callable(value)
        if name.startswith("_") or (helper and name not in hints):
            continue
        check_key(name, hints, f"{path}: ")
        given[name] = convert(name, value, hints[name])
    return given


def other_argument(path: str, hints: dict[str, object]) -> str:
    """What to write instead of an argument that is no config file: "; write ...", or "" where nothing is near."""
    if "=" in path:
        return f"; for a key write {shlex.quote('--' + path.lstrip('-'))}"
    run = Path(path).parent if os.path.isfile(path) else path
    of_run = (
        f"; for the folder of a run write {shlex.quote(f'--out_dir={run}')}"
        if "out_dir" in hints
        else ""
    )
    if os.path.exists(path):
        return of_run
    ours = {file.stem: os.path.relpath(file) for file in sorted(CONFIGS.rglob("*.py"))}
    if near := nearest_path(path, ".py"):
        return near
    if near := ours.get(nearest(Path(path).stem, ours)):
        return f"; did you mean {shlex.quote(near)}?"
    if (
        "/" in path and not path.endswith(".py") and not any(Path(path).parent.glob("*.py"))
    ):  # out/x, not config/x
        return of_run
    return (
        f"; for a prompt write {shlex.quote(f'--start={path}')}"
        if "start" in hints and " " in path
        else ""
    )


def parse(name: str, text: str, hint: object) -> object:
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
        value = {"nan": float("nan"), "inf": float("inf"), "true": True, "false": False}.get(
            text.lower(), text
        )
    if isinstance(value, tuple):  # 1,000
        raise UserError(f"{name}={text} must be {type_name(hint)}, without commas")
    return convert(name, value, hint)


def convert(name: str, value: object, hint: object) -> object:
    """The value, if it has the key's type: a whole number passes as a float, and True is not a number."""
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) not in kinds:
        raise UserError(f"{name}={value!r} must be {type_name(hint)}")
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{name} must be an integer of 64 bits")
    return value


def type_name(hint: object) -> str:
    if hint == TEXTS:
        return "texts"
    names = {int: "int", float: "float", bool: "True or False", str: "text", types.NoneType: "None"}
    return " or ".join(names[kind] for kind in typing.get_args(hint) or (hint,))


def help_text(*classes: type, positional: str | None = None) -> str:
    """Every key with its type, default and one line, by group, under the first paragraphs of the script's docstring."""
    script = sys.modules[classes[-1].__module__]
    several = positional is None or any(
        typing.get_type_hints(cls).get(positional) == TEXTS for cls in classes
    )
    bare = f"[{(positional or 'config_file').upper()}{' ...' if several else ''}]"
    lines = [
        f"usage: python {Path(script.__file__).name} {bare} [--key=value ...]",
        "",
        script.__doc__.strip(),
    ]
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.metadata["group"]:
                lines += ["", f"{field.metadata['group']}:"]
            kind = (
                type_name(hints[field.name]).replace("True or False", "bool").replace(" or ", "|")
            )
            choices = field.metadata["choices"]
            listed = f"; one of: {', '.join(choices)}" if choices else ""
            lines.append(
                f"  --{field.name}={field.default}".ljust(42)
                + f" {kind:<11}{field.metadata['help']}{listed}"
            )
    return "\n".join(lines)
