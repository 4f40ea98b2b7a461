"""The settings of a run: their names, defaults, ranges, and what each may be combined with."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from humptygpt.cli import (
    Except,
    Vain,
    check_above_0,
    check_choices,
    check_least,
    fields_of,
)
from humptygpt.device import DTYPES, pick_dtype, training_dtype
from humptygpt.models.build import MODELS
from humptygpt.training.optimizers import MUONS, OPTIMIZERS, SCHEDULES

# ModelConfig keys that affect only training, not the architecture
TRAINING_ONLY = {"dropout", "label_smoothing"}
# keys that may change on resume if their product does not
STEP = ("batch_size", "gradient_accumulation_steps")
WITHOUT_BLOCKS = ("window_mlp", "number_mlp")
IN_VAIN: Vain = [
    ("text_key val_input val_fraction", "input", (None,)),
    ("schedule lr_decay_iters min_lr warmup_iters", "decay_lr", (False,)),
    ("lora_alpha lora_targets", "lora_rank", (0,)),
    ("parallel backend", "processes", (1,)),
    ("rope_base rope_factor", "position", Except(["rotary"])),
    (
        "rope_low_freq_factor rope_high_freq_factor rope_original_context",
        "rope_factor",
        (1,),
    ),
    ("norm norm_eps embed_norm block position init tie_weights", "model", WITHOUT_BLOCKS),
    ("attention n_head n_kv_head head_size qk_norm attn_bias", "model", WITHOUT_BLOCKS),
    ("mlp mlp_conv mlp_bias", "model", WITHOUT_BLOCKS),
    ("mlp_conv mlp_bias activation n_hidden", "mlp", ("none",)),
    ("muon_learning_rate muon_momentum", "optimizer", Except(MUONS)),
]
# Defaults for a run that starts from a model; training/finetune.py chooses the optimizer and its rates.
GENTLE = {"schedule": "linear", "min_lr": 0.0, "warmup_iters": 10}
RECIPE = "config/shakespeare_char.py"  # what --minutes plans with: its law was fitted to this recipe


@dataclass(frozen=True)
class Adjustable:
    """Settings of a run that may change when it is resumed."""

    # run
    out_dir: str | None = None  # folder of the run; None: out/<dataset>
    init_from: str = "scratch"  # scratch, resume (out_dir/ckpt.pt), auto (resume if possible), or a model to start from
    overwrite: bool = False  # replace an earlier run in out_dir, and changed data of input
    eval_only: bool = False  # evaluate once, with BLEU for translation, and stop
    # data
    dataset: str = "shakespeare_char"  # folder in data/ that prepare_data.py wrote
    input: str | None = None  # your own text: a file or folder to prepare as a dataset
    text_key: str | None = None  # key of the text, or of a question and its answer: q,a
    val_input: str | None = None  # your own validation text; None: a tenth of input
    val_fraction: float | None = None  # share of input to hold out; 0: learn all of it
    batch_size: int = 4  # sequences per micro-batch (pairs: batch_size * block_size tokens)
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    # optimizer
    minutes: float | None = None  # run for this many minutes; unset keys are chosen to fit
    max_iters: int = 2400  # training steps
    learning_rate: float = 3e-3  # peak, after warmup; where to start: docs/experiments.md
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
    grad_clip: float = 1.0  # maximum gradient norm; 0: no clipping
    # evaluation
    eval_interval: int = 600  # steps between evaluations; one always follows the last step
    eval_iters: int | None = None  # batches per evaluation; None: about 10% of the run time
    early_stopping: int = 0  # stop after this many evaluations without a new best; 0: never
    always_save_checkpoint: bool = True  # False: save only a new best and at the end
    snapshots: bool | None = None  # save weight snapshots for explain.py; None: if < 10 MB
    log_interval: int = 10  # steps between training loss reports
    # memory
    checkpoint_activations: bool = False  # save memory by recomputing; a third more compute
    dry_run: bool = False  # report sizes and memory, then exit without writing anything
    # logging
    wandb_log: bool = False  # also log to Weights & Biases; WANDB_MODE=offline: locally
    wandb_project: str = "humptygpt"  # project on Weights & Biases
    wandb_run_name: str | None = None  # run name on Weights & Biases; None: name of out_dir
    # system
    device: str = "auto"  # auto: cuda, else mps, else cpu; or cuda:1
    dtype: str = "auto"  # auto: the fastest for this kind of device
    threads: int | None = None  # CPU cores to use; None: all that there are
    compile: bool | None = None  # use torch.compile; None: for long runs on CUDA
    parallel: str = "ddp"  # for several processes: ddp, or fsdp to shard the model
    backend: str = "auto"  # for several processes: auto is nccl on CUDA, gloo on a CPU


@dataclass(frozen=True)
class TrainConfig(Adjustable):
    """The settings of a run. Those declared here are kept, because the weights or the data's order depend on them."""

    # kept if the run is resumed
    optimizer: str = "adamw"  # optimizer of the blocks' matrices; AdamW trains the rest
    seed: int = 1337  # seed for initial weights, data order and dropout
    freeze: str | None = None  # freeze parameters whose names contain these: wte,blocks.0
    lora_rank: int = 0  # LoRA: rank of the added matrices; 0: no LoRA
    lora_alpha: float = 16.0  # LoRA: added matrices are scaled by lora_alpha / lora_rank
    lora_targets: str = "q_proj,v_proj"  # LoRA: names of the layers to adapt

    @classmethod
    def choices(cls) -> dict[str, Collection[str]]:
        """Map each key that names a variant to its variants; `model` is a key of ModelConfig."""
        return {
            "model": MODELS,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "dtype": ("auto", *DTYPES),
            "parallel": ("ddp", "fsdp"),
            "backend": ("auto", "gloo", "nccl"),
        }

    def validate(self) -> None:
        """Raise ValueError for the first value or combination that is invalid."""
        # a resumed run prints what a checkpoint holds, whoever made it
        for key, value in vars(self).items():
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{key}={value!r} must be printable text")
        check_choices(self)
        check_least(self, 0, "seed", "warmup_iters", "min_lr", "weight_decay", "grad_clip")
        check_least(self, 0, "early_stopping", "lora_rank")
        check_least(self, 1, "batch_size", "gradient_accumulation_steps", "max_iters", "threads")
        check_least(self, 1, "lr_decay_iters", "eval_interval", "eval_iters", "log_interval")
        check_above_0(self, "minutes", "learning_rate", "muon_learning_rate", "lora_alpha")
        check_least(self, 0, "beta1", "beta2", "muon_momentum", below=1)
        if self.lora_rank and self.init_from == "scratch":
            raise ValueError(f"lora_rank={self.lora_rank} needs an existing model; name it with --init_from")
        if self.decay_lr and self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} must be at most learning_rate={self.learning_rate}")

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
        decay = SCHEDULES[self.schedule]((it - warmup) / (end - warmup), self)
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
        return math.ceil(self.batch_size / max(1, processes // self.gradient_accumulation_steps))


# keys that may change on resume
MAY_CHANGE = fields_of(Adjustable).keys() | TRAINING_ONLY


def choose_dtype(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Replace auto by the dtype in which a device trains fastest. Raises UserError for a dtype that it cannot have."""
    chosen = training_dtype(device) if config.dtype == "auto" else config.dtype
    return replace(config, dtype=str(pick_dtype(chosen, device)).removeprefix("torch."))
