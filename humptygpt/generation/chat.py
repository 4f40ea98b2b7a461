"""Conversations with a model: what fits into its context, and replies turn by turn."""

import math
from collections.abc import Iterator

from humptygpt.cli import UserError, note
from humptygpt.files import check_schema
from humptygpt.generation.generator import Pipeline
from humptygpt.generation.sampling import Context, stream_texts
from humptygpt.tokenizers.basic import Tokenizer
from humptygpt.tokenizers.chat import CONTENT, ROLES, Turn, make_turn

ROLE = {*ROLES, "developer", "tool", "function"}
MESSAGES = [{"role": ROLE, "content?": CONTENT}]  # a call of a tool has no content


class TooLong(UserError):
    """A prompt that leaves no room for an answer."""

    code = "context_length_exceeded"  # from this, clients of a server know what happened


def read_messages(messages: object) -> list[Turn]:
    """Read messages in OpenAI's form. Raises ValueError if they are not, and UserError if there is none."""
    check_schema(messages, MESSAGES, "messages")
    if not messages:
        raise UserError("messages is empty, so there is nothing to answer")
    return [make_turn(each["role"], each.get("content")) for each in messages]


def make_room(
    turns: list[Turn], tokenizer: Tokenizer, block_size: int, limit: int, forgets: bool
) -> tuple[list[int], int, int]:
    """Fit turns into block_size tokens with a reply of up to `limit`, for which at most half of them are kept free.

    forgets: leave out the oldest exchanges, which begin with a turn of the user, but not the system's turns and the
    last. Returns the ids of the turns with the beginning of a reply; the most tokens of a reply, which would otherwise
    no longer see what it answers; and how many turns are left out. Raises TooLong.
    """
    most = block_size - min(limit, block_size // 2) if forgets else math.inf
    starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
    for start in [0, *starts[1:]]:
        kept = [turn for i, turn in enumerate(turns) if i >= start or turn.role == "system"]
        ids = tokenizer.encode_turns(kept, reply=True).tolist()
        if len(ids) <= most:
            break
    check_room(ids, block_size)
    return ids, min(limit, block_size - len(ids)), len(turns) - len(kept)


def check_room(prompt: list[int], block_size: int) -> None:
    if len(prompt) >= block_size:
        raise TooLong(
            f"the prompt takes {len(prompt):,} tokens, and the model's context has {block_size:,}, of which the answer"
            " needs at least one; shorten it"
        )


def reply(
    loaded: Pipeline,
    turns: list[Turn],
    sample: int = 0,
    forgets: bool = False,
    *,
    max_new_tokens: int,
    **sampling: object,
) -> Iterator[str]:
    """Yield a model's reply in pieces. sample: seeds it. forgets: as for make_room(). sampling: for stream_texts()."""
    model, tokenizer, _, device, *_ = loaded
    block_size = model.config.block_size
    ids, room, dropped = make_room(turns, tokenizer, block_size, max_new_tokens, forgets)
    if dropped:
        note(f"the context is full; forgetting the oldest exchanges: {dropped // 2}")
    context = Context(model, [ids], device=device)
    for piece in stream_texts(context, tokenizer, [sample], max_new_tokens=room, **sampling):
        yield piece.text
