"""A GPT with a compiled single-token step, and a cache whose length is a tensor. Source: gpt-fast.

Shapes: see model.py.
"""

import torch
from torch import Tensor, nn

from humptygpt.checks import is_close, randomize, smaller
from humptygpt.cli import first_line, note
from model import GPT, Cache, LayerCache


class StaticLayerCache(LayerCache):
    """The tensors of one layer's cache, at fixed addresses. The position to write to is a tensor."""

    def __init__(self, layer: LayerCache):
        self.buffers = layer.buffers
        # a slice of the prompt's inputs is not contiguous
        layer.state = {name: x.contiguous() for name, x in layer.state.items()}
        self.state = layer.state

    def append(self, end: Tensor, **new: Tensor) -> list[Tensor]:
        """Write each tensor, (..., 1, features), at position end - 1. Returns the whole buffers. end: (1,)."""
        for name, x in new.items():
            buffer = self.buffers[name]
            buffer.index_copy_(buffer.dim() - 2, end - 1, x.to(buffer.dtype))
        return [self.buffers[name] for name in new]

    def update(self, **state: Tensor) -> None:
        for name, x in state.items():
            self.state[name].copy_(x)


class StaticCache(Cache):
    """A cache whose length is a tensor, so that one graph serves every length. A mask hides the unwritten part."""

    def __init__(self, cache: Cache, idx: Tensor):
        """idx: (B, 1), the next tokens."""
        self.size = cache.layers[0].size
        self.length = torch.full((1,), cache.length, device=idx.device)
        self.n_padding = torch.zeros(len(idx), dtype=torch.int64, device=idx.device)
        if cache.n_padding is not None:
            self.n_padding += cache.n_padding
        self.layers = [StaticLayerCache(layer) for layer in cache.layers]

    def span(self, T: int) -> int:
        return self.size


@torch.inference_mode()
def fits_static_cache(model: nn.Module) -> bool:
    """True if a StaticCache, which returns rows that are not written yet, changes no logits of this model.py."""
    try:
        small, text = smaller(model)
        randomize(small.eval())
        idx = text["idx"][:, :-1]  # it leaves a row of the cache unwritten
        before, token = idx.tensor_split([-1], dim=1)
        cache = small.make_cache()
        small.next_logits(before, cache)
        found = small.next_logits(token, StaticCache(cache, token))
        return is_close(found, small.next_logits(idx))
    except Exception:
        return False


class CompiledGPT(nn.Module):
    """A GPT with a compiled single-token step. Prompts go through the uncompiled model.

    On CUDA, a step's kernels are replayed as one CUDA graph, so that the CPU does not launch them one by one.
    """

    has_cache = True

    def __init__(self, model: GPT, **options):
        """options: keyword arguments of torch.compile."""
        super().__init__()
        self.model = model
        self.config = model.config
        self.step = torch.compile(
            model.next_logits, dynamic=False, fullgraph=True, **options
        )

    def make_cache(self, size: int | None = None) -> Cache:
        """Return an empty cache for block_size tokens; `size` is ignored, so that all caches have the same shape."""
        return self.model.make_cache()

    def next_logits(self, idx: Tensor, cache: Cache) -> Tensor:
        """Same as GPT.next_logits, but a single token uses the compiled step if the cache is not empty."""
        if idx.shape[1] > 1 or not cache.length or not self.step:
            return self.model.next_logits(idx, cache)
        static = StaticCache(cache, idx)
        if idx.is_cuda:
            for layer in static.layers:
                for tensor in (layer.buffers | layer.state).values():
                    torch._dynamo.mark_static_address(tensor, guard=False)
        try:
            logits = self.step(idx, static)
        except Exception as error:  # compilers fail in many ways
            note(f"torch.compile failed ({first_line(error)}); generating without it")
            self.step = None
            return self.model.next_logits(idx, cache)
        cache.length += 1
        return logits.clone()  # the next CUDA graph replay overwrites the original
