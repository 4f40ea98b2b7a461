"""The chat task: the replies that a run shows after each evaluation."""

import numpy as np
from torch import nn

from humptygpt.chat.data import ChatDataset
from humptygpt.chat.tokens import END
from humptygpt.sampling import Context, stream_texts
from humptygpt.tasks import Task

REPLIES = 3  # replies that are shown
LONGEST = 60  # tokens of each


def show_replies(model: nn.Module, dataset: ChatDataset) -> str:
    """Answer the first question of some conversations of the validation split greedily."""
    tokenizer = dataset.tokenizer
    rows = dataset.rows["val"]
    device = next(model.parameters()).device
    lines = []
    for start, end in rows[:: len(rows) // REPLIES + 1]:
        asked = int(
            np.argmax(dataset.is_target["val"][start:end])
        )  # tokens before the reply
        ids = dataset.ids["val"][start : start + asked].tolist()
        context = Context(model, [ids], device=device)
        pieces = stream_texts(
            context, tokenizer, [0], max_new_tokens=LONGEST, temperature=0
        )
        said = tokenizer.decode(ids).split(END)[-2].partition("user\n")[2]
        reply = "".join(piece.text for piece in pieces)
        lines += [f"    {' '.join(said.split())}", f"  > {' '.join(reply.split())}"]
    return "\n".join(lines)


CHAT = Task(
    dataset=ChatDataset,
    evaluation_examples=show_replies,
    sample_label="talk to it",
    sample_command="python sample.py {} --interactive=True",
)
