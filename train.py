"""Train a model: config files and --key=value, from left to right.

    python train.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py --n_layer=6 --out_dir=out/deeper
    python train.py --init_from=resume --out_dir=out/deeper --max_iters=4000
    python train.py --input=FILE_OR_FOLDER --minutes=10                          your own text, your time
    python train.py --init_from=out/deeper --dataset=mine --out_dir=out/mine     a new run that starts from its model
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

It leaves in out_dir: ckpt.pt (all that resuming needs), best.pt (the model with the lowest validation loss),
metrics.jsonl, loss.png, config.json (a config file, too), command.txt, snapshots/ of a small model, for its page, and,
with --minutes, plan.py, which repeats the run. Ctrl-C saves before it stops.
Keys that are not set have the defaults below, which are the demo's settings.
"""

import dataclasses
import math
import os
import shlex
import signal
import sys
import zlib
from collections.abc import Collection
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import torch
from torch import Tensor, nn
from tqdm import tqdm

import model as models
from humptygpt import checkpoint, evaluation, resume, tasks, tokenizers
from humptygpt import config as configurator
from humptygpt.checkpoint import refuse_other_code
from humptygpt.config import UserError, as_written_here, note
from humptygpt.data import Dataset, Prefetcher
from humptygpt.device import (
    autocast,
    pick_device,
    pick_dtype,
    sample_dtype,
    to_device,
    tune_malloc,
)
from humptygpt.loading import Loaded, load
from humptygpt.memory import ADVICE, check_training_fits, memory_report
from humptygpt.optimizers import Optimizer, make_optimizer
from humptygpt.page import snapshots
from humptygpt.parallel import processes as distributed
from humptygpt.parallel.processes import LocalBatch, Processes
from humptygpt.run_folder import (
    Diverged,
    Meter,
    Progress,
    RunFolder,
    catch_signals,
)
from humptygpt.settings import TrainConfig, open_prepared, read_settings
from humptygpt.token_files import COMMAND, made_by, read_meta
from model import ModelConfig

MANY_EPOCHS = 5  # of fine-tuning
SMALL = 10e6  # bytes of snapshots that a run keeps without being asked


