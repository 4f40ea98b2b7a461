"""Read token files of conversations, and pack whole conversations into rows."""

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from humptygpt.chat.tokens import Turn
from humptygpt.config import UserError
from humptygpt.data import Dataset, next_tokens, permute, random_key


class ChatDataset(Dataset):
    """Conversations, stored as `turns eot turns eot ...`. Only the assistant's replies and their ends are predicted.

    A row has as many whole conversations as fit into block_size + 1 tokens. A longer conversation is cut at a turn, and
    a longer turn at the end of the row. Parts without a target are left out.
    """

    task = "chat"

    def set_up(self) -> None:
        self.ids, self.is_target, self.rows, self.cut = {}, {}, {}, 0
        for split in self.splits:
            ids = np.concatenate([part for _, part in self.chunks(split)])
            self.ids[split] = ids
            self.is_target[split] = self.find_targets(ids)
            self.rows[split] = self.pack(split)

    def find_targets(self, ids: np.ndarray) -> np.ndarray:
        """Find the tokens of the assistant's turns after their first line, END included. Returns (T,) bool."""
        tokenizer = self.tokenizer
        header = tokenizer.encode(Turn("assistant", "").text)
        begins, ends = (np.flatnonzero(ids == i) for i in (tokenizer.begin, tokenizer.eot))
        own = np.ones(len(begins), dtype=bool)
        for i, token in enumerate(header, start=1):
            own &= ids[begins + i] == token
        inside = np.zeros(len(ids) + 1, dtype=np.int64)
        inside[begins[own] + 1 + len(header)] += 1
        inside[ends[own] + 1] -= 1
        return inside.cumsum()[:-1] > 0

    def pack(self, split: str) -> np.ndarray:
        """Cut the split into rows. Returns the start and the end of each, (rows, 2)."""
        ids, size = self.ids[split], self.block_size + 1
        begins = np.flatnonzero(ids == self.tokenizer.begin)
        ends = np.flatnonzero(ids == self.tokenizer.base.eot) + 1
        rows = [[0, 0]]
        start = 0
        for end in ends.tolist():
            if end - rows[-1][0] <= size:
                rows[-1][1] = end
            elif end - start <= size:
                rows.append([start, end])
            else:
                self.cut += 1
                first, last = np.searchsorted(begins, [start, end])
                rows += self.cut_at_turns(begins[first:last], end)
            start = end
        targets = np.append(0, self.is_target[split].cumsum())
        # the first token of a row is not predicted
        rows = [(a, b) for a, b in rows if targets[b] > targets[min(a + 1, b)]]
        if not rows:
            raise UserError(
                f"{self.folder} has no reply in {split} that fits into block_size={self.block_size}; use a larger one"
            )
        return np.array(rows)

    def cut_at_turns(self, begins: np.ndarray, end: int) -> list[list[int]]:
        """Cut a long conversation into parts that fit into a row. begins: where its turns begin."""
        size = self.block_size + 1
        parts = []
        for a, b in zip(begins.tolist(), [*begins[1:].tolist(), end], strict=True):
            if parts and b - parts[-1][0] <= size:
                parts[-1][1] = b
            else:
                parts.append([a, min(b, a + size)])
        return parts

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Make training batch number `index`: idx and targets, both int64 (batch_size, block_size).

        An epoch visits each row once, in a random order.
        """
        count = len(self.rows["train"])
        epochs, numbers = np.divmod(index * batch_size + np.arange(batch_size), count)
        chosen = [
            permute(numbers[i : i + 1], count, random_key(self.seed, int(epoch)))
            for i, epoch in enumerate(epochs)
        ]
        return self.rows_batch("train", self.rows["train"][np.concatenate(chosen)])

    def rows_batch(self, split: str, rows: np.ndarray) -> dict[str, Tensor]:
        """Make a batch of rows, (B, 2), padded with eot."""
        position = rows[:, :1] + np.arange(self.block_size + 1)
        outside = position >= rows[:, 1:]
        position[outside] = 0
        ids = self.ids[split][position]
        ids[outside] = self.tokenizer.base.eot
        return next_tokens(ids, ignored=(~self.is_target[split][position] | outside)[:, 1:])

    def val_batches(
        self, batch_size: int, eval_iters: int | None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the fixed evaluation set: eval_iters batches of rows spread over the split; None: all rows."""
        rows = self.rows["val"]
        if eval_iters and eval_iters * batch_size < len(rows):
            rows = rows[np.linspace(0, len(rows) - 1, eval_iters * batch_size).astype(int)]
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            batch = self.rows_batch("val", np.resize(some, (batch_size, 2)))
            batch["targets"][len(some) :] = -1
            yield batch

    def all_val_batches(self, batch_size: int) -> int:
        return math.ceil(len(self.rows["val"]) / batch_size)

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.rows["train"]) / batch_size

    def summary(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """Describe a batch and the evaluation set in words."""
        conversations = self.meta["splits"]["train"]["conversations"]
        each = conversations / len(self.rows["train"])
        batch = f"{batch_size} rows of {self.block_size} tokens, with {each:.1f} conversations in a row"
        if self.cut:
            batch += f" ({self.cut:,} longer ones are cut at a turn)"
        total = len(self.rows["val"])
        evaluated = min(total, batch_size * (eval_iters or total))
        return batch, f"{evaluated:,} of {total:,} rows"

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of the replies per target token in the validation split."""
        entry = self.meta["splits"]["val"]
        return entry["target_bytes"] / entry["target_tokens"]
