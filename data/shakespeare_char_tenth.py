"""A tenth of tiny Shakespeare: a text so small that models learn it by heart."""

from humptygpt.data.builtin import data_set, keep

tokenizer = "char"
val_fraction = 0.5


def fetch(config):
    """The first tenth of tiny Shakespeare for training, and, as with the whole text, the last tenth for validation."""
    source, description = data_set("shakespeare").fetch(config)
    text = source.read_text(encoding="utf-8")
    tenth = len(text) - int(0.9 * len(text))
    path = keep(f"{config.name}.txt", text[:tenth] + text[-tenth:])
    return path, f"the first and the last tenth of {description}"
