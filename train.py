"""Train a model: config files and --key=value, from left to right.

    python train.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py --n_layer=6 --out_dir=out/deeper
    python train.py --init_from=resume --out_dir=out/deeper --max_iters=4000

It leaves in out_dir: ckpt.pt (all that going on needs), best.pt (the model with the lowest validation loss),
metrics.jsonl, loss.png and config.json. Ctrl-C saves before it stops.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

import model as models
import prepare_data
from humptygpt import checkpoint, configurator, files
from humptygpt.batches import Dataset, PairDataset, ReadAhead, TokenDataset, random_key
from humptygpt.beams import NUM_BEAMS, score, translate
from humptygpt.configurator import UserError, check, setting, without_effect
from humptygpt.device import (
    DTYPES,
    autocast,
    keep_freed_memory,
    peak_flops,
    pick_device,
    pick_dtype,
    pick_dtype_to_write,
)
from humptygpt.optimizers import OPTIMIZERS, SCHEDULES, AveragedWeights, Optimizer, learning_rate_at, make_optimizer
from humptygpt.token_files import read_meta
from model import ModelConfig
from sample import generate

NGRAMS_FROM = 20_000_000  # tokens of training text that are looked through for frequent runs


MUON = {"only_with": {"optimizer": "muon"}}
NGRAMS = {"not_with": {"ngrams": 0}}
DECAY = {"only_with": {"decay_lr": True}}


@dataclass(frozen=True)
class TrainConfig:
    out_dir: str = setting("out", "the folder for checkpoints, metrics and the picture", group="run")
    init_from: str = setting("scratch", "scratch: a new model; resume: continue out_dir/ckpt.pt with its settings")
    eval_only: bool = setting(False, "evaluate once, translations by BLEU too, and stop; nothing is written")
    seed: int = setting(1337, "seed of initial weights, data order and dropout", at_least=0, below=2**63)

    dataset: str = setting("shakespeare_char", "a folder in data/ that prepare_data.py wrote", group="data")
    batch_size: int = setting(
        12, "sequences in a micro-batch; pairs: as many as fit into that many sequences", at_least=1
    )
    gradient_accumulation_steps: int = setting(1, "micro-batches whose gradients make one step", at_least=1)

    max_iters: int = setting(2000, "training steps", group="optimizer", at_least=1)
    optimizer: str = setting(
        "adamw", "adamw; or muon: Muon for the matrices of the blocks, AdamW for the rest", choices=OPTIMIZERS
    )
    learning_rate: float = setting(1e-3, "the highest, after warmup", above=0)
    decay_lr: bool = setting(True, "warm up, then decay; False: constant")
    schedule: str = setting(
        "cosine",
        "shape of the decay: cosine, linear or wsd (constant for 80 %, then linear)",
        choices=SCHEDULES,
        **DECAY,
    )
    warmup_iters: int = setting(100, "steps of linear warmup", at_least=0, **DECAY)
    lr_decay_iters: int | None = setting(None, "step at which the decay ends; None: max_iters", at_least=1, **DECAY)
    min_lr: float | None = setting(None, "learning rate after the decay; None: learning_rate / 10", at_least=0, **DECAY)
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices and embeddings", at_least=0)
    beta1: float = setting(0.9, "AdamW: decay rate of the first moment", at_least=0, below=1)
    beta2: float = setting(0.99, "AdamW: decay rate of the second moment", at_least=0, below=1)
    muon_learning_rate: float = setting(0.02, "Muon: the highest learning rate", above=0, **MUON)
    muon_momentum: float = setting(0.95, "Muon: decay rate of the momentum", at_least=0, below=1, **MUON)
    ngram_learning_rate: float = setting(
        0.15, "n-gram embeddings, trained by Adagrad: the highest learning rate", above=0, **NGRAMS
    )
    ngram_min_count: int = setting(
        8, "an n-gram is frequent if it occurs this often in the training text", at_least=1, **NGRAMS
    )
    grad_clip: float = setting(1.0, "largest gradient norm, n-gram embeddings not counted; 0: no clipping", at_least=0)
    ema_decay: float = setting(
        0.0,
        "decay of an exponential moving average of the weights, which is evaluated and saved; 0: off",
        at_least=0,
        below=1,
    )

    eval_interval: int = setting(
        250, "steps between evaluations; there is always one at the end", group="evaluation", at_least=1
    )
    eval_iters: int | None = setting(
        None, "batches of a fixed evaluation set; None: the whole validation split", at_least=1
    )
    early_stopping: int = setting(0, "stop after this many evaluations without a new lowest loss; 0: never", at_least=0)
    always_save_checkpoint: bool = setting(True, "False: write ckpt.pt only after an evaluation with a new lowest loss")
    log_interval: int = setting(10, "steps between lines of the training loss", at_least=1)

    wandb_log: bool = setting(
        False, "log to Weights & Biases, too; WANDB_MODE=offline keeps it on this machine", group="wandb"
    )
    wandb_project: str = setting("gpt", "project there")
    wandb_run_name: str | None = setting(None, "run name there; None: the name of out_dir")

    device: str = setting("auto", "auto: the GPU if there is one; cpu, cuda, cuda:1, mps", group="system")
    dtype: str = setting(
        "auto",
        "auto: bfloat16 where the hardware has it, else float16 on CUDA, else float32; or one of these",
        choices=("auto", *DTYPES),
    )
    compile: bool | None = setting(None, "torch.compile; None: on CUDA only")
    backend: str = setting("nccl", "nanoGPT's key for several processes; this trainer runs in one")

    def __post_init__(self):
        check(self)
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}")
        if self.init_from.startswith("gpt2"):
            raise ValueError(f"init_from={self.init_from}: GPT-2's weights cannot be read yet; use scratch or resume")
        if self.init_from not in ("scratch", "resume"):
            raise ValueError(f"init_from={self.init_from} is not one of: scratch, resume")
        if not self.out_dir or not self.dataset:
            raise ValueError("out_dir and dataset must not be empty")

    def rate(self, it: int) -> float:
        """The learning rate of step it, the first being 0."""
        if not self.decay_lr:
            return self.learning_rate
        lowest = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        until = self.lr_decay_iters or self.max_iters
        return learning_rate_at(it, self.schedule, self.learning_rate, self.warmup_iters, until, lowest)


@dataclass
class Progress:
    """Where a run stands. Saved in ckpt.pt, so that a resumed run is the uninterrupted one."""

    iter: int = 0  # steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # spent training: evaluating and saving are not counted
    best_val_loss: float = math.inf
    best_iter: int = 0
    evals_since_best: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps since the last line of metrics

    def waited_enough(self, early_stopping: int) -> bool:
        return 0 < early_stopping <= self.evals_since_best


def main(argv: list[str]) -> int:
    settings = given = configurator.read(argv, ModelConfig, TrainConfig)
    saved = None
    if given.get("init_from") == "resume":
        path = Path(given.get("out_dir", TrainConfig.out_dir)) / "ckpt.pt"
        saved = checkpoint.load(path)
        by_data = ("vocab_size", "ngram_rows")  # None stands for what the checkpoint has
        given = {key: value for key, value in given.items() if key not in by_data or value is not None}
        check_resumable(saved, given, path)
        settings = saved["train_config"] | saved["model_config"] | given | {"out_dir": str(path.parent)}
    config, model_config = configurator.make(TrainConfig, settings), configurator.make(ModelConfig, settings)
    out_dir = Path(config.out_dir)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("started as several processes, but this trainer runs in one: python train.py ...")
    if "backend" in given:
        print(f"note: backend={config.backend} has no effect; this trainer runs in one process", file=sys.stderr)
    settings = asdict(config) | asdict(model_config)
    for key, why in without_effect(settings, ModelConfig, TrainConfig).items():
        if key in given:
            print(f"note: {key}={settings[key]} has no effect {why}", file=sys.stderr)
    steps = config.lr_decay_iters or config.max_iters
    if config.decay_lr and config.warmup_iters >= steps:
        note = f"warmup_iters={config.warmup_iters} leaves schedule={config.schedule} none of the {steps:,} steps"
        print(f"note: {note}", file=sys.stderr)
    device = pick_device(config.device)
    dtype, writes_in = pick_dtype(config.dtype, device), pick_dtype_to_write(config.dtype, device)
    keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    wandb = import_wandb() if config.wandb_log else None

    dataset = open_dataset(config, model_config)
    tokenizer, identity = dataset.tokenizer, dataset.identity()
    if saved and (saved["tokenizer"], saved["data"]["identity"]) != (tokenizer.state(), identity):
        raise UserError(f"data/{config.dataset} is not the data that {out_dir}/ckpt.pt was trained on")
    model = build_model(config, model_config, dataset, new=not saved).to(device)
    model_config, vocab_size = model.config, model.config.vocab_size
    optimizer = build_optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = Progress()
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where the run was not in float16 so far
            scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])
        if progress.iter > config.max_iters:
            raise UserError(
                f"max_iters={config.max_iters} is below the {progress.iter} steps that the checkpoint has done"
            )
        if progress.iter == config.max_iters and not config.eval_only:
            print(f"note: all {progress.iter} steps are done; for more: --max_iters=N", file=sys.stderr)
        if config.eval_iters != saved["train_config"]["eval_iters"]:
            print("note: eval_iters changed, so the best validation loss is counted anew", file=sys.stderr)
            progress = dataclasses.replace(progress, best_val_loss=math.inf, best_iter=0, evals_since_best=0)
    averaged = AveragedWeights(model, config.ema_decay) if config.ema_decay else None
    to_be_used = averaged.in_place if averaged else nullcontext  # within it, the model has the weights to evaluate
    if saved:
        model.load_state_dict(saved.get("newest_weights", saved["model"]))
    del saved
    batches = ReadAhead(dataset) if device.type == "cuda" else dataset
    net = model  # what trains; the weights are saved from the model itself, so that no name in them tells of a wrapper
    if config.compile or (config.compile is None and device.type == "cuda"):
        net = compiled(model, dataset, config, device, dtype)

    read, evaluated = dataset.describe(config.batch_size, config.eval_iters)
    if config.gradient_accumulation_steps > 1:
        read = f"{config.gradient_accumulation_steps} times {read}"
    batches_read = config.max_iters * config.gradient_accumulation_steps
    epochs = batches_read / dataset.batches_per_epoch(config.batch_size)
    print(
        f"data: {dataset.meta['source']}, {len(dataset.train):,} tokens to train on, vocabulary of {vocab_size:,}\n"
        f"model: {model_config.model}, {models.count_parameters(model):,} parameters\n"
        f"steps: {config.max_iters:,} of {read}, {epochs:.1f} epochs\n"
        f"evaluation: every {config.eval_interval:,} steps, on {evaluated}\n"
        f"device: {device}, {str(dtype).removeprefix('torch.')}",
        flush=True,
    )
    evaluation = lambda: evaluate(net, dataset, config, device, dtype)  # noqa: E731
    if config.eval_only:
        with to_be_used():
            print(f"{describe(measures(evaluation(), dataset))} at iter {progress.iter}")
            if dataset.task == "translation":
                print(describe_translations(score_translations(model, dataset, device, writes_in)))
        return 0

    rows = start_out_dir(out_dir, config, model_config, progress)
    log_wandb = start_wandb(wandb, config, model_config, out_dir, resumed=progress.iter > 0)

    def record(row: dict) -> None:
        row = {"iter": progress.iter, "tokens": progress.tokens, "seconds": round(progress.seconds, 3), **row}
        rows.append(row)
        files.append(out_dir / "metrics.jsonl", json.dumps(row))
        log_wandb(row)

    def save(name: str, **training_state) -> None:
        state = {"train_config": asdict(config), "model_config": asdict(model_config), "tokenizer": tokenizer.state()}
        state |= {"task": dataset.task, "data": {"source": dataset.meta["source"], "identity": identity}}
        state |= {"model": model.state_dict(), "iter": progress.iter}
        checkpoint.save(out_dir / name, state | {"best_val_loss": progress.best_val_loss, **training_state})

    peak = peak_flops(device)
    losses, norms = list(progress.losses), [0.0] * len(progress.losses)
    logged_seconds, logged_tokens = progress.seconds, progress.tokens
    bar = tqdm(total=config.max_iters, initial=progress.iter, unit="step", dynamic_ncols=True, disable=None)
    with catch_signals() as stopped, bar:
        started = time.perf_counter() - progress.seconds
        while progress.iter < config.max_iters and not progress.waited_enough(config.early_stopping):
            lr = config.rate(progress.iter)
            optimizer.set_rates(lr / config.learning_rate)
            loss, grad_norm, tokens = train_step(progress.iter, net, batches, optimizer, scaler, config, device, dtype)
            losses.append(loss)
            norms.append(grad_norm)
            progress.iter += 1
            progress.tokens += tokens
            if averaged:
                averaged.update(progress.iter)
            bar.update()

            last = progress.iter == config.max_iters
            due = last or progress.iter % config.eval_interval == 0
            log = last or progress.iter % config.log_interval == 0
            stop = bool(stopped)  # a signal that comes later waits for the next step
            if not (log or due or stop):
                continue

            losses, norms = [float(x) for x in losses], [float(x) for x in norms]  # a GPU's work is waited for here
            progress.seconds = time.perf_counter() - started
            for i, (x, norm) in enumerate(zip(losses, norms, strict=True)):
                # a scaler leaves out steps whose gradient is not finite; without it the weights are lost
                if not math.isfinite(x) or not (math.isfinite(norm) or scaler.is_enabled()):
                    what = "gradient is not finite" if math.isfinite(x) else f"loss is {x}"
                    return diverged(what, progress.iter - len(losses) + 1 + i, norm, out_dir)
            progress.losses = list(losses)
            if log:
                speed = (progress.tokens - logged_tokens) / (progress.seconds - logged_seconds)
                logged_tokens, logged_seconds = progress.tokens, progress.seconds
                row = {"train_loss": sum(losses) / len(losses), "lr": lr}
                row["grad_norm"] = norms[-1] if math.isfinite(norms[-1]) else None
                row["tokens_per_second"] = round(speed)
                if peak:
                    row["mfu"] = speed * models.flops_per_token(model) / peak
                record(row)
                tell(bar, row, progress, config.max_iters)
                progress.losses, losses, norms = [], [], []
            newest_weights = model.state_dict()  # they stay what they are when others take their place
            with to_be_used():
                if due:
                    val_loss = evaluation()
                    if not val_loss < 700:  # beyond that, e^loss is no number any more
                        return diverged(f"validation loss is {val_loss}", progress.iter, float(grad_norm), out_dir)
                    improved = val_loss < progress.best_val_loss
                    progress.evals_since_best = 0 if improved else progress.evals_since_best + 1
                    if improved:
                        progress.best_val_loss, progress.best_iter = val_loss, progress.iter
                    row = measures(val_loss, dataset)
                    record(row)
                    best = ", the best so far" if improved else ""
                    say(bar, f"iter {progress.iter}: {describe(row)}{best}")
                    if dataset.task == "translation":
                        say(bar, translate_a_few(model, dataset, device, writes_in))
                    if improved:
                        save("best.pt")
                last = last or progress.waited_enough(config.early_stopping)
                if stop or (due and (last or improved or config.always_save_checkpoint)):
                    training_state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                    training_state |= {"newest_weights": newest_weights, "progress": asdict(progress)}
                    save("ckpt.pt", **training_state)
            if stop:
                break
            if due and not last:
                draw_losses(rows, out_dir / "loss.png")
                started = time.perf_counter() - progress.seconds  # the time since then was not training
    draw_losses(rows, out_dir / "loss.png")  # a resumed run may have no step left, and its picture be missing
    this_run = f"--out_dir={shlex.quote(str(out_dir))}"  # for commands that can be pasted
    if stopped:
        log_wandb(None)
        name = signal.Signals(stopped[0]).name
        go_on = f"python train.py --init_from=resume {this_run}"
        with suppress(OSError):  # as in catch_signals
            print(f"{name}: saved {out_dir}/ckpt.pt at iter {progress.iter}; go on with: {go_on}", file=sys.stderr)
        return 128 + stopped[0]
    if progress.iter < config.max_iters:
        evaluations = "evaluation" if progress.evals_since_best == 1 else "evaluations"
        print(f"stopped early: {progress.evals_since_best} {evaluations} without a lower validation loss")
    if averaged:
        averaged.swap()  # training is over
    if dataset.task == "translation":
        if (out_dir / "best.pt").exists():  # it translates best, and sample.py takes it
            model.load_state_dict(checkpoint.load(out_dir / "best.pt")["model"])
        scores = score_translations(model, dataset, device, writes_in)
        record({"test_bleu": scores["bleu"], "test_chrf": scores["chrf"]})
        print(describe_translations(scores))
        print(f'translate: python sample.py {this_run} --start="..."')
    else:
        print(f"\n{write_a_little(model, tokenizer, device, writes_in)}\n")
        print(f"more of this: python sample.py {this_run}")
    log_wandb(None)
    print(f"best val loss {progress.best_val_loss:.4f} at iter {progress.best_iter}")
    return 0


# --------------------------------------------------------------------------------------
# Before the loop


def check_resumable(saved: dict, given: dict, path: Path) -> None:
    """Length, rates, evaluation and the like may change from one start to the next; what the weights mean may not."""
    if "optimizer" not in saved:
        raise UserError(f"{path} holds a model but not the state of its training; is it a copy of best.pt?")
    model_config = asdict(ModelConfig()) | saved["model_config"]  # an older checkpoint may lack a key
    of_training = ("dropout", "label_smoothing", "ngram_dropout")
    fixed = {key: value for key, value in model_config.items() if key not in of_training}
    course = ("dataset", "seed", "batch_size", "gradient_accumulation_steps", "optimizer", "ngram_min_count")
    train_config = asdict(TrainConfig()) | saved["train_config"]
    fixed |= {key: train_config[key] for key in course}
    for key, value in given.items():
        if key in fixed and value != fixed[key]:
            raise UserError(
                f"{key}={value} cannot change on resume: the checkpoint has {key}={fixed[key]};"
                " leave it out, or train a new model with --init_from=scratch and another --out_dir"
            )


def open_dataset(config: TrainConfig, model_config: ModelConfig) -> Dataset:
    """The prepared folder, which is prepared now if there is none."""
    folder = Path("data") / config.dataset
    whole, stopped, bare = (
        any(os.path.exists(folder / name) for name in names)
        for names in (("meta.json", "meta.pkl"), ("preparing",), ("train.bin",))
    )
    if not whole and (config.dataset in prepare_data.KNOWN if stopped else not bare):
        prepare_data.prepare(configurator.make(prepare_data.PrepareConfig, {"name": config.dataset}))
    model, meta = models.MODELS[model_config.model], read_meta(folder)
    task = meta["task"]
    if task not in model.tasks:
        raise UserError(
            f"dataset={config.dataset} is for {task}, but model={model_config.model} for {' and '.join(model.tasks)}"
        )
    if task == "translation":
        if not importlib.util.find_spec("sacrebleu"):  # said now and not when all is trained
            raise UserError("translations are scored with the package sacrebleu: pip install sacrebleu")
        return PairDataset(folder, model_config.block_size, config.seed, model.has_encoder, meta)
    return TokenDataset(folder, model_config.block_size, config.seed, meta)


def build_model(config: TrainConfig, model_config: ModelConfig, dataset: Dataset, new: bool = True) -> nn.Module:
    """A model for that data, on the CPU; its config has what only the data could tell. Raises UserError.

    new: False where a checkpoint's weights take the place of the first ones, and no text is to be looked through.
    """
    tokenizer = dataset.tokenizer
    vocab_size = model_config.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(f"vocab_size={vocab_size} is below the {tokenizer.vocab_size} tokens of {config.dataset}")
    model_config = dataclasses.replace(model_config, vocab_size=vocab_size)
    if with_ngrams := bool(model_config.ngrams) and new:
        runs = find_frequent_ngrams(dataset, config, model_config)
        model_config = dataclasses.replace(model_config, ngram_rows=len(runs))
    torch.manual_seed(config.seed)
    model = models.build(model_config)
    if with_ngrams:
        model.ngrams.keys.copy_(runs)
    return model


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    return make_optimizer(
        config.optimizer,
        model,
        config.learning_rate,
        (config.beta1, config.beta2),
        config.weight_decay,
        config.muon_learning_rate,
        config.muon_momentum,
        config.ngram_learning_rate,
    )


def find_frequent_ngrams(dataset: Dataset, config: TrainConfig, model_config: ModelConfig) -> Tensor:
    """Keys of the runs that get a vector, as from frequent_ngrams. Raises UserError where there are none."""
    if model_config.ngram_rows is not None:
        raise UserError(
            f"ngram_rows={model_config.ngram_rows} cannot be chosen: it is found in the text; leave it out, and take"
            " another --ngram_min_count for more or fewer"
        )
    text = torch.from_numpy(dataset.beginning("train", NGRAMS_FROM)[0])
    runs = models.frequent_ngrams(text, model_config.ngrams, config.ngram_min_count)
    if not len(runs):
        raise UserError(f"ngram_min_count={config.ngram_min_count}: no run of tokens occurs that often in the text")
    return runs


def compiled(
    model: nn.Module, dataset: Dataset, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model compiled and tried on two batches; where that fails, one line says why and the model is as it was."""
    print("compiling: this takes about a minute", flush=True)
    try:
        # batches of pairs have many shapes, those of a text one
        faster = torch.compile(model, dynamic=True if dataset.task == "translation" else None)
        for index in range(2):
            batch = to_device(dataset.batch(index, config.batch_size), device)
            with autocast(device, dtype):
                faster(**batch)[1].backward()
                with torch.no_grad():
                    model.eval()
                    faster(**batch)
            model.train()
    except Exception as error:  # compilers fail in as many ways as there are machines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"note: torch.compile fails here ({reason}); going on without", file=sys.stderr)
        return model
    finally:
        model.zero_grad()
        model.train()
    return faster


