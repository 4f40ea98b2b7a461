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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from humptygpt.cli import UserError, refuse
from humptygpt.parallel.processes import (
    DataParallel,
    SharedOptimizer,
    raise_if_rank_died,
)
from humptygpt.run import Run
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
    sampling_device = torch.device("cpu")  # a sharded model may not fit on one GPU

    def place(self, model: nn.Module, run: Run) -> None:
        """Move this rank's part of a model of the run to the device. Raises UserError as in DataParallel."""
        config = run.config
        half = run.dtype == torch.float16
        if config.lora_rank or config.snapshots or run.metrics or half:
            raise UserError(
                "parallel=fsdp does not support LoRA, snapshots, METRICS or float16; use --parallel=ddp"
            )
        super().place(model, run)

    def allocate(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keep this rank's part of each parameter on the device. Blocks are gathered one by one."""
        self.mesh = init_device_mesh(self.device.type, (self.size,))
        policy = precision(self.device, dtype)
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

    @raise_if_rank_died()
    def receive(self, value: Tensor, like: DTensor) -> DTensor:
        """Return this rank's rows of rank 0's tensor."""
        whole = torch.empty_like(value, device=self.device)
        if self.first:
            whole.copy_(value)
        return distribute_tensor(whole, like.device_mesh, like.placements)

    @raise_if_rank_died()
    def gather(self, x: DTensor) -> Tensor:
        return x.full_tensor()

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

    def save(self, path: Path, entries: dict) -> None:
        """Gather the tensors one by one in rank 0, which writes the checkpoint."""
        gathered = {}

        def gather(x: DTensor) -> Tensor | None:
            whole = self.gather(x)
            if not self.first:
                return None
            # tied weights are gathered twice, and kept once
            return gathered.setdefault(x.to_local().data_ptr(), whole.cpu())

        super().save(path, tree_map_only(DTensor, gather, entries))
        self.wait_for_all()  # writing may take longer than TIMEOUT


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
