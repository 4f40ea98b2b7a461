"""Training settings: defaults, the command line, and what a resumed run or a base model determines."""

import dataclasses
import importlib
import math
import re
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from humptygpt import checkpoint, cli
from humptygpt.checkpoint import refuse_other_code
from humptygpt.cli import (
    UserError,
    check_above_0,
    check_choices,
    check_least,
    fields_of,
    note,
    refuse_vain,
)
from humptygpt.device import DTYPES
from humptygpt.loading import Loaded, load
from humptygpt.machine import GIVEN
from humptygpt.optimizers import OPTIMIZERS, SCHEDULES
from humptygpt.process import BACKENDS, PARALLEL, launched, restarted
from humptygpt.run import MOVING, chosen_loggers, lock_out_dir, refuse_earlier_run
from humptygpt.tasks import MODELS, make_model_config
from model import POSITIONS, ModelConfig

# ModelConfig keys that affect only training, not the architecture
TRAINING_ONLY = {"dropout", "label_smoothing"}
# keys that may change on resume if their product does not
STEP = ("batch_size", "gradient_accumulation_steps")
# keys whose values in a checkpoint may differ from those in the command that wrote it: a short run's warmup is
# shortened, the vocabulary size comes from the data, and dtypes and threads are measured
MAY_DIFFER = {"out_dir", "warmup_iters", "input", "vocab_size"}
MAY_DIFFER |= {"dtype", "muon_dtype", "threads"}
# keys that control how the text of `input` is read
OF_INPUT = ("text_key", "encoding_errors", "skip_bad_lines")
# keys that may change on resume; all others determine the weights or the order of the data
MAY_CHANGE = {"out_dir", "init_from", "eval_only", "dataset", "input", *OF_INPUT, *STEP}
MAY_CHANGE |= {"minutes", "max_iters", "learning_rate", "decay_lr", "schedule", "min_lr"}
MAY_CHANGE |= {"warmup_iters", "lr_decay_iters", "weight_decay", "beta1", "beta2"}
MAY_CHANGE |= {"muon_learning_rate", "muon_momentum", "muon_dtype", "grad_clip"}
MAY_CHANGE |= {"ngram_targets", "eval_interval", "eval_iters", "eval_pairs"}
MAY_CHANGE |= {"early_stopping", "always_save_checkpoint", "snapshots", "log_interval"}
MAY_CHANGE |= {"checkpoint_activations", "dry_run", "log", "wandb_log", "wandb_project"}
MAY_CHANGE |= {"wandb_run_name", "device", "dtype", "threads", "compile", "parallel"}
MAY_CHANGE |= {"backend", *TRAINING_ONLY}
NOT_ROTARY = tuple(POSITIONS.keys() - {"rotary"})
# {key: (another key, the values of that other key for which the key has no effect)}
IN_VAIN = dict.fromkeys(OF_INPUT, ("input", (None,)))
IN_VAIN |= dict.fromkeys(("schedule", "lr_decay_iters", "min_lr"), ("decay_lr", (False,)))
IN_VAIN |= dict.fromkeys(("lora_alpha", "lora_targets"), ("lora_rank", (0,)))
IN_VAIN |= dict.fromkeys(("rope_base", "rope_factor"), ("position", NOT_ROTARY))
FOR_SEVERAL = dict.fromkeys(("parallel", "backend"), ("processes", (1,)))
# Defaults for a run that starts from a model: small steps, so that the model keeps what it has learned.
GENTLE = {
    "learning_rate": 1e-4,
    "muon_learning_rate": 0.002,
    "beta2": 0.95,
    "schedule": "linear",
    "min_lr": 0.0,
}
RECIPE = "config/shakespeare_char.py"  # what a new GPT is trained with if its command names no config file
# keys of that file that say what is trained and for how long
NOT_IN_RECIPE = ("out_dir", "dataset", "n_layer", "n_head", "n_embd", "block_size")
NOT_IN_RECIPE += ("batch_size", "max_iters", "eval_interval")


