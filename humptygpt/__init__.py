"""The HumptyGPT library, on floors: a file imports from its own folder or from a lower floor only.

From the bottom: cli, files, machine and other single files; tokenizers and models; data; formats; generation; training;
then scoring, page and server. model.py and the scripts belong to it as humptygpt.model, humptygpt.sample and so on, so
that a program with a model.py of its own can use them.

    import humptygpt

    loaded = humptygpt.load("out/shakespeare_char")
    print(humptygpt.complete(loaded, "ROMEO:"))
"""

from pathlib import Path

__path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str):
    """Load sample.py's load() and complete() when they are asked for, because torch takes seconds."""
    if name not in ("load", "complete"):
        raise AttributeError(f"humptygpt has no {name}")
    from humptygpt import sample

    return getattr(sample, name)
