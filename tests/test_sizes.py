"""What sizes.py computes is what training takes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, read_rows

import model as models
import train
from humptygpt.core import settings as configurator
from humptygpt.core.device import autocast
from humptygpt.training import sizes
from humptygpt.training.optimizers import OPTIMIZERS, make_optimizer
from humptygpt.training.settings import TrainConfig
from humptygpt.training.sizes import H100, MFU, Memory, all_reduce_seconds, memory, step_seconds
from model import ModelConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ModelConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=50)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_of_weights_gradients_and_optimizer_is_what_a_step_holds(optimizer):
    model = models.build(TINY)
    trained = make_optimizer(TrainConfig(optimizer=optimizer), model)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    model(idx, idx)[1].backward()
    trained.step()
    needed = memory(TINY, optimizer, 2, torch.float32, ema=True)
    held = [tensor for state in trained.state.values() for tensor in state.values()]
    assert needed.optimizer == sum(tensor.nbytes for tensor in held)
    assert needed.weights == needed.ema == sum(p.nbytes for p in model.parameters())
    assert needed.gradients == sum(p.grad.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [{}, {"dropout": 0.1}, {"model": "transformer"}, {"mlp": "gated", "qk_norm": True}]
)
def test_activations_are_those_that_autograd_keeps(dtype, change):
    config, found = replace(TINY, **change), {}
    model = models.build(config)
    idx = torch.zeros(2, 16, dtype=torch.int64)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(CPU, dtype),
    ):
        model(idx, idx, **({"source": idx} if model.has_encoder else {}))
    weights = {p.data_ptr() for p in model.parameters()}
    kept = sum(
        x.untyped_storage().nbytes() for pointer, x in found.items() if pointer not in weights
    )
    assert memory(config, "adamw", 2, dtype).activations - 4 * 2 * 16 * 50 == pytest.approx(
        kept, rel=0.01
    )


def test_checkpointed_activations_take_less_than_half_at_12_layers():
    config = replace(TINY, n_layer=12)
    whole, checkpointed = (
        memory(config, "adamw", 4, torch.float32, checkpoint_activations=choice).activations
        for choice in (False, True)
    )
    assert checkpointed < whole / 2


@pytest.mark.parametrize(
    "options", [[], ["--dtype=bfloat16"], ["--ngrams=2", "--ngram_dropout=0.2"]]
)
def test_with_checkpointed_activations_the_losses_are_the_same_bit_for_bit(tiny, options):
    found = []
    for choice in ("False", "True"):
        train.main([*TINY_RUN, "--dropout=0.2", *options, f"--checkpoint_activations={choice}"])
        found.append(read_rows(Path("out/run")))
    assert found[0] == found[1]


def test_blocks_are_computed_again_in_the_backward_pass(tiny, monkeypatch):
    calls = []
    forward = models.PreNormBlock.forward
    monkeypatch.setattr(
        models.PreNormBlock, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    train.main([*TINY_RUN, "--max_iters=1", "--eval_interval=9", "--checkpoint_activations=True"])
    training = len(calls)
    calls.clear()
    train.main([*TINY_RUN, "--max_iters=1", "--eval_interval=9"])
    assert training == len(calls) + 2  # layers


def test_a_dry_run_reports_and_touches_nothing(capsys):
    argv = [
        "--n_layer=2",
        "--vocab_size=100",
        "--device=cpu",
        "--dataset=missing",
        "--dry_run=True",
    ]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert (
        "parameters" in out
        and "FLOPs per token" in out
        and "GB: weights" in out
        and "1,024 H100" in out
    )
    assert not list(Path().iterdir())


def test_a_dry_run_without_data_or_vocabulary_is_one_line(fails):
    assert "meta.json" in fails(train.main, "--dataset=missing", "--dry_run=True")


PARAMETERS = {"gpt2_124m": 124e6, "gpt2_350m": 354e6, "gpt2_774m": 773e6, "gpt2_1558m": 1557e6}
PARAMETERS |= {"llama_1b": 1.236e9, "llama_8b": 8.03e9}


@pytest.mark.parametrize("name", PARAMETERS)
def test_configs_have_the_sizes_of_their_names(name):
    given = configurator.read([str(ROOT / f"config/{name}.py")], ModelConfig, TrainConfig)
    model = sizes.build_on_meta(configurator.make(ModelConfig, given))
    assert models.count_parameters(model) == pytest.approx(PARAMETERS[name], rel=0.01)


# --------------------------------------------------------------------------------------
# Clusters


def test_a_ring_sends_twice_all_but_one_part():
    assert all_reduce_seconds(450e9, 1, H100) == 0
    assert all_reduce_seconds(450e9, 2, H100) == pytest.approx(1.0)
    assert all_reduce_seconds(450e9, 8, H100) == pytest.approx(2 * 7 / 8)
    # two nodes: each of eight rings between them has an eighth
    assert all_reduce_seconds(450e9, 16, H100) == pytest.approx(
        2 * 7 / 8 + 450e9 / 8 / 50e9, rel=1e-3
    )


def test_what_is_gathered_arrives_in_half_the_time_of_a_sum():
    assert sizes.gather_seconds(450e9, 8, H100) == pytest.approx(
        all_reduce_seconds(450e9, 8, H100) / 2
    )
    two_nodes = 7 / 8 + 450e9 / 8 / 50e9 / 2
    assert sizes.gather_seconds(450e9, 16, H100) == pytest.approx(two_nodes, rel=1e-3)
    # a ring through many nodes is slow however little it carries
    assert sizes.gather_seconds(0, 1024, H100) == pytest.approx(127 * H100.latency)


def test_a_step_takes_the_time_of_its_products_and_of_its_sums():
    flops = 1e15
    alone = flops / (MFU * H100.peak_flops)
    assert step_seconds(flops, 10**9, 1, H100) == pytest.approx(alone)
    eight = step_seconds(flops, 10**9, 8, H100)
    assert alone / 8 < eight < alone


def test_a_sharded_step_takes_the_longer_time_of_products_and_of_what_is_gathered_meanwhile():
    groups, first = [10**8] * 10, sizes.gather_seconds(4e8, 8, H100)
    computed = sizes.sharded_step_seconds(1e18, groups, 1, 8, H100)
    assert computed == pytest.approx(first + 1e18 / 8 / (MFU * H100.peak_flops))
    sent = [sizes.sharded_step_seconds(1.0, groups, n, 8, H100) for n in (1, 2)]
    assert sent == pytest.approx([first * (1 + 3 * 10), first * (1 + 5 * 10)])


def test_each_node_writes_a_part_of_a_checkpoint():
    assert (
        sizes.checkpoint_seconds(8 * sizes.DISK, 1)
        == 8 * sizes.checkpoint_seconds(8 * sizes.DISK, 8)
        == 8
    )


def test_sharded_each_card_has_its_part_and_what_is_gathered():
    model = sizes.build_on_meta(TINY)
    whole = memory(TINY, "adamw", 2, torch.float32, ema=True)
    one, two = (sizes.sharded(whole, model, 8, n) for n in (1, 2))
    assert (one.weights, one.optimizer, one.ema) == (
        whole.weights / 8,
        whole.optimizer / 8,
        whole.ema / 8,
    )
    assert one.gradients == whole.gradients / 8 and two.gradients == whole.gradients
    assert one.activations == whole.activations and one.buffers == two.buffers > 0


def test_with_ddp_gradients_are_there_twice_where_the_activations_are_smaller():
    whole = Memory(weights=8, gradients=8, optimizer=16, ema=0, activations=3)
    assert sizes.replicated(whole, 1) == whole
    assert sizes.replicated(whole, 2) == whole._replace(buffers=5)
    assert sizes.replicated(whole._replace(activations=9), 2).buffers == 0


def test_ddp_ends_where_a_card_cannot_hold_the_model():
    model = sizes.build_on_meta(TINY)
    small, large = Memory(10**9, 10**9, 10**9, 0, 0), Memory(10**11, 10**11, 10**11, 0, 0)
    assert all("DDP" in line for line in sizes.on_clusters(model, small, 2000, 1))
    assert all("FSDP" in line for line in sizes.on_clusters(model, large, 2000, 1))
    assert sizes.on_clusters(model, small, 500, 1)[2].endswith("with 1,024 sequences a step")


def test_a_dry_run_knows_several_processes_and_n_grams(capsys, monkeypatch):
    argv = [
        "--n_layer=2",
        "--vocab_size=100",
        "--device=cpu",
        "--gradient_accumulation_steps=4",
        "--dry_run=True",
    ]
    found = {}
    for options in ("", "--parallel=ddp", "--parallel=fsdp", "--ngrams=3 --ngram_rows=5000"):
        if "parallel" in options:
            for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
                monkeypatch.setenv(name, "0")
            monkeypatch.setenv("MASTER_ADDR", "localhost")
            monkeypatch.setenv("WORLD_SIZE", "4")
        else:
            monkeypatch.setenv("WORLD_SIZE", "1")
        assert train.main([*argv, *options.split()]) == 0
        found[options] = re.search(
            "memory(.*), in GB: weights ([0-9.e-]+)", capsys.readouterr().out
        ).groups()
    assert found[""][0] == "" and found["--parallel=ddp"][0] == " of each of 4 processes, DDP"
    assert found["--parallel=fsdp"][0] == " of each of 4 processes, FSDP"
    assert float(found["--parallel=fsdp"][1]) == pytest.approx(float(found[""][1]) / 4, rel=0.01)
    assert float(found["--ngrams=3 --ngram_rows=5000"][1]) > 2 * float(found[""][1])
