"""The HumptyGPT library, on floors: a file imports from its own folder or from a lower floor only.

From the bottom: cli, files, machine and other single files; tokenizers and models; data; formats; generation; training;
then scoring, page and server. model.py and the scripts belong to it as humptygpt.model, humptygpt.sample and so on, so
that a program with a model.py of its own can use them.

    import humptygpt

    model = humptygpt.load("out/shakespeare_char")
    print(model.complete("ROMEO:"))

Model in sample.py has the other methods. humptygpt.UserError is what they raise.
"""

from pathlib import Path

from humptygpt.cli import UserError as UserError

__path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str):
    """Load sample.py's load() when it is asked for, because torch takes seconds."""
    if name != "load":
        raise AttributeError(f"humptygpt has no {name}")
    from humptygpt.sample import load

    return load
