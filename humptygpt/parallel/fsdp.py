"""Fully sharded data parallelism (FSDP): each process keeps a part of every weight, gradient and optimizer state.

    torchrun --standalone --nproc_per_node=4 train.py CONFIG --parallel=fsdp

The weights of a block are gathered just before it computes, forward and backward, and its gradients go to the processes
that keep them, all by torch's fully_shard. What is kept of a tensor are neighbouring rows of it: a DTensor, whose
to_local() has them. Source: Rajbhandari et al. 2019 (ZeRO), arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.

It takes a second to load, and one process or DDP needs none of it: it is imported where it is used.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import model as models
from humptygpt.checkpoint import sharded as sharded_checkpoint
from humptygpt.checkpoint.checkpoint import restore_model, stored
from humptygpt.core.errors import UserError
from humptygpt.core.files import remove
from humptygpt.parallel.processes import Processes, raise_if_rank_died


@dataclass(frozen=True)
class ShardedProcesses(Processes):
    """Processes that have a part of the model each: all have to compute, and to save, at the same time."""

    sharded = True

    def check_model(self, model_config: models.ModelConfig, dtype: torch.dtype) -> None:
        if rank := model_config.lora_rank:
            raise UserError(
                f"parallel=fsdp does not shard a model with lora_rank={rank}, which trains too little;"
                " take --parallel=ddp"
            )
        if dtype == torch.float16:
            raise UserError(
                "parallel=fsdp does not train in float16; take --dtype=bfloat16 or --dtype=float32"
            )

    def distribute(self, model: nn.Module) -> None:
        """Keep of each parameter, on the device, the part of this process; each block is gathered by itself.

        Weights are gathered in float32, since autocast converts them, as for one process.
        """
        without_memory = next(model.parameters()).is_meta  # the weights are read later
        if not without_memory:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)  # other hardware might have drawn other ones
        mesh = init_device_mesh(self.device.type, (self.size,))
        fully_shard(
            [model.wte, model.lm_head], mesh=mesh, reshard_after_forward=False
        )  # which may be one matrix
        for module in (*blocks(model), model):
            fully_shard(module, mesh=mesh)
        for module in (model.wte, *blocks(model), model):
            module.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
        model.lm_head.register_forward_pre_hook(
            lambda head, inputs: free_after_backward(model.wte, *inputs)
        )
        if without_memory:
            model._apply(
                lambda x: (
                    torch.empty_like(x, device=self.device) if x.is_meta else x.to(self.device)
                )
            )

    def compile(self, model: nn.Module, dynamic: bool | None) -> nn.Module:
        """Each block by itself, and not what gathers its weights."""
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

    def spread(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """The rows of this process of function(whole), whole: (n, rows, columns), whose n matrices are independent.

        x: (n, rows of this process, columns). Each process gathers some of the matrices, applies the function, and
        sends the rows of the result to those that keep them.
        """
        columns, most = x.shape[2], -(-rows // self.size)
        kept = [
            max(0, min(most, rows - most * rank)) for rank in range(self.size)
        ]  # rows, as DTensor divides them
        order = [i for owner in range(self.size) for i in range(owner, len(x), self.size)]
        owned = [len(range(owner, len(x), self.size)) for owner in range(self.size)]  # matrices
        sizes = [n * kept[self.rank] * columns for n in owned]
        parts = self.exchange(
            x[order].flatten(), sizes, [owned[self.rank] * n * columns for n in kept]
        )
        mine = owned[self.rank]
        whole = torch.cat(
            [part.view(mine, n, columns) for part, n in zip(parts, kept, strict=True)], dim=1
        )
        if len(whole):
            whole = function(whole)
        updates = self.exchange(
            torch.cat([part.flatten() for part in whole.split(kept, dim=1)]),
            [part.numel() for part in parts],
            sizes,
        )
        found = torch.empty_like(x)
        found[order] = torch.cat(updates).view(x.shape)
        return found

    @raise_if_rank_died()
    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, ...]:
        """Each process gets a piece of x, (n,), of these sizes. Returns what this one gets from each."""
        found = x.new_empty(sum(received))
        dist.all_to_all_single(found, x, received, sent)
        return found.split(received)

    @raise_if_rank_died()
    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the processes."""
        dist.all_reduce(x)
        return x

    def after_forward(self, model: nn.Module) -> None:
        """What is in no block would stay gathered, and be outdated when the weights change."""
        model.wte.reshard()
        model.reshard()

    @raise_if_rank_died()
    def whole_model(self, model: nn.Module) -> nn.Module | None:
        """A copy of it in the first process; None in the others."""
        weights: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.first:
                weights[name] = whole.cpu()
        return restore_model(weights, model.config).to(self.device).eval() if self.first else None

    def save(self, path: Path, entries: dict) -> None:
        """Instead of ckpt.pt the folder ckpt."""
        sharded_checkpoint.save(path.with_suffix(""), entries, self)
        if self.first:
            remove(path)

    def load(self, path: Path, entries: dict) -> None:
        """Fill entries, of which each process reads its part."""
        sharded_checkpoint.load(stored(path), entries, self)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, models.Block)]


def free_after_backward(embedding: nn.Module, x: Tensor) -> None:
    """x: the head's input. When its gradient is there, no backward pass needs the weights of head and embedding."""
    if x.requires_grad:
        x.register_hook(lambda gradient: embedding.reshard())


def own_part(value: Tensor, p: Tensor) -> Tensor:
    """What this process keeps of a value of a whole parameter, or of one number for each of its rows or columns."""
    placements = p.placements if len(value) == len(p) else [Replicate()]
    return distribute_tensor(
        value.to(p.device), p.device_mesh, placements, src_data_rank=None
    ).clone()