@dataclass
class Run:
    """What a run is made of. setup() puts it together."""

    config: TrainConfig
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    dataset: Dataset
    identity: dict  # of the data set, which takes a moment to compute
    batches: Dataset | Prefetcher
    model: nn.Module
    # the model, or the same compiled; weights are saved from the model itself
    net: nn.Module
    # the net, or the same in DDP: its backward pass sums gradients over ranks
    replica: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    clock: object | None  # a plan.Clock, of a run that ends with its minutes

    @property
    def task(self) -> tasks.Task:
        task = tasks.find_task(self.dataset.task)
        if self.processes.sharded:  # a whole model may not fit onto a card
            return dataclasses.replace(task, evaluation_examples=None, final_examples=None)
        return task

    @property
    def is_over(self) -> bool:
        stops_early = 0 < self.config.early_stopping <= self.progress.evals_since_best
        return stops_early or self.progress.position >= self.config.max_iters

    @property
    def path(self) -> Path:
        """Where its latest checkpoint is, or will be."""
        return checkpoint.stored(Path(self.config.out_dir) / "ckpt.pt")

    def state(self) -> dict:
        """Return what ckpt.pt and best.pt have in common: see checkpoint.SCHEMA."""
        meta = self.dataset.meta
        data = {key: meta[key] for key in ("source", "command") if key in meta}
        return {
            "train_config": asdict(self.config),
            "model_config": asdict(self.model.config),
            "tokenizer": self.dataset.tokenizer.state(),
            "task": self.dataset.task,
            "data": data | {"identity": self.identity},
            "progress": asdict(self.progress),
            "model": dict(self.model.state_dict()),
        }

    def latest_state(self) -> dict:
        """Return the entries of ckpt.pt."""
        scaler = self.scaler.state_dict() or None
        return self.state() | {"optimizer": self.optimizer.state_dict(), "scaler": scaler}

    def best_state(self) -> dict:
        """Return the entries of best.pt. LoRA is merged, so that it is a model as any other."""
        no_lora = asdict(dataclasses.replace(self.config, lora_rank=0))
        return self.state() | {"train_config": no_lora, "model": self.weights()}

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the model, or of the model that it is without LoRA."""
        if not self.config.lora_rank:
            return dict(self.model.state_dict())
        from humptygpt.finetune.lora import merged_state

        return merged_state(self.model)

    def load(self, saved: dict) -> None:
        """Take over the state of a checkpoint, whose weights the model has already. Raises UserError."""
        sharded = checkpoint.lacks_tensors(saved)
        if self.config.eval_only:  # without the optimizer's state, which takes memory
            if sharded:
                self.processes.load(self.path, self.state())
            return
        with refuse_other_code(self.path):
            self.optimizer.check_state(saved["optimizer"], "meta" if sharded else "cpu")
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        if sharded:
            self.optimizer.steps = saved["optimizer"]["steps"]
            self.optimizer.make_state()
            self.processes.load(self.path, self.latest_state())
        else:
            self.optimizer.load_state_dict(saved["optimizer"])


def main(argv: list[str]) -> int:
    with (
        ExitStack() as locks,
        distributed.silence_other_ranks(),
        machine.memory_advice(ADVICE),
    ):
        start = read_settings(argv, locks)
        if start.config.dry_run:
            print(dry_run(start.config, start.model_config))
            return 0
        run = setup(*start)
        fine_tunes = start.base is not None
        del start  # which would keep a checkpoint in memory
        print(summary(run), flush=True)
        if run.config.eval_only:
            print(evaluate_only(run))
            code = 0
        else:
            if fine_tunes:
                print(resume.trained_part(run.model), flush=True)
            code = fit(run, fine_tunes)
        run.processes.end()
        return code


def fit(run: Run, fine_tunes: bool) -> int:
    """Train, show what the model can do, and return the exit code."""
    out_dir = Path(run.config.out_dir)
    settings = asdict(run.config) | asdict(run.model.config)
    # what starts with _ is no setting, also if config.json is taken for a config file
    settings["_parameters"] = models.count_parameters(run.model)
    settings["_model.py"] = f"{zlib.crc32(Path(models.__file__).read_bytes()):08x}"
    folder = RunFolder(out_dir, settings, run.progress.iter, writes=run.processes.first)
    with closing(folder):
        if fine_tunes:
            row = evaluation.measures(run, run.net, run.config.evaluated_batches())
            folder.record(run.progress.stamp() | row)
            print(f"before the first step: {evaluation.evaluation_line(row)}", flush=True)
        try:
            stopped_by = train(run, folder)
        except Diverged as error:
            if run.processes.first:
                report_divergence(run, error)
            return 1
        end = "stopped" if stopped_by else "done"
        folder.record(run.progress.stamp() | {"end": end})
        folder.draw()  # a resumed run may have no step left, and its plot be missing
        if run.processes.first:
            if stopped_by:
                report_stop(run, stopped_by)
            else:
                finish(run, folder)
    return distributed.exit_code(stopped_by)


# --------------------------------------------------------------------------------------
# Setup


def setup(
    config: TrainConfig,
    model_config: ModelConfig,
    saved: dict | None = None,
    base: Loaded | None = None,
    given: Collection[str] = (),
) -> Run:
    """Put a run together. saved: the checkpoint that it resumes. base: the model that it starts from.

    given: the keys that a plan for minutes leaves as they are.
    """
    processes = distributed.start(
        config.backend, pick_device(config.device), config.parallel
    )
    device = processes.device
    dtype = pick_dtype(config.dtype, device)
    tune_malloc(processes.sharded)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    with processes.rank_zero_first():  # it may have to prepare them
        dataset = open_dataset(config, model_config)
    identity = dataset.identity()
    steps = {"iter": saved["progress"]["iter"]} if saved else {}
    processes.check_alike(asdict(config) | asdict(model_config) | identity | steps)
    micro_batches = config.gradient_accumulation_steps
    varies = tasks.find_task(dataset.task).batches_vary
    distributed.check_divisible(processes.size, micro_batches, config.batch_size, varies)
    if saved:
        resume.check_same_data(saved, dataset, config.out_dir)
    elif base:
        resume.check_same_tokens(base, dataset)
    else:
        model_config = for_vocabulary(model_config, dataset)
    clock = None
    if config.minutes:
        from humptygpt.minutes import plan

        earlier = saved["progress"].get("run_seconds", 0.0) if saved else 0.0
        clock = plan.Clock(machine.STARTED, config.minutes, earlier)
        # compiling takes about a minute, so here the user has to ask for it
        config = dataclasses.replace(config, compile=bool(config.compile))
    if clock and not saved:
        config, model_config = plan.choose(
            config, model_config, given, dataset, clock, device, dtype
        )
    elif not config.eval_only:
        check_training_fits(config, model_config, device, dtype, processes.size)
    processes.check_model(config, dtype)

    model = resume.make_model(config, model_config, processes, saved, base)
    processes.distribute(model, config.seed if not saved and not base else None)
    optimizer = make_optimizer(config, model, processes)
    batches = dataset
    if device.type == "cuda":
        batches = Prefetcher(dataset, processes.stride(micro_batches))
    run = Run(
        config=config,
        processes=processes,
        device=device,
        dtype=dtype,
        dataset=dataset,
        identity=identity,
        batches=batches,
        model=model,
        net=model,
        replica=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        progress=resumed_progress(config, saved) if saved else Progress(),
        clock=clock,
    )
    if clock:
        clock.at_the_end += evaluations_of_whole(run)
        clock.evaluation = evaluation_seconds(run)
    if saved:
        run.load(saved)
    if not config.eval_only:
        prepare_training(run, saved)
    return run


def prepare_training(run: Run, saved: dict | None) -> None:
    """Do what only training needs, and what takes its memory: gradients and compiled backward passes."""
    if saved:
        keep_best(run, saved)
    config = run.config
    if config.compile or (config.compile is None and run.device.type == "cuda"):
        run.net = compile_model(run)
    run.replica = run.processes.replicate(run.net)


def open_dataset(config: TrainConfig, model_config: ModelConfig) -> Dataset:
    """Open data/<dataset>, which is prepared now if it is missing, or if its preparation was stopped."""
    folder = Path("data") / config.dataset
    names = {path.name for path in folder.glob("*")}
    prepared = names & {"meta.json", "meta.pkl"}
    rank, _ = distributed.launched()
    if config.input and (rank == 0 or not prepared):
        prepare_input(config, folder)
    elif not prepared:
        import prepare_data  # here, since it is seldom needed

        stopped = "preparing" in names and config.dataset in prepare_data.SOURCES
        # a train.bin alone is taken for nanoGPT's; a command is left of a folder of ours
        if stopped or not names & {"preparing", "train.bin", COMMAND}:
            keys = {"name": config.dataset}
            prepare_data.prepare(configurator.make(prepare_data.PrepareConfig, keys))
    return open_prepared(folder, model_config, config.seed)


def prepare_input(config: TrainConfig, folder: Path) -> None:
    """Prepare the input in this folder, in the tokens of the model to start from, or as the folder's own command says.

    So the data stays as it is where the input does. Raises UserError where the folder is of another input.
    """
    import prepare_data

    keys = {"input": config.input}
    if config.init_from != "scratch":
        keys["tokenizer"] = config.init_from
    if command := made_by(folder):
        words = shlex.split(command)[2:]
        keys = configurator.read(words, prepare_data.PrepareConfig, positional="name")
        if Path(keys.get("input", "")).resolve() != Path(config.input).resolve():
            raise UserError(
                f"{folder} is not of input={config.input}, but made by: {command};"
                " take another name: --dataset=ANOTHER_NAME"
            )
    for key in ("text_key", "encoding_errors", "skip_bad_lines"):
        if (value := getattr(config, key)) is not None:
            keys[key] = value
    keys["name"] = config.dataset
    prepare_data.prepare(configurator.make(prepare_data.PrepareConfig, keys))


def for_vocabulary(model_config: ModelConfig, dataset: Dataset) -> ModelConfig:
    """Return the config of a new model for this data. Raises UserError."""
    tokens = dataset.tokenizer.vocab_size
    vocab_size = model_config.vocab_size or tokens
    if vocab_size < tokens:
        raise UserError(
            f"vocab_size={vocab_size} is below the {tokens} tokens of {dataset.folder.name}"
        )
    return dataclasses.replace(model_config, vocab_size=vocab_size)


def resumed_progress(config: TrainConfig, saved: dict) -> Progress:
    """Return the checkpoint's progress."""
    progress = dict(saved["progress"])
    steps = progress["iter"]
    before = configurator.restore(TrainConfig, saved["train_config"])
    position = float(steps)
    if config.minutes and before.minutes:
        position = progress.get("position", 0.0) * before.minutes / config.minutes
    if config.eval_only:
        return Progress(**progress | {"position": position})
    if position >= config.max_iters:
        note(f"all {steps} steps are done; for more: --max_iters=N")
    had = before.lr(progress.get("position", steps))
    lr = config.lr(position)
    if lr - had > 0.01 * config.learning_rate:
        note(
            f"the learning rate rises from {had:.1e} to {lr:.1e}, as its schedule now has it"
        )
    return Progress(**progress | {"position": position})


