"""Set up a run: its data, its model, and its progress if it resumes a checkpoint."""

import importlib.util
import math
import shlex
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from humptygpt import checkpoint, cli, evaluation, machine
from humptygpt.cli import UserError, first_line, note
from humptygpt.data import COMMAND, Dataset, is_command, made_by, read_meta
from humptygpt.device import (
    DTYPES,
    autocast,
    pick_device,
    pick_dtype,
    thread_counts,
    to_device,
    training_dtype,
)
from humptygpt.loading import Loaded, code_checksum, load, note_edits, recorded
from humptygpt.machine import fastest, usable_cores
from humptygpt.optimizers import freeze
from humptygpt.process import Process, launched
from humptygpt.report import memory_report
from humptygpt.run import Progress, Run
from humptygpt.settings import OF_INPUT, TrainConfig
from humptygpt.tasks import MODELS, add_lora, build, build_on_meta, find_task, model_class
from humptygpt.tokenizers import from_state
from model import ModelConfig, Stack, count_parameters

# on a GPU, a run of at least this many micro-batches is compiled, which takes a minute
LONG = 20_000
# A measurement takes as many tokens as multiply this many weights of a block, in about 10 ms, but at most TOKENS.
WEIGHTS = 2**27
TOKENS = 512
LARGE = 2048  # n_embd above which nothing is measured, because a block and its gradients take too much memory
# settings that the machine chooses if the user does not
MEASURED = ("dtype", "muon_dtype", "threads")

# --------------------------------------------------------------------------------------
# The machine


def tune(config: TrainConfig, model_config: ModelConfig, process: Process) -> TrainConfig:
    """Return the config with the fastest dtypes and number of CPU threads, and set the number of threads.

    What the user has set stays. The dtypes are the same in all runs on a machine. The number of threads follows the
    load: all of them, unless fewer are clearly faster for one layer of the model at this moment, as they are while
    another training runs. In a run of several processes, the first one decides.
    """
    device = process.device

    def choose(choices: Sequence[Hashable], measure: Callable[[], Hashable]) -> Hashable:
        index = choices.index(measure()) if process.first else 0
        return choices[int(process.sum(torch.tensor(index)))]

    dtype, muon_dtype = config.dtype, config.muon_dtype
    if "auto" in (dtype, muon_dtype):
        best = choose(["float32", "bfloat16"], lambda: training_dtype(device))
        muon_dtype = best if muon_dtype == "auto" else muon_dtype
        if device.type == "cpu" and dtype == "auto":
            dtype = best
    dtype = str(pick_dtype(dtype, device)).removeprefix("torch.")

    counts = [min(config.threads, usable_cores())] if config.threads else thread_counts()
    counts = counts[::-1]
    number = counts[0]
    if device.type == "cpu" and model_config.n_embd <= LARGE:
        number = choose(counts, lambda: fastest_count(counts, model_config, DTYPES[dtype]))
    torch.set_num_threads(number)
    return replace(
        config,
        dtype=dtype,
        muon_dtype=muon_dtype,
        # another number of processes may have more threads each
        threads=number if process.size == 1 else None,
    )


