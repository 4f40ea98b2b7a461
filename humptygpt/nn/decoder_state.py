"""The decoder's state: what generating the next token needs of the tokens read so far.

Shapes: B batch, H heads, T new tokens, S source length, D head size, C n_embd.
"""

import torch
from torch import Tensor

# Positions of the tokens of one forward pass: T consecutive ones, or (B, T) where each text of a batch has its own
PositionIds = slice | Tensor


class LayerState:
    """Keys and values of one block, in buffers that hold `size` tokens."""

    def __init__(self):
        self.k = None  # (B, H, size, D), made when the first token shows shape, dtype and device
        self.v = None
        self.cross_k = None  # (B, H, S, D), of the encoder's output
        self.cross_v = None
        self.last_inputs = None  # (B, up to n, C), of a convolution over n tokens before each

    def append(self, k: Tensor, v: Tensor, end: int, size: int) -> tuple[Tensor, Tensor]:
        """k, v: (B, H, T, D), which go before position `end` of the buffers. Returns all up to it, (B, H, end, D)."""
        B, H, T, D = k.shape
        if self.k is None:
            self.k = k.new_empty(B, H, size, D)
            self.v = v.new_empty(B, H, size, D)
        self.k[:, :, end - T : end] = k
        self.v[:, :, end - T : end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def copy(self, first: int, end: int, size: int, rows: Tensor | None = None) -> None:
        """Move what the buffers hold from `first` to `end` into new ones, of these rows of the batch; None: of all."""
        if self.k is not None:
            self.k = copied(self.k[:, :, first:end], size, rows)
            self.v = copied(self.v[:, :, first:end], size, rows)


def copied(held: Tensor, size: int, rows: Tensor | None) -> Tensor:
    """Return a buffer for `size` tokens that begins with these rows of held, (B, H, up to size, D)."""
    held = select_rows(held, rows)
    B, H, T, D = held.shape
    buffer = held.new_empty(B, H, size, D)
    buffer[:, :, :T] = held
    return buffer


def select_rows(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return x if x is None or rows is None else x[rows]


class DecoderState:
    """A decoder's KV cache: what it keeps of the tokens read. Its length is an int: no step waits for a GPU.

    size: the most tokens that will be read. window: of sliding-window attention; keys and values that are out of every
    later token's reach are dropped, so that the buffers never hold more than about twice as many; 0: keep all.
    padding: (B,) int64, how many of the first tokens of each text are padding, where a batch holds texts of different
    lengths; None: all texts start at the first token.
    """

    def __init__(self, n_layer: int, size: int, window: int = 0, padding: Tensor | None = None):
        self.length = 0  # tokens read
        self.held = 0  # of these, the newest, that the buffers hold
        self.size = min(size, 2 * window) if window else size
        self.window = window
        self.padding = padding
        self.layers = [LayerState() for _ in range(n_layer)]
        self.source_padding = None  # (B, S) bool, of the text that cross-attention looks at

    def make_room(self, T: int) -> int:
        """For the next T tokens. Returns how many tokens they can attend to, themselves included."""
        if self.held + T > self.size:
            assert self.window, f"{self.held + T} tokens, but the state was made for {self.size}"
            kept = min(self.held, self.window - 1)
            self.size = max(2 * self.window, kept + T)
            for layer in self.layers:
                layer.copy(self.held - kept, self.held, self.size)
            self.held = kept
        self.held += T
        return self.held

    def positions(self, T: int) -> PositionIds:
        """Of the next T tokens."""
        if self.padding is None:
            return slice(self.length, self.length + T)
        index = torch.arange(self.length, self.length + T, device=self.padding.device)
        return (index - self.padding[:, None]).clamp(min=0)

    def padding_mask(self, T: int, S: int) -> Tensor | None:
        """(B, S) bool, True where a token is padding, of the last S up to the next T."""
        if self.padding is None:
            return None
        end = self.length + T
        return torch.arange(end - S, end, device=self.padding.device) < self.padding[:, None]

    def clear(self) -> None:
        """Forget the tokens, but not the source."""
        self.length = 0
        self.held = 0
        self.padding = None
        for layer in self.layers:
            layer.last_inputs = None

    def select(self, rows: Tensor) -> None:
        """The batch becomes these of its rows, int64 (any number,), in this order; a row may occur several times."""
        for layer in self.layers:
            layer.copy(0, self.held, self.size, rows)
            layer.cross_k = select_rows(layer.cross_k, rows)
            layer.cross_v = select_rows(layer.cross_v, rows)
            layer.last_inputs = select_rows(layer.last_inputs, rows)
        self.padding = select_rows(self.padding, rows)
        self.source_padding = select_rows(self.source_padding, rows)