@dataclass(frozen=True)
class TrainConfig:
    # run
    out_dir: str | None = None  # folder of the run; None: out/<dataset>
    init_from: str = "scratch"  # scratch, resume (from out_dir/ckpt.pt), or a model: a run, checkpoint, folder or gpt2
    overwrite: bool = False  # move an earlier run in out_dir to out_dir/previous
    eval_only: bool = False  # evaluate once, with BLEU for translation, and stop
    seed: int = 1337  # seed for initial weights, data order and dropout
    # data
    dataset: str = "shakespeare_char"  # folder in data/ that prepare_data.py wrote
    input: str | None = None  # your own text: a file or folder to prepare as a dataset
    text_key: str | None = None  # field or column of the input that holds the text
    encoding_errors: str | None = None  # on invalid UTF-8: strict (fail), replace or ignore
    skip_bad_lines: bool | None = None  # skip lines of the input that have no text
    batch_size: int = 4  # sequences per micro-batch (pairs: batch_size * block_size tokens)
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    ngram_targets: float = 0.0  # part of each target that n-grams of the text predict
    # optimizer
    minutes: float | None = None  # run for this many minutes; unset keys are chosen to fit
    max_iters: int = 2400  # training steps
    optimizer: str = "adamw"  # optimizer of the blocks' matrices; AdamW trains the rest
    learning_rate: float = 1e-3  # peak learning rate, after warmup
    decay_lr: bool = True  # warm up, then decay; False: constant learning rate
    schedule: str = "cosine"  # shape of the learning rate decay
    warmup_iters: int = 100  # steps of linear warmup
    lr_decay_iters: int | None = None  # step at which the decay ends; None: max_iters
    min_lr: float | None = None  # minimum learning rate; None: learning_rate / 10
    weight_decay: float = 0.1  # weight decay for matrices and embeddings
    beta1: float = 0.9  # AdamW: decay rate of the first moment
    beta2: float = 0.99  # AdamW, NorMuon: decay rate of the second moment
    muon_learning_rate: float = 0.03  # Muon: peak learning rate
    muon_momentum: float = 0.85  # Muon: decay rate of the momentum
    muon_dtype: str = "auto"  # Muon: dtype of its matrix products; auto: the faster
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
    freeze: str | None = None  # freeze parameters whose names contain these: wte,blocks.0
    lora_rank: int = 0  # LoRA: rank of the added matrices; 0: no LoRA
    lora_alpha: float = 16.0  # LoRA: added matrices are scaled by lora_alpha / lora_rank
    lora_targets: str = "q_proj,v_proj"  # LoRA: names of the layers to adapt
    # evaluation
    eval_interval: int = 600  # steps between evaluations; one always follows the last step
    eval_iters: int | None = None  # batches per evaluation; None: about 10% of the run time
    eval_pairs: str | None = None  # pairs to test at each evaluation: a file or a suite
    early_stopping: int = 0  # stop after this many evaluations without a new best; 0: never
    always_save_checkpoint: bool = True  # False: save only a new best and at the end
    snapshots: bool | None = None  # save weight snapshots for explain.py; None: if < 10 MB
    log_interval: int = 10  # steps between training loss reports
    # memory
    checkpoint_activations: bool = False  # save memory by recomputing; a third more compute
    dry_run: bool = False  # report sizes and memory, then exit without writing anything
    # logging
    log: str = ""  # also log to tensorboard, wandb or both: tensorboard,wandb
    wandb_log: bool = False  # the same as log=wandb; WANDB_MODE=offline logs locally
    wandb_project: str = "humptygpt"  # project on Weights & Biases
    wandb_run_name: str | None = None  # run name on Weights & Biases; None: name of out_dir
    # system
    device: str = "auto"  # auto: the fastest there is; cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto: the fastest on this machine, measured once
    threads: int | None = None  # CPU threads; None: the fastest, measured at the start
    compile: bool | None = None  # use torch.compile; None: for long runs on CUDA
    parallel: str = "ddp"  # for several processes: ddp, or fsdp to shard the model
    backend: str = "auto"  # for several processes: auto is nccl on CUDA, gloo on a CPU

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        """Map each key that names a variant to its variants; `model` is a key of ModelConfig."""
        return {
            "model": MODELS,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "dtype": ("auto", *DTYPES),
            "muon_dtype": ("auto", "float32", "bfloat16"),
            "parallel": PARALLEL,
            "backend": BACKENDS,
        }

    def validate(self) -> None:
        """Raise ValueError for the first value or combination that is invalid."""
        check_choices(self)
        check_least(self, 0, "seed", "warmup_iters", "min_lr", "weight_decay", "grad_clip")
        check_least(self, 0, "early_stopping", "lora_rank")
        check_least(
            self, 1, "batch_size", "gradient_accumulation_steps", "max_iters", "threads"
        )
        check_least(
            self, 1, "lr_decay_iters", "eval_interval", "eval_iters", "log_interval"
        )
        check_above_0(self, "minutes", "learning_rate", "muon_learning_rate", "lora_alpha")
        check_least(self, 0, "beta1", "beta2", "muon_momentum", "ngram_targets", below=1)
        chosen_loggers(vars(self))
        if self.lora_rank and self.init_from == "scratch":
            raise ValueError(
                f"lora_rank={self.lora_rank} needs an existing model; name it with --init_from"
            )
        if self.decay_lr and self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}"
            )

    def lr(self, it: float) -> float:
        """Return the learning rate of step `it`, counted from 0: linear warmup from above zero, then decay to min_lr.

        From step lr_decay_iters on, it stays at min_lr.
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
        """Return the number of batches per evaluation.

        By default, enough to take about a tenth of the training time since the last evaluation, but at least 20.
        Evaluating a batch takes about a third as long as training on it.
        """
        steps = min(self.eval_interval, self.max_iters)
        between = steps * self.gradient_accumulation_steps
        return self.eval_iters or max(20, 3 * between // 10)

    def rows(self, processes: int) -> int:
        """Return the largest number of sequences that a process handles at once. Processes may split a micro-batch."""
        return math.ceil(
            self.batch_size / max(1, processes // self.gradient_accumulation_steps)
        )


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
    given, typed = read_command(argv)
    overwrite = given.pop("overwrite", False)  # belongs to this command, not to the run
    out_dir = Path(given["out_dir"])
    path = out_dir / "ckpt.pt"
    writes = not given.get("eval_only") and not given.get("dry_run")
    if locks and writes and not rank:
        locks.enter_context(lock_out_dir(out_dir))
    init_from = given.get("init_from", "scratch")
    saved, base, settings, defaults = None, None, given, {}
    if init_from not in ("scratch", "resume"):
        base = load(init_from)
        settings = given | base_settings(base, given)
        defaults = GENTLE
    elif init_from == "scratch" and takes_recipe(argv, given):
        defaults = recipe()
    # while the subfolder MOVING exists, ckpt.pt belongs to the run that is being moved into it
    begins = (out_dir / MOVING).exists()
    if restarted() and not begins and is_same_run(defaults | settings, path):
        note(f"torchrun has restarted this run; resuming {path}")
        init_from = "resume"
    if init_from == "resume":
        # a sharded checkpoint comes from parallel=fsdp, which a resumed run keeps unless told otherwise
        sharded = processes > 1 and given.get("parallel", "fsdp") == "fsdp"
        saved, base = checkpoint.read(path, with_tensors=not sharded), None
        settings = resumed_settings(saved, settings, path)
    else:
        settings = defaults | settings
        if writes and not overwrite:
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
    # a config.json sets every key, most of them to the default
    fields = fields_of(TrainConfig, ModelConfig)
    chosen = {key for key in given if given[key] != fields[key].default}
    # only noted: a config file may be combined with others, and the same command may run in several processes
    noted = given.keys() - typed | FOR_SEVERAL.keys()
    refuse_vain(chosen | typed, values, IN_VAIN | FOR_SEVERAL, noted)
    if overwrite and (given.get("init_from") == "resume" or not writes):
        note("overwrite=True has no effect: no new run is written")
    if not saved and "warmup_iters" not in given:
        config = fit_warmup(config)
    if init_from == "scratch" and defaults:
        print(f"no config file: training with the recipe of {RECIPE}", flush=True)
    return Start(config, model_config, saved, base, given)


def read_command(argv: list[str]) -> tuple[dict[str, object], set[str]]:
    """Return the settings in a command and its config files, with out_dir set, and the keys typed in the command."""
    given = cli.read(argv, ModelConfig, TrainConfig)
    typed = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
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


def takes_recipe(argv: list[str], given: dict) -> bool:
    """True for a new GPT without a config file. For the other models the recipe has not been tried."""
    no_file = all(argument.startswith("--") for argument in argv)
    return no_file and given.get("model", ModelConfig.model) == "gpt"


def recipe() -> dict[str, object]:
    """Read the settings of the demo's config file, without those that say what is trained and for how long."""
    fields = fields_of(ModelConfig, TrainConfig)
    path = cli.CONFIGS.parent / RECIPE
    settings = cli.read_config(str(path), fields, before="")
    return {key: x for key, x in settings.items() if key not in NOT_IN_RECIPE}


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
    with refuse_other_code(path):
        train_config = cli.restore(TrainConfig, saved["train_config"])
    own = asdict(train_config) | saved["model_config"]
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
    return own | given | kept | {"out_dir": str(path.parent), "input": None}


