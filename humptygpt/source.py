"""The settings with which a script names a model. They do not need torch."""

from collections.abc import Collection
from dataclasses import dataclass

from humptygpt.cli import check_choices


@dataclass(frozen=True)
class RunSource:
    """A run."""

    # model
    out_dir: str = "out"  # folder of the run, or a checkpoint in it
    checkpoint: str = "best"  # best: best.pt (lowest loss); latest: ckpt.pt

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {"checkpoint": ("best", "latest")}

    def validate(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class ModelSource(RunSource):
    """A run or any other model."""

    # model
    init_from: str = "resume"  # resume: a checkpoint in out_dir; otherwise a run, a checkpoint, a model folder or gpt2
