"""Set up a run: its settings, its data, its model, and its progress if it resumes a checkpoint."""

import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from humptygpt import checkpoint, cli, evaluation, machine
from humptygpt.checks import sharing_problem
from humptygpt.cli import (
    UserError,
    fields_of,
    first_line,
    is_removed,
    note,
    refuse,
    refuse_vain,
)
from humptygpt.data import COMMAND, DATASETS, Dataset, read_meta
from humptygpt.device import DTYPES, pick_device
from humptygpt.files import refuse_damaged
from humptygpt.forked import ForkedRanks
from humptygpt.loading import (
    Loaded,
    code_checksum,
    find_source,
    load,
    note_edits,
)
from humptygpt.loggers import chosen_loggers
from humptygpt.machine import GIVEN
from humptygpt.optimizers import freeze, make_optimizer
from humptygpt.ranks import Ranks, choose_dtypes, launched, read_each, read_once
from humptygpt.report import memory_report
from humptygpt.run import Clock, Progress, Run, lock_out_dir, refuse_earlier_run
from humptygpt.settings import (
    IN_VAIN,
    MAY_CHANGE,
    RECIPE,
    STEP,
    UNPLANNED,
    TrainConfig,
)
from humptygpt.step import weighted_losses
from humptygpt.tasks import (
    MODELS,
    build,
    build_on_meta,
    find_task,
    make_model_config,
    model_class,
)
from humptygpt.tokenizers import Tokenizer, from_state
from model import ModelConfig, Stack, count_parameters

# on a GPU, a run of at least this many micro-batches is compiled, which takes a minute
LONG = 20_000
# Ranks are forked if the model has at most this many parameters for each token of a rank: above that, the sum of their
# gradients and the conversion of weights to bfloat16 take longer than the waits of threads that share operators
PARAMETERS_PER_TOKEN = 50_000

# --------------------------------------------------------------------------------------
# Settings


class Start(NamedTuple):
    """The settings of a run, and the checkpoint or model that it starts from."""

    config: TrainConfig
    model_config: ModelConfig
    saved: dict | None = None  # the checkpoint to resume
    base: Loaded | None = None  # the model that the run starts from
    given: Collection[str] = ()  # keys that the command line and its config files set


def read_settings(argv: list[str], locks: ExitStack | None = None) -> Start:
    """Read a command line, and the checkpoint that it resumes or the model that it starts from.

    locks: receives the lock on out_dir, taken before the checkpoint is read. A run that writes nothing takes no lock.
    """
    rank, processes = launched()
    fields = fields_of(TrainConfig, ModelConfig)
    given, typed = read_command(argv)
    overwrite = given.pop("overwrite", False)  # belongs to this command, not to the run
    out_dir = Path(given["out_dir"])
    path = out_dir / "ckpt.pt"
    writes = not given.get("eval_only") and not given.get("dry_run")
    if locks and writes and not rank:
        locks.enter_context(lock_out_dir(out_dir))
    init_from = given.get("init_from", "scratch")
    auto = init_from == "auto"
    saved, base, settings, defaults = None, None, given, {}
    backend = given.get("backend", TrainConfig.backend)
    if auto or init_from == "resume":
        saved = read_once(
            lambda: read_run(path) if path.exists() or not auto else None, backend
        )
    if auto:
        given["init_from"] = init_from = "resume" if saved else "scratch"
    if init_from not in ("scratch", "resume"):
        from humptygpt.finetune.base import base_defaults, base_settings

        base = read_each(lambda: load(init_from), backend)
        settings = given | base_settings(base, given)
        defaults = base_defaults(base, given)
    elif given.get("minutes") and given.get("model", ModelConfig.model) == "gpt":
        defaults = cli.read_config(str(cli.CONFIGS.parent / RECIPE), fields)
        # the recipe's width would have to be a multiple of n_head: keep the size of its heads instead
        heads = given.get("n_head", defaults["n_head"])
        defaults["n_embd"] = defaults["n_embd"] // defaults["n_head"] * heads
    if saved:
        settings = resumed_settings(saved, settings, path)
    else:
        settings = defaults | settings
        # a run that was killed before its first ckpt.pt may have left a best.pt
        if writes and not rank and not overwrite and not auto:
            refuse_earlier_run(out_dir)
    config = cli.make(TrainConfig, settings)
    model_config = make_model_config(settings)
    if given.get("minutes") and (config.dry_run or config.eval_only):
        raise UserError("minutes has no effect with dry_run or eval_only; leave it out")
    if config.minutes and processes > 1:
        raise UserError("minutes works with one process only; with several, use max_iters")
    for name in chosen_loggers(asdict(config)):  # fail now, not after preparing data
        importlib.import_module(name)
    values = asdict(config) | asdict(model_config) | {"processes": processes}
    values["input"] = given.get("input")  # a resumed run forgets it
    # a config.json sets every key, most of them to the default, and muon_dtype as the machine chose it
    chosen = {key for key in given if given[key] != fields[key].default} - {"muon_dtype"}
    # only noted: a config file may be combined with others, and the same command may run in several processes
    noted = given.keys() - typed | {"parallel", "backend"}
    refuse_vain(chosen | typed, values, IN_VAIN, noted)
    if overwrite and (saved or not writes):
        note("overwrite=True has no effect: no new run is written")
    if not saved and "warmup_iters" not in given:
        config = fit_warmup(config)
    if init_from == "scratch" and defaults:
        print(f"minutes: settings that are not given are those of {RECIPE}", flush=True)
    return Start(config, model_config, saved, base, given)


