"""The settings of python -m benchmarks."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from humptygpt.cli import check_above_0, check_choices, check_least

MODES = {  # {mode: the module in benchmarks/ whose bench() measures it}
    "train": "step_time",
    "loss": "time_to_loss",
    "profile": "step_profile",
    "sample": "generation",
    "page": "keystrokes",
    "gpu": "gpu",
    "machine": "choices",
}
NEEDED = {"loss": "nanogpt", "page": "page"}


@dataclass(frozen=True)
class BenchConfig:
    # benchmark
    what: str = "train"  # measurement to run: see above
    nanogpt: str | None = None  # a nanoGPT checkout to compare with
    config: str | None = None  # config file; None: nanoGPT's CPU preset, or the demo
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str | None = None  # HumptyGPT's dtype; None: nanoGPT's if what=train, else auto
    # what=train, profile
    steps: int = 300  # timed steps
    # what=loss
    target: float = 1.88  # validation loss to reach
    seeds: int = 3  # runs of each program, alternating
    # what=sample
    size: str = "gpt2"  # model size
    weights: str = "float32"  # dtype of the weights
    texts: int = 1  # batch size: prompts continued in one batch
    prompt: int = 8  # prompt tokens per text
    new_tokens: int = 32  # tokens to generate after each prompt
    rounds: int = 3  # measurements of each program, alternating
    # what=page
    page: str | None = None  # HTML file made by explain.py
    keystrokes: int = 50  # timed keystrokes
    # what=gpu
    short: bool = False  # small models and few steps

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        return {
            "what": MODES,
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "size": ("0.8M", "gpt2"),
            "weights": ("float32", "bfloat16", "int8"),
        }

    def validate(self) -> None:
        check_choices(self)
        check_least(self, 1, "steps", "seeds", "texts", "prompt", "rounds", "keystrokes")
        check_least(self, 2, "new_tokens")
        check_above_0(self, "target")
        needed = NEEDED.get(self.what)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"what={self.what} needs --{needed}=PATH")
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").exists():
            raise ValueError(f"nanogpt={self.nanogpt} has no model.py; give the folder of a checkout")
