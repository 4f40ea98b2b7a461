"""The chat task: the replies that a run shows after each evaluation."""

import numpy as np
from torch import nn

from humptygpt.chat.data import ChatDataset
from humptygpt.chat.tokens import BEGIN, END
from humptygpt.sampling import Context, stream_texts
from humptygpt.tasks import Task

LONGEST = 60  # tokens of a reply


def show_replies(model: nn.Module, dataset: ChatDataset, count: int = 3) -> str:
    """Answer the first question of up to `count` conversations of the validation split greedily."""
    tokenizer = dataset.tokenizer
    rows = dataset.rows["val"]
    device = next(model.parameters()).device
    lines = []
    for row in rows[:: len(rows) // count + 1]:
        target = np.argmax(dataset.is_target["val"][row])
        prompt = dataset.ids["val"][row[:target]].tolist()
        context = Context(model, [prompt], device=device)
        pieces = stream_texts(
            context, tokenizer, [0], max_new_tokens=LONGEST, temperature=0
        )
        # a row that begins with a reply has no turn before it
        said = tokenizer.decode(prompt).split(BEGIN)[-2].removesuffix(f"{END}\n")
        reply = "".join(piece.text for piece in pieces)
        lines += [f"    {' '.join(said.split())}", f"    > {' '.join(reply.split())}"]
    return "\n".join(lines)


CARD_INPUT = """tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Who are you?"}}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)"""
CHAT = Task(
    dataset=ChatDataset,
    evaluation_examples=show_replies,
    sample_label="talk to it",
    card_input=CARD_INPUT,
    card_note="It answers as in the conversations that it was trained on.",
)