def is_same_run(settings: dict, path: Path) -> bool:
    """True if path is a checkpoint of an interrupted run with these settings."""
    try:
        saved = checkpoint.read(path, with_tensors=False)
    except UserError:
        return False
    asked = asdict(cli.make(TrainConfig, settings))
    asked |= asdict(make_model_config(settings))
    had = saved["train_config"] | saved["model_config"]
    differ = {key for key, value in asked.items() if value != had.get(key)}
    return "optimizer" in saved and differ <= MAY_DIFFER


def base_settings(base: Loaded, given: dict) -> dict[str, object]:
    """Return the settings of a run that starts from a model: the model's, except for those that the run may choose."""
    own = asdict(base.model.config)
    free = {key: getattr(ModelConfig, key) for key in TRAINING_ONLY}
    free["block_size"] = own["block_size"]
    for key in given.keys() & own.keys():
        if key in free:
            free[key] = given[key]
        elif given[key] not in (own[key], None):
            note(
                f"{key}={given[key]} has no effect; the model {base.path} has {key}={own[key]}"
            )
    if free["block_size"] > own["block_size"] and own["position"] == "learned":
        raise UserError(
            f"block_size={free['block_size']} is too large: the model {base.path} has learned"
            f" {own['block_size']} positions; use at most that many"
        )
    return own | free


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
    return dataclasses.replace(config, warmup_iters=shorter)
