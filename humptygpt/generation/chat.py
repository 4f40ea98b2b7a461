"""Talk to a model turn by turn. Its cache is kept between turns."""

from collections.abc import Iterator

from humptygpt.cli import UserError, note
from humptygpt.generation.generator import Pipeline
from humptygpt.generation.sampling import Context, stream_texts
from humptygpt.tokenizers.basic import Tokenizer
from humptygpt.tokenizers.chat import Turn


def keep_newest(
    turns: list[Turn], tokenizer: Tokenizer, most: int
) -> tuple[list[Turn], list[int]]:
    """Leave out the oldest exchanges until the turns take at most `most` tokens. The system's turns and the last stay.

    An exchange begins with a turn of the user. Returns the turns that are left, and their ids with the beginning of a
    reply.
    """
    starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
    for start in [0, *starts[1:]]:
        kept = [turn for i, turn in enumerate(turns) if i >= start or turn.role == "system"]
        ids = tokenizer.encode_turns(kept, reply=True).tolist()
        if len(ids) <= most:
            break
    return kept, ids


class Talk:
    """A conversation with a model. When the context is full, the oldest exchanges are dropped, but not the system's.

    loaded: its tokenizer is a ChatTokenizer. For each reply, it encodes the whole conversation. Tokens that are in the
    context already stay there, with their cache.
    """

    def __init__(self, loaded: Pipeline, system: str | None = None):
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.turns = [] if system is None else [Turn("system", system.strip())]
        self.context = None  # a Context, from the first reply on

    def reply(
        self, said: str, sample: int, max_new_tokens: int, **sampling: object
    ) -> Iterator[str]:
        """Yield the reply in pieces; there is none to an empty text. sample: seeds it. sampling: for stream_texts().

        Raises UserError if a turn cannot be encoded, or leaves no room for a reply.
        """
        new = Turn("user", said.strip())
        if not new.content:
            return
        block_size = self.model.config.block_size
        # up to half of the context is for the reply, unless the question alone takes more
        room = min(max_new_tokens, block_size // 2)
        turns = [*self.turns, new]
        kept, ids = keep_newest(turns, self.tokenizer, block_size - room)
        if len(ids) >= block_size:
            raise UserError(
                f"this takes {len(ids):,} tokens, more than fit into block_size={block_size}"
            )
        room = min(room, block_size - len(ids))
        if dropped := (len(turns) - len(kept)) // 2:
            note(f"the context is full; forgetting the oldest exchanges: {dropped}")
        if self.context and ids[: len(known := self.context.texts[0])] == known:
            self.context.append([ids[len(known) :]])
        else:
            self.context = Context(self.model, [ids], device=self.device)
        reply = ""
        for piece in stream_texts(
            self.context, self.tokenizer, [sample], max_new_tokens=room, **sampling
        ):
            reply += piece.text
            yield piece.text
        self.turns = [*kept, Turn("assistant", reply)]
