"""A step of training."""

import torch
from torch import Tensor, nn

from humptygpt.device import autocast, to_device
from humptygpt.models.build import losses_of, set_seeds, with_progress
from humptygpt.training.ranks import Share
from humptygpt.training.run import Run


def train_step(run: Run) -> tuple[dict[str, Tensor], Tensor, int]:
    """Take the next step: every rank computes its shares of the batch, and updates weights.

    Returns the mean losses before the step, the gradient norm before clipping and the number of tokens. Tensors stay on
    the device, because reading them would make the CPU wait for the GPU. The gradients stay, too.
    """
    ranks, scaler, optimizer = run.ranks, run.scaler, run.optimizer
    shares, tokens = ranks.shares(run, run.progress.iter)
    losses = 0
    for share in shares:
        with ranks.syncing(run.net, last=share is shares[-1]):
            names, terms = weighted_losses(run, share)
            scaler.scale(terms.sum()).backward()
        losses = losses + terms.detach()
    losses = ranks.sum_with_gradients(losses)
    scaler.unscale_(optimizer)
    grad_norm = clip(run)
    scaler.step(optimizer)
    scaler.update()
    return dict(zip(names, losses, strict=True)), grad_norm, tokens


def weighted_losses(run: Run, share: Share) -> tuple[list[str], Tensor]:
    """Compute the loss of a share and the terms that the model adds to it, each times the share's weight.

    Returns their names and values, (terms,).
    """
    set_seeds(run.model, share.seeds)
    progress = run.progress.position / run.config.max_iters
    with autocast(run.device, run.dtype):
        batch = with_progress(run.model, share.batch, progress)
        losses = losses_of(run.net(**to_device(batch, run.device)))
        terms = torch.stack([x.float() for x in losses.values()])
        # without targets, the mean is nan
        terms = terms * share.weight if share.weight else terms.nan_to_num() * 0
    return [*losses], terms


def clip(run: Run) -> Tensor:
    """Scale the gradients down so that their norm is at most grad_clip, unless that is 0. Returns the norm before."""
    groups = run.optimizer.param_groups
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    norm = run.ranks.total_norm(nn.utils.get_total_norm([p.grad for p in params]))
    if run.config.grad_clip:
        nn.utils.clip_grads_with_norm_(params, run.config.grad_clip, norm)
    return norm
