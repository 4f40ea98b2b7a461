"""Train a model: config files and --key=value, from left to right.

    python train.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py --n_layer=6 --out_dir=out/deeper
    python train.py --init_from=resume --out_dir=out/deeper --max_iters=4000
    python train.py --init_from=out/deeper --dataset=mine --out_dir=out/mine     a new run that starts from its model
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

It leaves in out_dir: ckpt.pt (all that resuming needs), best.pt (the model with the lowest validation loss),
metrics.jsonl, loss.png and config.json. Ctrl-C saves before it stops.
"""

import dataclasses
import importlib.util
import math
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from humptygpt.core import limits

if __name__ == "__main__":
    limits.start(limits.TORCH)  # before numpy and torch are loaded

import torch
from torch import Tensor, nn
from tqdm import tqdm

import model as models
import prepare_data
from humptygpt.checkpoint import checkpoint
from humptygpt.core import settings as configurator
from humptygpt.core.device import (
    autocast,
    give_back_freed_memory,
    keep_freed_memory,
    peak_flops,
    pick_device,
    pick_dtype,
    sample_dtype,
    to_device,
)
from humptygpt.core.errors import UserError
from humptygpt.core.settings import as_written_here
from humptygpt.data.batches import Dataset, PairDataset, Prefetcher, TokenDataset
from humptygpt.data.token_files import COMMAND, is_command, read_meta
from humptygpt.interchange.adapters import write_adapter
from humptygpt.interchange.load import Loaded, load
from humptygpt.nn import lora
from humptygpt.parallel import processes as distributed
from humptygpt.parallel.processes import ONE_PROCESS, Processes, note
from humptygpt.tokenizer import tokenizers
from humptygpt.training import evaluation
from humptygpt.training.interrupts import catch_signals
from humptygpt.training.memory import check_training_fits, memory_report
from humptygpt.training.optimizers import (
    Optimizer,
    clip_gradients,
    freeze,
    local,
    make_optimizer,
    state_bytes,
    trained_parameters,
)
from humptygpt.training.run_folder import NoFolder, RunFolder
from humptygpt.training.settings import TrainConfig, read_settings
from model import ModelConfig

PREPARED_WITH = ("--tokenizer=", "--vocab_size=", "--model_type=")


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

    def record(self, val_loss: float) -> bool:
        """Count a validation loss; whether it is the lowest so far."""
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_iter, self.evals_since_best = val_loss, self.iter, 0
            return True
        self.evals_since_best += 1
        return False


