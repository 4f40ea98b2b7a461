"""Fully sharded data parallelism (FSDP): each rank keeps a part of every weight, gradient and optimizer state.

    torchrun --standalone --nproc_per_node=4 train.py CONFIG --parallel=fsdp

The weights of a block are gathered just before it computes, forward and backward, and its gradients go to the ranks
that keep them, all by torch's fully_shard. What is kept of a tensor are neighbouring rows of it: a DTensor, whose
to_local() has them. Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.

It takes a second to load, and one process or DDP needs none of it: it is imported where it is used.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import model as models
from humptygpt.checkpoint import checkpoint, sharded
from humptygpt.core.errors import UserError
from humptygpt.core.files import remove
from humptygpt.parallel.processes import Processes, raise_if_rank_died


@dataclass(frozen=True)
class ShardedProcesses(Processes):
    """Ranks that have a part of the model each: all have to compute, and to save, at the same time."""

    sharded = True

    @cached_property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.size,))

    def check_model(self, model_config: models.ModelConfig, dtype: torch.dtype) -> None:
        if model_config.lora_rank or dtype == torch.float16:
            raise UserError(
                "parallel=fsdp trains neither LoRA nor in float16; take --parallel=ddp, or --dtype=bfloat16"
            )

    def distribute(self, model: nn.Module) -> None:
        """Keep of each parameter, on the device, the part of this rank; each block is gathered by itself.

        Weights are gathered in float32, since autocast converts them, as for one process.
        """
        if not next(model.parameters()).is_meta:  # else the weights are read later
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)  # other hardware might have drawn other ones
        for module in (*blocks(model), model):
            fully_shard(module, mesh=self.mesh)
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
        for module in model.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                module.to_empty(device=self.device, recurse=False)
        model.to(self.device)  # tables of positions

    def compile(self, model: nn.Module, dynamic: bool | None) -> nn.Module:
        """Compile each block by itself, and not what gathers its weights."""
        for block in blocks(model):
            block.forward = torch.compile(block.forward, dynamic=dynamic)
        return model

    def replicate(self, net: nn.Module) -> nn.Module:
        """Return the network itself, which is sharded already."""
        return net

    def sync_gradients(self, replica: nn.Module, last: bool) -> AbstractContextManager:
        """Before the last micro-batch of a step, each rank keeps whole gradients of its own."""
        replica.set_requires_gradient_sync(last)
        return nullcontext()

    @raise_if_rank_died()
    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Return this rank's rows of function(whole), whole: (n, rows, columns), whose n matrices are independent.

        x: (n, rows of this rank, columns). Each rank gathers some of the matrices, computes them, and sends the rows of
        the result to the ranks that keep them.
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

    def total(self, x: Tensor) -> Tensor:
        """Sum x over ranks, in place."""
        return self.all_reduce(x)

    @raise_if_rank_died()
    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """Return a copy of it in rank 0; None in the others."""
        weights: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor()
            if self.first:
                weights[name] = whole.cpu()
        if not self.first:
            return None
        return checkpoint.restore_model(weights, model.config).to(self.device).eval()

    @raise_if_rank_died()
    def save(self, path: Path, entries: dict) -> None:
        """Write the folder ckpt instead of ckpt.pt."""
        entries = {"format": checkpoint.FORMAT, **entries}
        sharded.save(path.with_suffix(""), entries, self.wait_for_all)
        if self.first:
            remove(path)

    def own_part(self, value: Tensor, p: Tensor) -> Tensor:
        """Return the rows that this rank keeps of the state of a whole parameter, or all of a row."""
        placements = p.placements if len(value) == len(p) else [Replicate()]
        value = value.to(p.device)
        return distribute_tensor(
            value, p.device_mesh, placements, src_data_rank=None
        ).clone()

    @raise_if_rank_died()
    def load(self, path: Path, entries: dict) -> None:
        """Fill entries, of which each rank reads its part."""
        sharded.load(checkpoint.stored(path), entries)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, models.Block)]