def start_out_dir(out_dir: Path, config: TrainConfig, model_config: ModelConfig, progress: Progress) -> list[dict]:
    """Make the folder ready and return the rows of metrics that the run goes on from.

    A new run moves an older one's files aside; a resumed one drops what came after its checkpoint.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        rows = []
        metrics = out_dir / "metrics.jsonl"
        if progress.iter:
            # the test split is scored at the end, and anew if there is more to come
            rows = [row for row in read_metrics(metrics) if row["iter"] <= progress.iter and "test_bleu" not in row]
        else:
            keep_earlier_run(out_dir)
    except OSError as error:
        raise UserError(f"cannot write out_dir={out_dir}: {error.strerror}; name another --out_dir") from error
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.write_whole(metrics, lambda file: file.write(lines.encode()))
    settings = json.dumps(asdict(config) | asdict(model_config), indent=1)
    files.write_whole(out_dir / "config.json", lambda file: file.write(settings.encode()))
    return rows


def keep_earlier_run(out_dir: Path) -> None:
    """Move an earlier run's files into a new folder in out_dir; killed in between, the next start moves the rest."""
    names = ("ckpt.pt", "best.pt", "metrics.jsonl", "loss.png", "config.json", "wandb_id")
    found = [name for name in names if (out_dir / name).exists()]
    moving = out_dir / "previous.new"
    begun_only = (out_dir / "metrics.jsonl").exists() and not (out_dir / "metrics.jsonl").stat().st_size
    if (not found or begun_only) and not moving.exists():
        return
    moving.mkdir(exist_ok=True)
    for name in found:
        (out_dir / name).replace(moving / name)
    kept = next(path for n in itertools.count(1) if not (path := out_dir / f"previous-{n}").exists())
    moving.rename(kept)
    print(f"note: {out_dir} held an earlier run; it is now in {kept}", file=sys.stderr)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def import_wandb() -> ModuleType:
    """The package, and not a folder of that name, which it leaves behind and Python would import as well."""
    try:
        import wandb

        assert wandb.init
    except (ImportError, AttributeError) as error:
        raise UserError("wandb_log=True needs the package wandb: pip install wandb") from error
    return wandb


