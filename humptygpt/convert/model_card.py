"""The README.md of an exported model. It describes the model's origin, training, validation loss and use."""

import json
import re

from humptygpt.loading import Loaded
from humptygpt.settings import TrainConfig
from humptygpt.tasks import find_task
from model import ModelConfig, count_parameters

# the folders of an absolute path, which the card leaves out, because they may name a user
FOLDERS = re.compile(r"""(?<![^\s'"])(/|[A-Za-z]:[/\\])\S*[/\\]""")


def model_card(loaded: Loaded, name: str) -> str:
    """Write the card of a model. name: its title."""
    model, tokenizer, saved = loaded.model, loaded.tokenizer, loaded.saved
    task = find_task(loaded.task)
    family = "Llama" if model.config.position == "rotary" else "GPT-2"
    context = model.config.block_size
    prompt = json.dumps(
        task.card_prompt + tokenizer.decode(tokenizer.start()), ensure_ascii=False
    )
    origin = f"converted by HumptyGPT from {FOLDERS.sub('', loaded.description)}"
    training = settings = ""
    if saved:
        source = FOLDERS.sub("", saved["data"]["source"])
        origin = f"trained with HumptyGPT on {source}"
        training = training_rows(source, saved["progress"])
        settings = settings_section(saved)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- humptygpt
---
# {name}

A {family} model with {count_parameters(model):,} parameters, {origin}.

| | |
|---|---|
{training}| context | {context:,} tokens |
| tokenizer | {tokenizer.name}, {tokenizer.vocab_size:,} tokens |

{task.card_note} Nothing prevents it from writing false or offensive text.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
prompt = {task.card_input.format(prompt)}
output = model.generate(**prompt, max_new_tokens={min(200, context // 2)})
print(tokenizer.decode(output[0]))
```

Prompt and output together can have at most {context:,} tokens.
{settings}"""


def training_rows(source: str, progress: dict) -> str:
    return f"""| trained on | {source} |
| training | {progress["iter"]:,} steps, {progress["tokens"]:,} tokens |
| lowest validation loss | {progress["best_val_loss"]:.4f} nats per token, at step {progress["best_iter"]:,} |
"""


def settings_section(saved: dict) -> str:
    """Write the settings of a run that differ from the defaults as lines of a config file."""
    defaults = vars(ModelConfig()) | vars(TrainConfig())
    settings = saved["model_config"] | saved["train_config"]
    lines = [
        f"{key} = {FOLDERS.sub('', repr(value))}"
        for key, value in settings.items()
        if value != defaults.get(key, value)
    ]
    text = "\n".join(lines)
    return f"""
## Settings

Settings of the run that differ from HumptyGPT's defaults:

```python
{text}
```
"""
