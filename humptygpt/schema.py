"""Check a file against a schema of its expected content. A file may be damaged, malicious or from another program."""

import json


def parse_json(text: str | bytes, schema: object) -> dict:
    """Parse a JSON file's text. Raises ValueError, with a one-line message, unless the content fits the schema."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_schema(content, schema)
    return content


def check_schema(value: object, schema: object, name: str = "") -> None:
    """Raise ValueError, naming the offending entry, unless value fits the schema. name: value's path, for messages.

    A schema is
        a type               a value of exactly this type (a bool is not an int); a 64-bit int also counts as a float
        None                 None
        {"a", "b"}           one of these strings
        range(1, 10)         an integer in the range
        [schema]             a list of any length
        {str: schema}        a dictionary whose keys are any strings
        {"a": schema, ...}   a dictionary with at least these keys; one written "a?" may be missing
        (schema, ...)        any one of these schemas, which must be of different types
    """
    what = name or "the content"
    options = schema if isinstance(schema, tuple) else (schema,)
    fitting = [option for option in options if is_kind(value, option)]
    if not fitting:
        raise ValueError(f"{what} must be {' or '.join(map(describe, options))}")
    form = fitting[0]
    if isinstance(form, list):
        for number, item in enumerate(value):
            check_schema(item, form[0], f"{name}[{number}]")
    if not isinstance(form, dict):
        return
    if any(type(key) is not str for key in value):
        raise ValueError(f"{what} must have strings as keys")
    if str in form:
        for key, item in value.items():
            check_schema(
                item, form[str], f"{name}.{key if key.isprintable() else repr(key)}"
            )
    else:
        for declared, rule in form.items():
            key = declared.removesuffix("?")
            path = f"{name}.{key}" if name else key
            if key in value:
                check_schema(value[key], rule, path)
            elif key == declared:
                raise ValueError(f"{path} is missing")


def is_kind(value: object, schema: object) -> bool:
    """True if value fits the schema at its outermost level; the items of lists and dictionaries are not checked."""
    if isinstance(schema, set | range):
        return type(value) is (str if isinstance(schema, set) else int) and value in schema
    if schema is float and type(value) is int:
        return abs(value) < 2**63
    return type(value) is kind_of(schema)


def describe(schema: object) -> str:
    if isinstance(schema, set):
        return " or ".join(sorted(schema))
    if isinstance(schema, range):
        return f"an int from {schema.start:,} to {schema.stop - 1:,}"
    return "None" if schema is None else kind_of(schema).__name__


def kind_of(schema: object) -> type:
    return schema if isinstance(schema, type) else type(schema)
