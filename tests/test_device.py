import itertools
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model as models
import train
from humptygpt.core.errors import UserError
from humptygpt.nn.layers import (
    ACTIVATIONS,
    autocast,
    peak_flops,
    pick_device,
    pick_dtype,
    sample_dtype,
)
from humptygpt.nn.window_mlp import EMBEDDINGS
from humptygpt.parallel.processes import ONE_PROCESS
from humptygpt.training.optimizers import OPTIMIZERS, make_optimizer
from model import BLOCKS, MLPS, MODELS, NORMS, POSITIONS, ModelConfig
from train import TrainConfig

CPU, META = torch.device("cpu"), torch.device("meta")


def test_auto_picks_the_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["cuda:7", "tpu", "meta", "gpu", "cpu:x"])
def test_a_device_that_is_not_available_is_refused(name):
    with pytest.raises(
        UserError,
        match=f"^device={name} is not available; this machine and this torch have: .*cpu",
    ):
        pick_device(name)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)],
)
def test_auto_dtype_is_what_the_card_multiplies(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
        ("avx2", torch.float32),
    ],
)
def test_auto_dtype_is_what_the_processor_multiplies_and_float32_to_generate(
    monkeypatch, capabilities, dtype
):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {capabilities: True}, raising=False
    )
    assert pick_dtype("auto", CPU) == dtype
    assert sample_dtype("auto", CPU) == torch.float32
    assert sample_dtype("bfloat16", CPU) == torch.bfloat16


def test_dtype_can_be_set_and_float16_needs_cuda():
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="dtype=float16 needs a CUDA device"):
        pick_dtype("float16", CPU)


def test_autocast_multiplies_in_the_given_dtype():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


def test_peak_flops_are_found_by_the_name_of_the_card(monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": None,
        "NVIDIA H100 PCIe": 756e12,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda) == peak
    assert peak_flops(CPU) is None


# --------------------------------------------------------------------------------------
# All tensors are on the model's device. The meta device, which has shapes but no data, stands for a GPU here.


class OneDevice(TorchDispatchMode):
    """Fail at the first operation that reads or makes a tensor on another device. Zero-dimensional ones count, too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        for x in (*args, *(kwargs or {}).values(), result):
            for y in x if isinstance(x, list | tuple) else [x]:
                assert not isinstance(y, torch.Tensor) or y.is_meta, f"{operation}: {y}"
        return result


SHAPE = {"n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 8, "vocab_size": 11}
OPTIONS = {
    "mlp": MLPS,
    "activation": ACTIVATIONS,
    "n_kv_head": (None, 2, 1),
    "window": (0, 3),
    "dropout": (0.0, 0.2),
    "label_smoothing": (0.0, 0.1),
    "logit_soft_cap": (0.0, 15.0),
    "rope_factor": (1.0, 8.0),
    "init": ("gpt2", "zero"),
    "mlp_conv": (0, 2),
    **dict.fromkeys(("bias", "tie_weights", "qk_norm", "embed_norm"), (False, True)),
}


def random_variants(model: str) -> list[ModelConfig]:
    """Every position x block x norm, of a GPT thrice, with the other settings drawn at random."""
    draw, found = random.Random(0), []
    if model == "window_mlp":
        for embedding, activation in itertools.product(EMBEDDINGS, ACTIVATIONS):
            keys = {
                key: draw.choice(OPTIONS[key])
                for key in ("dropout", "label_smoothing", "logit_soft_cap", "bias")
            }
            keys |= {
                "n_embd": 1 if embedding == "number" else 16,
                "embedding": embedding,
                "activation": activation,
            }
            found.append(ModelConfig(**SHAPE | keys, model=model, window=3))
        return found
    for position, block, norm in [*itertools.product(POSITIONS, BLOCKS, NORMS)] * (
        3 if model == "gpt" else 1
    ):
        keys = {key: draw.choice(list(values)) for key, values in OPTIONS.items()}
        if block == "plain":
            keys["init"] = "gpt2"
        if block == "parallel" and keys["mlp"] == "none":
            keys["mlp"] = "plain"
        found.append(
            ModelConfig(
                **SHAPE | keys,
                model=model,
                position=position,
                block=block,
                norm=norm,
            )
        )
    return found


def train_evaluate_and_generate(
    model: nn.Module, optimizer_name: str, padded: bool
) -> None:
    idx, source = (torch.zeros(2, T, dtype=torch.int64, device=META) for T in (5, 6))
    batch = {"idx": idx} | ({"source": source} if model.has_encoder else {})
    optimizer = make_optimizer(TrainConfig(optimizer=optimizer_name), model)
    logits, loss = model(**batch, targets=idx)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(**batch)[0].shape == logits.shape == (2, 5, 11)
        if model.has_state:
            state = model.make_state(source) if model.has_encoder else model.make_state()
            if padded and not model.has_encoder:
                state.padding = torch.zeros(2, dtype=torch.int64, device=META)
            model(idx, state=state)
            state.select(torch.zeros(3, dtype=torch.int64, device=META))
            assert model(idx[:1, :1].expand(3, 1), state=state)[0].shape == (3, 1, 11)


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_trains_evaluates_and_generates_on_its_device_alone(name):
    variants, draw = random_variants(name), random.Random(0)
    assert len(variants) == {"gpt": 180, "transformer": 60, "window_mlp": 10}[name]
    for config in variants:
        model, optimizer, padded = (
            models.build(config).to(META),
            draw.choice(list(OPTIMIZERS)),
            draw.random() < 0.5,
        )
        try:
            with OneDevice():
                train_evaluate_and_generate(model, optimizer, padded)
        except Exception as error:
            raise AssertionError(f"{config}, {optimizer=}, {padded=}") from error


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_moves_its_batch_to_the_device(monkeypatch, name, optimizer):
    # refuses meta
    monkeypatch.setattr(train, "autocast", lambda device, dtype: nullcontext())
    config = TrainConfig(optimizer=optimizer, batch_size=2, gradient_accumulation_steps=2)
    model = models.build(ModelConfig(**SHAPE, model=name, window=3, dropout=0.1)).to(META)
    batch = dict.fromkeys(
        ("idx", "targets") + ("source",) * model.has_encoder,
        torch.zeros(2, 5, dtype=torch.int64),
    )
    run = SimpleNamespace(
        config=config,
        model=model,
        net=model,
        replica=model,
        batches=SimpleNamespace(batch=lambda index, size: batch),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=META,
        dtype=torch.float32,
        optimizer=make_optimizer(config, model),
        processes=ONE_PROCESS,
    )
    loss, grad_norm, count = train.train_step(run, it=0)
    assert (loss.device, grad_norm.device, count) == (META, META, 20)