def start_wandb(
    wandb: ModuleType | None, config: TrainConfig, model_config: ModelConfig, out_dir: Path, resumed: bool
) -> Callable:
    """A function that sends a row to Weights & Biases, and ends the run when it is given None."""
    if wandb is None:
        return lambda row: None
    id_file = out_dir / "wandb_id"  # the same run there, however often it is resumed here
    run_id = id_file.read_text() if resumed and id_file.exists() else secrets.token_hex(4)
    files.write_whole(id_file, lambda file: file.write(run_id.encode()))
    options = {
        "project": config.wandb_project,
        "name": config.wandb_run_name or out_dir.name,
        "id": run_id,
        "resume": "allow",
        "dir": str(out_dir),
        "config": asdict(config) | asdict(model_config),
    }
    try:
        run = wandb.init(**options)
    except wandb.Error as error:
        print(f"note: wandb cannot be reached ({error}); logging offline, to be sent by: wandb sync", file=sys.stderr)
        run = wandb.init(**options, mode="offline")
    return lambda row: run.finish() if row is None else run.log(row, step=row["iter"])


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put themselves into; a second one ends the program at once.

    What follows within a second is the same request, as timeout and some shells send it to a process and its group.
    """
    caught, first = [], 0.0

    def note(number: int, frame) -> None:
        nonlocal first
        if caught:
            if time.monotonic() - first > 1:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        caught.append(number)
        first = time.monotonic()
        with suppress(OSError):  # whoever reads our messages may have got the signal, too, and be gone
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then saving\n".encode())

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------
# In the loop


def train_step(
    it: int,
    model: nn.Module,
    batches: Dataset | ReadAhead,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, int]:
    """Step number it, the first being 0: gradients of a few batches, then the weights move.

    Returns the mean loss before the step, the norm before clipping of the gradient, ngrams left out, both still on the
    device, since reading them would make the CPU wait for the GPU, and how many tokens the loss is the mean of.
    """
    first = it * config.gradient_accumulation_steps
    indices = range(first, first + config.gradient_accumulation_steps)
    micro_batches = [batches.batch(index, config.batch_size) for index in indices]
    tokens = [int((batch["targets"] >= 0).sum()) for batch in micro_batches]
    mean_loss = torch.zeros((), device=device)
    for index, batch, counted in zip(indices, micro_batches, tokens, strict=True):
        if model.config.dropout or model.config.ngram_dropout:
            torch.manual_seed(random_key(config.seed, index))
        with autocast(device, dtype):
            _, loss = model(**to_device(batch, device))
            loss = loss * (counted / sum(tokens))
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    # the gradients of ngrams are sparse, and their rule does not mind how long they are
    dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    grad_norm = nn.utils.clip_grad_norm_(dense, config.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return mean_loss, grad_norm, sum(tokens)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type == "cuda":  # from pinned memory without gaps the copy runs beside the GPU's work
        return {key: value.contiguous().pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean loss in nats a token over the evaluation set. Draws no random number, so it cannot disturb training."""
    model.eval()
    total, count = torch.zeros((), device=device), 0
    for batch in dataset.val_batches(config.batch_size, config.eval_iters):
        counted = int((batch["targets"] >= 0).sum())
        with autocast(device, dtype):
            _, loss = model(**to_device(batch, device))
        total += loss * counted
        count += counted
    model.train()
    return float(total) / count


