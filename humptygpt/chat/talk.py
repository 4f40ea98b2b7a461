"""Talk to a model turn by turn. Its cache is kept between turns."""

from collections.abc import Iterator

import torch
from torch import nn

from humptygpt.chat.tokens import ChatTokenizer, Turn
from humptygpt.config import UserError, note
from humptygpt.sampling import Context, stream_texts


class Talk:
    """A conversation with a model. When the context is full, the oldest exchanges are dropped, but not the system's."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: ChatTokenizer,
        device: torch.device,
        system: str | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        turns = [] if system is None else [Turn("system", system)]
        self.system = tokenizer.encode_turns(turns).tolist()
        self.exchanges: list[list[int]] = []  # token ids of what was said and replied
        self.context: Context | None = None

    def reply(
        self, said: str, sample: int, max_new_tokens: int, **sampling
    ) -> Iterator[str]:
        """Yield the reply in pieces. sample: seeds it. sampling: arguments of stream_texts().

        Raises UserError if a turn cannot be encoded, or leaves no room for a reply.
        """
        block_size = self.model.config.block_size
        new = self.tokenizer.encode_turns([Turn("user", said)], reply=True).tolist()
        # up to half of the context is for the reply
        room = min(max_new_tokens, block_size // 2)
        before = len(self.exchanges)
        while self.exchanges and self.length() + len(new) + room > block_size:
            self.exchanges.pop(0)
        if dropped := before - len(self.exchanges):
            note(f"the context is full; forgetting the oldest exchanges: {dropped}")
        if self.length() + len(new) >= block_size:
            raise UserError(
                f"this takes {len(new):,} tokens, more than fit into block_size={block_size}"
            )
        if self.context is None or dropped:
            ids = sum(self.exchanges, self.system) + new
            self.context = Context(self.model, [ids], device=self.device)
        else:
            self.context.append([new])
        replied = []
        for piece in stream_texts(
            self.context, self.tokenizer, [sample], max_new_tokens=room, **sampling
        ):
            replied += [] if piece.token is None else [piece.token]
            yield piece.text
        end = self.tokenizer.encode("\n").tolist()
        if replied[-1] != self.tokenizer.eot:
            end.insert(0, self.tokenizer.eot)
        self.context.append([end])
        self.exchanges.append(new + replied + end)

    def length(self) -> int:
        return len(self.system) + sum(map(len, self.exchanges))
