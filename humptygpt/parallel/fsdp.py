"""Fully sharded data parallelism (FSDP): each rank keeps a part of every weight, gradient and optimizer state.

    torchrun --standalone --nproc_per_node=4 train.py CONFIG --parallel=fsdp

torch's fully_shard gathers the weights of a block just before its forward and backward passes, and sends its gradients
to the ranks that keep them. Each rank keeps some neighbouring rows of every tensor, in a DTensor whose to_local()
returns them. Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.

This module takes a second to load, so it is imported only with --parallel=fsdp.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from humptygpt import checkpoint
from humptygpt.config import UserError
from humptygpt.files import remove
from humptygpt.parallel import sharded
from humptygpt.parallel.processes import (
    DataParallel,
    SharedOptimizer,
    raise_if_rank_died,
    share_dropout,
)
from humptygpt.tasks import build
from model import Block

aten = torch.ops.aten
# operations that initialize a whole weight
FILLS = (
    aten.normal_.default,
    aten.uniform_.default,
    aten.fill_.Scalar,
    aten.zero_.default,
)
UNKNOWN_INIT = "parallel=fsdp can initialize weights only with normal_, uniform_ and fill_; use --parallel=ddp"


class FullySharded(DataParallel):
    """One of several processes that each hold a part of the model. All compute and save at the same time."""

    sharded = True

    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer_class = partial(ShardedOptimizer, process=self)

    @cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.size,))

    @classmethod
    def check_config(cls, config, dtype: torch.dtype) -> None:
        if config.lora_rank or dtype == torch.float16:
            raise UserError(
                "parallel=fsdp supports neither LoRA nor float16; use --parallel=ddp or --dtype=bfloat16"
            )
        if config.snapshots:
            raise UserError("parallel=fsdp does not keep snapshots; use --parallel=ddp")

    def place(self, run) -> None:
        """Keep only this rank's part of each parameter, on the device. Each block is gathered separately.

        Weights are gathered in float32; autocast converts them, as it does for a single process.
        """
        self.check(run)
        model = run.model
        share_dropout(model)
        new = run.config.init_from == "scratch" and not run.progress.iter
        if not next(model.parameters()).is_meta:  # else they are drawn below or read later
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)  # different hardware may draw different weights
        for module in (*blocks(model), model):
            fully_shard(module, mesh=self.mesh)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports only sums
        for module in model.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=self.device, recurse=False)
        model.to(self.device)  # position tables
        if new:
            self.draw(model, run.config.seed)

    @torch.no_grad()
    def draw(self, model: nn.Module, seed: int) -> None:
        """Initialize a new model with the weights that a single process would draw."""
        torch.manual_seed(seed)
        with DrawnRows(self) as drawn:
            whole = build(model.config)
        for part, p in zip(model.parameters(), whole.parameters(), strict=True):
            part.to_local().copy_(drawn.take(p))

    def rows_of(self, x: Tensor) -> Tensor:
        """Return this rank's part of a whole parameter, split as fully_shard does it. It may be empty."""
        most = -(-len(x) // self.size)
        return x[self.rank * most : (self.rank + 1) * most]

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Return the model itself, with each block compiled, except for the code that gathers the block's weights."""
        if compiled:
            for block in blocks(model):
                block.forward = torch.compile(block.forward, dynamic=dynamic)
        return model

    def summing(self, net: nn.Module, last: bool) -> AbstractContextManager:
        """Sum gradients over ranks in the last share. Until then, each rank accumulates its own unsharded ones."""
        net.set_requires_gradient_sync(last)
        return nullcontext()

    @raise_if_rank_died()
    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Return this rank's rows of function(whole). whole: (n, rows, columns), n independent matrices.

        x: (n, rows of this rank, columns). Each rank gathers some of the matrices, applies the function to them, and
        sends the rows of the result to the ranks that keep them.
        """
        shape = torch.Size((len(x), rows, x.shape[2]))

        def redistribute(part: Tensor, before: int, after: int) -> Tensor:
            whole = DTensor.from_local(
                part.contiguous(),
                self.mesh,
                [Shard(before)],
                shape=shape,
                stride=(rows * shape[2], shape[2], 1),
            )
            return whole.redistribute(placements=[Shard(after)]).to_local()

        matrices = redistribute(x, before=1, after=0)
        if len(matrices):
            matrices = function(matrices)
        return redistribute(matrices, before=0, after=1)

    @raise_if_rank_died()
    def save(self, path: Path, entries: dict) -> None:
        """Write the folder ckpt instead of ckpt.pt."""
        entries = {"format": checkpoint.FORMAT, **entries}
        sharded.save(path.with_suffix(""), entries, self.wait_for_all)
        if self.first:
            remove(path)


class ShardedOptimizer(SharedOptimizer):
    """An optimizer whose parameters are DTensors. Each rank updates its own rows."""

    def local(self, x: Tensor) -> Tensor:
        return x.to_local()

    def total(self, x: Tensor) -> Tensor:
        return self.process.sum(x)

    def own_part(self, value: Tensor, p: Tensor) -> Tensor:
        """Return this rank's rows of a whole parameter's state. A state of a single row is returned whole."""
        placements = p.placements if len(value) == len(p) else [Replicate()]
        value = value.to(p.device)
        return distribute_tensor(
            value, p.device_mesh, placements, src_data_rank=None
        ).clone()


@raise_if_rank_died()
def load(path: Path, entries: dict) -> None:
    """Fill the DTensors of entries from a sharded checkpoint. Each rank reads its own part."""
    sharded.load(checkpoint.stored(path), entries)


class DrawnRows(TorchDispatchMode):
    """Builds a model without memory for its weights, and keeps only this rank's rows of their initial values.

    Each weight is drawn whole, on the CPU, one at a time, so the random numbers are the same as in a single process.
    """

    def __init__(self, process: FullySharded):
        super().__init__()
        self.process = process
        self.rows: dict[Tensor, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.empty.memory_format:
            return func(*args, **kwargs | {"device": "meta"})
        changed = args[0] if args and func._schema.is_mutable else None
        if changed is None or not changed.is_meta:
            return func(*args, **kwargs)
        if func not in FILLS:
            raise UserError(UNKNOWN_INIT)
        whole = func(torch.empty(changed.shape), *args[1:], **kwargs)
        self.rows[changed] = self.process.rows_of(whole).clone()
        return changed

    def take(self, p: Tensor) -> Tensor:
        """Return this rank's rows of a weight, and free them. Raises UserError."""
        if not p.is_meta:  # a small tensor, for example one of zeros
            return self.process.rows_of(p)
        if p not in self.rows:
            raise UserError(UNKNOWN_INIT)
        return self.rows.pop(p)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block)]
