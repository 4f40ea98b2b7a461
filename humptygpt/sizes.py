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
from humptygpt.checkpoint import build_on_meta
from humptygpt.device import autocast, free_memory
from humptygpt.optimizers import state_bytes
from model import ModelConfig

SMALLER = "a smaller --batch_size with more --gradient_accumulation_steps"
WAY_OUT = {False: f"take --checkpoint_activations=True, or {SMALLER}", True: f"take {SMALLER}, or a smaller model"}
FLOAT = 4  # bytes of a weight, of a gradient, and of an element of the optimizer state


class Memory(NamedTuple):
    """Bytes of one process. Weights, gradients and states are float32 whatever dtype the products are computed in."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
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
    activations = activation_bytes(config, rows, dtype, on_gpu, checkpoint_activations)
    return Memory(weights, weights, state_bytes(optimizer, model), weights if ema else 0, activations)


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
    config: ModelConfig, train_config, *, rows: int, dtype: torch.dtype, device: torch.device, processes: int
) -> str:
    """Parameters, FLOPs and memory of a run; train_config: a TrainConfig; rows: of a process's micro-batch."""
    model, micro_batches = build_on_meta(config), train_config.gradient_accumulation_steps
    needed = memory(
        config,
        train_config.optimizer,
        rows,
        dtype,
        on_gpu=device.type == "cuda",
        ema=train_config.ema_decay > 0,
        checkpoint_activations=train_config.checkpoint_activations,
    )
    tokens = micro_batches * train_config.batch_size * config.block_size
    flops, free = models.flops_per_token(model), free_memory(device)
    entries = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in needed._asdict().items() if size)
    fits = "it fits" if needed.total <= free else f"it does not fit; {WAY_OUT[train_config.checkpoint_activations]}"
    return "\n".join(
        [
            f"model: {config.model}, {models.count_parameters(model):,} parameters, {flops:,} FLOPs per token",
            f"step: {tokens:,} tokens, {micro_batches} x {train_config.batch_size} x {config.block_size},"
            f" {flops * tokens:.3g} FLOPs",
            f"memory of each of {processes} processes, in GB: {entries}; {needed.total / 1e9:.3g} in all,"
            f" {free / 1e9:.3g} free on {device}: {fits}",
            f"computed, not measured, at {MFU:.0%} of the peak:",
            *on_clusters(model, needed, micro_batches * train_config.batch_size),
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
            2 * (nodes - 1) / nodes * (size / inside) / card.slow + 2 * math.ceil(math.log2(nodes)) * card.latency
        )
    return seconds


def step_seconds(flops: float, parameters: int, cards: int, card: Card, *, sharded: bool = False) -> float:
    """Of a step of this many FLOPs, with float32 gradients that are added up after the backward pass.

    sharded (FSDP): weights in bfloat16 are gathered for the forward and again for the backward pass, and the gradients
    reach one card each: 2 + 2 + 4 bytes go half the way of an all-reduce. Nothing is sent while computing.
    """
    size = parameters * (2 + 2 + FLOAT) / 2 if sharded else parameters * FLOAT
    return flops / cards / (MFU * card.peak_flops) + all_reduce_seconds(size, cards, card)


def sharded_bytes(whole: Memory, cards: int, largest: int) -> float:
    """Of one card where all but the activations is divided; largest: weights of the largest block, twice gathered."""
    return (whole.total - whole.activations) / cards + whole.activations + 2 * 2 * largest


def on_clusters(model: nn.Module, whole: Memory, sequences: int, card: Card = H100) -> list[str]:
    """A line for 8, 64 and 1,024 cards; whole: the memory of a process with the whole model; sequences: of a step."""
    parameters, lines = models.count_parameters(model), []
    blocks = [module for module in model.modules() if isinstance(module, models.Block)]
    largest = max((models.count_parameters(block) for block in blocks), default=parameters)
    for cards in (8, 64, 1024):
        enough = max(sequences, cards)
        more = f", with {enough:,} sequences a step" if enough > sequences else ""
        flops = models.flops_per_token(model) * enough * model.config.block_size
        sharded = whole.total > card.memory
        size = sharded_bytes(whole, cards, largest) if sharded else whole.total
        seconds = step_seconds(flops, parameters, cards, card, sharded=sharded)
        way = "FSDP" if sharded else "DDP"
        fits = "" if size <= card.memory else ", which does not fit"
        lines.append(f"  {cards:>5,} {card.name}: {seconds:.3g} s a step, {size / 1e9:.3g} GB each{fits}, {way}{more}")
    return lines