def measures(val_loss: float, dataset: Dataset) -> dict:
    """A validation loss in nats per token, and the same in bits per byte of text and as perplexity."""
    bits = val_loss / math.log(2) / dataset.val_bytes_per_token()
    return {"val_loss": val_loss, "val_bits_per_byte": bits, "val_perplexity": math.exp(val_loss)}


def describe(row: dict) -> str:
    """val loss 2.0123 (2.903 bits per byte, perplexity 7.48)"""
    bits, perplexity = row["val_bits_per_byte"], row["val_perplexity"]
    return f"val loss {row['val_loss']:.4f} ({bits:.3f} bits per byte, perplexity {perplexity:.2f})"


def say(bar: tqdm, line: str) -> None:
    """Print a line above the bar. A reader who has gone, as a closed terminal, does not end the training."""
    try:
        bar.write(line)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115, open to the end


def tell(bar: tqdm, row: dict, progress: Progress, max_iters: int) -> None:
    """On a terminal the bar shows the numbers; elsewhere, a line does."""
    if not bar.disable:
        bar.set_postfix_str(f"loss {row['train_loss']:.3f}, lr {row['lr']:.1e}, {row['tokens_per_second']:,} tokens/s")
        return
    left = (max_iters - progress.iter) * progress.seconds / progress.iter
    norm = "inf" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    line = f"iter {progress.iter}/{max_iters}: loss {row['train_loss']:.4f}, lr {row['lr']:.2e}, gradient norm {norm}"
    say(bar, f"{line}, {row['tokens_per_second']:,} tokens/s, {left:.0f} s left")


