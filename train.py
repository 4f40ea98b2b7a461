"""Train a model. Config files and --key=value arguments are applied from left to right.

    python train.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py --n_layer=6 --out_dir=out/deeper
    python train.py --init_from=resume --out_dir=out/deeper --max_iters=4000
    python train.py --input=FILE_OR_FOLDER --minutes=10                          train on your own text for ten minutes
    python train.py --init_from=out/deeper --dataset=mine --out_dir=out/mine     a new run that starts from that model
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

Files written to out_dir: ckpt.pt (everything needed to resume), best.pt (the best model so far), metrics.jsonl,
loss.png, config.json (a config file that repeats the run) and command.txt. A small model also gets snapshots/ for
explain.py. Ctrl-C saves a checkpoint and stops.
Keys that are not set have the defaults below: a GPT-2 of a laptop's size without biases, with AdamW. --minutes plans
with the recipe of config/shakespeare_char.py.
"""

import signal
from collections.abc import Callable
from contextlib import ExitStack, closing

from humptygpt import machine

if __name__ == "__main__":
    machine.start()  # before numpy and torch are loaded

import torch
from torch import Tensor, nn
from tqdm import tqdm

from humptygpt.data.open import open_data, prepare_missing
from humptygpt.device import autocast
from humptygpt.formats.checkpoint import is_edited
from humptygpt.formats.load import load, load_tokenizer
from humptygpt.machine import launched
from humptygpt.models.build import is_finite
from humptygpt.page.snapshots import take_snapshot
from humptygpt.training import evaluation, report
from humptygpt.training.memory import ADVICE, check_training_fits, dry_run, limited_memory
from humptygpt.training.optimizers import set_lr
from humptygpt.training.resume import resumed_progress
from humptygpt.training.run import (
    Clock,
    Diverged,
    Meter,
    Progress,
    Run,
    RunFolder,
    catch_signals,
)
from humptygpt.training.setup import (
    assemble,
    fit_to_data,
    make_model,
    start_ranks,
    tune,
)
from humptygpt.training.start import Start, read_settings
from humptygpt.training.step import train_step

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
        with run.ranks:
            print(report.summary(run), flush=True)
            if run.config.minutes:
                from humptygpt.training import minutes as plan

                print(plan.choice(run), flush=True)
            if run.config.eval_only:
                print(evaluate_only(run))
                return 0
            with limited_memory(run):
                return run.ranks.each(fit, run)


# --------------------------------------------------------------------------------------
# Setup


def setup(start: Start) -> Run:
    """Put the run together that a command has asked for."""
    config, model_config, saved, base, given, overwrite = start
    ranks = start_ranks(config, lambda: prepare_missing(config, load_tokenizer, overwrite))
    config = tune(config, ranks)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    dataset = open_data(config.dataset, model_config, config.seed)
    model_config = fit_to_data(start, dataset)
    progress = resumed_progress(config, saved, dataset) if saved else Progress()
    clock = Clock(progress, config.minutes)
    if config.minutes:
        from humptygpt.training import minutes as plan

        config, model_config = plan.begin(config, model_config, given, dataset, clock, ranks.device)
    elif not config.eval_only:
        check_training_fits(config, model_config, ranks.device, ranks.size)
    model = make_model(config, model_config, saved, base, ranks.first, dataset.tokenizer)
    if is_edited():
        from humptygpt.models.checks import check_model

        check_model(model)
    return assemble(config, dataset, model, ranks, clock, METRICS, saved)


# --------------------------------------------------------------------------------------
# Training


def fit(run: Run) -> int:
    """Train, then show what the best model can do. Returns the exit code."""
    config = run.config
    folder = RunFolder(run)
    with closing(folder):
        if config.init_from != "scratch" and not run.progress.iter:
            print(report.trained_part(run), flush=True)
            row = evaluation.measures(run, run.net, config.evaluated_batches())
            folder.record(run.progress.stamp("eval") | row)
            print(f"before the first step: {evaluation.evaluation_line(row)}", flush=True)
        try:
            stopped_by = train(run, folder)
        except Diverged as error:
            if run.ranks.first:
                folder.end(run, "diverged")
                report.diverged(folder, error)
            return 1
        folder.draw(run)  # a resumed run may have no steps left and no plot yet
        folder.end(run, "interrupted" if stopped_by else finish(run, folder))
    if stopped_by:
        if run.ranks.first:
            report.stopped(run, stopped_by)
        return 128 + stopped_by
    return 0


def train(run: Run, folder: RunFolder) -> int | None:
    """Train to the end or until a signal arrives. Returns the signal's number or None. Raises Diverged."""
    config, progress, clock = run.config, run.progress, run.clock
    meter = Meter(run)
    clock.start(1 + evaluation.cost_of_whole_split(run))
    due = False
    with catch_signals() as signals, report.progress_bar(run) as bar:
        while not run.is_over:
            take_snapshot(run)
            if not due:  # an evaluation shows what the model writes
                write_line(run, meter, bar)
            lr = config.lr(progress.position)
            set_lr(run.optimizer, lr / config.learning_rate)
            before = weights_for_metrics(run)
            losses, grad_norm, tokens = train_step(run)
            # a signal that arrives after this line is handled in the next step
            due, stop = run.advance(tokens, signals)
            losses |= compute_metrics(run, before)
            run.model.zero_grad()
            meter.add(losses, grad_norm)
            bar.update(progress.position - bar.n)
            log = run.is_last or progress.iter % config.log_interval == 0
            if not (log or due or stop):
                continue
            meter.read()
            if log:
                row = meter.row(lr)
                folder.record(row)
                report.show_step(bar, run, row)
            improved = due and evaluate(run, folder, bar)
            if stop or (due and (run.is_over or improved or config.always_save_checkpoint)):
                progress.run_seconds = clock.total()
                run.ranks.save(folder.path / "ckpt.pt", run.latest_state())
            if stop:
                return (signals or [signal.SIGTERM])[0]
            if due and not run.is_over:
                folder.draw(run)
                clock.evaluation = clock.leave_out()
    return None


