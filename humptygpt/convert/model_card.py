"""README.md of an exported model: its origin and training, its validation loss, and how to use it."""

import json
import math

from humptygpt.loading import Loaded
from humptygpt.metrics import read_metrics
from humptygpt.tokenizers import END_OF_TEXT
from model import count_parameters

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

It continues texts like those it was trained on. It does not follow instructions, and nothing prevents it from writing
false or offensive text.

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

Prompt and output together can have at most {context} tokens. {note}
"""
TRAINING = """| trained on | {source} |
| training | {steps} steps, {tokens} tokens |
| validation loss | {loss} |
"""
SETTINGS = """
## Settings

Settings of the run that differ from HumptyGPT's defaults:

```python
{settings}
```
"""


def model_card(loaded: Loaded, name: str, prompt: str, note: str, defaults: dict) -> str:
    """Write the model card.

    prompt, note: how an example prompt begins, and a remark, both for the model's task. defaults: the default values of
    all settings; only settings that differ from them are listed.
    """
    model, tokenizer, saved = loaded.model, loaded.tokenizer, loaded.saved
    context = model.config.block_size
    start = tokenizer.decode(tokenizer.start()) if tokenizer.eot is None else END_OF_TEXT
    card = CARD.format(
        name=name,
        family="Llama" if model.config.position == "rotary" else "GPT-2",
        parameters=f"{count_parameters(model):,}",
        origin=origin(loaded),
        training=TRAINING.format(**training(loaded)) if saved else "",
        context=f"{context:,}",
        tokenizer=tokenizer.name,
        vocabulary=f"{tokenizer.vocab_size:,}",
        prompt=json.dumps(prompt + start, ensure_ascii=False),
        new_tokens=min(200, context // 2),
        note=note,
    )
    if not saved:
        return card
    settings = (saved["model_config"] | saved["train_config"]).items()
    changed = [
        f"{key} = {value!r}" for key, value in settings if value != defaults.get(key, value)
    ]
    return card + SETTINGS.format(settings="\n".join(changed))


def summary(loaded: Loaded) -> str:
    """Describe the origin of a model and its validation loss in one line."""
    loss = f"; validation loss: {training(loaded)['loss']}" if loaded.saved else ""
    return f"{origin(loaded)}{loss}"


def origin(loaded: Loaded) -> str:
    if loaded.saved is None:
        return f"converted by HumptyGPT from {loaded.description}"
    return f"trained with HumptyGPT on {training(loaded)['source']}"


def training(loaded: Loaded) -> dict[str, str]:
    """Describe a run's data, length and validation loss (of these weights if known, otherwise the run's lowest)."""
    saved, progress = loaded.saved, loaded.saved["progress"]
    best = f"{progress['best_val_loss']:.4f} nats per token"
    loss = f"{best}, at step {progress['best_iter']:,}"
    if progress["best_val_loss"] == math.inf:
        loss = "not evaluated"
    for row in read_metrics(loaded.path.with_name("metrics.jsonl")):
        if row["iter"] == progress["iter"] and "val_bits_per_byte" in row:
            bits = f"{row['val_bits_per_byte']:.3f} bits per byte"
            loss = f"{row['val_loss']:.4f} nats per token, {bits}"
    return {
        "source": saved["data"].get("source", saved["train_config"]["dataset"]),
        "steps": f"{progress['iter']:,}",
        "tokens": f"{progress['tokens']:,}",
        "loss": loss,
    }
