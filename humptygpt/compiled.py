"""A GPT whose step of one token is compiled, with a cache whose length is a tensor. Source: gpt-fast.

Shapes: see model.py.
"""

import torch
from torch import Tensor, nn

from humptygpt.config import note
from humptygpt.machine import is_out_of_memory
from model import GPT, Cache, LayerCache


class StaticLayerCache(LayerCache):
    """The buffers of a layer at fixed addresses. The position at which a token is written is a tensor."""

    def __init__(self, layer: LayerCache):
        super().__init__(layer.size)
        self.k = layer.k
        self.v = layer.v
        if layer.last_inputs is not None:  # after a prompt, a slice of its inputs
            layer.last_inputs = layer.last_inputs.contiguous()
        self.buffer = layer.last_inputs

    def append(self, k: Tensor, v: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, H, 1, D); end: (1,). Returns the whole buffers, (B, H, size, D)."""
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
    """A cache whose length is a tensor, so that one graph serves all lengths. Masks hide the part not yet written."""

    def __init__(self, cache: Cache, B: int, device: torch.device):
        self.size = cache.size
        self.length = torch.full((1,), cache.length, device=device)
        self.padding = torch.zeros(B, dtype=torch.int64, device=device)
        if cache.padding is not None:
            self.padding += cache.padding
        self.layers = [StaticLayerCache(layer) for layer in cache.layers]

    def span(self, T: int) -> int:
        return self.size


class CompiledGPT(nn.Module):
    """A GPT whose step of one token is compiled. Prompts go through the model as it is.

    On CUDA, the kernels of a step are replayed as one CUDA graph, so that the CPU does not launch each of them.
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
        """Return an empty cache with room for block_size tokens: one shape for all texts."""
        return self.model.make_cache()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple:
        """Compute GPT.forward."""
        return self.model(idx, targets)

    def next_logits(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Compute GPT.next_logits; a single token that follows others takes the compiled step."""
        if idx.shape[1] > 1 or not cache or not cache.length:
            return self.model.next_logits(idx, cache)
        static = StaticCache(cache, len(idx), idx.device)
        if idx.is_cuda:
            for layer in static.layers:
                for buffer in (layer.k, layer.v, layer.buffer):
                    if buffer is not None:
                        torch._dynamo.mark_static_address(buffer, guard=False)
        try:
            # another stride, or a tensor made outside of inference mode, would be compiled for once more
            token = idx.clone(memory_format=torch.contiguous_format)
            logits = self.step(token, static)
        except Exception as error:  # compilers fail in as many ways as there are machines
            if self.step == self.model.next_logits or is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            note(f"torch.compile fails here ({reason}); generating uncompiled")
            self.step = self.model.next_logits
            logits = self.step(idx, static)
        cache.length += 1
        return logits.clone()  # the next replay of a CUDA graph overwrites it
