"""Train a model. Config files and --key=value arguments are applied from left to right.

    python train.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py --n_layer=6 --out_dir=out/deeper
    python train.py --init_from=resume --out_dir=out/deeper --max_iters=4000
    python train.py --input=FILE_OR_FOLDER --minutes=10                          train on your own text for ten minutes
    python train.py --init_from=out/deeper --dataset=mine --out_dir=out/mine     a new run that starts from that model
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

Files written to out_dir: ckpt.pt (everything needed to resume), best.pt (the model with the lowest validation loss),
metrics.jsonl, loss.png, config.json (which also works as a config file) and command.txt. A small model also gets
snapshots/ for explain.py, and a run with --minutes gets plan.py, a config file that repeats it.
Ctrl-C saves a checkpoint and stops.
Keys that are not set have the defaults below: a GPT-2 of a laptop's size without biases, with AdamW. --minutes plans
with the recipe of config/shakespeare_char.py. --input without a config file, --minutes and --max_iters takes
--minutes=3.
"""

import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import torch
from torch import Tensor, nn
from tqdm import tqdm

from humptygpt import evaluation, report
from humptygpt.checks import check_model
from humptygpt.device import DTYPES, autocast, to_device
from humptygpt.loading import is_finite, load
from humptygpt.optimizers import make_optimizer, set_lr
from humptygpt.process import launched, part_of, start_process, tune
from humptygpt.report import ADVICE, check_training_fits
from humptygpt.run import (
    Diverged,
    Meter,
    Progress,
    Run,
    RunFolder,
    StepClock,
    catch_signals,
    take_snapshot,
)
from humptygpt.setup import (
    Start,
    dry_run,
    fit_to_data,
    make_model,
    make_net,
    open_prepared,
    prepare_missing,
    read_settings,
    recorded_settings,
    resumed_progress,
    start_workers,
)
from humptygpt.tasks import losses_of, with_progress
from humptygpt.workers import set_seeds

# {name: function}: your own metrics, for metrics.jsonl and loss.png. Every log_interval steps, each is called after the
# update as function(run, before), while the gradients are there. before: {name: weight before the update}
METRICS = {}
# numbers of steps after which the model writes a line
LINES = {0, *(25 * 2**doublings for doublings in range(40))}


def main(argv: list[str]) -> int:
    if launched()[0]:  # of several processes, the first prints
        machine.discard_output()
    with ExitStack() as locks, machine.memory_advice(ADVICE):
        start = read_settings(argv, locks)
        if start.config.dry_run:
            print(dry_run(start.config, start.model_config))
            return 0
        run = setup(start)
        del start  # free the checkpoint's memory
        with run.process:
            print(report.summary(run), flush=True)
            if run.config.minutes:
                from humptygpt.minutes import plan

                print(plan.choice(run), flush=True)
            if run.config.eval_only:
                print(evaluate_only(run))
                return 0
            return fit(run)


# --------------------------------------------------------------------------------------
# Setup


