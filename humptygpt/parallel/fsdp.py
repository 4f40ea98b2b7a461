"""Fully sharded data parallelism (FSDP): each rank keeps a part of every weight, gradient and optimizer state.

    torchrun --standalone --nproc_per_node=4 train.py CONFIG --parallel=fsdp

Each rank keeps some consecutive rows of every tensor, in a DTensor whose to_local() returns them. torch's fully_shard
gathers the weights of a block just before its forward and backward passes, and then sends each rank the gradients of
its rows. Sources: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.

This module takes a second to load, so it is imported only with --parallel=fsdp.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from humptygpt import checkpoint
from humptygpt.cli import UserError, refuse
from humptygpt.files import remove
from humptygpt.parallel import sharded
from humptygpt.parallel.processes import (
    DataParallel,
    SharedOptimizer,
    raise_if_rank_died,
)
from humptygpt.run import Run
from humptygpt.tasks import build
from humptygpt.workers import add_seeds
from model import Block


class ShardedOptimizer(SharedOptimizer):
    """An optimizer whose parameters are DTensors. Each rank updates its own rows."""

    def __init__(self, groups: list[dict], process: DataParallel):
        """Raises UserError if a rule needs whole matrices."""
        super().__init__(groups, process)
        for group in groups:
            if not group["rule"].by_rows:
                raise UserError(
                    f"optimizer={group['config'].optimizer} needs whole matrices; use --parallel=ddp"
                )

    def local(self, x: Tensor) -> Tensor:
        return x.to_local()

    def total(self, x: Tensor) -> Tensor:
        return self.process.sum(x)

    def own_part(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this rank's rows of a whole state tensor. A state of a single row is returned whole."""
        return distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        ).clone()

    @raise_if_rank_died()
    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Apply a function to n independent matrices whose rows are spread over the ranks. Returns this rank's rows.

        Each rank gathers some of the matrices, applies the function to them, and sends the rows of the results to the
        ranks that keep them. x: (n, rows of this rank, columns). rows: number of rows of a whole matrix.
        """
        like = torch.empty(len(x), rows, x.shape[2], device="meta")

        def redistribute(part: Tensor, before: int, after: int) -> Tensor:
            whole = DTensor.from_local(
                part.contiguous(),
                self.process.mesh,
                [Shard(before)],
                shape=like.shape,
                stride=like.stride(),
            )
            return whole.redistribute(placements=[Shard(after)]).to_local()

        matrices = redistribute(x, before=1, after=0)
        return redistribute(function(matrices), before=0, after=1)


class FullySharded(DataParallel):
    """One of several processes that each hold a part of the model (FSDP).

    Forward passes and saving are collective: every process must take part.
    """

    sharded = True
    optimizer_class = ShardedOptimizer

    def place(self, model: nn.Module, run: Run) -> None:
        """Move this rank's part of each parameter to the device, and drop the rest. Blocks are gathered one by one.

        Raises UserError if the settings are not supported, or the ranks cannot train together.
        """
        config = run.config
        if config.lora_rank or config.snapshots or run.dtype == torch.float16:
            raise UserError(
                "parallel=fsdp does not support LoRA, snapshots or float16; use --parallel=ddp"
            )
        self.check(run)
        add_seeds(model)
        self.mesh = init_device_mesh(self.device.type, (self.size,))
        policy = precision(self.device, run.dtype)
        with refuse("parallel=fsdp: "):
            for block in blocks(model):
                fully_shard(block, mesh=self.mesh, mp_policy=policy)
            # the rest in float32, because the embedding starts a float32 residual stream
            fully_shard(model, mesh=self.mesh)
        for module in (*blocks(model), model):
            module.set_force_sum_reduction_for_comms(True)  # gloo supports only sums
        for module in model.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=self.device, recurse=False)
        model.to(self.device)  # also moves the position tables
        if config.init_from == "scratch" and not run.progress.iter:
            # rank 0 draws the weights that a single process would draw, and sends them
            torch.manual_seed(config.seed)
            whole = build(model.config).state_dict() if self.first else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, whole, options=options)

    def wrap(self, model: nn.Module, compiled: bool, dynamic: bool) -> nn.Module:
        """Return the model itself. If `compiled`, compile each block, but not the code that gathers its weights."""
        if compiled:
            for block in blocks(model):
                block.forward = torch.compile(block.forward, dynamic=dynamic)
        return model

    def syncing(self, net: nn.Module, last: bool) -> AbstractContextManager:
        """Sum gradients over ranks in the last share. Until then, each rank keeps unsharded gradients of its own."""
        net.set_requires_gradient_sync(last)
        return super().syncing(net, last=True)

    @raise_if_rank_died()
    def save(self, path: Path, entries: dict) -> None:
        """Write the checkpoint as a folder, named ckpt instead of ckpt.pt."""
        sharded.save(path.with_suffix(""), {"format": checkpoint.FORMAT, **entries})
        if self.first:
            remove(path)


def precision(device: torch.device, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """On CUDA, gather a block's weights in the dtype of its products. Gradients are summed in float32.

    All of its weights are converted. CUDA's autocast computes norms in float32 again; a CPU's layer norm would refuse.
    """
    return MixedPrecisionPolicy(
        param_dtype=dtype if device.type == "cuda" else torch.float32,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the residual stream stays float32
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block)]
