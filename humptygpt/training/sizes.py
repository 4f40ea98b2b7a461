"""How large a model is, what memory its training takes, and how fast clusters of GPUs would train it.

All of it is computed before a tensor has any memory: from shapes, and from what PyTorch would keep for the backward
pass. What a cluster would do is a formula: an estimate, and not a measurement.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model as models
from humptygpt.checkpoint.checkpoint import build_on_meta
from humptygpt.core.device import autocast, free_memory
from humptygpt.training.optimizers import group_parameters, state_bytes
from model import ModelConfig

SMALLER = "a smaller --batch_size with more --gradient_accumulation_steps"
WAY_OUT = {
    False: f"take --checkpoint_activations=True, or {SMALLER}",
    True: f"take {SMALLER}, or a smaller model",
}
FLOAT = 4  # bytes of a weight, of a gradient, and of an element of the optimizer state


class Memory(NamedTuple):
    """Bytes of one process. Weights, gradients and states are float32 whatever dtype the products are computed in."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buffers: float = 0  # gradients on their way, and with FSDP whole weights: what exceeds the activations by then

    @property
    def total(self) -> float:
        return sum(self)


def memory(
    config: ModelConfig,
    optimizer: str,
    rows: int,
    dtype: torch.dtype,
    *,
    on_gpu: bool = False,
    ema: bool = False,
    checkpoint_activations: bool = False,
) -> Memory:
    """Of training with micro-batches of this many sequences of block_size tokens, a process with the whole model."""
    model = build_on_meta(config)
    weights = FLOAT * models.count_parameters(model)
    gradients = FLOAT * sum(
        p.numel()
        for group, members in group_parameters(model).items()
        for p in members.values()
        if group != "sparse"
    )
    if config.ngrams:  # of the rows of n-gram embeddings that the batch looks up
        gradients += FLOAT * rows * config.block_size * (config.ngrams - 1) * config.n_embd
    activations = activation_bytes(config, rows, dtype, on_gpu, checkpoint_activations)
    buffers = max(0, embedding_gradients(config) - activations)
    state = state_bytes(optimizer, model)
    return Memory(weights, gradients, state, weights if ema else 0, activations, buffers)


def embedding_gradients(config: ModelConfig) -> int:
    """At the end of a backward pass: where the head is the embedding, the gradients of both and their sum."""
    return FLOAT * config.vocab_size * config.n_embd * (3 if config.tie_weights else 1)


def replicated(whole: Memory, processes: int) -> Memory:
    """Of one of several processes with DDP: the gradients that are sent are a copy."""
    if processes == 1:
        return whole
    return whole._replace(buffers=max(whole.buffers, whole.gradients - whole.activations))


def sharded(whole: Memory, model: nn.Module, processes: int, micro_batches: int) -> Memory:
    """Of one of several processes with FSDP; whole: of one with the whole model; micro_batches: of each in a step.

    With several micro-batches a process adds up whole gradients of its own. Beside the activations it has, whole, what
    is in no block, such as the embedding, two blocks, and the gradients of one twice: by parameters and by processes.
    At the end of the backward pass it has the gradients of what is in no block instead.
    """
    blocks = [
        FLOAT * models.count_parameters(module)
        for module in model.modules()
        if isinstance(module, models.Block)
    ]
    rest, largest = FLOAT * models.count_parameters(model) - sum(blocks), max(blocks, default=0)
    last = max(embedding_gradients(model.config), 2 * rest) - whole.activations
    gradients = whole.gradients if micro_batches > 1 else whole.gradients / processes
    parts = (
        whole.weights / processes,
        gradients,
        whole.optimizer / processes,
        whole.ema / processes,
    )
    return Memory(*parts, whole.activations, max(rest + 4 * largest, last))


