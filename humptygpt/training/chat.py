"""The chat task: the replies that a run shows after each evaluation and at its end."""

from torch import nn

from humptygpt.data.chat_dataset import ChatDataset
from humptygpt.generation.sampling import Context, stream_texts
from humptygpt.tokenizers.chat import BEGIN, END

REPLY_TOKENS = 60  # tokens of a reply during training
QUESTIONS = 50  # held-out questions that are answered at the end of a run
EXAMPLES = 5  # of these


def answers(
    model: nn.Module, dataset: ChatDataset, count: int, longest: int | None = None
) -> list[tuple[str, str, str]]:
    """Answer up to `count` held-out questions greedily.

    Returns each question, the reply that its conversation has, and the model's reply.
    longest: maximum number of tokens in a reply; None: as many as the longest expected reply has.
    """
    prompts, expected = zip(*dataset.held_out(count), strict=True)
    device, decode = next(model.parameters()).device, dataset.tokenizer.decode
    replies = [""] * len(prompts)
    for piece in stream_texts(
        Context(model, prompts, device=device),
        dataset.tokenizer,
        range(len(prompts)),
        max_new_tokens=longest or max(map(len, expected)),
        temperature=0,
    ):
        replies[piece.row] += piece.text
    asked = [decode(ids).split(BEGIN)[-2] for ids in prompts]
    expected = [decode(ids).removesuffix(END) for ids in expected]
    return list(zip(asked, expected, replies, strict=True))


def one_line(turn: str) -> str:
    return " ".join(turn.replace(END, "").split())


def show_replies(model: nn.Module, dataset: ChatDataset, count: int = 3) -> str:
    """Answer up to `count` held-out questions."""
    return "\n".join(
        f"    {one_line(asked)}\n    > {one_line(reply)}"
        for asked, _, reply in answers(model, dataset, count, REPLY_TOKENS)
    )


def show_answers(model: nn.Module, dataset: ChatDataset) -> str:
    """Count the held-out questions that are answered as in their conversation, and show some of the answers."""
    found = answers(model, dataset, QUESTIONS)
    right = sum(reply == expected for _, expected, reply in found)
    lines = [f"held-out questions answered word for word: {right} of {len(found)}"]
    for asked, expected, reply in found[:: -(-len(found) // EXAMPLES)]:
        lines += [f"    {one_line(asked)}", f"    > {one_line(reply)}"]
        if reply != expected:
            lines.append(f"      the conversation has: {one_line(expected)}")
    return "\n".join(lines)


def write_replies(model: nn.Module, dataset: ChatDataset) -> list[str]:
    return [reply for *_, reply in answers(model, dataset, QUESTIONS)]