def read_command(argv: list[str]) -> tuple[dict[str, object], set[str]]:
    """Return the settings in a command and its config files, with out_dir set, and the keys typed in the command."""
    given = cli.read(argv, ModelConfig, TrainConfig)
    typed = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    if is_unplanned(argv, given):
        given["minutes"] = UNPLANNED
        print(f"no length is given: --minutes={UNPLANNED:g}", flush=True)
    if given.get("minutes"):
        if "max_iters" in typed:
            raise UserError(
                "minutes and max_iters both set the length of the run; give only one"
            )
        for key in {"max_iters", "lr_decay_iters"} - typed:  # set by a config file
            given.pop(key, None)
    if given.get("input"):
        if given.get("init_from") == "resume":
            raise UserError(
                f"input={given['input']} is only for a new run; leave it out: a resumed run already has its data"
            )
        # a dataset name from a config file does not apply to an input that was typed in the command
        if "dataset" not in (typed if "input" in typed else given):
            given["dataset"] = data_name(given["input"])
    if given.get("out_dir") is None:
        given["out_dir"] = f"out/{given.get('dataset', TrainConfig.dataset)}"
    return given, typed


def is_unplanned(argv: list[str], given: dict) -> bool:
    """True if a command has text of its own to train a GPT on, and says nothing about the length of the run."""
    has_file = any(not argument.startswith("--") for argument in argv)
    says = given.keys() & {"minutes", "max_iters", "dry_run", "eval_only"}
    is_gpt = given.get("model", ModelConfig.model) == "gpt"
    if not given.get("input") or has_file or says or not is_gpt or launched()[1] > 1:
        return False
    path = Path(given["input"])
    files = filter(Path.is_file, path.rglob("*")) if path.is_dir() else [path]
    is_pairs = all(".tsv" in file.suffixes for file in files)
    return not is_pairs or "text_key" in given


def data_name(where: str) -> str:
    """Name a dataset after its input: a folder, a file without its extensions, or the folder of a glob pattern."""
    parts = reversed(Path(where).resolve().parts)
    stems = (re.sub(r"[^\w-]+", "_", part.partition(".")[0]).strip("_") for part in parts)
    return next(filter(None, stems), "text")


def resumed_settings(saved: dict, given: dict, path: Path) -> dict[str, object]:
    """Return the settings of a resumed run. Raises UserError for a key that cannot change.

    Length, learning rates, evaluation and so on may change. All keys that are not in MAY_CHANGE stay as they are.
    """
    if "optimizer" not in saved:
        raise UserError(
            f"{path} holds a model but no optimizer state, so it cannot be resumed; is it a copy of best.pt?"
        )
    own = asdict(saved["train_config"]) | saved["model_config"]
    fixed = own.keys() - MAY_CHANGE
    # the sequences of a step stay the same, but they may be split into more or fewer micro-batches
    if math.prod((own | given)[key] for key in STEP) != math.prod(own[key] for key in STEP):
        fixed |= {*STEP}
    for key in given.keys() & fixed:
        if given[key] not in (own[key], None):
            raise UserError(
                f"{key}={given[key]} cannot change on resume: the checkpoint has {key}={own[key]};"
                " leave it out, or train a new model with --init_from=scratch and another --out_dir"
            )
    kept = {key: own[key] for key in fixed | {"init_from"}}
    own["backend"] = TrainConfig.backend
    if "OMP_NUM_THREADS" in GIVEN:
        own["threads"] = None
    if "max_iters" in given:
        own["minutes"] = None
    return own | given | kept | {"out_dir": path.parent.as_posix(), "input": None}


def read_run(path: Path) -> dict:
    """Read a checkpoint. Of its entries, train_config is made a TrainConfig and progress a Progress."""
    saved = checkpoint.read(path)
    with refuse_damaged(path):
        saved["train_config"] = cli.restore(TrainConfig, saved["train_config"])
        saved["progress"] = cli.restore(Progress, saved["progress"])
    return saved


