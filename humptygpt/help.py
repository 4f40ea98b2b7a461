"""What --help prints: the keys of a script, with the comments after the fields of its config classes."""

import dataclasses
import inspect
import sys
from pathlib import Path


def help_text(*classes: type, bare: str = "[CONFIG_FILE ...]") -> str:
    """Format the help: the script's docstring, then all keys by group, each with its default, type and comment.

    bare: what may be given without a key.
    """
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
    about = sys.modules["__main__"].__doc__ or ""
    lines = [
        f"usage: python {Path(sys.argv[0]).name} {bare} [--key=value ...]",
        "",
        about.strip(),
    ]
    choices = {name: names for cls in classes for name, names in cls.choices().items()}
    group = None
    for name, (title, text) in comments_of(*classes).items():
        if [*choices.get(name, ())] == [fields[name].default]:
            continue  # there is nothing to choose, unless an edited model.py adds a second one
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
    """Read comments from the source of dataclasses. Returns {field: (title of its group, the comment after it)}."""
    comments = {}
    for cls in [base for each in classes for base in each.__mro__[-2::-1]]:
        names = {field.name for field in dataclasses.fields(cls)}
        title = cls.__name__
        for line in inspect.getsource(cls).splitlines():
            code, _, text = line.partition("  # ")
            name = code.partition(":")[0].strip()
            if name in names:
                comments[name] = title, text
            elif text and not name:
                title = text
    return comments