def activation_bytes(
    config: ModelConfig, rows: int, dtype: torch.dtype, on_gpu: bool, checkpoint_activations: bool
) -> int:
    """What the backward pass needs of the forward pass, uncompiled, and the gradient of the logits."""
    if config.model == "window_mlp":
        return saved_bytes(config, rows, dtype, on_gpu)
    one, two = (saved_bytes(replace(config, n_layer=n), rows, dtype, on_gpu) for n in (1, 2))
    block, rest = two - one, 2 * one - two  # of a transformer, two blocks: one of each stack
    rest += FLOAT * rows * config.block_size * config.vocab_size
    if not checkpoint_activations:
        return rest + config.n_layer * block
    stacks = 2 if config.model == "transformer" else 1
    inputs = FLOAT * rows * config.block_size * config.n_embd * stacks
    return rest + config.n_layer * inputs + block


def saved_bytes(config: ModelConfig, rows: int, dtype: torch.dtype, on_gpu: bool) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass, found with tensors that have no memory.

    A GPU's attention keeps no scores; whether one is there does not matter.
    """
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage  # kept, so that no other gets its number
        return tensor

    explicit = models.EXPLICIT_SCORES
    models.EXPLICIT_SCORES = 0 if on_gpu else explicit
    try:
        with FakeTensorMode():
            model = models.build(replace(config, dropout=0.0) if on_gpu else config)
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            idx = torch.zeros(rows, config.block_size, dtype=torch.int64)
            batch = {"idx": idx, "targets": idx} | ({"source": idx} if model.has_encoder else {})
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            with hooks, autocast(torch.device("cpu"), dtype):
                model(**batch)
    finally:
        models.EXPLICIT_SCORES = explicit
    return sum(storage.nbytes() for key, storage in found.items() if key not in weights)


def describe(
    config: ModelConfig,
    train_config,
    *,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    processes: int,
) -> str:
    """Parameters, FLOPs and memory of a run; train_config: a TrainConfig; rows: of a process's micro-batch."""
    model, micro_batches = build_on_meta(config), train_config.gradient_accumulation_steps
    whole = memory(
        config,
        train_config.optimizer,
        rows,
        dtype,
        on_gpu=device.type == "cuda",
        ema=train_config.ema_decay > 0,
        checkpoint_activations=train_config.checkpoint_activations,
    )
    is_sharded = train_config.parallel == "fsdp" and processes > 1
    needed = replicated(whole, processes)
    if is_sharded:
        needed = sharded(whole, model, processes, micro_batches // processes)
    each = (
        f" of each of {processes} processes, {train_config.parallel.upper()}"
        if processes > 1
        else ""
    )
    tokens = micro_batches * train_config.batch_size * config.block_size
    flops, free = models.flops_per_token(model), free_memory(device)
    entries = ", ".join(
        f"{name} {size / 1e9:.3g}" for name, size in needed._asdict().items() if size
    )
    fits = (
        "it fits"
        if needed.total <= free
        else f"it does not fit; {WAY_OUT[train_config.checkpoint_activations]}"
    )
    return "\n".join(
        [
            f"model: {config.model}, {models.count_parameters(model):,} parameters, {flops:,} FLOPs per token",
            f"step: {tokens:,} tokens, {micro_batches} x {train_config.batch_size} x {config.block_size},"
            f" {flops * tokens:.3g} FLOPs",
            f"memory{each}, in GB: {entries}; {needed.total / 1e9:.3g} in all,"
            f" {free / 1e9:.3g} free on {device}: {fits}",
            f"computed, not measured, at {MFU:.0%} of the peak and {DISK / 1e9:.0f} GB/s to a disk:",
            *on_clusters(model, whole, micro_batches, train_config.batch_size),
        ]
    )


# --------------------------------------------------------------------------------------
# Clusters


class Card(NamedTuple):
    name: str
    peak_flops: float  # in bfloat16
    memory: float  # bytes
    node: int  # cards that are joined by a fast network
    fast: float  # bytes per second and direction of a card, inside a node
    slow: float  # and between nodes
    latency: float  # seconds of a message between nodes


# NVIDIA's data sheet: NVLink 900 GB/s in both directions; a 400 Gbit/s network card for each GPU
H100 = Card("H100", 989e12, 80e9, 8, 450e9, 50e9, 10e-6)
MFU = 0.4  # assumed fraction of the peak: nanoGPT's on A100, 0.3 to 0.5
DISK = 2e9  # bytes per second that a node is assumed to write to a disk that all share


def all_reduce_seconds(size: float, cards: int, card: Card) -> float:
    """Until all cards have the sum of this many bytes of each: by rings, first inside the nodes and then between.

    In a ring each card sends 2 (n - 1) / n of its bytes. Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations". Between nodes, each card's ring has the part that it summed inside.
    """
    inside = min(cards, card.node)
    nodes = math.ceil(cards / card.node)
    seconds = 2 * (inside - 1) / inside * size / card.fast
    if nodes > 1:
        seconds += (
            2 * (nodes - 1) / nodes * (size / inside) / card.slow
            + 2 * math.ceil(math.log2(nodes)) * card.latency
        )
    return seconds


def gather_seconds(size: float, cards: int, card: Card) -> float:
    """Until each card has all of a tensor of this many bytes, of which it had a part; or its part of their sum.

    By rings, so that every card receives (n - 1) / n of it; between nodes, each of a node's cards takes a part.
    """
    inside = min(cards, card.node)
    nodes = math.ceil(cards / card.node)
    seconds = (inside - 1) / inside * size / card.fast
    if nodes > 1:
        seconds += (nodes - 1) / nodes * size / inside / card.slow + (nodes - 1) * card.latency
    return seconds


def step_seconds(flops: float, parameters: int, cards: int, card: Card) -> float:
    """Of a step of this many FLOPs with DDP: float32 gradients are added up after the last backward pass."""
    return flops / cards / (MFU * card.peak_flops) + all_reduce_seconds(
        FLOAT * parameters, cards, card
    )


def sharded_step_seconds(
    flops: float, groups: list[int], micro_batches: int, cards: int, card: Card
) -> float:
    """The same with FSDP; groups: parameters that are gathered together; micro_batches: of each card.

    The weights, in float32, are gathered for the forward and again for the backward pass of each micro-batch, while the
    group before computes: what takes longer counts. The gradients are sent once, as the last backward pass computes.
    """
    gathered = sum(gather_seconds(FLOAT * size, cards, card) for size in groups)
    computed = flops / cards / (MFU * card.peak_flops)
    first = gather_seconds(FLOAT * groups[0], cards, card)  # nothing computes meanwhile
    return first + max(computed, (2 * micro_batches + 1) * gathered)


def checkpoint_seconds(size: float, nodes: int) -> float:
    """Of writing this many bytes, a part from each node."""
    return size / (DISK * nodes)


def on_clusters(
    model: nn.Module, whole: Memory, micro_batches: int, batch_size: int, card: Card = H100
) -> list[str]:
    """A line for 8, 64 and 1,024 cards; whole: the memory of a process with the whole model.

    Where there are fewer sequences in a step than cards, there are as many here; where there are fewer micro-batches,
    each card takes a part of one.
    """
    parameters, lines = models.count_parameters(model), []
    blocks = [
        models.count_parameters(module)
        for module in model.modules()
        if isinstance(module, models.Block)
    ]
    groups = [parameters - sum(blocks), *blocks]
    for cards in (8, 64, 1024):
        sequences = max(micro_batches * batch_size, cards)
        more = (
            f", with {sequences:,} sequences a step"
            if sequences > micro_batches * batch_size
            else ""
        )
        flops = models.flops_per_token(model) * sequences * model.config.block_size
        each = math.ceil(micro_batches / cards)
        rows = min(1, sequences / cards / batch_size)  # of a micro-batch
        part = whole._replace(activations=whole.activations * rows)
        needed = replicated(part, cards)
        is_sharded = needed.total > card.memory
        if is_sharded:
            needed = sharded(part, model, cards, each)
            seconds = sharded_step_seconds(flops, groups, each, cards, card)
        else:
            seconds = step_seconds(flops, parameters, cards, card)
        fits = "" if needed.total <= card.memory else ", which does not fit"
        state = whole.weights + whole.optimizer + whole.ema
        saving = checkpoint_seconds(state, math.ceil(cards / card.node) if is_sharded else 1)
        way = "FSDP" if is_sharded else "DDP"
        lines.append(
            f"  {cards:>5,} {card.name}: {seconds:.3g} s a step, {needed.total / 1e9:.3g} GB each{fits}, {way},"
            f" {saving:.2g} s a checkpoint{more}"
        )
    return lines
