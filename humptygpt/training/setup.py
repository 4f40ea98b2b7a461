"""Put a run together: its processes, its model, its optimizer."""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from humptygpt import machine
from humptygpt.cli import UserError, first_line, note
from humptygpt.data.dataset import Dataset
from humptygpt.device import DTYPES, THREADS, pick_device, tune_malloc
from humptygpt.formats.checkpoint import is_edited
from humptygpt.formats.load import Loaded
from humptygpt.machine import launched, usable_cores
from humptygpt.model import ModelConfig, Stack, count_parameters
from humptygpt.models.build import build, build_on_meta, restore_model
from humptygpt.tokenizers.basic import Tokenizer
from humptygpt.training import evaluation
from humptygpt.training.forked import ForkedRanks
from humptygpt.training.optimizers import freeze, make_optimizer
from humptygpt.training.ranks import Ranks
from humptygpt.training.resume import check_same_data
from humptygpt.training.run import Clock, Run
from humptygpt.training.settings import TrainConfig, choose_dtype
from humptygpt.training.start import Start
from humptygpt.training.step import weighted_losses

# on a GPU, a run of at least this many micro-batches is compiled, which takes a minute
WORTH_COMPILING = 20_000
# Ranks are forked if the model has at most this many parameters for each token of a rank: above that, the sum of their
# gradients and the conversion of weights to bfloat16 take longer than the waits of threads that share operators
PARAMETERS_PER_TOKEN = 50_000


def start_ranks(config: TrainConfig, prepare: Callable[[], None]) -> Ranks:
    """Return this rank, connected to the others that torchrun has started, if there are any.

    prepare: function that prepares the data if it is missing. Several ranks call it one after another.
    Raises UserError if the device is not available, or the ranks cannot connect.
    """
    device = pick_device(config.device)
    _, size = launched()
    if size == 1:
        prepare()
        return Ranks(device)
    if config.parallel == "fsdp":
        from humptygpt.training.fsdp import FullySharded as Parallel
    else:
        from humptygpt.training.torchrun import DataParallel as Parallel
    return Parallel.start(config, device, prepare)


