"""The texts on which the page can train a model."""

from pathlib import Path

from humptygpt.prepare.sources import RHYMES, write_wills


def playground_texts() -> dict[str, str]:
    """Return the texts by the names under which the page offers them."""
    sonnets = Path(__file__).with_name("sonnets.txt")
    return {
        "The rhyme": RHYMES,
        "Sonnets by Shakespeare": sonnets.read_text(encoding="utf-8"),
        "Damian's sentences": write_wills(150),
    }