def keep_best(run: Run, saved: dict) -> None:
    """Evaluate best.pt again if the evaluation set has changed, so that only a better model replaces it."""
    before = configurator.restore(TrainConfig, saved["train_config"])

    def sequences(config: TrainConfig) -> int:
        whole = run.dataset.all_val_batches(config.batch_size)
        return min(config.evaluated_batches(), whole) * config.batch_size

    progress = run.progress
    if progress.best_val_loss == math.inf or sequences(run.config) == sequences(before):
        return
    best = load(run.config.out_dir).model
    run.processes.distribute(best)
    loss = evaluation.evaluate(run, best, run.config.evaluated_batches()).mean
    note(
        f"the evaluation set changed: on the new one, best.pt has {loss:.4f} instead of {progress.best_val_loss:.4f}"
    )
    progress.best_val_loss = loss


def compile_model(run: Run) -> nn.Module:
    """Compile the model and try it on two batches; where that fails, a note says why and the model itself trains.

    On what training and evaluation will give this rank: a part of a batch, perhaps, and a whole one.
    """
    print("compiling: this takes about a minute", flush=True)
    model = run.model
    size = run.config.batch_size
    micro_batches = run.config.gradient_accumulation_steps
    try:
        net = run.processes.compile(model, dynamic=run.task.batches_vary)
        for first in (0, micro_batches):
            whole = run.dataset.batch(first, size)
            parts = run.processes.local_batches(run.dataset, first, micro_batches, size)
            part = next(parts)
            part.seed_dropout(run.config.seed, model, run.device)
            with autocast(run.device, run.dtype):
                net(**to_device(part.batch, run.device))[1].backward()
                # now: evaluation leaves whole weights in place of a sharded model's parts
                model.zero_grad()
                with torch.no_grad():
                    model.eval()
                    net(**to_device(whole, run.device))
            model.train()
    except Exception as error:  # compilers fail in as many ways as there are machines
        if machine.is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        note(f"torch.compile fails here ({reason}); training uncompiled")
        for module in model.modules():
            vars(module).pop("forward", None)  # a compiled one
        net = model
    model.zero_grad()
    model.train()
    return net


