"""The chat task: the replies that a run shows after each evaluation."""

import numpy as np
import torch
from torch import nn

from humptygpt.chat.data import ChatDataset
from humptygpt.tasks import Task

REPLIES = 3  # replies that are shown
LONGEST = 60  # tokens of each


def show_replies(model: nn.Module, dataset: ChatDataset) -> str:
    """Answer the first question of conversations of the validation split greedily."""
    tokenizer = dataset.tokenizer
    rows = dataset.rows["val"]
    device = next(model.parameters()).device
    lines = []
    for start, end in rows[:: len(rows) // REPLIES + 1]:
        ids, is_target = (
            each["val"][start:end] for each in (dataset.ids, dataset.is_target)
        )
        first = int(np.argmax(is_target))  # the reply begins here
        asked = torch.from_numpy(ids[:first]).to(device)[None]
        tokens = model.generate(asked, LONGEST, temperature=0)[0, first:].tolist()
        if tokenizer.eot in tokens:
            tokens = tokens[: tokens.index(tokenizer.eot)]
        lines += [
            f"    {last_turn(tokenizer.decode(ids[:first]))}",
            f"  > {' '.join(tokenizer.decode(tokens).split())}",
        ]
    return "\n".join(lines)


def last_turn(text: str) -> str:
    """Return what was said last, on one line."""
    said = text.split("<|im_end|>")[-2].partition("\n")[2] if "<|im_end|>" in text else text
    return " ".join(said.split("\n")[-1].split())


CHAT = Task(
    dataset=ChatDataset,
    evaluation_examples=show_replies,
    sample_label="talk to it",
    sample_command="python sample.py {} --interactive=True",
)