def fit_warmup(config: TrainConfig) -> TrainConfig:
    """Shorten the warmup of a short run, so that most steps are left for the decay."""
    steps = config.lr_decay_iters or config.max_iters
    warmup = config.warmup_iters
    if not config.decay_lr or warmup < steps:
        return config
    shorter = steps // 10
    note(
        f"warmup_iters={warmup} would last all {steps:,} steps; using warmup_iters={shorter}"
    )
    return replace(config, warmup_iters=shorter)


# --------------------------------------------------------------------------------------
# Data


def prepare_missing(config: TrainConfig) -> None:
    """Prepare data/<dataset> if it is missing or incomplete. With --input, check that the input has not changed."""
    if config.dataset in DATASETS:
        return
    folder = Path("data") / config.dataset
    with refuse():
        names = {path.name for path in folder.glob("*")}
    prepared = names & {"meta.json", "meta.pkl"}
    if prepared and (config.input is None or launched()[0]):
        return
    # late import: it is rarely needed
    from humptygpt.prepare.dataset import PrepareConfig, prepare

    keys = {}
    if config.input:
        keys = input_keys(config, folder)
    # Do not overwrite existing data: a train.bin without a meta.json is probably nanoGPT's, and a command.txt
    # means that this folder was prepared here before.
    elif names & {"train.bin", COMMAND}:
        return
    keys["name"] = config.dataset
    prepare(cli.make(PrepareConfig, keys))


def input_keys(config: TrainConfig, folder: Path) -> dict[str, object]:
    """Return the settings for preparing config.input: those that the folder was made with, updated by config.

    For a new folder, fine-tuning uses the base model's tokenizer by default.
    Raises UserError if the folder was made from a different input.
    """
    from humptygpt.prepare.dataset import PrepareConfig

    keys = {"input": config.input}
    if config.init_from != "scratch":
        keys["tokenizer"] = config.init_from
    command = folder / COMMAND
    if command.exists():
        with refuse(f"{command}: "):
            words = shlex.split(command.read_text(encoding="utf-8"))[2:]
            for word in words:
                is_removed(*word.removeprefix("--").partition("=")[::2])
            keys = cli.read(words, PrepareConfig, positional="name")
        if Path(keys.get("input", "")).resolve() != Path(config.input).resolve():
            raise UserError(
                f"{folder} was not made from input={config.input}; choose another name: --dataset=ANOTHER_NAME"
            )
    for key in ("text_key", "val_input"):
        if value := getattr(config, key):
            keys[key] = value
    return keys


def open_prepared(config: TrainConfig, model_config: ModelConfig) -> Dataset:
    """Open data/<dataset>. Raises UserError if the model is for another task, or a package is missing."""
    folder = Path("data") / config.dataset
    meta = read_meta(folder)
    own = folder / "input.txt"
    if own.exists() and "made_from" in meta and meta["source"] != str(own):
        note(
            f"{folder} was prepared from {meta['source']}, not from {own}; to prepare that:"
            f" python prepare_data.py {folder.name} --overwrite=True"
        )
    with_encoder = hasattr(model_class(model_config.model), "encode")
    _, learns = MODELS[model_config.model]
    if meta["task"] not in learns:
        raise UserError(
            f"dataset={folder.name} is for {meta['task']}, but model={model_config.model} is for {' and '.join(learns)}"
        )
    task = find_task(meta["task"])
    # fail now, not at the end of training
    if task.package and not importlib.util.find_spec(task.package):
        raise UserError(
            f"{meta['task']} is scored with a package that is not installed: pip install {task.package}"
        )
    dataset = DATASETS.get(folder.name, task.dataset)
    return dataset(folder, model_config.block_size, config.seed, with_encoder, meta)


def fit_to_data(start: Start, dataset: Dataset) -> ModelConfig:
    """Return the model's config for this data. A model gets at least the data's vocabulary; vocab_size may be larger.

    Raises UserError if vocab_size is too small, or if the resumed run or the base model does not match the data.
    """
    config, model_config, saved, base, _ = start
    if saved:
        check_same_data(saved, dataset, config.out_dir)
    elif base:
        from humptygpt.finetune.base import check_same_tokens

        check_same_tokens(base, dataset)
    tokens = dataset.tokenizer.vocab_size
    vocab_size = model_config.vocab_size or tokens
    if vocab_size < tokens and not base:
        raise UserError(
            f"vocab_size={vocab_size} must be at least {tokens}, the vocabulary size of {dataset.folder.name}"
        )
    return replace(model_config, vocab_size=max(vocab_size, tokens))