def tune(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Return the config with the fastest dtypes and a number of CPU threads. Set the number of threads, and malloc.

    What the user has set stays.
    """
    if not ranks.sharded:  # that gathers whole weights and frees them, which leaves gaps
        tune_malloc()
    threads = min(config.threads, usable_cores()) if config.threads else THREADS
    torch.set_num_threads(threads)
    # another number of processes may have more threads each
    threads = threads if ranks.size == 1 else None
    return replace(choose_dtype(config, ranks.device), threads=threads)


def fit_to_data(start: Start, dataset: Dataset) -> ModelConfig:
    """Return the model's config for this data. A model gets at least the data's vocabulary; vocab_size may be larger.

    Raises UserError if vocab_size is too small, or if the resumed run or the base model does not match the data.
    """
    config, model_config, saved, base, *_ = start
    if saved:
        check_same_data(saved, dataset, config.out_dir)
    elif base:
        from humptygpt.training.finetune import check_same_tokens

        check_same_tokens(base, dataset)
    tokens = dataset.tokenizer.vocab_size
    vocab_size = model_config.vocab_size or tokens
    if vocab_size < tokens and not base:
        raise UserError(
            f"vocab_size={vocab_size} must be at least {tokens}, the vocabulary size of {dataset.folder.name}"
        )
    return replace(model_config, vocab_size=max(vocab_size, tokens))


def make_model(
    config: TrainConfig,
    model_config: ModelConfig,
    saved: dict | None = None,
    base: Loaded | None = None,
    first: bool = True,
    tokenizer: Tokenizer | None = None,
) -> nn.Module:
    """Return the model to train, on the CPU. tokenizer: that of the data; a trial without it trains a new model.

    first: False: do not allocate the weights of a new model, because the first process will send them.
    """
    if saved:
        model = build_on_meta(model_config, vars(config))
        restore_model(model, saved["model"])
    elif base:
        from humptygpt.training.finetune import adapt_model

        model = adapt_model(base, config, model_config, tokenizer.vocab_size)
    else:
        torch.manual_seed(config.seed)
        make = build if first else build_on_meta
        model = make(model_config, vars(config))
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpoint_activations = config.checkpoint_activations
    freeze(model, config.freeze)
    if config.lora_rank and tokenizer and tokenizer.marks:
        from humptygpt.models.lora import train_rows

        train_rows(model, tokenizer.marks)
    return model


def assemble(
    config: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    ranks: Ranks,
    clock: Clock,
    metrics: dict[str, Callable] | None = None,
    saved: dict | None = None,
) -> Run:
    """Put a run together. saved: the checkpoint that it resumes."""
    dtype = DTYPES[config.dtype]
    run = Run(
        config=config,
        ranks=ranks,
        device=ranks.device,
        dtype=dtype,
        dataset=dataset,
        model=model,
        net=model,
        progress=clock.progress,
        clock=clock,
        metrics=metrics or {},
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16),
    )
    ranks.place(model, run)
    run.optimizer = make_optimizer(config, model, ranks.spread)
    if config.eval_only:  # to save memory, with the plain model and no optimizer state
        return run
    if saved:
        run.restore(saved)
    wrap_model(run)
    run.ranks = fork_ranks(run)
    return run


def wrap_model(run: Run) -> None:
    """Wrap the model of a run for training, compiled if the settings and the machine allow it."""
    config = run.config
    dynamic = run.task.batches_vary
    compiles = config.compile
    if compiles is None:
        micro_batches = config.max_iters * config.gradient_accumulation_steps
        compiles = run.device.type == "cuda" and micro_batches >= WORTH_COMPILING
    if compiles:
        print("compiling: this takes about a minute", flush=True)
        try:
            run.net = run.ranks.wrap(run.model, compiled=True, dynamic=dynamic)
            compile_now(run)
            return
        except Exception as error:  # a compiler can raise almost anything
            if machine.is_out_of_memory(error):
                raise
            note(f"torch.compile failed ({first_line(error)}); training without it")
        for module in run.model.modules():
            vars(module).pop("forward", None)  # remove the compiled forward
    run.net = run.ranks.wrap(run.model, compiled=False, dynamic=dynamic)


def compile_now(run: Run) -> None:
    """Trigger compilation for the shapes of training, a rank's share of a batch, and evaluation, a whole batch."""
    for step in range(2):
        shares, _ = run.ranks.shares(run, step)
        with run.ranks.syncing(run.net, last=True):
            weighted_losses(run, shares[0])[1].sum().backward()
        # evaluation temporarily puts whole weights in place of shards, whose gradients would not fit them
        run.model.zero_grad()
        evaluation.validation_loss(run, run.net, 1)


def fork_ranks(run: Run) -> Ranks:
    """Let ranks that are forked share each batch, if that is faster and computes the same gradients."""
    count = count_ranks(run)
    if count > 1 and is_edited():
        from humptygpt.models.checks import forking_problem

        if problem := forking_problem(run.model):
            note(f"threads share each operator, not the batch, which is slower: {problem}")
            count = 1
    if run.config.threads:
        torch.set_num_threads(run.config.threads // count)
    return ForkedRanks(count) if count > 1 else run.ranks


def count_ranks(run: Run) -> int:
    """Return how many ranks share a batch: as many as can take equally many rows; 1: threads share operators."""
    config = run.config
    compiled_or_shared = run.net is not run.model or run.ranks.size > 1
    if compiled_or_shared or run.device.type != "cpu" or sys.platform != "linux":
        return 1
    sizes = range(1, config.threads + 1)
    if not run.task.batches_vary:  # otherwise there are many rows
        sizes = [count for count in sizes if config.batch_size % count == 0]
    tokens = config.batch_size * run.model.config.block_size / sizes[-1]
    fits = count_parameters(run.model) <= PARAMETERS_PER_TOKEN * tokens
    return sizes[-1] if fits else 1
