"""TensorBoard and Weights & Biases, chosen with --log. Both loggers have the interface of a wandb run."""

import secrets
from pathlib import Path

from humptygpt.cli import note
from humptygpt.files import write_text


class TensorBoard:
    """Writes files to out_dir/tensorboard, which `tensorboard --logdir=out` shows."""

    def __init__(self, out_dir: Path, settings: dict, resumed_at: int):
        """Hide points that an earlier process logged after step resumed_at: the resumed run will log them again."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=resumed_at + 1)

    def log(self, row: dict, step: int) -> None:
        for key, value in row.items():
            if key != "iter" and type(value) in (int, float):
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def start_wandb(out_dir: Path, settings: dict, resumed_at: int):
    """Start a run on Weights & Biases, or continue a resumed one. If wandb cannot be reached, log offline."""
    import wandb

    id_file = out_dir / "wandb_id"
    if not resumed_at or not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    options = {
        "project": settings["wandb_project"],
        "name": settings["wandb_run_name"] or out_dir.name,
        "id": id_file.read_text(),
        "resume": "allow",
        "dir": str(out_dir),
        "config": settings,
    }
    try:
        return wandb.init(**options)
    except wandb.Error as error:
        note(
            f"wandb cannot be reached ({error}); logging offline; to upload the log later: wandb sync"
        )
        return wandb.init(**options, mode="offline")


LOGGERS = {
    "tensorboard": TensorBoard,
    "wandb": start_wandb,
}  # each named after the package it needs


def chosen_loggers(settings: dict) -> list[str]:
    """List the names of the loggers that a run's settings choose. Raises ValueError for an unknown one."""
    names = settings["log"].replace(",", " ").split()
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"log={settings['log']}: {name} is not one of: {', '.join(LOGGERS)}"
            )
    if settings["wandb_log"]:
        names.append("wandb")
    return list(dict.fromkeys(names))
