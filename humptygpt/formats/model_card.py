"""The README.md of an exported model: what it is, what it was trained on, and how to use it."""

import json
import re

from humptygpt.formats.load import Loaded
from humptygpt.model import count_parameters

# the folders of an absolute path, which the card leaves out, because they may name a user
FOLDERS = re.compile(r"""(?<![^\s'"])(/|[A-Za-z]:[/\\])\S*[/\\]""")


def model_card(loaded: Loaded, name: str) -> str:
    """Write the card of a model. name: its title."""
    tokenizer, context = loaded.tokenizer, loaded.model.config.block_size
    family = "Llama" if loaded.model.config.position == "rotary" else "GPT-2"
    origin = f"converted by HumptyGPT from {loaded.description}"
    if saved := loaded.saved:
        loss = saved["progress"]["best_val_loss"]
        origin = f"trained with HumptyGPT on {saved['data'].get('source')} (validation loss: {loss:.4f} nats per token)"
    prompt = tokenizer.decode(tokenizer.start())
    if tokenizer.chat_template:
        prompt = [{"role": "user", "content": "Who are you?"}]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A {family} model with {count_parameters(loaded.model):,} parameters and a context of {context:,} tokens,
{FOLDERS.sub("", origin)}.

```python
import transformers

pipeline = transformers.pipeline("text-generation", ".")  # this folder
print(pipeline({json.dumps(prompt)}, max_new_tokens={min(200, context // 2)}))
```
"""
