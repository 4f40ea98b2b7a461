"""The settings of a training, from a command and from the run or the model that it starts from; and its data."""

import dataclasses
import importlib.util
import math
import os
import shlex
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from humptygpt import checkpoint
from humptygpt import config as configurator
from humptygpt.checkpoint import refuse_other_code
from humptygpt.config import UserError, check, note, setting
from humptygpt.data import Dataset
from humptygpt.finetune import lora
from humptygpt.layers import DTYPES
from humptygpt.loading import Loaded, load
from humptygpt.optimizers import OPTIMIZERS, SCHEDULES
from humptygpt.parallel import processes as distributed
from humptygpt.prepare.documents import data_name
from humptygpt.run_folder import (
    chosen_loggers,
    import_logger,
    lock_out_dir,
    refuse_earlier_run,
)
from humptygpt.tasks import TASKS
from humptygpt.token_files import read_meta
from model import MODELS, ModelConfig

TRAINING_ONLY = {"dropout", "label_smoothing"}  # keys of ModelConfig that change no weight
# what the weights and the order of the data mean
FIXED = {"seed", "optimizer", "freeze"}
STEP = ("batch_size", "gradient_accumulation_steps")  # their product is fixed
# in an interrupted run; warmup is fitted to a short one
MAY_DIFFER = {"out_dir", "warmup_iters", "input"}
MUONS = [name for name, rule in OPTIMIZERS.items() if rule.learning_rate != "learning_rate"]
MUON = {"only_with": {"optimizer": tuple(MUONS)}}
DECAY = {"only_with": {"decay_lr": True}}
INPUT = {"not_with": {"input": None}}  # keys that train.py hands on to prepare_data.py
DECAY_RATE = {"at_least": 0, "below": 1}
# the defaults of a run that starts from a model: small steps, so that it keeps what it knows
GENTLE = {
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "muon_learning_rate": 0.002,
    "warmup_iters": 100,
    "grad_clip": 1.0,
}


