"""The chat task: the replies that a run shows after each evaluation and at its end."""

from torch import nn

from humptygpt.chat.data import Asked, ChatDataset
from humptygpt.chat.tokens import BEGIN, END
from humptygpt.sampling import Context, stream_texts
from humptygpt.tasks import Task

LONGEST = 60  # tokens of a reply during training
QUESTIONS = 50  # held-out questions that are answered at the end of a run
SHOWN = 5  # of these


def answer(
    model: nn.Module, dataset: ChatDataset, asked: list[Asked], longest: int
) -> list[str]:
    """Answer questions greedily, with up to `longest` tokens each."""
    if not asked:
        return []
    device = next(model.parameters()).device
    context = Context(model, [each.prompt for each in asked], device=device)
    replies = [""] * len(asked)
    for piece in stream_texts(
        context,
        dataset.tokenizer,
        range(len(asked)),
        max_new_tokens=longest,
        temperature=0,
    ):
        replies[piece.row] += piece.text
    return replies


def said(dataset: ChatDataset, asked: Asked) -> str:
    """The last turn before the reply, in one line."""
    turns = dataset.tokenizer.decode(asked.prompt).split(BEGIN)
    return " ".join(turns[-2].removesuffix(f"{END}\n").split())


def show_replies(model: nn.Module, dataset: ChatDataset, count: int = 3) -> str:
    """Answer the first question of up to `count` conversations of the validation split."""
    asked = dataset.asked(count)
    lines = []
    for each, reply in zip(asked, answer(model, dataset, asked, LONGEST), strict=True):
        lines += [f"    {said(dataset, each)}", f"    > {' '.join(reply.split())}"]
    return "\n".join(lines)


def show_answers(model: nn.Module, dataset: ChatDataset) -> str:
    """Count the held-out questions that are answered as in their conversation, and show some of the answers."""
    asked = dataset.asked(QUESTIONS)
    longest = max((each.length for each in asked), default=0)
    replies = answer(model, dataset, asked, longest)
    right = [reply == each.reply for each, reply in zip(asked, replies, strict=True)]
    lines = [f"held-out questions answered word for word: {sum(right)} of {len(asked)}"]
    for number in range(0, len(asked), -(-len(asked) // SHOWN)):
        reply, true = (" ".join(x.split()) for x in (replies[number], asked[number].reply))
        lines += [f"    {said(dataset, asked[number])}", f"    > {reply}"]
        if not right[number]:
            lines.append(f"      the conversation has: {true}")
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
    final_examples=show_answers,
    sample_label="talk to it",
    card_input=CARD_INPUT,
    card_note="It answers as in the conversations that it was trained on.",
)