def diverged(what: str, it: int, grad_norm: float, out_dir: Path) -> int:
    """Say what happened and what to try; the exit code."""
    saved = (out_dir / "ckpt.pt").exists()
    kept = f"{out_dir}/ckpt.pt is the last good checkpoint" if saved else "nothing was saved yet"
    print(
        f"train.py: the {what} at iter {it} (gradient norm {grad_norm}); {kept}."
        " Try a lower --learning_rate, more --warmup_iters, --grad_clip=1.0 or --dtype=float32",
        file=sys.stderr,
    )
    return 1


def draw_losses(rows: list[dict], path: Path) -> None:
    """The picture of a run: training and validation loss against steps."""
    val = [(row["iter"], row["val_loss"]) for row in rows if "val_loss" in row]
    if not val:
        return
    import matplotlib  # here, since it takes a second to load and the first step should not wait for it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    train = [(row["iter"], row["train_loss"]) for row in rows if "train_loss" in row]
    axes.plot(*zip(*train, strict=True), color="#9db4c8", linewidth=1, label="training")
    axes.plot(*zip(*val, strict=True), color="#c2410c", linewidth=1.8, marker="o", markersize=3.5, label="validation")
    best = min(val, key=lambda point: point[1])
    axes.annotate(f"{best[1]:.3f}", best, xytext=(0, 8), textcoords="offset points", ha="right", color="#c2410c")
    axes.set(xlabel="steps", ylabel="loss, nats per token", title=path.parent.name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    files.write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


def write_a_little(model: nn.Module, tokenizer, device: torch.device, dtype: torch.dtype) -> str:
    """300 tokens by the model as it is now."""
    model.eval()
    idx = torch.from_numpy(tokenizer.start()).to(device)[None]
    generator = torch.Generator(device).manual_seed(1337)
    with autocast(device, dtype):
        tokens = list(generate(model, idx, 300, tokenizer.vocab_size, temperature=0.8, generator=generator))
    return tokenizer.decode(torch.cat(tokens).tolist()).strip()


def translate_a_few(model: nn.Module, dataset: PairDataset, device: torch.device, dtype: torch.dtype) -> str:
    """Three sentences of the validation split, each with the reference and what the model makes of it now."""
    model.eval()
    tokenizer, examples = dataset.tokenizer, dataset.texts("val", 3)
    with autocast(device, dtype):
        found = translate(model, [source for source, _ in examples], tokenizer.eot, known=tokenizer.vocab_size)
    model.train()
    lines = [
        f"    {tokenizer.decode(source[:-1])}\n  = {reference}\n  > {tokenizer.decode(translation.ids)}"
        for (source, reference), translation in zip(examples, found, strict=True)
    ]
    return "\n".join(lines)


def score_translations(model: nn.Module, dataset: PairDataset, device: torch.device, dtype: torch.dtype) -> dict:
    """BLEU and chrF on the test split, or where there is none on the validation split, as from translate.score()."""
    split = "test" if "test" in dataset.pairs else "val"
    tokenizer, pairs = dataset.tokenizer, dataset.texts(split)
    model.eval()
    with autocast(device, dtype):
        found = translate(model, [source for source, _ in pairs], tokenizer.eot, NUM_BEAMS, known=tokenizer.vocab_size)
    translations = tokenizer.decode_batch(translation.ids for translation in found)
    return score(translations, [reference for _, reference in pairs]) | {"split": split, "pairs": len(pairs)}


def describe_translations(scores: dict) -> str:
    return (
        f"\n{scores['pairs']:,} pairs of the {scores['split']} split, beams: {NUM_BEAMS}\n"
        f"  BLEU {scores['bleu']:5.2f}   {scores['bleu_signature']}\n"
        f"  chrF {scores['chrf']:5.2f}   {scores['chrf_signature']}"
    )


if __name__ == "__main__":
    configurator.run(main)
