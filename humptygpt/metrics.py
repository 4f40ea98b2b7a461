"""metrics.jsonl, one JSON object a line, read back: a kill may have cut its last line, a disk damaged any."""

import json
from pathlib import Path

MEASURED = (
    "position",
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "val_tokens",
    "whole_iter",
    "whole_val_loss",
    "whole_val_bits_per_byte",
    "whole_val_tokens",
    "test_bleu",
)


def read_metrics(path: Path) -> list[dict | None]:
    """Return the rows of a metrics.jsonl, None for a damaged one; no rows if there is no such file.

    A last line without a line break is left out: it is being written, or a kill has cut it.
    """
    if not path.exists():
        return []
    return [parse_row(line) for line in path.read_bytes().split(b"\n")[:-1]]


def parse_row(line: bytes) -> dict | None:
    """Return a row, or None unless all numbers that are read later are finite, not negative and below 1e18."""
    try:
        row = json.loads(line)
        numbers = [row[key] for key in ("iter", "tokens", "seconds")]
        numbers += [row[key] for key in MEASURED if key in row]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    valid = all(type(number) in (int, float) and 0 <= number < 1e18 for number in numbers)
    # an evaluation records both; if one is missing, bytes of its name have changed
    whole = ("val_loss" in row) == ("val_bits_per_byte" in row)
    return row if valid and whole else None