def dry_run(config: TrainConfig, model_config: ModelConfig) -> str:
    """Return what training would take, found without data and without memory."""
    if model_config.vocab_size is None:
        meta = read_meta(Path("data") / config.dataset)
        vocab_size = tokenizers.from_state(meta["tokenizer"]).vocab_size
        model_config = dataclasses.replace(model_config, vocab_size=vocab_size)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    _, processes = distributed.launched()
    return memory_report(config, model_config, device, dtype, processes)


def summary(run: Run) -> str:
    """Return what is about to happen."""
    config = run.config
    dataset = run.dataset
    batch, evaluated = dataset.summary(config.batch_size, config.evaluated_batches())
    if config.gradient_accumulation_steps > 1:
        batch = f"{config.gradient_accumulation_steps} times {batch}"
    micro_batches = config.max_iters * config.gradient_accumulation_steps
    epochs = micro_batches / dataset.batches_per_epoch(config.batch_size)
    if config.init_from != "scratch" and epochs > MANY_EPOCHS:
        note(
            f"{epochs:.0f} epochs: a model that is fine-tuned on so little text soon memorises it"
        )
    start = "" if config.init_from == "scratch" else f", from {config.init_from}"
    about = f"about {config.max_iters:,}" if run.clock else f"{config.max_iters:,}"
    done = f"; {run.progress.iter:,} are done" if run.progress.iter else ""
    processes = f", {run.processes.size} processes" if run.processes.size > 1 else ""
    return (
        f"data: {dataset.meta['source']}, {len(dataset.train):,} tokens to train on,"
        f" vocabulary of {run.model.config.vocab_size:,}\n"
        f"model: {run.model.config.model}, {models.count_parameters(run.model):,} parameters{start}\n"
        f"steps: {about} of {batch}, {epochs:.1f} epochs{done}\n"
        f"evaluation: every {config.eval_interval:,} steps, on {evaluated}\n"
        f"device: {run.device}, {str(run.dtype).removeprefix('torch.')}{processes}"
        f"{choice(run) if run.clock else ''}"
    )


