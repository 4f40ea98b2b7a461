"""Fully sharded data parallelism (FSDP): each rank keeps a part of every weight, gradient and optimizer state.

    torchrun --standalone --nproc_per_node=4 train.py CONFIG --parallel=fsdp

Each rank keeps some consecutive rows of every tensor, in a DTensor whose to_local() returns them. torch's fully_shard
gathers the weights of a block just before its forward and backward passes, and then sends each rank the gradients of
its rows. Sources: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.

This module takes a second to load, so it is imported only with --parallel=fsdp.
"""

from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from humptygpt.cli import UserError, as_user_error
from humptygpt.model import Block
from humptygpt.training.run import Run
from humptygpt.training.torchrun import DataParallel, raise_if_rank_died


class FullySharded(DataParallel):
    """One of several ranks that torchrun has started, and that each hold a part of the model (FSDP).

    Forward passes and saving are collective: every rank must take part.
    """

    sharded = True
    sampling_device = torch.device("cpu")  # a sharded model may not fit on one GPU

    def place(self, model: nn.Module, run: Run) -> None:
        """Move this rank's part of a model of the run to the device. Raises UserError as in DataParallel."""
        config = run.config
        needs_whole = {
            "LoRA": config.lora_rank,
            f"optimizer={config.optimizer}": config.optimizer != "adamw",
            "snapshots": config.snapshots,
            "METRICS": run.metrics,
            "float16": run.dtype == torch.float16,
        }
        for name, chosen in needs_whole.items():
            if chosen:
                raise UserError(f"parallel=fsdp does not support {name}; leave it out, or use --parallel=ddp")
        super().place(model, run)

    def allocate(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keep this rank's part of each parameter on the device. Blocks are gathered one by one."""
        mesh = init_device_mesh(self.device.type, (self.size,))
        policy = precision(self.device, dtype)
        with as_user_error("parallel=fsdp: "):
            for block in blocks(model):
                fully_shard(block, mesh=mesh, mp_policy=policy)
            # the rest in float32, because the embedding starts a float32 residual stream
            fully_shard(model, mesh=mesh)
        for module in (*blocks(model), model):
            module.set_force_sum_reduction_for_comms(True)  # gloo supports only sums
        for module in model.modules():
            own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
            if any(x.is_meta for x in own):
                module.to_empty(device=self.device, recurse=False)
        model.to(self.device)  # also moves the position tables

    @raise_if_rank_died()
    def receive(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this rank's rows of rank 0's tensor."""
        if not isinstance(like, DTensor):  # a buffer
            return super().receive(value, like)
        whole = torch.empty_like(value, device=self.device)
        if self.first:
            whole.copy_(value)
        return distribute_tensor(whole, like.device_mesh, like.placements)

    def total_norm(self, norm: DTensor) -> Tensor:
        return gather(norm)

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

        def keep(x: DTensor) -> Tensor | None:
            whole = gather(x)
            if not self.first:
                return None
            # tied weights are gathered twice, and kept once
            return gathered.setdefault(x.to_local().data_ptr(), whole.cpu())

        super().save(path, tree_map_only(DTensor, keep, entries))
        self.wait_for_all()  # writing may take longer than TIMEOUT


@raise_if_rank_died()
def gather(x: DTensor) -> Tensor:
    return x.full_tensor()


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
