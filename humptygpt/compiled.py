"""A GPT made for generation -> the same, whose step of one token is compiled: one graph for every length of text.

The length is a tensor and all buffers hold block_size tokens, so that neither shapes nor numbers in the graph change
from token to token; a mask hides what is not written yet. On CUDA the kernels of a step are replayed as one CUDA graph,
which spares the CPU from launching each. Prompts go through the model as it is. Source: gpt-fast.

Shapes: see model.py.
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn

from humptygpt.agreement import OTHER_LOGITS, difference
from humptygpt.config import note
from humptygpt.decoder import prepare_for_generation
from humptygpt.layers import NO_MASK, DecoderState, LayerState, with_loss
from humptygpt.machine import is_out_of_memory
from model import GPT, BlockInputs, ModelConfig


def make_generator(
    model: nn.Module, dtype: torch.dtype, device: torch.device, compiles: bool
) -> nn.Module:
    """Prepare a model for generation, with its shortcuts and compiled if they still agree with model.py.

    If an edit of model.py made the shortcuts differ, the model's own code generates. If the cache differs as well, the
    model generates without it.
    """
    reason = model.has_state and difference(model, partial(shorten, compiles=compiles))
    if reason:
        note(f"model.py is not what the shortcuts compute ({reason}): generating without")
        compiles = False
        if difference(model, lambda small: small) == OTHER_LOGITS:
            note("each token is computed from the whole text: the cache gives other logits")
            model.has_state = False
    model = prepare_for_generation(model, dtype, device, compiles, not reason)
    if not compiles:
        return model
    print("compiling: this takes about a minute", file=sys.stderr)
    # a CUDA graph; on a CPU there is none
    return CompiledGPT(model, mode="reduce-overhead" if device.type == "cuda" else None)


def shorten(model: nn.Module, compiles: bool) -> nn.Module:
    """Return the model with all shortcuts, but not compiled."""
    model = prepare_for_generation(model, compiles=compiles)
    return CompiledGPT(model) if compiles else model


class StaticLayer(LayerState):
    """Keys and values of one block, of which one token is written at a position that is a tensor."""

    def __init__(self, k: Tensor, v: Tensor, last_inputs: Tensor | None):
        super().__init__()
        self.k = k
        self.v = v
        self.last_inputs = last_inputs

    def append(self, k: Tensor, v: Tensor, position: Tensor, size: int) -> tuple:
        """k, v: (B, H, 1, D); position: (1,). Returns the whole buffers, (B, H, size, D)."""
        self.k.index_copy_(2, position, k.to(self.k.dtype))
        self.v.index_copy_(2, position, v.to(self.v.dtype))
        return self.k, self.v


class CompiledGPT(nn.Module):
    """What generation asks of a GPT; see next_logits."""

    has_encoder = False
    has_state = True

    def __init__(self, model: GPT, **options):
        """options: of torch.compile; without any, the step is not compiled."""
        super().__init__()
        self.model = model
        self.compiled = self.step
        if options:
            self.compiled = torch.compile(
                self.step, dynamic=False, fullgraph=True, **options
            )

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple:
        """As GPT.forward."""
        return self.model(idx, targets)

    def make_state(self, size: int | None = None) -> DecoderState:
        """An empty state with room for block_size tokens, whatever the windows: one shape for all texts."""
        return DecoderState(self.config.n_layer, self.config.block_size, {0})

    def next_logits(self, idx: Tensor, state: DecoderState | None = None) -> Tensor:
        """As GPT.next_logits: a single token after others by the compiled step."""
        if idx.shape[1] > 1 or not state or not state.length:
            return self.model.next_logits(idx, state)
        position = torch.full((1,), state.length, device=idx.device)
        for layer, block in zip(state.layers, self.model.stack.blocks, strict=True):
            if block.conv:
                missing = len(block.conv.weight) - layer.last_inputs.shape[1]
                padding = (0, 0, missing, 0)  # what is before the text counts as zeros
                layer.last_inputs = nn.functional.pad(layer.last_inputs, padding)
            if idx.is_cuda:
                for buffer in (layer.k, layer.v):
                    torch._dynamo.mark_static_address(buffer, guard=False)
        buffers = [(layer.k, layer.v, layer.last_inputs) for layer in state.layers]
        # what was made outside of inference mode would be compiled for once more
        padding = None if state.padding is None else state.padding.clone()
        arguments = idx.clone(), position, padding, buffers
        try:
            logits, last_inputs = self.compiled(*arguments)
        except Exception as error:  # compilers fail in as many ways as there are machines
            if self.compiled == self.step or is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            note(f"torch.compile fails here ({reason}); generating uncompiled")
            self.compiled = self.step
            logits, last_inputs = self.step(*arguments)
        state.make_room(1)
        state.length += 1
        # the next replay of a CUDA graph overwrites what it returned
        for layer, inputs in zip(state.layers, last_inputs, strict=True):
            layer.last_inputs = None if inputs is None else inputs.clone()
        return logits.clone()

    def step(
        self,
        idx: Tensor,
        position: Tensor,
        padding: Tensor | None,
        buffers: list[tuple[Tensor, Tensor, Tensor | None]],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Compute the logits (B, V) after one more token of each text, and write its keys and values into the buffers.

        idx: (B, 1). position: (1,), of the token in the buffers. padding: as DecoderState has it. buffers: keys, values
        and last inputs of each layer. Returns the new last inputs, too: a graph that changed them, which are at another
        address for each token, would not become a CUDA graph.
        """
        model = self.model
        stack = model.stack
        at = position[None] if padding is None else position - padding[:, None]
        masks = {window: self.mask(position, padding, window) for window in stack.windows}
        cached = position, model.config.block_size
        rotary = stack.position.rotary(at)
        inputs = BlockInputs(cached, masks, rotary, None, NO_MASK, None)
        x = stack.embed_norm(stack.position.embed(model.wte(idx), at))
        kept = []
        for block, (k, v, last_inputs) in zip(stack.blocks, buffers, strict=True):
            layer = StaticLayer(k, v, last_inputs)
            x = block(x, inputs, layer)
            kept.append(layer.last_inputs)
        return with_loss(model, model.lm_head(stack.norm(x))[:, -1], None)[0], kept

    def mask(self, position: Tensor, padding: Tensor | None, window: int) -> tuple:
        """As attention_mask, for the query at this position and as many keys as the buffers hold."""
        size = self.config.block_size
        key = torch.arange(size, device=position.device)
        distance = position - key  # (size,)
        allowed = (distance >= 0) & (distance < (window or size))
        if padding is not None:
            allowed = (allowed & (key >= padding[:, None]))[:, None, None]
        bias = self.model.stack.position.score_bias(1, size)
        if bias is None:
            bias = torch.zeros(1, 1, 1, size, device=position.device)
        else:  # it is for a query at the end: each key takes that of its distance
            bias = bias.index_select(3, (size - 1 - distance).clamp(max=size - 1))
        return bias.masked_fill(~allowed, -torch.inf), False