def choice(run: Run) -> str:
    """Return what --minutes has chosen, and whether the model can leave."""
    from humptygpt.convert.huggingface import find_family

    config = run.model.config
    try:
        export = f"as {find_family(config)}"
    except UserError as error:
        export = f"not of this model; {error}"
    return (
        f"\nminutes: {run.config.minutes:g}; chosen: {config.n_layer} layers of {config.n_embd} features,"
        f" a context of {config.block_size} tokens, dropout {config.dropout:g}; what is given is obeyed"
        f"\nexport: {export}"
    )


# --------------------------------------------------------------------------------------
# The loop


def train(run: Run, folder: RunFolder) -> int | None:
    """Train to the end, or to the signal whose number is returned. Raises Diverged."""
    config = run.config
    progress = run.progress
    meter = Meter(run)
    kept = snapshots.FILES if keeps_snapshots(run) else {}
    if run.clock:
        run.clock.leave_out(run.clock.evaluation)
    with catch_signals() as signals, progress_bar(run) as bar:
        while not run.is_over:
            # here, so that a run that was killed just after a checkpoint has this one, too
            if name := kept.get(progress.iter):
                on_whole_model(run, partial(save_snapshot, run, folder.path / name))
            before = progress.position
            lr = config.lr(before)
            run.optimizer.set_lr(lr / config.learning_rate)
            loss, grad_norm, tokens = train_step(run, progress.iter)
            progress.iter += 1
            progress.tokens += tokens
            meter.add(loss, grad_norm)
            after = run.clock.advance(before, config) if run.clock else before + 1
            progress.position = after
            bar.update(after - before)

            last = after >= config.max_iters
            interval = config.eval_interval
            due = last or before // interval < after // interval
            log = last or progress.iter % config.log_interval == 0
            # a signal that comes later waits for the next step
            stop = run.processes.agree(signals)
            if not (log or due or stop):
                continue
            meter.read()
            if log:
                row = meter.row(lr)
                folder.record(row)
                report(bar, row, run)
            improved = due and evaluate_and_record(run, folder, bar)
            if stop or (due and (run.is_over or improved or config.always_save_checkpoint)):
                if run.clock:
                    progress.run_seconds = run.clock.seconds()
                run.processes.save(folder.path / "ckpt.pt", run.latest_state())
                folder.remove_overwritten()
            if stop:
                return stop
            if due and not run.is_over:
                folder.draw()
                meter.restart_clock()
                if run.clock:
                    run.clock.leave_out(meter.evaluation)
    return None


def save_snapshot(run: Run, path: Path, model: nn.Module, _: Dataset) -> None:
    snapshots.save(path, run.weights() if model is run.model else model.state_dict())


def train_step(run: Run, it: int) -> tuple[Tensor, Tensor, int]:
    """Take step number it, the first being 0: the gradients of a few micro-batches, then an optimizer step.

    Several processes divide the micro-batches, sum gradients over ranks once, and take the same step.
    Returns the mean loss before the step and the gradient norm before clipping, both still on the device, since reading
    them would make the CPU wait for the GPU, and how many tokens the loss is the mean of.
    """
    config = run.config
    processes = run.processes
    micro_batches = config.gradient_accumulation_steps
    first = it * micro_batches
    parts = [*processes.local_batches(run.batches, first, micro_batches, config.batch_size)]
    tokens = sum(part.tokens for part in parts)
    # all ranks have as many tokens of text, so there is no need to wait for each other; sharded, this notices
    # in one line that a rank has died, before the forward pass does
    if run.task.batches_vary or processes.sharded:
        tokens = processes.sum(tokens)
    else:
        tokens *= processes.size
    mean_loss = torch.zeros((), device=run.device)
    for part in parts:
        if run.model.config.dropout:
            part.seed_dropout(config.seed, run.model, run.device)
        with processes.sync_gradients(run.replica, last=part is parts[-1]):
            loss = part_loss(run, part, tokens)
            try:
                processes.backward(run.scaler.scale(loss))
            except RuntimeError as error:
                if processes.size == 1 and not machine.is_out_of_memory(error):
                    # once more, so that torch names the line of the forward pass
                    with torch.autograd.detect_anomaly(check_nan=False):
                        part_loss(run, part, tokens).backward()
                raise
        mean_loss += loss.detach()
    processes.all_reduce(mean_loss)
    run.scaler.unscale_(run.optimizer)
    largest = config.grad_clip or math.inf
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), largest)
    if processes.sharded:
        grad_norm = grad_norm.full_tensor()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.model.zero_grad()
    return mean_loss, grad_norm, tokens