def write_line(run: Run, meter: Meter, bar: tqdm) -> None:
    """Show what the model writes after 0, 25, 50, 100, 200 steps and so on.

    All lines together take at most 1 % of the run's time. The first is always written, because nobody knows beforehand
    how long it takes. Raises Diverged.
    """
    progress, clock = run.progress, run.clock
    if progress.iter not in LINES:
        return
    meter.read()
    write = run.task.evaluation_examples
    if write and not is_finite(run.model):
        raise Diverged(f"model has weights that are not finite at iter {progress.iter}")
    if not write or not run.ranks.first:
        return
    taken = clock.line_seconds
    if taken:
        whole = progress.seconds + clock.left(run.config)
        if sum(taken) + taken[-1] > whole / 100:
            return
    report.show_line(bar, f"iter {progress.iter}:{show(run, write, run.model, 1)}")
    taken.append(clock.leave_out())


def weights_for_metrics(run: Run) -> dict[str, Tensor]:
    """Copy the weights before a step whose METRICS are due, {name: weight}. Before other steps, return nothing."""
    due = (run.progress.iter + 1) % run.config.log_interval == 0
    if not (run.metrics and run.ranks.first and due):
        return {}
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def compute_metrics(run: Run, before: dict[str, Tensor]) -> dict[str, object]:
    """Compute METRICS after a step. before: from weights_for_metrics(), which says whether they are due."""
    metrics = run.metrics if before else {}
    with torch.no_grad():
        return {name: metric(run, before) for name, metric in metrics.items()}


def evaluate(run: Run, folder: RunFolder, bar: tqdm) -> bool:
    """Evaluate, and save best.pt if the model is the best so far. Returns True if it is. Raises Diverged."""
    row = evaluation.measures(run, run.net, run.config.evaluated_batches())
    if (count_right := run.task.count_right) and not run.dataset.trains_on_all:
        answered = show(run, count_right, run.model) if run.ranks.first else 0
        row["val_answered"] = int(run.ranks.sum(torch.tensor([answered])))
    answered = row.get("val_answered", 0)
    improved = run.progress.record(row["val_loss"], answered, run.dataset.trains_on_all)
    folder.record(run.progress.stamp("eval") | row)
    best = f", {answered} questions answered" if answered else ""
    best += ", the best so far" if improved else ""
    report.show_line(bar, f"iter {run.progress.iter}: {evaluation.evaluation_line(row)}{best}")
    if run.task.evaluation_examples and run.ranks.first:
        report.show_line(bar, show(run, run.task.evaluation_examples, run.model))
    if improved:
        run.ranks.save(folder.path / "best.pt", run.best_state())
    return improved


# --------------------------------------------------------------------------------------
# End of training


def finish(run: Run, folder: RunFolder) -> str:
    """Show what the best model can do, and say what to do next. Returns how the run ended."""
    progress = run.progress
    early = progress.position < run.config.max_iters
    if run.ranks.first:
        folder.write_settings(run)
    if early:
        print(f"stopped early: the best model is that of iter {progress.best_iter}")
    show_best(run, folder)
    print(report.closing(run, folder.rows))
    return "stopped early" if early else "finished"


def show_best(run: Run, folder: RunFolder) -> None:
    """Evaluate the best model on the whole validation split, print a sample, and score its translations."""
    task, whole = run.task, evaluation.cost_of_whole_split(run)
    model, net = run.model, run.net
    if run.ranks.sharded or run.progress.best_iter < run.progress.iter:
        if not run.ranks.first or not (task.final_examples or task.score or whole):
            return
        model = net = load(folder.path).model
        model.has_cache = run.model.has_cache
        model.to(run.ranks.sampling_device)
    if whole:
        row = evaluation.measures(run, net, None)
        print(f"the whole validation split: {evaluation.evaluation_line(row)}")
        row["best_iter"] = run.progress.best_iter
        folder.record(run.progress.stamp("whole") | row)
    if not run.ranks.first:
        return
    if task.final_examples:
        print(show(run, task.final_examples, model))
    if task.score:
        text, metrics = show(run, task.score, model)
        folder.record(run.progress.stamp("test") | metrics)
        print(text)


def evaluate_only(run: Run) -> str:
    row = evaluation.measures(run, run.net, run.config.eval_iters)
    text = f"{evaluation.evaluation_line(row)} at iter {run.progress.iter}"
    if run.task.score and run.ranks.size == 1:
        text += "\n" + show(run, run.task.score, run.model)[0]
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