@dataclass(frozen=True)
class TrainConfig:
    out_dir: str | None = setting(
        None,
        "folder for checkpoints, metrics and the plot; None: out/ and the dataset's name",
        "run",
        path=True,
    )
    init_from: str = setting(
        "scratch",
        "scratch: a new model; resume: continue out_dir/ckpt.pt; or a run, a checkpoint, a model's folder, gpt2",
        path=True,
    )
    overwrite: bool = setting(
        False, "replace an earlier run in out_dir, once the new one has a checkpoint"
    )
    eval_only: bool = setting(
        False, "evaluate once, translations by BLEU too, and stop; nothing is written"
    )
    seed: int = setting(
        1337, "seed of initial weights, data order and dropout", at_least=0, below=2**63
    )

    dataset: str = setting(
        "shakespeare_char", "folder in data/ that prepare_data.py wrote", "data"
    )
    input: str | None = setting(
        None, "your own text, prepared as a dataset that is named after it", path=True
    )
    text_key: str | None = setting(
        None, "of an input: the field or column with the text", **INPUT
    )
    encoding_errors: str | None = setting(
        None, "of an input: strict, replace or ignore bytes that are not UTF-8", **INPUT
    )
    skip_bad_lines: bool | None = setting(
        None, "of an input: leave out lines and rows without a text", **INPUT
    )
    batch_size: int = setting(
        4, "sequences per micro-batch; of pairs, as many as fit into them", at_least=1
    )
    gradient_accumulation_steps: int = setting(
        1, "micro-batches whose gradients make one step", at_least=1
    )

    minutes: float | None = setting(
        None,
        "of the whole command; what is not given, the model's size too, is chosen to fit",
        "optimizer",
        above=0,
    )
    max_iters: int = setting(2400, "training steps", at_least=1)
    optimizer: str = setting(
        "normuon", "muon, normuon: for the matrices of the blocks", choices=OPTIMIZERS
    )
    learning_rate: float = setting(6e-3, "the peak, after warmup", above=0)
    decay_lr: bool = setting(True, "warm up, then decay; False: constant")
    schedule: str = setting("linear", "shape of the decay", choices=SCHEDULES, **DECAY)
    warmup_iters: int = setting(10, "steps of linear warmup", at_least=0, **DECAY)
    lr_decay_iters: int | None = setting(
        None, "step at which the decay ends; None: max_iters", at_least=1, **DECAY
    )
    min_lr: float | None = setting(
        0.0, "the minimum; None: learning_rate / 10", at_least=0, **DECAY
    )
    weight_decay: float = setting(
        0.1, "weight decay of matrices and embeddings", at_least=0
    )
    beta1: float = setting(0.9, "AdamW: decay rate of the first moment", **DECAY_RATE)
    beta2: float = setting(
        0.95, "AdamW, NorMuon: decay rate of the second moment", **DECAY_RATE
    )
    muon_learning_rate: float = setting(
        0.03, "Muon: the peak learning rate", above=0, **MUON
    )
    muon_momentum: float = setting(
        0.85, "Muon: decay rate of the momentum", **DECAY_RATE, **MUON
    )
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping", at_least=0)
    freeze: str | None = setting(
        None,
        "parameters that stay as they are: parts of their names, as wte,blocks.0",
        only_with={"lora_rank": 0},
    )

    eval_interval: int = setting(
        600, "steps between evaluations; the last step has one", "evaluation", at_least=1
    )
    eval_iters: int | None = setting(
        None, "batches of a fixed set; None: a tenth of the time at most", at_least=1
    )
    early_stopping: int = setting(
        0, "evaluations without a new lowest loss before stopping; 0: never", at_least=0
    )
    always_save_checkpoint: bool = setting(
        True, "False: save ckpt.pt only where the loss is a new lowest"
    )
    snapshots: bool | None = setting(
        None,
        "keep the weights of steps 0, 10, 30, 100, ... in 8 bits, for the page; None: if below 10 MB",
    )
    log_interval: int = setting(10, "steps between lines of the training loss", at_least=1)

    checkpoint_activations: bool = setting(
        False,
        "keep only each block's input and compute the rest twice: less memory, a third more work",
        "memory",
        not_with={"model": "window_mlp"},
    )
    dry_run: bool = setting(
        False, "report sizes and memory and stop, before any data or memory is touched"
    )

    log: str = setting(
        "", "log to tensorboard, wandb or both (with a comma), too", "logging"
    )
    wandb_log: bool = setting(False, "as log=wandb; WANDB_MODE=offline keeps it here")
    wandb_project: str = setting("humptygpt", "project there")
    wandb_run_name: str | None = setting(None, "run name there; None: the name of out_dir")

    device: str = setting(
        "auto", "auto: the GPU if there is one; cpu, cuda, cuda:1, mps", "system"
    )
    dtype: str = setting("auto", "auto: what the hardware has", choices=("auto", *DTYPES))
    compile: bool | None = setting(
        None, "torch.compile; None: on CUDA, without minutes", not_with={"eval_only": True}
    )
    parallel: str = setting(
        "ddp",
        "of several processes: each has the whole model; fsdp: a part of it",
        choices=distributed.WAYS,
    )
    backend: str = setting(
        "auto",
        "of several processes: nccl on CUDA, gloo on a CPU",
        choices=distributed.BACKENDS,
    )

    def __post_init__(self):
        check(self)
        chosen_loggers(vars(self))
        if self.decay_lr and self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}"
            )

    def lr(self, it: float) -> float:
        """Return the learning rate of step it, the first being 0: linear warmup from above zero, then decay to min_lr.

        That of steps from lr_decay_iters on is min_lr.
        """
        if not self.decay_lr:
            return self.learning_rate
        warmup = self.warmup_iters
        if it < warmup:
            return self.learning_rate * (it + 1) / (warmup + 1)
        min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        end = self.lr_decay_iters or self.max_iters
        if it >= end:
            return min_lr
        decay = SCHEDULES[self.schedule]((it - warmup) / (end - warmup))
        return min_lr + decay * (self.learning_rate - min_lr)

    def evaluated_batches(self) -> int:
        """Return how many batches an evaluation takes, of which each takes a third of the time of a training batch."""
        steps = min(self.eval_interval, self.max_iters)
        between = steps * self.gradient_accumulation_steps
        return self.eval_iters or max(20, 3 * between // 10)

    def rows(self, processes: int) -> int:
        """Return the most sequences that a process has at once: several share a micro-batch where these are too few."""
        return math.ceil(
            self.batch_size / max(1, processes // self.gradient_accumulation_steps)
        )


class Start(NamedTuple):
    """What a command asks for."""

    config: TrainConfig
    model_config: ModelConfig
    saved: dict | None = None  # the checkpoint to resume
    base: Loaded | None = None  # the model to start from
    # keys that the command line and its config files set
    given: Collection[str] = ()


def read_settings(argv: list[str], locks: ExitStack | None = None) -> Start:
    """Read a command, and what it resumes or starts from.

    locks: takes the lock of the out_dir, before its checkpoint is read, unless the run writes nothing.
    """
    rank, processes = distributed.launched()
    given = configurator.read(argv, ModelConfig, TrainConfig)
    overwrite = given.pop("overwrite", False)  # of this command, not of the run
    in_line = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    if given.get("minutes"):
        if "max_iters" in in_line:
            raise UserError(
                "minutes and max_iters are two lengths of one run; leave one out"
            )
        for key in {"max_iters", "lr_decay_iters"} - in_line:  # those of a config file
            given.pop(key, None)
    if given.get("input"):
        name_dataset(given, in_line)
    if given.get("out_dir") is None:
        given["out_dir"] = f"out/{given.get('dataset', TrainConfig.dataset)}"
    out_dir = Path(given["out_dir"])
    path = out_dir / "ckpt.pt"
    if os.path.isfile(out_dir):  # probably a checkpoint in the folder that is meant
        raise UserError(
            f"out_dir={out_dir} is a file; write {shlex.quote(f'--out_dir={out_dir.parent}')}"
        )
    writes = not given.get("eval_only") and not given.get("dry_run")
    if locks and writes and not rank:
        locks.enter_context(lock_out_dir(out_dir))
    init_from = given.get("init_from", "scratch")
    saved, base, settings = None, None, given
    if init_from not in ("scratch", "resume"):
        base = load(init_from)
        settings = GENTLE | given | base_settings(base, given)
    if distributed.restarted() and is_same_run(settings, path):
        note(f"torchrun has started this run again; it resumes {path}")
        init_from = "resume"
    if writes and not overwrite and init_from != "resume":
        refuse_earlier_run(out_dir)
    if init_from == "resume":
        saved, base = checkpoint.read(path, with_tensors=False), None
        settings = resumed_settings(saved, settings, path)
    config = configurator.make(TrainConfig, settings)
    model_config = configurator.make(ModelConfig, settings)
    if given.get("minutes") and (config.dry_run or config.eval_only):
        raise UserError("minutes is for training, which dry_run and eval_only leave out")
    if config.minutes and processes > 1:
        raise UserError("minutes is for one process; with several, take max_iters")
    sharded = processes > 1 and config.parallel == "fsdp"
    if saved and checkpoint.lacks_tensors(saved) and not sharded:
        saved = checkpoint.read(path)
    for name in chosen_loggers(asdict(config)):  # now, not after a long preparation
        import_logger(name)
    note_without_effect(given, config, model_config, processes)
    if overwrite and (given.get("init_from") == "resume" or not writes):
        note("overwrite=True has no effect: no new run is written")
    config = fit_warmup(config, chosen="warmup_iters" in given or saved is not None)
    return Start(config, model_config, saved, base, given)


def name_dataset(given: dict, in_line: set[str]) -> None:
    """Name the data set of a new run after its input, unless whoever sets the input names it, too."""
    if given.get("init_from") == "resume":
        raise UserError(
            f"input={given['input']} is for a new run; the one that resumes has its data: leave it out"
        )
    if "dataset" not in (in_line if "input" in in_line else given):
        given["dataset"] = data_name(given["input"])


def resumed_settings(saved: dict, given: dict, path: Path) -> dict[str, object]:
    """Return the settings of a run that goes on. Raises UserError for a key that cannot change.

    Length, rates, evaluation and the like may; what the weights and the data order mean may not. Nor may the data: they
    are checked by what is in them, wherever they are now.
    """
    if "optimizer" not in saved:
        raise UserError(
            f"{path} holds a model but not the state of its training; is it a copy of best.pt?"
        )
    with refuse_other_code(path):
        train_config = asdict(configurator.restore(TrainConfig, saved["train_config"]))
        model_config = asdict(configurator.restore(ModelConfig, saved["model_config"]))
    own = train_config | model_config
    fixed = model_config.keys() - TRAINING_ONLY | FIXED
    # a step has the same sequences in smaller or larger parts
    if math.prod((own | given)[key] for key in STEP) != math.prod(own[key] for key in STEP):
        fixed |= {*STEP}
    for key in given.keys() & fixed:
        if given[key] not in (own[key], None):
            raise UserError(
                f"{key}={given[key]} cannot change on resume: the checkpoint has {key}={own[key]};"
                " leave it out, or train a new model with --init_from=scratch and another --out_dir"
            )
    kept = {key: own[key] for key in fixed | {"init_from"}}
    if "max_iters" in given:
        own["minutes"] = None
    return (
        own
        | {"backend": TrainConfig.backend}
        | given
        | kept
        | {"out_dir": str(path.parent), "input": None}
    )


def is_same_run(settings: dict, path: Path) -> bool:
    """Whether path is a checkpoint of a run with these settings, which an interrupted run then continues."""
    try:
        saved = checkpoint.read(path, with_tensors=False)
    except UserError:
        return False
    asked = asdict(configurator.make(TrainConfig, settings))
    asked |= asdict(configurator.make(ModelConfig, settings))
    had = saved["train_config"] | saved["model_config"]
    if asked["vocab_size"] is None:  # the data's
        asked["vocab_size"] = had["vocab_size"]
    differ = {key for key, value in asked.items() if value != had.get(key)}
    return "optimizer" in saved and differ <= MAY_DIFFER


def base_settings(base: Loaded, given: dict) -> dict[str, object]:
    """Return the ModelConfig of a run that starts from a model: the model's own, but for what a run may choose."""
    own = asdict(base.model.config)
    free = {key: getattr(ModelConfig, key) for key in (*TRAINING_ONLY, *lora.OFF)}
    free["block_size"] = own["block_size"]
    for key in given.keys() & own.keys():
        if key in free:
            free[key] = given[key]
        elif given[key] not in (own[key], None):
            note(
                f"{key}={given[key]}: without effect; the model {base.path} has {key}={own[key]}"
            )
    if free["block_size"] > own["block_size"] and own["position"] == "learned":
        raise UserError(
            f"block_size={free['block_size']} is too large: the model {base.path} has learned"
            f" {own['block_size']} positions; take at most as many"
        )
    return own | free


def note_without_effect(
    given: dict, config: TrainConfig, model_config: ModelConfig, processes: int
) -> None:
    """Report the keys that the user set in vain."""
    if processes == 1:
        for key in given.keys() & {"parallel", "backend"}:
            note(
                f"{key}={given[key]} has no effect on one process; torchrun starts several"
            )
    settings = asdict(config) | asdict(model_config)
    configurator.note_without_effect(settings, given, ModelConfig, TrainConfig)


def fit_warmup(config: TrainConfig, chosen: bool) -> TrainConfig:
    """Return the config with a warmup that leaves most steps of a short run to the decay, unless the user chose it."""
    steps = config.lr_decay_iters or config.max_iters
    warmup = config.warmup_iters
    if chosen or not config.decay_lr or warmup < steps:
        return config
    shorter = steps // 10
    note(
        f"warmup_iters={warmup} would last all {steps:,} steps; warmup_iters={shorter} is taken"
    )
    return dataclasses.replace(config, warmup_iters=shorter)


def open_prepared(folder: Path, config: ModelConfig, seed: int) -> Dataset:
    """Open a prepared folder for a model. Raises UserError where it, or this machine, is not made for the task."""
    meta = read_meta(folder)
    task = TASKS[meta["task"]]
    model = MODELS[config.model]
    if meta["task"] not in model.tasks:
        raise UserError(
            f"dataset={folder.name} is for {meta['task']}, but model={config.model} for {' and '.join(model.tasks)}"
        )
    # now, not when all is trained
    if task.package and not importlib.util.find_spec(task.package):
        raise UserError(
            f"{meta['task']} is scored with the package {task.package}: pip install {task.package}"
        )
    return task.dataset(folder, config.block_size, seed, model.has_encoder, meta)
