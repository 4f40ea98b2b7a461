"""Resume a run: what may change, what must be the same, and how far it is."""

import math
from dataclasses import asdict
from pathlib import Path

from humptygpt import cli
from humptygpt.cli import UserError, note
from humptygpt.data.dataset import Dataset
from humptygpt.files import refuse_damaged
from humptygpt.formats import checkpoint
from humptygpt.formats.checkpoint import note_edits
from humptygpt.machine import GIVEN
from humptygpt.tokenizers.saved import from_state
from humptygpt.training.run import Progress
from humptygpt.training.settings import MAY_CHANGE, STEP, TrainConfig


def read_run(path: Path) -> dict:
    """Read a checkpoint. Of its entries, train_config is made a TrainConfig and progress a Progress."""
    saved = checkpoint.read(path)
    with refuse_damaged(path):
        saved["train_config"] = cli.restore(TrainConfig, saved["train_config"])
        saved["progress"] = cli.restore(Progress, saved["progress"])
    return saved


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


def check_same_data(saved: dict, dataset: Dataset, out_dir: str) -> None:
    """Raise UserError unless a checkpoint was trained on this data."""
    pieces, identity = from_state(saved["tokenizer"]).pieces, dataset.identity
    with refuse_damaged(f"{out_dir}/ckpt.pt"):
        same = saved["data"]["identity"] == identity
    if pieces == dataset.tokenizer.pieces and same:
        return
    raise UserError(
        f"{dataset.folder} is not the data that {out_dir}/ckpt.pt was trained on;"
        " if that is in another folder, add --dataset=NAME"
    )


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
        note(f"threads={config.threads} instead of {before.threads}: losses stay the same only up to rounding")
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
        note(f"the learning rate rises from {had:.1e} to {lr:.1e}, because its schedule has changed")

    def sequences(config: TrainConfig) -> int:
        whole = dataset.all_val_batches(config.batch_size) or math.inf  # if generated
        return min(config.evaluated_batches(), whole) * config.batch_size

    if sequences(config) != sequences(before) and progress.best_val_loss < math.inf:
        note(
            "the evaluation set has changed, so the next evaluation begins a new best.pt, whose loss was"
            f" {progress.best_val_loss:.4f} on the earlier set"
        )
        progress.best_val_loss = math.inf
        progress.best_answered = 0
        progress.evals_since_best = 0
    return progress