def check_same_data(saved: dict, dataset: Dataset, out_dir: str) -> None:
    """Raise UserError unless a checkpoint was trained on this data."""
    pieces, identity = from_state(saved["tokenizer"]).pieces, dataset.identity
    with refuse_damaged(f"{out_dir}/ckpt.pt"):
        # a checkpoint from an earlier version may have different keys
        known = saved["data"]["identity"].items()
        same = all(identity.get(key, value) == value for key, value in known)
    if pieces == dataset.tokenizer.pieces and same:
        return
    raise UserError(
        f"{dataset.folder} is not the data that {out_dir}/ckpt.pt was trained on;"
        " if that is in another folder, add --dataset=NAME"
    )


def training_data(path: str | Path) -> Dataset:
    """Open the data that the run of a checkpoint was trained on. Raises UserError if it is not there any more."""
    saved = read_run(find_source(path))
    config = saved["train_config"]
    dataset = open_prepared(config, make_model_config(saved["model_config"]))
    check_same_data(saved, dataset, config.out_dir)
    return dataset


# --------------------------------------------------------------------------------------
# The model


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
        checkpoint.restore_model(model, saved["model"])
    elif base:
        from humptygpt.finetune.base import adapt_model

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
        from humptygpt.finetune.lora import train_rows

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
    if (
        config.eval_only
    ):  # to save memory, with the plain model and no state of the optimizer
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
        compiles = run.device.type == "cuda" and micro_batches >= LONG
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


def fork_ranks(run: Run) -> Ranks:
    """Let ranks that are forked share each batch, if that is faster and computes the same gradients."""
    count = count_ranks(run)
    if count > 1 and (problem := sharing_problem(run.model)):
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


def compile_now(run: Run) -> None:
    """Trigger compilation for the shapes of training, a rank's share of a batch, and evaluation, a whole batch."""
    for step in range(2):
        shares, _ = run.ranks.shares(run, step)
        with run.ranks.syncing(run.net, last=True):
            weighted_losses(run, shares[0])[1].sum().backward()
        # evaluation temporarily puts whole weights in place of shards, whose gradients would not fit them
        run.model.zero_grad()
        evaluation.evaluate(run, run.net, 1)


def dry_run(config: TrainConfig, model_config: ModelConfig) -> str:
    """Report the size of a run and the memory it needs, without reading the data or allocating a model."""
    if model_config.vocab_size is None:
        meta = read_meta(Path("data") / config.dataset)
        vocab_size = from_state(meta["tokenizer"]).vocab_size
        model_config = replace(model_config, vocab_size=vocab_size)
    device = pick_device(config.device)
    config = choose_dtypes(config, device)
    _, processes = launched()
    return memory_report(config, model_config, device, processes)


def recorded_settings(run: Run) -> dict[str, object]:
    """Return the settings that config.json records for a run."""
    settings = asdict(run.config) | asdict(run.model.config)
    # Keys that start with _ are ignored if config.json is used as a config file.
    settings["_parameters"] = count_parameters(run.model)
    settings["_train_tokens"] = run.dataset.identity.get("train_tokens")
    settings["_model.py"] = code_checksum()
    return settings


# --------------------------------------------------------------------------------------
# Resuming a run


def resumed_progress(config: TrainConfig, saved: dict, dataset: Dataset) -> Progress:
    """Return the checkpoint's progress. Print a note about what will not go on as it was."""
    note_edits(Path(config.out_dir))
    progress, before = saved["progress"], saved["train_config"]
    had = before.lr(progress.position)
    if config.minutes and before.minutes:
        progress.position *= before.minutes / config.minutes
    else:
        progress.position = float(progress.iter)
    if config.eval_only:
        return progress
    if None not in (config.threads, before.threads) and config.threads != before.threads:
        note(
            f"threads={config.threads} instead of {before.threads}: losses stay the same only up to rounding"
        )
    if progress.position >= config.max_iters:
        done = f"all {progress.iter} steps are done; for more, use --"
        if not config.minutes:
            note(f"{done}max_iters=N")
        elif before.minutes:
            taken = config.minutes * progress.position / config.max_iters
            note(f"{done}minutes=N above {taken:g}")
        else:
            raise UserError(f"{done}max_iters=N: minutes were not the length of this run")
    lr = config.lr(progress.position)
    if lr - had > 0.01 * config.learning_rate:
        note(
            f"the learning rate rises from {had:.1e} to {lr:.1e}, because its schedule has changed"
        )

    def sequences(config: TrainConfig) -> int:
        whole = dataset.all_val_batches(config.batch_size) or math.inf  # if generated
        return min(config.evaluated_batches(), whole) * config.batch_size

    if sequences(config) != sequences(before) and progress.best_val_loss < math.inf:
        note(
            "the evaluation set has changed, so the next evaluation begins a new best.pt, whose loss was"
            f" {progress.best_val_loss:.4f} on the earlier set"
        )
        progress.best_val_loss = math.inf
        progress.evals_since_best = 0
    return progress
