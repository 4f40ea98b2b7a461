"""Read token files of conversations, and pack whole conversations into rows."""

from itertools import pairwise

import numpy as np
from torch import Tensor

from humptygpt.config import UserError
from humptygpt.data import TokenDataset, next_tokens, permute, random_key


class ChatDataset(TokenDataset):
    """Conversations, stored as `turn turn ... eot`. Only the assistant's replies and their ends are predicted.

    A row has as many whole conversations as fit into block_size + 1 tokens. A longer conversation is cut at a turn, and
    a longer turn at the end of its row. Rows without a target are left out. Raises UserError if no row has one.

    is_target: {split: which tokens are targets, (T,)}. rows: {split: start and end of each row, (rows, 2)}.
    """

    task = "chat"

    def set_up(self) -> None:
        self.ids, self.is_target, self.rows = {}, {}, {}
        for split in self.splits:
            self.ids[split] = np.concatenate([ids for _, ids in self.chunks(split)])
            self.is_target[split] = self.find_targets(self.ids[split])
            self.rows[split] = self.pack(split)

    def find_targets(self, ids: np.ndarray) -> np.ndarray:
        """Find the tokens of the assistant's turns, each with its end and without its first line. Returns (T,) bool."""
        header = [self.tokenizer.begin, *self.tokenizer.encode("assistant\n")]
        is_target = np.zeros(len(ids), dtype=bool)
        # each turn has one of either
        starts, ends = (np.flatnonzero(ids == mark) for mark in self.tokenizer.marks)
        for start, end in zip(starts, ends, strict=True):
            first = start + len(header)
            if ids[start:first].tolist() == header:
                is_target[first : end + 1] = True
        return is_target

    def pack(self, split: str) -> np.ndarray:
        """Cut a split into rows. Returns the start and the end of each, (rows, 2)."""
        size = self.block_size + 1
        ids, is_target = self.ids[split], self.is_target[split]
        turns = np.flatnonzero(ids == self.tokenizer.begin)
        ends = np.flatnonzero(ids == self.tokenizer.base.eot) + 1
        is_long = np.diff(ends, prepend=0) > size
        # where a row may end: after a conversation, and before each turn of a long one
        cuts = np.union1d(ends, turns[is_long[np.searchsorted(ends, turns, "right")]])
        rows = [[0, 0]]
        for start, end in pairwise([0, *cuts.tolist()]):
            if end - rows[-1][0] > size:
                rows.append([start, end])
            rows[-1][1] = min(end, rows[-1][0] + size)
        # the first token of a row is not predicted
        rows = [row for row in rows if is_target[row[0] + 1 : row[1]].any()]
        if not rows:
            raise UserError(
                f"no reply in {self.folder / split}.bin begins within block_size={self.block_size}; use a larger one"
            )
        return np.array(rows)

    def batch(self, index: int, batch_size: int) -> dict[str, Tensor]:
        """Make training batch number `index`: idx and targets, both int64 (batch_size, block_size).

        An epoch visits each row once, in a random order.
        """
        count = len(self.rows["train"])
        visits = range(index * batch_size, (index + 1) * batch_size)
        order = [
            permute(np.array([visit % count]), count, random_key(self.seed, visit // count))
            for visit in visits
        ]
        return self.blocks("train", np.concatenate(order))

    def blocks(self, split: str, rows: np.ndarray) -> dict[str, Tensor]:
        """Make a batch of the rows with these numbers, (B,), padded with eot."""
        starts, ends = self.rows[split][rows].T[:, :, None]
        position = starts + np.arange(self.block_size + 1)
        position[position >= ends] = -1  # the last token of the split: an eot
        return next_tokens(
            self.ids[split][position], ~self.is_target[split][position[:, 1:]]
        )

    def val_starts(self, batch_size: int, eval_iters: int | None) -> np.ndarray:
        """Numbers of the rows in the evaluation set, spread over the split."""
        count = len(self.rows["val"])
        wanted = min(count, batch_size * (eval_iters or count))
        return np.linspace(0, count - 1, wanted).astype(np.int64)

    def batches_per_epoch(self, batch_size: int) -> float:
        return len(self.rows["train"]) / batch_size

    def summary(self, batch_size: int, eval_iters: int | None) -> tuple[str, str]:
        """Describe a batch and the evaluation set in words."""
        rows, total = len(self.rows["train"]), len(self.rows["val"])
        each = self.meta["splits"]["train"]["conversations"] / rows
        batch = f"{batch_size} rows of {self.block_size} tokens, with {each:.1f} conversations in a row"
        if self.meta["longest"] > self.block_size + 1:
            batch += "; longer ones are cut at a turn"
        return batch, f"{len(self.val_starts(batch_size, eval_iters)):,} of {total:,} rows"

    def val_bytes_per_token(self) -> float:
        """UTF-8 bytes of the replies per target token in the validation split."""
        entry = self.meta["splits"]["val"]
        return entry["target_bytes"] / entry["target_tokens"]
