"""The chat task: the replies that a run shows after each evaluation and at its end, and how many are right."""

from difflib import SequenceMatcher

from torch import nn

from humptygpt.data.chat_dataset import ChatDataset, Exchange
from humptygpt.data.lookup import look_up
from humptygpt.generation.sampling import Context, stream_texts
from humptygpt.tokenizers.basic import Tokenizer

REPLY_TOKENS = 60  # tokens of a reply that is written during training
QUESTIONS = 50  # held-out questions that an evaluation and the end of a run ask
FEWEST = 10  # of these; fewer do not tell which model is the best
TAUGHT = 3000  # questions at most in which the nearest one is looked up
LETTERS = 1000  # of a reply that are compared
EXAMPLES = 5  # answers shown at the end of a run


def answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    asked: list[Exchange],
    longest: int | None = None,
) -> list[str]:
    """Write the reply of each exchange greedily, in batches of QUESTIONS.

    longest: maximum number of tokens in a reply; None: as many as the longest true reply has.
    """
    # int8 weights are not parameters, and they are always on a CPU
    device = next((p.device for p in model.parameters()), "cpu")
    replies = [""] * len(asked)
    for first in range(0, len(asked), QUESTIONS):
        prompts = [x.prompt for x in asked[first : first + QUESTIONS]]
        for piece in stream_texts(
            Context(model, prompts, device=device),
            tokenizer,
            range(len(prompts)),
            max_new_tokens=longest or max(x.tokens for x in asked),
            temperature=0,
        ):
            replies[first + piece.row] += piece.text
    return replies


def compare(asked: list[Exchange], replies: list[str], taught: list[Exchange]) -> tuple[str, list[dict]]:
    """Count the right replies, beside those of a lookup among what was taught, if that is known.

    Returns the counts as text, and for each exchange its question, its true reply, the model's, how alike these two are
    by letters, from 0 to 1, and the lookup's.
    """
    known = {x.question: x.reply for x in taught}
    nearest = look_up(known, [x.question for x in asked]) if known else [None] * len(asked)
    rows = [
        {
            "question": x.question,
            "expected": x.reply,
            "reply": reply,
            "by_letters": likeness(x.reply, reply),
            "lookup": found,
        }
        for x, reply, found in zip(asked, replies, nearest, strict=True)
    ]
    right, looked_up = (sum(row[key] == row["expected"] for row in rows) for key in ("reply", "lookup"))
    alike = sum(row["by_letters"] for row in rows) / len(rows)
    text = f"{right} of {len(rows)}, and {alike:.0%} by letters"
    if known:
        text += f"; a lookup of the nearest question taught answers {looked_up}"
    return text, rows


def likeness(a: str, b: str) -> float:
    """Return how alike the beginnings of two texts are by letters, from 0 to 1. The time grows with their square."""
    return SequenceMatcher(None, a[:LETTERS], b[:LETTERS], autojunk=False).ratio()


def count_right(model: nn.Module, dataset: ChatDataset) -> int:
    """Count the held-out questions that are answered word for word. 0: they are too few, or their replies too long."""
    asked = dataset.exchanges("val", QUESTIONS)
    if len(asked) < FEWEST or max(x.tokens for x in asked) > REPLY_TOKENS:
        return 0
    replies = answer(model, dataset.tokenizer, asked)
    return sum(x.reply == reply for x, reply in zip(asked, replies, strict=True))


def one_line(turn: str) -> str:
    return " ".join(turn.split())


def show_replies(model: nn.Module, dataset: ChatDataset, count: int = 3) -> str:
    """Answer up to `count` held-out questions."""
    asked = dataset.exchanges("val", count)
    replies = answer(model, dataset.tokenizer, asked, REPLY_TOKENS)
    return "\n".join(
        f"    {one_line(x.question)}\n    > {one_line(reply)}" for x, reply in zip(asked, replies, strict=True)
    )


def show_answers(model: nn.Module, dataset: ChatDataset) -> str:
    """Count the held-out questions that are answered as in their conversation, and show some of the answers."""
    asked = dataset.exchanges("val", QUESTIONS)
    replies = answer(model, dataset.tokenizer, asked)
    text, rows = compare(asked, replies, dataset.exchanges("train", TAUGHT))
    examples = rows[:: -(-len(rows) // EXAMPLES)]
    kind = "taught" if dataset.trains_on_all else "held-out"
    return f"{kind} questions answered word for word: {text}\n{show(examples)}"


def show(rows: list[dict]) -> str:
    """Show questions with their replies and, if they are wrong, with what would be right. rows: from compare()."""
    lines = []
    for row in rows:
        lines += [f"    {one_line(row['question'])}", f"    > {one_line(row['reply'])}"]
        if row["reply"] != row["expected"]:
            lines.append(f"      the conversation has: {one_line(row['expected'])}")
    return "\n".join(lines)
