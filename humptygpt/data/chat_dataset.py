"""Read token files of conversations, and pack whole conversations into rows."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from humptygpt.cli import UserError
from humptygpt.data.dataset import Batch, TokenDataset, how_to, next_tokens, permute
from humptygpt.machine import random_key
from humptygpt.tokenizers.chat import BEGIN, END


class Exchange(NamedTuple):
    """A question and the reply to it."""

    prompt: list[int]  # ids of all that precedes the reply
    question: str
    reply: str
    tokens: int  # of the reply with its end, at most


class ChatDataset(TokenDataset):
    """Conversations, stored as `turn turn ... eot`. Only the assistant's replies and their ends are predicted.

    Rows of block_size + 1 tokens are filled with whole conversations. A conversation that is longer than a row is cut
    into parts, each of which begins with a question. An exchange that is longer loses the end of its reply, or is left
    out if its question alone fills the row. Raises UserError if no reply is left.

    is_target: {split: which tokens are targets, (T,)}. rows: {split: positions of each row's tokens}; see pack().
    fitting: {split: positions of each conversation, or part of one, that is in a row}. longest: tokens of the longest
    conversation.
    cut: {split: Counter of what happened to replies that do not fit}.
    """

    task = "chat"

    def set_up(self) -> None:
        if not self.tokenizer.marks:
            raise UserError(f"{self.folder} holds no conversations; {how_to(self.folder)}")
        self.ids, self.is_target, self.rows, self.cut, self.fitting = {}, {}, {}, {}, {}
        self.longest = 0
        for split in self.splits:
            self.ids[split] = ids = np.concatenate([ids for _, ids in self.chunks(split)])
            self.is_target[split], exchanges = self.find_targets(ids)
            starts = [start for start in exchanges if self.begins(ids, start)]
            self.longest = max([self.longest, *np.diff([*starts, len(ids)])])
            self.rows[split] = self.pack(split, exchanges)
        self.places = lru_cache(2)(self.find_places)  # of an epoch and the next

    @property
    def target_fraction(self) -> float:
        return self.is_target["train"][self.rows["train"]].mean()

    def contexts(self, sizes: Collection[int]) -> list[int]:
        """Return the smallest size that has room for each conversation and a few more turns."""
        needed = max(256, self.longest)
        return [min((size for size in sizes if size >= needed), default=max(sizes))]

    def find_targets(self, ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Find the tokens of the assistant's turns, each with its end and without its first line.

        Returns whether each token is one of them, (T,) bool, and where each exchange starts: a turn that begins a
        conversation or follows a reply.
        """
        header = [self.tokenizer.begin, *self.tokenizer.encode("assistant\n")]
        is_target = np.zeros(len(ids), dtype=bool)
        exchanges = []
        starts, ends = (np.flatnonzero(ids == mark) for mark in self.tokenizer.marks)
        # there may be more ends, because the token that separates conversations may be the same
        ends = ends[np.searchsorted(ends, starts)]
        follows_reply = False
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            first = start + len(header)
            is_reply = ids[start:first].tolist() == header
            is_target[first : end + 1] = is_reply
            if self.begins(ids, start) or (follows_reply and not is_reply):
                exchanges.append(start)
            follows_reply = is_reply
        return is_target, exchanges

    def begins(self, ids: np.ndarray, start: int) -> bool:
        """True if a conversation begins here: it follows an eot, and the first one is preceded by the last token."""
        return ids[start - 1] == self.tokenizer.base.eot

    def pack(self, split: str, exchanges: list[int]) -> np.ndarray:
        """Group the pieces of a split into rows.

        Returns where the tokens of each row are, int32 (rows, block_size + 1). The rest of a row is -1: the last token
        of the split, an eot.
        """
        size = self.block_size + 1
        is_target = self.is_target[split]
        self.cut[split] = cut = Counter()
        self.fitting[split] = pieces = []
        for piece in self.pieces(self.ids[split], exchanges):
            # the first token of a row is not predicted
            if is_target[piece.start + 1 : piece.stop].any():
                pieces.append(piece)
                cut["replies cut short"] += is_target[piece.stop % len(is_target)]
            else:
                cut["replies left out"] += 1
        if not pieces:
            raise UserError(
                f"no reply in {self.folder / split}.bin begins within block_size={self.block_size}; use a larger one"
            )
        grouped = best_fit([len(piece) for piece in pieces], size)
        rows = np.full((len(grouped), size), -1, dtype=np.int32)
        for row, numbers in zip(rows, grouped, strict=True):
            positions = np.concatenate([pieces[number] for number in numbers])
            row[: len(positions)] = positions
        return rows

    def find_places(self, epoch: int) -> np.ndarray:
        """Let pieces of the same length change places, or a model learns which reply comes after which.

        Returns the position that takes the place of each position of the training split; -1, the padding, stays.
        """
        places = np.arange(len(self.ids["train"]) + 1, dtype=np.int32)
        places[-1] = -1
        if epoch:
            pieces = self.fitting["train"]
            lengths = [len(piece) for piece in pieces]
            draw = np.random.default_rng((self.seed, epoch)).permutation(len(pieces))
            before, after = np.argsort(lengths, kind="stable"), np.lexsort((draw, lengths))
            for old, new in zip(before, after, strict=True):
                places[pieces[old]] = pieces[new]
        return places

    def pieces(self, ids: np.ndarray, exchanges: list[int]) -> list[range]:
        """Find the positions of each conversation, or of its parts if it is longer than a row."""
        size = self.block_size + 1
        pieces = []
        for start, end in pairwise([*exchanges, len(ids)]):
            if self.begins(ids, start) or end - pieces[-1].start > size:
                pieces.append(range(start, start))
            first = pieces[-1].start
            pieces[-1] = range(first, min(end, first + size))
        return pieces

    def exchanges(self, split: str, count: int) -> list[Exchange]:
        """Return the first questions of up to `count` conversations, which are spread over a split, and the replies."""
        pieces = self.fitting[split]
        decode = self.tokenizer.decode
        found = []
        for piece in pieces[:: max(1, len(pieces) // count)][:count]:
            changes = np.flatnonzero(np.diff(self.is_target[split][piece])) + 1
            parts = np.split(self.ids[split][piece], changes)
            for end in range(1, len(parts), 2):
                role, _, turn = decode(parts[end - 1]).split(BEGIN)[-2].partition("\n")
                if role == "user":
                    prompt, reply = np.concatenate(parts[:end]).tolist(), parts[end]
                    texts = turn.removesuffix(f"{END}\n"), decode(reply).removesuffix(END)
                    found.append(Exchange(prompt, *texts, len(reply)))
                    break
        return found

    def batch(self, index: int, batch_size: int) -> Batch:
        """Make training batch number `index`: idx and targets, both int64 (batch_size, block_size).

        An epoch visits each row once, in a random order.
        """
        rows = self.rows["train"]
        positions = []
        for visit in range(index * batch_size, (index + 1) * batch_size):
            epoch, place = divmod(visit, len(rows))
            row = permute(np.array([place]), len(rows), random_key(self.seed, epoch))[0]
            positions.append(self.places(epoch)[rows[row]])
        return self.tokens("train", np.stack(positions))

    def blocks(self, split: str, rows: np.ndarray) -> Batch:
        """Make a batch of the rows with these numbers, (B,), padded with eot."""
        return self.tokens(split, self.rows[split][rows])

    def tokens(self, split: str, positions: np.ndarray) -> Batch:
        """Make a batch of the tokens at these positions, (B, block_size + 1)."""
        return next_tokens(self.ids[split][positions], ~self.is_target[split][positions[:, 1:]])

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
        each = len(self.fitting["train"]) / rows
        batch = f"{batch_size} rows of {self.block_size} tokens, with {each:.1f} conversations in a row"
        for what, count in self.cut["train"].items():
            if count:
                batch += f"; {what}: {count:,}"
        return batch, f"{len(self.val_starts(batch_size, eval_iters)):,} of {total:,} rows"


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Group texts into rows of at most `size` tokens: each goes into the fullest row that has room for it.

    Returns the numbers of the texts in each row.
    """
    shortest = min(lengths)
    rows, with_room = [], []  # with_room: (room in tokens, number of the row), sorted
    for number, length in enumerate(lengths):
        place = bisect_left(with_room, (length,))
        if place == len(with_room):
            room, row = size, len(rows)
            rows.append([])
        else:
            room, row = with_room.pop(place)
        rows[row].append(number)
        if room - length >= shortest:
            insort(with_room, (room - length, row))
    return rows