def part_loss(run: Run, part: LocalBatch, tokens: int) -> Tensor:
    """Compute what a part of a step contributes to its mean loss over so many tokens."""
    with autocast(run.device, run.dtype):
        _, loss = run.replica(**to_device(part.batch, run.device))
        return loss * (part.tokens / tokens)


def evaluate_and_record(run: Run, folder: RunFolder, bar: tqdm) -> bool:
    """Evaluate, save best.pt if the loss is the lowest so far, and return whether it is. Raises Diverged."""
    row = evaluation.measures(run, run.net, run.config.evaluated_batches())
    improved = run.progress.record(row["val_loss"])
    folder.record(run.progress.stamp() | row)
    best = ", the best so far" if improved else ""
    write_line(bar, f"iter {run.progress.iter}: {evaluation.evaluation_line(row)}{best}")
    if examples := on_whole_model(run, run.task.evaluation_examples):
        write_line(bar, examples)
    if improved:
        run.processes.save(folder.path / "best.pt", run.best_state())
        if run.config.lora_rank and run.processes.first:
            from humptygpt.convert.adapters import write_adapter

            write_adapter(run.model, run.config, folder.path / "adapter")
    return improved


def keeps_snapshots(run: Run) -> bool:
    """Return what the config says; where it leaves that open, whether all snapshots together are small."""
    steps = sum(step < run.config.max_iters for step in snapshots.FILES)
    small = steps * models.count_parameters(run.model) < SMALL
    return small if run.config.snapshots is None else run.config.snapshots


def evaluate_only(run: Run) -> str:
    row = evaluation.measures(run, run.net, run.config.eval_iters)
    text = f"{evaluation.evaluation_line(row)} at iter {run.progress.iter}"
    score = on_whole_model(run, run.task.score)
    return f"{text}\n{score.text}" if score else text


def on_whole_model(run: Run, show):
    """Return show(model, dataset), a function of a task, in the first process; None in the others, and without show."""
    if show is None:
        return None
    model = run.processes.whole_model(run.model)
    if not run.processes.first:
        return None
    device = next(model.parameters()).device
    model.eval()
    with autocast(device, sample_dtype(run.config.dtype, device)):
        result = show(model, run.dataset)
    model.train()
    return result


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.config.max_iters,
        initial=run.progress.position,
        unit="step",
        dynamic_ncols=True,
        disable=None if run.processes.first else True,
    )


def report(bar: tqdm, row: dict, run: Run) -> None:
    """Show the numbers in the bar on a terminal, and in a line elsewhere."""
    progress = run.progress
    norm = "inf" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    text = (
        f"loss {row['train_loss']:.4f}, lr {row['lr']:.2e}, gradient norm {norm},"
        f" {row['tokens_per_second']:,} tokens/s"
    )
    if not bar.disable:
        bar.set_postfix_str(text)
        return
    steps = run.config.max_iters
    if run.clock:
        of = f" ({progress.position / steps:.0%})"
        left = run.clock.end - monotonic()
    else:
        of = f"/{steps}"
        left = (steps - progress.iter) * progress.seconds / progress.iter
    write_line(bar, f"iter {progress.iter}{of}: {text}, {left:.0f} s of training left")


def write_line(bar: tqdm, line: str) -> None:
    """Print a line above the bar. A closed terminal or pipe does not end the training."""
    try:
        bar.write(line)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115, open to the end