def setup(start: Start) -> Run:
    """Assemble a run."""
    config, model_config, saved, base, given = start
    process = start_process(config, lambda: prepare_missing(config))
    device = process.device
    config = tune(config, process)
    dtype = DTYPES[config.dtype]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    dataset = open_prepared(config, model_config)
    model_config = fit_to_data(start, dataset)
    clock = StepClock()
    if config.minutes:
        from humptygpt.minutes import plan

        config, model_config, clock = plan.begin(
            config,
            model_config,
            given,
            saved,
            dataset,
            device,
            step=(train_step, compute_gradients),
        )
    elif not config.eval_only:
        check_training_fits(config, model_config, device, process.size)

    model = make_model(config, model_config, saved, base, process.first, dataset.tokenizer)
    check_model(model)
    run = Run(
        config=config,
        process=process,
        device=device,
        dtype=dtype,
        dataset=dataset,
        model=model,
        net=model,
        progress=resumed_progress(config, saved, dataset) if saved else Progress(),
        metrics=METRICS,
        clock=clock,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    process.place(model, run)
    run.optimizer = make_optimizer(config, model, process.spread)
    # an evaluation uses the plain model and no optimizer, to save memory
    if saved and not config.eval_only:
        run.restore(saved)
    if not config.eval_only:
        run.net = make_net(run)
        start_workers(run, compute_gradients)
    return run


# --------------------------------------------------------------------------------------
# Training


def fit(run: Run) -> int:
    """Train, then show what the best model can do. Returns the exit code."""
    config = run.config
    folder = RunFolder(run, recorded_settings(run))
    with closing(folder):
        if config.init_from != "scratch" and not run.progress.iter:
            print(report.trained_part(run), flush=True)
            row = evaluation.measures(run, run.net, config.evaluated_batches())
            folder.record(run.progress.stamp() | row)
            print(f"before the first step: {evaluation.evaluation_line(row)}", flush=True)
        try:
            stopped_by = train(run, folder)
        except Diverged as error:
            if run.process.first:
                folder.end(run, "diverged")
                report.diverged(folder, error)
            return 1
        folder.draw(run)  # a resumed run may have no steps left and no plot yet
        if run.process.first:
            folder.end(run, "interrupted" if stopped_by else finish(run, folder))
    if run.process.first and stopped_by:
        report.stopped(run, stopped_by)
    return 128 + stopped_by if stopped_by else 0


def train(run: Run, folder: RunFolder) -> int | None:
    """Train to the end or until a signal arrives. Returns the signal's number or None. Raises Diverged."""
    config = run.config
    progress = run.progress
    meter = Meter(run)
    run.clock.start(run)
    due = False
    with catch_signals() as signals, report.progress_bar(run) as bar:
        while not run.is_over:
            take_snapshot(run)
            if not due:  # an evaluation shows what the model writes
                write_line(run, meter, bar)
            before = progress.position
            lr = config.lr(before)
            set_lr(run.optimizer, lr / config.learning_rate)
            losses, grad_norm, tokens = train_step(run, progress.iter)
            due = run.advance(tokens)
            meter.add(losses, grad_norm)
            bar.update(progress.position - before)
            log = run.is_last or progress.iter % config.log_interval == 0
            # a signal that arrives after this line is handled in the next step
            stop = bool(run.process.sum(torch.tensor(len(signals))))
            if not (log or due or stop):
                continue
            meter.read()
            if log:
                row = meter.row(lr)
                folder.record(row)
                report.step(bar, run, row)
            improved = due and evaluate(run, folder, bar)
            if stop or (due and (run.is_over or improved or config.always_save_checkpoint)):
                progress.run_seconds = run.clock.seconds()
                run.process.save(folder.path / "ckpt.pt", run.latest_state())
            if stop:
                return (signals or [signal.SIGTERM])[0]
            if due and not run.is_over:
                folder.draw(run)
                run.clock.leave_out(meter.leave_out())
    return None


def write_line(run: Run, meter: Meter, bar: tqdm) -> None:
    """Show what the model writes after 0, 25, 50, 100, 200 steps and so on.

    All lines together take at most 1 % of the run's time. The first is always written, because nobody knows beforehand
    how long it takes. Raises Diverged.
    """
    progress = run.progress
    if progress.iter not in LINES:
        return
    meter.read()
    write = run.task.evaluation_examples
    if write and not is_finite(run.model):
        raise Diverged(f"model has weights that are not finite at iter {progress.iter}")
    if not write or not run.process.first:
        return
    taken = meter.lines
    if taken:
        whole = progress.seconds + run.clock.time_left(run)
        if sum(taken) + taken[-1] > whole / 100:
            return
    report.line(bar, f"iter {progress.iter}:{show(run, write, run.model, 1)}")
    taken.append(meter.leave_out())
    run.clock.leave_out_line(taken[-1])


def train_step(run: Run, step: int) -> tuple[dict[str, Tensor], Tensor, int]:
    """Take one optimizer step. step: its index, from 0.

    Workers or, with torchrun, processes take parts of the gradients, which are summed once, and of Muon's update.
    Returns the mean losses before the step, with METRICS if they are due, the gradient norm before clipping and the
    number of tokens. Tensors stay on the device, because reading them would make the CPU wait for the GPU.
    """
    process = run.process
    task = "gradients", step, run.progress.position / run.config.max_iters
    try:
        parts, (tokens, *_) = zip(*process.workers.each(*task), strict=True)
    except RuntimeError as error:
        if process.size == 1 and not machine.is_out_of_memory(error):
            # repeat the computation, so that torch shows which line of the forward pass is to blame
            with suppress(RuntimeError), torch.autograd.detect_anomaly(check_nan=False):
                compute_gradients(run, 0, *task[1:])
        raise
    losses = {key: process.sum(sum(part[key] for part in parts)) for key in parts[0]}
    process.workers.sum_gradients()
    run.scaler.unscale_(run.optimizer)
    grad_norm = process.gather(clip(run.model, run.config.grad_clip))
    metrics = {} if (step + 1) % run.config.log_interval else run.metrics
    weights = run.model.named_parameters() if metrics else ()
    before = {key: p.detach().clone() for key, p in weights}
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        losses |= {key: metric(run, before) for key, metric in metrics.items()}
    run.model.zero_grad()
    return losses, grad_norm, tokens


def compute_gradients(
    run: Run, worker: int, step: int, progress: float
) -> tuple[dict[str, Tensor], int]:
    """Add up a worker's gradients over the micro-batches of a step.

    progress: that of the run, from 0 to 1. Returns its part of the mean losses of the step: train_loss, and the terms
    that the model adds to it under names of its own; and the number of tokens in the whole step.
    """
    process = run.process
    shares, tokens = process.shares(run, step)
    means = defaultdict(float)
    for share in shares:
        rows = part_of(share, worker, process.workers.count)
        set_seeds(run.model, rows.seeds)
        with process.syncing(run.net, last=share is shares[-1]):
            with autocast(run.device, run.dtype):
                batch = with_progress(run.model, rows.batch, progress)
                losses = losses_of(run.net(**to_device(batch, run.device)))
                # without targets, the mean is nan
                losses = {
                    key: x * (rows.tokens / tokens) if rows.tokens else x.nan_to_num() * 0
                    for key, x in losses.items()
                }
            # DDP and FSDP average gradients over processes; this factor turns the average into a sum
            run.scaler.scale(sum(losses.values()) * process.size).backward()
        for key, x in losses.items():
            means[key] += x.detach()
    return dict(means), tokens


def clip(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients down so that their norm is at most `largest`, unless that is 0. Returns the norm before."""
    norm = nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    if largest:
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm


def evaluate(run: Run, folder: RunFolder, bar: tqdm) -> bool:
    """Evaluate, and save best.pt if the loss is the lowest so far. Returns True if it is. Raises Diverged."""
    row = evaluation.measures(run, run.net, run.config.evaluated_batches())
    improved = run.progress.record(row["val_loss"])
    folder.record(run.progress.stamp() | row)
    best = ", the best so far" if improved else ""
    report.line(bar, f"iter {run.progress.iter}: {evaluation.evaluation_line(row)}{best}")
    if run.task.evaluation_examples and run.process.first:
        report.line(bar, show(run, run.task.evaluation_examples, run.model))
    if improved:
        run.process.save(folder.path / "best.pt", run.best_state())
    return improved


# --------------------------------------------------------------------------------------
# End of training


def finish(run: Run, folder: RunFolder) -> str:
    """Show what the best model can do, and say what to do next. Returns how the run ended."""
    progress = run.progress
    early = progress.position < run.config.max_iters
    if run.config.minutes:
        from humptygpt.minutes import plan

        print(plan.closing(run, folder.path))
    if early:
        print(f"stopped early: the validation loss was lowest at iter {progress.best_iter}")
    if run.task.final_examples or run.task.score or evaluation.cost_of_whole_split(run):
        show_best(run, folder)
    print(report.closing(run, folder.rows))
    return "stopped early" if early else "finished"


def show_best(run: Run, folder: RunFolder) -> None:
    """Evaluate the best model on the whole validation split, print a sample, and score its translations."""
    model = run.model
    if run.process.sharded or run.progress.best_iter < run.progress.iter:
        model = load(folder.path).model
        model.has_cache = run.model.has_cache
        model.to(run.process.sampling_device)
    stamp = run.progress.stamp()
    if evaluation.cost_of_whole_split(run):
        row = evaluation.measures(run, model, None)
        print(f"the whole validation split: {evaluation.evaluation_line(row)}")
        row["iter"] = run.progress.best_iter
        folder.record(stamp | {f"whole_{key}": value for key, value in row.items()})
    if run.task.final_examples:
        print(show(run, run.task.final_examples, model))
    if run.task.score:
        score = show(run, run.task.score, model)
        folder.record(stamp | score.metrics)
        print(score.text)


def evaluate_only(run: Run) -> str:
    row = evaluation.measures(run, run.net, run.config.eval_iters)
    text = f"{evaluation.evaluation_line(row)} at iter {run.progress.iter}"
    if run.task.score and run.process.size == 1:
        text += "\n" + show(run, run.task.score, run.model).text
    return text


def show(run: Run, function: Callable, model: nn.Module, *options: object):
    """Call one of the task's functions with the model in evaluation mode, and return the result."""
    device = next(model.parameters()).device
    model.eval()
    # on a CPU, memory is the bottleneck of generation, not arithmetic
    dtype = torch.float32 if device.type == "cpu" else run.dtype
    with autocast(device, dtype):
        result = function(model, run.dataset, *options)
    model.train()
    return result


if __name__ == "__main__":
    machine.run(main)
