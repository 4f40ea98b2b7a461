"""A GPT with a compiled single-token step, and a cache whose length is a tensor. Source: gpt-fast.

Shapes: see model.py.
"""

import torch
from torch import Tensor, nn

from humptygpt.cli import first_line, note
from model import GPT, Cache, LayerCache


class StaticLayerCache(LayerCache):
    """One layer's cache buffers, at fixed addresses. The position to write to is a tensor."""

    def __init__(self, layer: LayerCache):
        super().__init__(layer.size)
        self.k = layer.k
        self.v = layer.v
        # after a prompt, last_inputs is a non-contiguous slice of the prompt's inputs
        if layer.last_inputs is not None:
            layer.last_inputs = layer.last_inputs.contiguous()
        self.buffer = layer.last_inputs

    def append(self, k: Tensor, v: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v, (B, H, 1, D), at position end - 1. Returns the whole buffers, (B, H, size, D). end: (1,)."""
        self.k.index_copy_(2, end - 1, k.to(self.k.dtype))
        self.v.index_copy_(2, end - 1, v.to(self.v.dtype))
        return self.k, self.v

    @property
    def last_inputs(self) -> Tensor | None:
        return self.buffer

    @last_inputs.setter
    def last_inputs(self, inputs: Tensor | None) -> None:
        if inputs is not None:
            self.buffer.copy_(inputs)


class StaticCache(Cache):
    """A cache whose length is a tensor, so that one graph serves every length. A mask hides the unwritten part."""

    def __init__(self, cache: Cache, idx: Tensor):
        """idx: (B, 1), the next tokens."""
        self.size = cache.size
        self.length = torch.full((1,), cache.length, device=idx.device)
        self.padding = torch.zeros(len(idx), dtype=torch.int64, device=idx.device)
        if cache.padding is not None:
            self.padding += cache.padding
        self.layers = [StaticLayerCache(layer) for layer in cache.layers]

    def span(self, T: int) -> int:
        return self.size


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

    def next_logits(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Same as GPT.next_logits, but a single token uses the compiled step if the cache is not empty."""
        if idx.shape[1] > 1 or not cache or not cache.length:
            return self.model.next_logits(idx, cache)
        static = StaticCache(cache, idx)
        if idx.is_cuda:
            for layer in static.layers:
                for buffer in (layer.k, layer.v, layer.buffer):
                    if buffer is not None:
                        torch._dynamo.mark_static_address(buffer, guard=False)
        try:
            logits = self.step(idx, static)
        except Exception as error:  # compilers fail in many ways
            note(f"torch.compile failed ({first_line(error)}); generating without it")
            self.step = self.model.next_logits
            logits = self.step(idx, static)
        cache.length += 1
        return logits.clone()  # the next CUDA graph replay overwrites the original