def fastest_count(counts: Sequence[int], config: ModelConfig, dtype: torch.dtype) -> int:
    """Time the forward and backward pass of one layer of the model with each number of threads."""
    with suppress(Exception):  # from an edited model.py: training will show the error
        model = build(replace(config, n_layer=1, n_members=1, vocab_size=256))
        weights = sum(p.numel() for p in model.parameters())
        tokens = min(TOKENS, WEIGHTS // weights + 1)
        T = min(config.block_size, tokens)
        idx = torch.zeros(tokens // T, T, dtype=torch.int64)
        batch = {"idx": idx, "targets": idx} | (
            {"source": idx} if hasattr(model, "encode") else {}
        )

        def train(number: int) -> None:
            torch.set_num_threads(number)
            with autocast(torch.device("cpu"), dtype):
                model(**batch)[1].backward()

        return fastest(counts, train)
    return counts[0]


# --------------------------------------------------------------------------------------
# Data


def prepare_missing(config: TrainConfig) -> None:
    """Prepare data/<dataset> if it is missing or incomplete. With --input, check that the input has not changed."""
    folder = Path("data") / config.dataset
    names = {path.name for path in folder.glob("*")}
    prepared = names & {"meta.json", "meta.pkl"}
    if prepared and (config.input is None or launched()[0]):
        return
    import prepare_data  # late import: it is rarely needed

    keys = {}
    if config.input:
        keys = input_keys(config, folder)
    # Do not overwrite existing data: a train.bin without a meta.json is probably nanoGPT's, and a command.txt
    # means that this folder was prepared here before.
    elif names & {"train.bin", COMMAND}:
        return
    keys["name"] = config.dataset
    prepare_data.prepare(cli.make(prepare_data.PrepareConfig, keys))


def input_keys(config: TrainConfig, folder: Path) -> dict[str, object]:
    """Return the settings for preparing config.input: those that the folder was made with, updated by config.

    For a new folder, fine-tuning uses the base model's tokenizer by default.
    Raises UserError if the folder was made from a different input.
    """
    import prepare_data

    keys = {"input": config.input}
    if config.init_from != "scratch":
        keys["tokenizer"] = config.init_from
    if command := made_by(folder):
        words = shlex.split(command)[2:]
        keys = cli.read(words, prepare_data.PrepareConfig, positional="name")
        if Path(keys.get("input", "")).resolve() != Path(config.input).resolve():
            raise UserError(
                f"{folder} was not made from input={config.input} but by this command: {command};"
                " choose another name: --dataset=ANOTHER_NAME"
            )
    for key in OF_INPUT:
        if (value := getattr(config, key)) is not None:
            keys[key] = value
    return keys


def open_prepared(folder: Path, config: ModelConfig, seed: int) -> Dataset:
    """Open a prepared folder. Raises UserError if the model is for another task, or a package is missing."""
    meta = read_meta(folder)
    own = folder / "input.txt"
    if own.exists() and "made_from" in meta and meta["source"] != str(own):
        note(
            f"{folder} was prepared from {meta['source']}, not from {own}; to prepare that:"
            f" python prepare_data.py {folder.name} --overwrite=True"
        )
    task = find_task(meta["task"])
    model = model_class(config.model)
    _, learns = MODELS[config.model]
    if meta["task"] not in learns:
        raise UserError(
            f"dataset={folder.name} is for {meta['task']}, but model={config.model} is for {' and '.join(learns)}"
        )
    # fail now, not at the end of training
    if task.package and not importlib.util.find_spec(task.package):
        raise UserError(
            f"{meta['task']} is scored with a package that is not installed: pip install {task.package}"
        )
    return task.dataset(folder, config.block_size, seed, hasattr(model, "encode"), meta)


def fit_to_data(
    config: TrainConfig,
    model_config: ModelConfig,
    saved: dict | None,
    base: Loaded | None,
    dataset: Dataset,
) -> ModelConfig:
    """Return the model's config for this data. A model gets at least the data's vocabulary; vocab_size may be larger.

    Raises UserError if vocab_size is too small, or if the resumed run or the base model does not match the data.
    """
    if saved:
        check_same_data(saved, dataset, config.out_dir)
    elif base:
        check_same_tokens(base, dataset)
    tokens = dataset.tokenizer.vocab_size
    vocab_size = model_config.vocab_size or tokens
    if vocab_size < tokens and not base:
        raise UserError(
            f"vocab_size={vocab_size} must be at least {tokens}, the vocabulary size of {dataset.folder.name}"
        )
    return replace(model_config, vocab_size=max(vocab_size, tokens))


def check_same_data(saved: dict, dataset: Dataset, out_dir: str) -> None:
    """Raise UserError unless a checkpoint was trained on this data. The message says how to get the right data."""
    pieces = from_state(saved["tokenizer"]).pieces
    # a checkpoint from an earlier version may have different keys
    known = saved["data"]["identity"].items()
    same = all(dataset.identity.get(key, value) == value for key, value in known)
    if pieces == dataset.tokenizer.pieces and same:
        return
    advice = "; if the right data is in another folder, add --dataset=NAME"
    command = saved["data"].get("command", "")
    if is_command(command):
        advice += f"; to prepare it again: {command}"
    raise UserError(
        f"{dataset.folder} is not the data that {out_dir}/ckpt.pt was trained on{advice}"
    )


def check_same_tokens(base: Loaded, dataset: Dataset) -> None:
    """Raise UserError unless the data uses the base model's tokens. The message says how to prepare it with them."""
    tokenizer = base.tokenizer
    # tokens may be added at the end, as those that mark turns are
    if dataset.tokenizer.pieces[: tokenizer.vocab_size] == tokenizer.pieces:
        return
    source = tokenizer.name if tokenizer.name == "gpt2" else base.path
    keys = shlex.join([f"--tokenizer={source}", "--overwrite=True"])
    raise UserError(
        f"the tokens of {dataset.folder} ({dataset.tokenizer.name}) differ from those of the model {base.path}"
        f" ({tokenizer.name}); prepare the data again with {keys}"
    )


# --------------------------------------------------------------------------------------
# The model


def make_model(
    config: TrainConfig,
    model_config: ModelConfig,
    saved: dict | None = None,
    base: Loaded | None = None,
    sharded: bool = False,
    tokens: int = 0,
) -> nn.Module:
    """Return the model to train, on the CPU. sharded: do not allocate the weights of a new model yet.

    tokens: vocabulary size of the data, if there is a base model.
    """
    if saved:
        model = checkpoint.restore_model(saved["model"], model_config, vars(config))
    elif base:
        model = adapt_model(base, config, model_config, tokens)
    else:
        torch.manual_seed(config.seed)
        model = (
            build_on_meta(model_config) if sharded else build(model_config, vars(config))
        )
    for module in model.modules():
        if isinstance(module, Stack):
            module.checkpoint_activations = config.checkpoint_activations
    freeze(model, config.freeze)
    return model


def adapt_model(
    base: Loaded, config: TrainConfig, model_config: ModelConfig, tokens: int
) -> nn.Module:
    """Return the base model, adapted to this config: fewer positions, more tokens, different dropout, LoRA."""
    weights = dict(base.model.state_dict())
    known = base.tokenizer.vocab_size
    for name, x in weights.items():
        if name.endswith("position.wpe.weight"):
            # keep the first positions, as nanoGPT does
            weights[name] = x[: model_config.block_size].clone()
        if name.endswith(("wte.weight", "lm_head.weight")):
            # the vectors of a new token, which may have been padding, start as the mean of the others
            mean = x[:known].mean(dim=0)
            weights[name] = grown = mean.repeat(model_config.vocab_size, 1)
            grown[: len(x)] = x
            grown[known:tokens] = mean
    model = checkpoint.restore_model(weights, model_config)
    torch.manual_seed(config.seed)
    return add_lora(model, vars(config))


def make_net(run: Run) -> nn.Module:
    """Wrap the model of a run for training, compiled if the settings and the machine allow it."""
    config = run.config
    dynamic = run.task.batches_vary
    compiles = config.compile
    if compiles is None:
        micro_batches = config.max_iters * config.gradient_accumulation_steps
        compiles = run.device.type == "cuda" and micro_batches >= LONG
    if compiles:
        print("compiling: this takes about a minute", flush=True)
        try:
            net = run.process.wrap(run.model, compiled=True, dynamic=dynamic)
            compile_now(run, net)
            return net
        except Exception as error:  # a compiler can raise almost anything
            if machine.is_out_of_memory(error):
                raise
            note(f"torch.compile failed ({first_line(error)}); training without it")
        for module in run.model.modules():
            vars(module).pop("forward", None)  # remove the compiled forward
    return run.process.wrap(run.model, compiled=False, dynamic=dynamic)


def compile_now(run: Run, net: nn.Module) -> None:
    """Trigger compilation for the shapes of training, a process's share of a batch, and evaluation, a whole batch."""
    for step in range(2):
        shares, _ = run.process.shares(run.batches, run.config, step)
        with (
            run.process.accumulate(net, shares[0], last=True),
            autocast(run.device, run.dtype),
        ):
            net(**to_device(shares[0].batch, run.device))[1].backward()
        # evaluation temporarily puts whole weights in place of shards, whose gradients would not fit them
        run.model.zero_grad()
        evaluation.evaluate(run, net, 1)


def dry_run(config: TrainConfig, model_config: ModelConfig) -> str:
    """Report the size of a run and the memory it needs, without reading the data or allocating a model."""
    if model_config.vocab_size is None:
        meta = read_meta(Path("data") / config.dataset)
        vocab_size = from_state(meta["tokenizer"]).vocab_size
        model_config = replace(model_config, vocab_size=vocab_size)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    _, processes = launched()
    return memory_report(config, model_config, device, dtype, processes)


def left_open(config: TrainConfig, saved: dict | None, given: Collection[str]) -> list[str]:
    """List the settings that the machine chooses, for config.json: those that the user never set."""
    if saved:
        before = recorded(Path(config.out_dir), "_measured", [str])
        keys = MEASURED if before is None else before
        return [key for key in keys if key not in given]
    return [key for key in MEASURED if getattr(config, key) in ("auto", None)]


def recorded_settings(run: Run) -> dict[str, object]:
    """Return the settings that config.json records for a run."""
    settings = asdict(run.config) | asdict(run.model.config)
    # Keys that start with _ are ignored if config.json is used as a config file.
    settings["_parameters"] = count_parameters(run.model)
    settings["_model.py"] = code_checksum()
    settings["_measured"] = run.measured
    return settings


# --------------------------------------------------------------------------------------
# Resuming a run


def resumed_progress(config: TrainConfig, saved: dict) -> Progress:
    """Return the checkpoint's progress. Print a note if no steps are left, or if the learning rate will rise."""
    note_edits(Path(config.out_dir))
    progress = Progress(**saved["progress"])
    before = cli.restore(TrainConfig, saved["train_config"])
    had = before.lr(progress.position)
    if config.minutes and before.minutes:
        progress.position *= before.minutes / config.minutes
    else:
        progress.position = float(progress.iter)
    if config.eval_only:
        return progress
    if progress.position >= config.max_iters:
        more = f"minutes=N above {config.minutes:g}" if config.minutes else "max_iters=N"
        note(f"all {progress.iter} steps are done; for more, use --{more}")
    lr = config.lr(progress.position)
    if lr - had > 0.01 * config.learning_rate:
        note(
            f"the learning rate rises from {had:.1e} to {lr:.1e}, because its schedule has changed"
        )
    return progress


def keep_best(run: Run, saved: dict) -> None:
    """Evaluate best.pt again if the evaluation set has changed, so that only a better model replaces it."""
    before = cli.restore(TrainConfig, saved["train_config"])

    def sequences(config: TrainConfig) -> int:
        whole = run.dataset.all_val_batches(config.batch_size)
        return min(config.evaluated_batches(), whole) * config.batch_size

    progress = run.progress
    changed = sequences(run.config) != sequences(before)
    if run.config.eval_only or progress.best_val_loss == math.inf or not changed:
        return
    best = load(run.config.out_dir).model
    run.process.place(best, run)
    loss = evaluation.evaluate(run, best, run.config.evaluated_batches()).mean
    note(
        f"the evaluation set changed: on the new one, the loss of best.pt is {loss:.4f}"
        f" instead of {progress.best_val_loss:.4f}"
    )
    progress.best_val_loss = loss
