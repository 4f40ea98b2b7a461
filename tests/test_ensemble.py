"""Ensembles: what several GPTs in one model compute, learn and save."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN
from humptygpt.model import ModelConfig
from test_model import tiny as tiny_gpt
from uncached import generate, uncached

import train
from humptygpt.cli import UserError
from humptygpt.formats.families import FAMILIES, find_family
from humptygpt.formats.load import load
from humptygpt.generation import sampling
from humptygpt.models import lora
from humptygpt.models.build import build, make_model_config
from humptygpt.page.page_data import pack_weights, page_data

IDX = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
TARGETS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, -1]])


def ensemble(**keys):
    model = tiny_gpt(n_members=3, **keys)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_the_prediction_is_the_mean_of_the_members_predictions():
    model = ensemble().eval()
    mean = sum(member(IDX)[0].softmax(-1) for member in model.members) / 3
    logits, loss = model(IDX, TARGETS)
    torch.testing.assert_close(logits.softmax(-1), mean)
    torch.testing.assert_close(model.next_logits(IDX).softmax(-1), mean[:, -1])
    right = mean.gather(-1, TARGETS.clamp(min=0)[..., None])[TARGETS >= 0]
    torch.testing.assert_close(loss, -right.log().mean())


def test_a_penalty_for_repetition_means_the_same_as_for_a_member_alone():
    model = ensemble().eval()
    first = model.members[0]
    for member in model.members:
        member.load_state_dict(first.state_dict())
    alone, together = (
        sampling.penalize_repetition(one.next_logits(IDX), IDX.tolist(), 2.0).softmax(-1) for one in (first, model)
    )
    torch.testing.assert_close(alone, together)


def test_under_autocast_the_mean_is_computed_in_float32():
    model = ensemble().eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDX)[0]
        each = [member(IDX)[0] for member in model.members]
    assert each[0].dtype == torch.bfloat16
    mean = sum(one.float().softmax(-1) for one in each) / 3
    torch.testing.assert_close(logits.log_softmax(-1), mean.log())


def test_each_member_learns_as_it_would_alone():
    model = ensemble()
    model(IDX, TARGETS)[1].backward()
    for member in model.members:
        together = [p.grad.clone() for p in member.parameters()]
        member.zero_grad()
        member(IDX, TARGETS)[1].backward()
        for p, gradient in zip(member.parameters(), together, strict=True):
            torch.testing.assert_close(3 * gradient, p.grad)


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_cached_equals_uncached_before_and_past_block_size(position):
    model = ensemble(position=position, block_size=8).eval()
    assert generate(model, [[1, 2, 3]], 20) == [uncached(model, [1, 2, 3], 20)]


def test_each_token_is_read_only_once():
    model = ensemble().eval()
    cache = model.make_cache()
    with torch.no_grad():
        model.next_logits(IDX[:, :3], cache)
        assert cache.length == 3
        found = model.next_logits(IDX[:, 3:], cache)
        torch.testing.assert_close(found, model.next_logits(IDX))


def test_members_start_with_different_weights():
    first, second, _ = tiny_gpt(n_members=3).members
    assert not torch.equal(first.wte.weight, second.wte.weight)


def test_a_run_is_saved_and_loaded_with_the_tied_weights_of_each_member(tiny):
    assert train.main([*TINY_RUN, "--n_members=2", "--tie_weights=True"]) == 0
    model = load(Path("out/run")).model
    assert len(model.members) == 2
    for member in model.members:
        assert member.lm_head.weight is member.wte.weight


def test_it_is_not_exported():
    llama = ModelConfig(**FAMILIES["llama"].fixed | {"n_members": 2})
    one = "n_members=2 cannot be exported; LlamaForCausalLM needs n_members=1"
    with pytest.raises(UserError, match=one):
        find_family(llama)


def test_a_page_has_the_weights_of_the_first_member_now_and_earlier(tiny):
    assert train.main([*TINY_RUN, "--n_members=2", "--snapshots=True"]) == 0
    first = load(Path("out/run")).model.members[0]
    data = page_data(Path("out/run/best.pt"))
    assert data["weights"] == pack_weights(first)
    # alone, the first member starts with the same weights
    assert train.main([*TINY_RUN, "--out_dir=out/one", "--snapshots=True"]) == 0
    alone = page_data(Path("out/one/best.pt"))
    assert data["snapshots"] == alone["snapshots"] != []


def test_lora_is_added_to_each_member_but_not_to_its_head():
    model = ensemble()
    training = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "q_proj"}
    lora.add(model, training)
    layers = [part for part in model.modules() if isinstance(part, lora.LoRALinear)]
    assert len(layers) == 3 * model.config.n_layer
    lora.train_rows(model, [5])
    model(IDX, TARGETS)[1].backward()
    for member in model.members:
        for layer in (member.wte, member.lm_head):
            assert layer.weight.grad.any(dim=1).nonzero().tolist() == [[5]]
    with pytest.raises(UserError, match="'lm_head' is not one of"):
        lora.add(ensemble(), training | {"lora_targets": "lm_head"})


def test_the_cache_of_each_member_is_counted_before_sampling(monkeypatch):
    monkeypatch.setattr(sampling, "free_memory", lambda device: 100_000)
    three, one = (sampling.texts_at_once(tiny_gpt(n_members=n), torch.device("cpu"), 8) for n in (3, 1))
    assert one > three


def test_only_a_gpt_can_be_a_member():
    config = make_model_config({"model": "transformer", "n_members": 2, "vocab_size": 9})
    with pytest.raises(UserError, match="n_members=2 works only with model=gpt"):
        build(config)