@dataclass
class Run:
    """What a run is made of. setup() puts it together."""

    config: TrainConfig
    dataset: Dataset
    model: nn.Module
    net: (
        nn.Module
    )  # the model, or the same compiled, which trains; weights are saved from the model itself
    batches: Dataset | Prefetcher
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    device: torch.device
    dtype: torch.dtype
    identity: dict  # of the data set, which takes a moment to compute
    processes: Processes = ONE_PROCESS
    replica: nn.Module | None = (
        None  # the net, or the same in DDP: its backward sums over processes
    )

    def evaluate(self) -> float:
        """Return the mean validation loss, in nats per token."""
        val_loss = evaluation.evaluate(
            self.net,
            self.dataset,
            self.config.batch_size,
            self.config.eval_iters,
            device=self.device,
            dtype=self.dtype,
            processes=self.processes,
        )
        self.processes.after_forward(self.model)
        return val_loss

    def stops_early(self) -> bool:
        return 0 < self.config.early_stopping <= self.progress.evals_since_best

    def settings(self) -> dict:
        return asdict(self.config) | asdict(self.model.config)

    def save(self, path: Path, entries: dict) -> None:
        """Write a checkpoint, path, in the process that writes; of a sharded model a folder, such as ckpt for ckpt.pt.

        All processes have to call this.
        """
        self.processes.save(path, entries)

    def load(self, saved: dict) -> None:
        """Take over the state of a checkpoint, whose weights the model has already."""
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        if next(
            iter(saved["model"].values())
        ).is_meta:  # sharded: each process reads its part, weights included
            self.optimizer.steps = saved["optimizer"]["steps"]
            if self.optimizer.steps:
                self.optimizer.prepare_state()
            self.processes.load(
                Path(self.config.out_dir) / "ckpt.pt", self.state() | self.training_state()
            )
            return
        self.optimizer.load_state_dict(saved["optimizer"])

    def best_state(self) -> dict:
        """The entries of best.pt: see checkpoint.SCHEMA. LoRA is merged, so that it is a model as any other."""
        model_config, weights = lora.merged_state(self.model)
        return self.state() | {"model_config": asdict(model_config), "model": weights}

    def state(self) -> dict:
        """The entries of ckpt.pt, but for those of training."""
        return {
            "train_config": asdict(self.config),
            "model_config": asdict(self.model.config),
            "tokenizer": self.dataset.tokenizer.state(),
            "task": self.dataset.task,
            "data": {"identity": self.identity}
            | {
                key: self.dataset.meta[key]
                for key in ("source", "command")
                if key in self.dataset.meta
            },
            "progress": asdict(self.progress),
            "model": dict(self.model.state_dict()),
        }

    def training_state(self) -> dict:
        """What ckpt.pt has beside them."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() or None,
        }


def main(argv: list[str]) -> int:
    smaller = "try a smaller --batch_size, --block_size or model"
    with ExitStack() as locks, distributed.silence_other_ranks(), limits.memory_advice(smaller):
        config, model_config, *start = read_settings(argv, locks)
        if config.dry_run:
            print(describe_sizes(config, model_config))
            return 0
        # popped, since a name for the checkpoint would keep it in memory
        run = setup(config, model_config, base=start.pop(), saved=start.pop())
        print(describe(run), flush=True)
        if busy := limits.load_note():
            note(busy)
        if run.config.init_from not in ("scratch", "resume") and not (
            run.config.eval_only or run.progress.iter
        ):
            print(describe_cost(run), flush=True)
        if run.config.eval_only:
            print(evaluate_only(run))
            code = 0
        else:
            code = train_and_finish(run)
        run.processes.end()
        return code


def train_and_finish(run: Run) -> int:
    new_folder = RunFolder if run.processes.first else NoFolder
    folder = new_folder(Path(run.config.out_dir), run.settings(), run.progress.iter)
    try:
        stopped_by = train(run, folder)
    except Diverged as error:
        saved = checkpoint.stored(folder.path / "ckpt.pt")
        kept = f"{saved} is the last good checkpoint" if saved.exists() else "nothing was saved yet"
        advice = (
            "Try a lower --learning_rate, more --warmup_iters, --grad_clip=1.0 or --dtype=float32"
        )
        if run.processes.first:
            print(f"train.py: the {error}; {kept}. {advice}", file=sys.stderr)
        return 1
    folder.draw()  # a resumed run may have no step left, and its plot be missing
    out_dir = f"--out_dir={shlex.quote(str(folder.path))}"  # in commands that can be pasted
    if stopped_by:
        saved = checkpoint.stored(folder.path / "ckpt.pt")
        line = f"{signal.Signals(stopped_by).name}: saved {saved} at iter {run.progress.iter}"
        with suppress(OSError):  # as in catch_signals
            if run.processes.first:
                command = as_written_here(f"python train.py --init_from=resume {out_dir}")
                print(f"{line}; resume: {command}", file=sys.stderr)
    else:
        finish(run, folder, out_dir)
    folder.close()
    return distributed.exit_code(stopped_by)


# --------------------------------------------------------------------------------------
# Setup


def base_model(
    base: Loaded, config: TrainConfig, model_config: ModelConfig, dataset: Dataset
) -> nn.Module:
    """The model to start from, on the CPU. Raises UserError where the data has other tokens than it knows."""
    if dataset.tokenizer.pieces != base.tokenizer.pieces:
        kinds = dataset.tokenizer.name, base.tokenizer.name
        command = dataset.meta.get(
            "command", f"python prepare_data.py {shlex.quote(config.dataset)}"
        )
        words = [word for word in shlex.split(command) if not word.startswith(PREPARED_WITH)]
        tokenizer = base.tokenizer.name if base.tokenizer.name == "gpt2" else base.path
        raise UserError(
            f"data/{config.dataset} has tokens ({kinds[0]}) that are not those of the model {base.path} ({kinds[1]});"
            f" prepare it with the model's: {as_written_here(shlex.join([*words, f'--tokenizer={tokenizer}']))}"
        )
    cropped = {  # as nanoGPT: the first positions
        name: x[: model_config.block_size].clone() if name.endswith("position.wpe.weight") else x
        for name, x in base.model.state_dict().items()
    }
    model = checkpoint.restore_model(cropped, dataclasses.replace(model_config, lora_rank=0))
    model.config = model_config
    torch.manual_seed(config.seed)
    return lora.add(model) if model_config.lora_rank else model


def setup(
    config: TrainConfig,
    model_config: ModelConfig,
    saved: dict | None = None,
    base: Loaded | None = None,
) -> Run:
    """Put a run together; saved: the checkpoint that it resumes. base: the model that it starts from."""
    processes = distributed.start(config.backend, pick_device(config.device), config.parallel)
    device = processes.device
    dtype = pick_dtype(config.dtype, device)
    (give_back_freed_memory if processes.sharded else keep_freed_memory)()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    with processes.rank_zero_first():  # it may have to prepare them
        dataset = open_dataset(config, model_config)
    identity = dataset.identity()
    steps = {"iter": saved["progress"]["iter"]} if saved else {}
    processes.check_alike(asdict(config) | asdict(model_config) | identity | steps)
    accumulation, pairs = config.gradient_accumulation_steps, dataset.task == "translation"
    distributed.check_divisible(processes.size, accumulation, config.batch_size, pairs)
    if saved and not is_data_of(saved, dataset, identity):
        other = (
            f"data/{config.dataset} is not the data that {config.out_dir}/ckpt.pt was trained on"
        )
        raise UserError(other + find_data_of(saved, config, model_config))
    if not saved and not base:
        model_config = complete_model_config(config, model_config, dataset)
    if not config.eval_only and not config.freeze:  # frozen parameters take less than it counts
        rows = rows_of_process(config, processes.size)
        check_training_fits(config, model_config, rows, device, dtype, processes=processes.size)
    processes.check_model(model_config, dtype)
    if saved:
        model = checkpoint.restore_model(saved["model"], model_config)
    elif base:
        model = base_model(base, config, model_config, dataset)
    else:
        torch.manual_seed(config.seed)
        model = models.build(model_config)
    for stack in (module for module in model.modules() if isinstance(module, models.Stack)):
        stack.checkpoint_activations = config.checkpoint_activations
    freeze(model, config.freeze)
    processes.distribute(model)
    optimizer = make_optimizer(config, model)
    optimizer.spread, optimizer.total = processes.spread, processes.total
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches = (
        Prefetcher(dataset, processes.stride(accumulation)) if device.type == "cuda" else dataset
    )
    run = Run(
        config,
        dataset,
        model,
        model,
        batches,
        optimizer,
        scaler,
        Progress(),
        device,
        dtype,
        identity,
    )
    run.processes = processes
    if saved:
        run.progress = resume_progress(config, saved)
        run.load(saved)
    if config.compile or (config.compile is None and device.type == "cuda"):
        run.net = compile_model(run)
    run.replica = processes.replicate(run.net)
    return run


def describe_sizes(config: TrainConfig, model_config: ModelConfig) -> str:
    """What training would take, found without data and without memory."""
    if model_config.vocab_size is None:
        meta = read_meta(Path("data") / config.dataset)
        model_config = dataclasses.replace(
            model_config, vocab_size=tokenizers.from_state(meta["tokenizer"]).vocab_size
        )
    device, size = pick_device(config.device), distributed.launched().size
    return memory_report(
        config,
        model_config,
        rows=rows_of_process(config, size),
        dtype=pick_dtype(config.dtype, device),
        device=device,
        processes=size,
    )


def rows_of_process(config: TrainConfig, processes: int) -> int:
    """The most sequences that one of several processes has at once: they divide a micro-batch if these are too few."""
    return math.ceil(config.batch_size / max(1, processes // config.gradient_accumulation_steps))


def open_dataset(config: TrainConfig, model_config: ModelConfig) -> Dataset:
    """The prepared folder, which is prepared now if it is missing."""
    folder = Path("data") / config.dataset
    exists = lambda *names: any(os.path.exists(folder / name) for name in names)  # noqa: E731
    prepared = exists("meta.json", "meta.pkl")
    stopped = (
        exists("preparing") and config.dataset in prepare_data.SOURCES
    )  # its preparation can be resumed
    # a train.bin alone is taken for nanoGPT's; a command is left of a folder of ours
    missing = not prepared and not exists("preparing", "train.bin", COMMAND)
    if missing and len(folder.parts) > 2:  # a path: data/mine
        name = shlex.quote(f"--dataset={Path(config.dataset).name}")
        raise UserError(
            f"dataset={config.dataset} is not the name of a folder in data/; write {name}"
        )
    if not prepared and (stopped or missing):
        prepare_data.prepare(
            configurator.make(prepare_data.PrepareConfig, {"name": config.dataset})
        )
    model, meta = models.MODELS[model_config.model], read_meta(folder)
    task = meta["task"]
    if task not in model.tasks:
        raise UserError(
            f"dataset={config.dataset} is for {task}, but model={model_config.model} for {' and '.join(model.tasks)}"
        )
    if task == "translation":
        if not importlib.util.find_spec("sacrebleu"):  # refused now and not when all is trained
            raise UserError(
                "translations are scored with the package sacrebleu: pip install sacrebleu"
            )
        return PairDataset(folder, model_config.block_size, config.seed, model.has_encoder, meta)
    return TokenDataset(folder, model_config.block_size, config.seed, meta)


def is_data_of(saved: dict, dataset: Dataset, identity: dict) -> bool:
    return (saved["tokenizer"], saved["data"]["identity"]) == (dataset.tokenizer.state(), identity)


def find_data_of(saved: dict, config: TrainConfig, model_config: ModelConfig) -> str:
    """Where the data of a checkpoint is now, or else the command that makes it again: the end of a message."""
    dataset = saved["train_config"].get("dataset", config.dataset)
    earlier = (
        f"{dataset}/{folder.name}" for folder in sorted((Path("data") / dataset).glob("previous-*"))
    )
    for name in (dataset, *earlier):
        if any((Path("data") / name / meta).exists() for meta in ("meta.json", "meta.pkl")):
            with suppress(UserError):
                found = open_dataset(dataclasses.replace(config, dataset=name), model_config)
                if is_data_of(saved, found, found.identity()):
                    return f"; that is now in data/{name}: add --dataset={shlex.quote(name)}"
    command = saved["data"].get("command", "")
    return f"; to make that again: {as_written_here(command)}" if is_command(command) else ""


def complete_model_config(
    config: TrainConfig, model_config: ModelConfig, dataset: Dataset
) -> ModelConfig:
    """The config of a new model for this data. Raises UserError."""
    tokens = dataset.tokenizer.vocab_size
    vocab_size = model_config.vocab_size or tokens
    if vocab_size < tokens:
        raise UserError(f"vocab_size={vocab_size} is below the {tokens} tokens of {config.dataset}")
    if model_config.lora_rank:
        raise UserError(
            f"lora_rank={model_config.lora_rank} trains beside a model; name that with --init_from"
        )
    return dataclasses.replace(model_config, vocab_size=vocab_size)


def resume_progress(config: TrainConfig, saved: dict) -> Progress:
    """The checkpoint's progress. Raises UserError where it is beyond the end of training."""
    progress = Progress(**saved["progress"])
    if progress.iter > config.max_iters:
        raise UserError(
            f"max_iters={config.max_iters} is below the {progress.iter} steps that the checkpoint has done"
        )
    if progress.iter == config.max_iters and not config.eval_only:
        note(f"all {progress.iter} steps are done; for more: --max_iters=N")
    if config.eval_iters != saved["train_config"]["eval_iters"]:
        note("eval_iters changed, so that the lowest validation loss starts over")
        progress = dataclasses.replace(
            progress, best_val_loss=math.inf, best_iter=0, evals_since_best=0
        )
    return progress


