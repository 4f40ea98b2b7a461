"""Put the styles and scripts of explain/ into a page, so that it is one file."""

import json
import re
import zlib
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "explain"


def fill(page: str, data: str = "") -> bytes:
    """Fill in a page of explain/: replace each placeholder, such as {{model.js}}, with what it names."""
    contents = {path.name: path.read_text(encoding="utf-8") for path in SOURCES.iterdir()}
    contents |= {"data": data, "checksum": f"{zlib.crc32(data.encode()):08x}"}
    return re.sub(r"\{\{([\w.]+)\}\}", lambda name: contents[name[1]], contents[page]).encode()


def to_text(data: dict) -> str:
    """Encode data as ASCII JSON with < escaped, so that it cannot end the <script> element that holds it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