# --------------------------------------------------------------------------------------
# The end


def finish(run: Run, folder: RunFolder) -> None:
    """Show what the best model can do, and say what to do next."""
    progress = run.progress
    if run.clock:
        from humptygpt.minutes import plan

        path = folder.path / "plan.py"
        plan.write_plan(path, run)
        print(f"{path} is a config file that repeats this, step by step")
        print(advice(run))
    if progress.position < run.config.max_iters:
        print(f"stopped early: the validation loss was lowest at iter {progress.best_iter}")
    if run.task.final_examples or run.task.score or evaluations_of_whole(run):
        show_best(run, folder)
    command = as_written_here(run.task.sample_command.format(out_dir_key(run)))
    print(f"{run.task.sample_label}: {command}")
    if progress.best_val_loss < math.inf:
        print(f"best val loss {progress.best_val_loss:.4f} at iter {progress.best_iter}")
    start = next((row.get("val_loss", 0) for row in folder.rows if not row["iter"]), 0)
    if 0 < start < progress.best_val_loss:
        print(f"the model that it started from was better: val loss {start:.4f}")


def show_best(run: Run, folder: RunFolder) -> None:
    """Evaluate best.pt on the whole validation split, print its text, and score its translations."""
    # one that is trained in shards may not fit onto a card
    device = torch.device("cpu") if run.processes.sharded else run.device
    model = load(folder.path).model.to(device)
    stamp = run.progress.stamp()
    if evaluations_of_whole(run):
        row = evaluation.measures(run, model, None)
        print(f"the whole validation split: {evaluation.evaluation_line(row)}")
        row["iter"] = run.progress.best_iter
        folder.record(stamp | {f"whole_{key}": value for key, value in row.items()})
    with autocast(device, sample_dtype(run.config.dtype, device)):
        if run.task.final_examples:
            print(run.task.final_examples(model, run.dataset))
        if run.task.score:
            score = run.task.score(model, run.dataset)
            folder.record(stamp | score.metrics)
            print(score.text)


def advice(run: Run) -> str:
    """Return what would help most, by the law that chose."""
    from humptygpt.minutes import plan

    bytes_per_token = run.dataset.val_bytes_per_token()
    parameters, *_ = plan.cost(run.model)
    text = len(run.dataset.train) * bytes_per_token
    return plan.advice(parameters, run.progress.tokens * bytes_per_token, text)


def evaluations_of_whole(run: Run) -> float:
    """Return how many evaluations the whole validation split is worth; 0 where the run does not end with it.

    It does where evaluations have seen a part of it, and all of it takes less than a twentieth of the training.
    """
    config = run.config
    if config.eval_iters or run.processes.size > 1:
        return 0
    batches = run.dataset.all_val_batches(config.batch_size)
    steps = config.max_iters * config.gradient_accumulation_steps
    more = batches / config.evaluated_batches()
    return more if more > 1 and batches / 3 < steps / 20 else 0


def evaluation_seconds(run: Run) -> float:
    """Estimate the time of an evaluation, in which a batch takes a third of the time that it takes in training."""
    config = run.config
    step = run.clock.step or run.progress.seconds / run.progress.iter
    rows = len(run.dataset.val_starts(config.batch_size, config.evaluated_batches()))
    return step * rows / config.batch_size / config.gradient_accumulation_steps / 3


def report_stop(run: Run, number: int) -> None:
    command = as_written_here(f"python train.py --init_from=resume {out_dir_key(run)}")
    saved = f"saved {run.path} at iter {run.progress.iter}"
    line = f"{signal.Signals(number).name}: {saved}; resume: {command}"
    with suppress(OSError):  # the reader of our messages may have got the signal, too
        print(line, file=sys.stderr)


def report_divergence(run: Run, error: Diverged) -> None:
    kept = "nothing was saved yet"
    if run.path.exists():
        kept = f"{run.path} is the last good checkpoint"
    advice = "Try a lower --learning_rate, more --warmup_iters, --grad_clip=1.0 or --dtype=float32"
    print(f"train.py: the {error}; {kept}. {advice}", file=sys.stderr)


def out_dir_key(run: Run) -> str:
    """Return the argument as it can be pasted into a command."""
    return f"--out_dir={shlex.quote(run.config.out_dir)}"


if __name__ == "__main__":
    machine.run(main)