def compile_model(run: Run) -> nn.Module:
    """The model compiled and tried on two batches; where that fails, a note says why and it is the model itself."""
    print("compiling: this takes about a minute", flush=True)
    model, dataset = run.model, run.dataset
    batches = [
        to_device(dataset.batch(index, run.config.batch_size), run.device) for index in range(2)
    ]
    try:
        # batches of pairs have many shapes, those of a text one
        compiled = run.processes.compile(
            model, dynamic=True if dataset.task == "translation" else None
        )
        for batch in batches:
            with autocast(run.device, run.dtype):
                compiled(**batch)[1].backward()
                with torch.no_grad():
                    model.eval()
                    compiled(**batch)
            model.train()
    except Exception as error:  # compilers fail in as many ways as there are machines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        note(f"torch.compile fails here ({reason}); training uncompiled")
        for module in model.modules():
            vars(module).pop("forward", None)  # a compiled one
        return model
    finally:
        run.processes.after_forward(model)
        model.zero_grad()
        model.train()
    return compiled


def describe(run: Run) -> str:
    """What is about to happen."""
    config, dataset = run.config, run.dataset
    batch, evaluated = dataset.describe(config.batch_size, config.eval_iters)
    if config.gradient_accumulation_steps > 1:
        batch = f"{config.gradient_accumulation_steps} times {batch}"
    micro_batches = config.max_iters * config.gradient_accumulation_steps
    epochs = micro_batches / dataset.batches_per_epoch(config.batch_size)
    model_config = run.model.config
    start = "" if config.init_from in ("scratch", "resume") else f", from {config.init_from}"
    return (
        f"data: {dataset.meta['source']}, {len(dataset.train):,} tokens to train on,"
        f" vocabulary of {model_config.vocab_size:,}\n"
        f"model: {model_config.model}, {models.count_parameters(run.model):,} parameters{start}\n"
        f"steps: {config.max_iters:,} of {batch}, {epochs:.1f} epochs\n"
        f"evaluation: every {config.eval_interval:,} steps, on {evaluated}\n"
        f"device: {run.device}, {str(run.dtype).removeprefix('torch.')}"
        f"{f', {run.processes.size} processes' if run.processes.size > 1 else ''}"
    )


