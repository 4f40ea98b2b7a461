"""README.md of an exported model: what it is, what it was trained on, how well it predicts, and how to use it."""

import dataclasses
from pathlib import Path

from humptygpt.checkpoint.checkpoint import Loaded
from humptygpt.checkpoint.metrics import read_metrics
from model import ModelConfig, count_parameters

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- humptygpt
---
# {name}

A {family} model with {parameters} parameters, {origin}.

| | |
|---|---|
{training}| context | {context} tokens |
| tokenizer | {tokenizer}, {vocabulary} tokens |

It continues texts like those that it was trained on. It follows no instructions, and nothing keeps it from writing what
is wrong or offensive.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = tokenizer({prompt}, return_tensors="pt")
output = model.generate(**prompt, max_new_tokens={new_tokens})
print(tokenizer.decode(output[0]))
```

{notes}
"""
TRAINING = """| trained on | {source} |
| training | {steps} steps, {tokens} tokens |
| validation loss | {loss} |
"""
SETTINGS = """
## Settings

The settings of the run that are not HumptyGPT's defaults:

```python
{settings}
```
"""


def model_card(loaded: Loaded, path: Path, name: str) -> str:
    """path: of the checkpoint, or of a model that was not trained here. name: of the model."""
    model, tokenizer, saved = loaded
    eot, translation = tokenizer.eot, saved is not None and saved["task"] == "translation"
    notes = [f"Prompt and output together have at most {model.config.block_size:,} tokens."]
    if translation:
        notes.append(
            "It translates: after a sentence and the end-of-text token, it writes the translation."
        )
    if tokenizer.name == "char":
        notes.append("Characters that its training text does not have are an error.")
    if eot is None:
        notes.append("Its training text was a single one, so that it never ends one.")
    prompt = "Ein Mann schläft." if translation else ""
    start = f"{prompt}{'<|endoftext|>' if eot is not None else tokenizer.decode(tokenizer.start())}"
    card = CARD.format(
        name=name,
        family="Llama" if model.config.position == "rotary" else "GPT-2",
        parameters=f"{count_parameters(model):,}",
        origin=origin(saved, path),
        training=training(saved, path) if saved else "",
        context=f"{model.config.block_size:,}",
        tokenizer=tokenizer.name,
        vocabulary=f"{tokenizer.vocab_size:,}",
        prompt=repr(start).replace("'", '"')
        if "'" not in start and '"' not in start
        else repr(start),
        new_tokens=min(200, model.config.block_size // 2),
        notes=" ".join(notes),
    )
    return card + (SETTINGS.format(settings=changed_settings(saved)) if saved else "")


def origin(saved: dict | None, path: Path) -> str:
    return (
        f"trained with HumptyGPT on {source(saved)}"
        if saved
        else f"converted by HumptyGPT from {path}"
    )


def training(saved: dict, path: Path) -> str:
    """Rows of the card's table."""
    progress = saved["progress"]
    steps, tokens = f"{progress['iter']:,}", f"{progress['tokens']:,}"
    return TRAINING.format(source=source(saved), steps=steps, tokens=tokens, loss=loss(saved, path))


def describe(loaded: Loaded, path: Path) -> str:
    """In one line; path: as in model_card."""
    described = origin(loaded.saved, path)
    return (
        f"{described}; validation loss: {loss(loaded.saved, path)}" if loaded.saved else described
    )


def source(saved: dict) -> str:
    """What it was trained on."""
    return saved["data"].get("source", saved["train_config"]["dataset"])


def loss(saved: dict, path: Path) -> str:
    """Of these weights where it was measured, else the lowest so far."""
    progress = saved["progress"]
    rows = [
        row for row in read_metrics(path.with_name("metrics.jsonl")) if row and "val_loss" in row
    ]
    measured = next((row for row in rows if row["iter"] == progress["iter"]), None)
    if measured and "val_bits_per_byte" in measured:
        return f"{measured['val_loss']:.4f} nats per token, {measured['val_bits_per_byte']:.3f} bits per byte"
    if progress["best_iter"] == progress["iter"]:
        return f"{progress['best_val_loss']:.4f} nats per token"
    best = f"{progress['best_val_loss']:.4f} nats per token at step {progress['best_iter']:,}"
    return f"not measured at this step; {best}"


def changed_settings(saved: dict) -> str:
    """Lines of a config file."""
    from humptygpt.training.settings import TrainConfig

    lines = []
    for cls, settings in (
        (ModelConfig, saved["model_config"]),
        (TrainConfig, saved["train_config"]),
    ):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        lines += [
            f"{key} = {value!r}"
            for key, value in settings.items()
            if value != defaults.get(key, value)
        ]
    return "\n".join(lines)
