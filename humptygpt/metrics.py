"""Read metrics.jsonl, one JSON object per line.

A killed run may leave an incomplete last line, and a failing disk may damage any line.
"""

import json
from pathlib import Path

# the numbers in a row that are read back later, besides iter, tokens and seconds
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
    """Read the rows of a metrics.jsonl: None for a damaged row, and no rows if there is no such file.

    A last line without a line break is incomplete and is left out.
    """
    if not path.exists():
        return []
    return [parse_row(line) for line in path.read_bytes().split(b"\n")[:-1]]


def parse_row(line: bytes) -> dict | None:
    """Parse a row. Returns None unless the numbers that are read back are finite, not negative and below 1e18."""
    try:
        row = json.loads(line)
        numbers = [row[key] for key in ("iter", "tokens", "seconds")]
        numbers += [row[key] for key in MEASURED if key in row]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    valid = all(type(number) in (int, float) and 0 <= number < 1e18 for number in numbers)
    # an evaluation records both losses; if one is missing, its name is damaged
    whole = ("val_loss" in row) == ("val_bits_per_byte" in row)
    return row if valid and whole else None