def describe_cost(run: Run) -> str:
    """What fine-tuning takes, by a trial of the first micro-batch, of which nothing remains."""
    config, kept = run.config, {}
    trained = sum(p.numel() for p in trained_parameters(run.model).values())

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    storages = [local(p).untyped_storage() for p in run.model.parameters()]
    weights = {storage.data_ptr(): storage.nbytes() for storage in storages}
    batch, started = (
        to_device(run.dataset.batch(0, config.batch_size), run.device),
        time.perf_counter(),
    )
    with (
        autocast(run.device, run.dtype),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        _, loss = run.model(**batch)
    loss.backward()
    loss.detach().item()  # waits for a GPU
    seconds = (time.perf_counter() - started) * config.gradient_accumulation_steps
    run.model.zero_grad()
    parts = run.processes.size if run.processes.sharded else 1
    update = (4 * trained + state_bytes(config.optimizer, run.model)) / parts
    activations = sum(size for at, size in kept.items() if at not in weights)
    memory = [size / 1e9 for size in (sum(weights.values()), update, activations)]
    return (
        f"training: {trained:,} parameters, {trained / models.count_parameters(run.model):.1%}\n"
        f"memory: {sum(memory):.2f} GB: weights {memory[0]:.2f}, gradients and optimizer state {memory[1]:.2f},"
        f" activations {memory[2]:.2f}\n"
        f"time: about {seconds:.2g} s a step, {seconds * config.max_iters:.2g} s in all"
    )


def evaluate_only(run: Run) -> str:
    text = f"{evaluation.describe(evaluation.measures(run.evaluate(), run.dataset))} at iter {run.progress.iter}"
    if run.dataset.task == "translation":
        model, dtype = (
            run.processes.whole_model(run.model),
            sample_dtype(run.config.dtype, run.device),
        )
        if run.processes.first:
            scores = evaluation.score_translations(model, run.dataset, run.device, dtype)
            text += f"\n{evaluation.describe_translations(scores)}"
    return text


# --------------------------------------------------------------------------------------
# The loop


class Diverged(Exception):
    """The loss or the gradient is not finite."""


def train(run: Run, folder: RunFolder) -> int | None:
    """Train to the end, or to the signal whose number is returned. Raises Diverged."""
    config, progress = run.config, run.progress
    meter = Meter(run)
    hidden = None if run.processes.first else True
    bar = tqdm(
        total=config.max_iters,
        initial=progress.iter,
        unit="step",
        dynamic_ncols=True,
        disable=hidden,
    )
    with catch_signals() as signals, bar:
        while progress.iter < config.max_iters and not run.stops_early():
            lr = config.lr(progress.iter)
            run.optimizer.set_lr(lr / config.learning_rate)
            loss, grad_norm, tokens = train_step(run, progress.iter)
            progress.iter += 1
            progress.tokens += tokens
            meter.add(loss, grad_norm)
            bar.update()

            last = progress.iter == config.max_iters
            due = last or progress.iter % config.eval_interval == 0
            log = last or progress.iter % config.log_interval == 0
            stop = run.processes.agree(signals)  # a signal that comes later waits for the next step
            if not (log or due or stop):
                continue
            meter.read()
            if log:
                row = meter.row(lr)
                folder.record(row)
                report(bar, row, run)
            improved = due and evaluate_and_record(run, folder, bar)
            last = last or run.stops_early()
            if stop or (due and (last or improved or config.always_save_checkpoint)):
                run.save(folder.path / "ckpt.pt", run.state() | run.training_state())
            if stop:
                return stop
            if due and not last:
                folder.draw()
                meter.restart_clock()
    return None


def train_step(run: Run, it: int) -> tuple[Tensor, Tensor, int]:
    """Step number it, the first being 0: the gradients of a few micro-batches, then an optimizer step.

    Several processes divide the micro-batches, sum gradients over ranks once, and take the same step.
    Returns the mean loss before the step, the gradient norm before clipping, both still on the device, since
    reading them would make the CPU wait for the GPU, and how many tokens the loss is the mean of.
    """
    config, processes = run.config, run.processes
    micro_batches = config.gradient_accumulation_steps
    batches = processes.local_batches(
        run.batches, it * micro_batches, micro_batches, config.batch_size
    )
    parts = list(batches)
    tokens = processes.sum(sum(part.tokens for part in parts))
    mean_loss = torch.zeros((), device=run.device)
    for part in parts:
        dropout = nullcontext()
        if run.model.config.dropout:
            dropout = part.same_dropout(config.seed, run.device)
        with dropout, processes.sync_gradients(run.replica, last=part is parts[-1]):
            with autocast(run.device, run.dtype):
                _, loss = run.replica(**to_device(part.batch, run.device))
                loss = loss * (part.tokens / tokens)
            processes.backward(run.scaler.scale(loss))
        mean_loss += loss.detach()
    processes.all_reduce(mean_loss)
    run.scaler.unscale_(run.optimizer)
    trained = [p for p in run.model.parameters() if p.grad is not None]
    grad_norm = clip_gradients(trained, config.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return mean_loss, grad_norm, tokens


class Meter:
    """Losses and gradient norms since the last row of metrics, left on the device until they are read; and the time."""

    def __init__(self, run: Run):
        self.run, progress = run, run.progress
        self.losses, self.norms = list(progress.losses), [0.0] * len(progress.losses)
        self.logged_seconds, self.logged_tokens = progress.seconds, progress.tokens
        self.peak_flops = peak_flops(run.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """The time since read() does not count as training."""
        self.started = time.perf_counter() - self.run.progress.seconds

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(grad_norm)

    def read(self) -> None:
        """Wait for the device and bring progress up to date. Raises Diverged."""
        self.losses, self.norms = [float(x) for x in self.losses], [float(x) for x in self.norms]
        progress, scaled = self.run.progress, self.run.scaler.is_enabled()
        progress.seconds = time.perf_counter() - self.started
        progress.losses = list(self.losses)
        for i, (loss, norm) in enumerate(zip(self.losses, self.norms, strict=True)):
            # a scaler leaves out steps whose gradient is not finite; without it the weights are lost
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):
                what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
                raise Diverged(
                    f"{what} at iter {progress.iter - len(self.losses) + 1 + i} (gradient norm {norm})"
                )

    def row(self, lr: float) -> dict:
        """A row of metrics; the next one begins."""
        progress = self.run.progress
        speed = (progress.tokens - self.logged_tokens) / (progress.seconds - self.logged_seconds)
        row = stamp(progress) | {"train_loss": sum(self.losses) / len(self.losses), "lr": lr}
        row["grad_norm"] = self.norms[-1] if math.isfinite(self.norms[-1]) else None
        row["tokens_per_second"] = round(speed)
        if self.peak_flops:
            row["mfu"] = (
                speed
                * models.flops_per_token(self.run.model)
                / (self.peak_flops * self.run.processes.size)
            )
        self.logged_tokens, self.logged_seconds = progress.tokens, progress.seconds
        progress.losses, self.losses, self.norms = [], [], []
        return row


def stamp(progress: Progress) -> dict:
    """What each row of metrics begins with."""
    return {"iter": progress.iter, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}


def evaluate_and_record(run: Run, folder: RunFolder, bar: tqdm) -> bool:
    """Evaluate, save best.pt if the loss is the lowest so far, and return whether it is. Raises Diverged."""
    progress = run.progress
    val_loss = run.evaluate()
    if not val_loss < 700:  # beyond that, e^loss overflows
        raise Diverged(f"validation loss is {val_loss} at iter {progress.iter}")
    improved = progress.record(val_loss)
    row = evaluation.measures(val_loss, run.dataset)
    folder.record(stamp(progress) | row)
    best = ", the best so far" if improved else ""
    write_line(bar, f"iter {progress.iter}: {evaluation.describe(row)}{best}")
    if run.dataset.task == "translation":
        model, dtype = (
            run.processes.whole_model(run.model),
            sample_dtype(run.config.dtype, run.device),
        )
        if run.processes.first:
            write_line(bar, evaluation.translate_examples(model, run.dataset, run.device, dtype))
    if improved:
        run.save(folder.path / "best.pt", run.best_state())
        if run.model.config.lora_rank and run.processes.first:
            write_adapter(run.model, run.config.init_from, folder.path / "adapter")
    return improved


def report(bar: tqdm, row: dict, run: Run) -> None:
    """On a terminal the bar shows the numbers; elsewhere, a line does."""
    progress, max_iters = run.progress, run.config.max_iters
    loss, lr, speed = row["train_loss"], row["lr"], row["tokens_per_second"]
    if not bar.disable:
        bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed:,} tokens/s")
        return
    left = (max_iters - progress.iter) * progress.seconds / progress.iter
    norm = "inf" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    line = f"iter {progress.iter}/{max_iters}: loss {loss:.4f}, lr {lr:.2e}, gradient norm {norm}"
    write_line(bar, f"{line}, {speed:,} tokens/s, {left:.0f} s left")


def write_line(bar: tqdm, line: str) -> None:
    """Print a line above the bar. A closed terminal or pipe does not end the training."""
    try:
        bar.write(line)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115, open to the end


# --------------------------------------------------------------------------------------
# The end


def finish(run: Run, folder: RunFolder, out_dir: str) -> None:
    """Show in the first process what the model can do: a sample of text, or the score of its translations."""
    model = run.processes.whole_model(run.model)
    if run.processes.first:
        show(run, model, folder, out_dir)


def show(run: Run, model: nn.Module, folder: RunFolder, out_dir: str) -> None:
    progress, best = run.progress, checkpoint.stored(folder.path / "best.pt")
    dtype = sample_dtype(run.config.dtype, run.device)
    if progress.iter < run.config.max_iters:
        evaluations = "evaluation" if progress.evals_since_best == 1 else "evaluations"
        print(
            f"stopped early: {progress.evals_since_best} {evaluations} without a lower validation loss"
        )
    if run.dataset.task == "translation":
        # best.pt translates best, and sample.py takes it
        model = load(best).model.to(run.device) if best.exists() else model
        scores = evaluation.score_translations(model, run.dataset, run.device, dtype)
        folder.record(stamp(progress) | {"test_bleu": scores["bleu"], "test_chrf": scores["chrf"]})
        print(evaluation.describe_translations(scores))
        print("translate: " + as_written_here(f'python sample.py {out_dir} --start="..."'))
    else:
        print(f"\n{evaluation.sample_text(model, run.dataset.tokenizer, run.device, dtype)}\n")
        print("more of this: " + as_written_here(f"python sample.py {out_dir}"))
    print(f"best val loss {progress.best_val_loss:.4f} at iter {progress.best_iter}")


if __name__ == "__main__":
    configurator.run(main)
