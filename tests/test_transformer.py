"""The encoder-decoder: beside torch's, and in every variant."""

import itertools
import warnings

import pytest
import torch
from conftest import fill_ngrams, overfit
from torch import Tensor, nn

import model as models
from model import ACTIVATIONS, BLOCKS, MLPS, NORMS, POSITIONS, ModelConfig

VARIANTS = [
    *({"position": name} for name in POSITIONS),
    *({"norm": name} for name in NORMS),
    *({"activation": name} for name in ACTIVATIONS),
    *({"mlp": name} for name in MLPS),
    *({"block": name} for name in BLOCKS),
    {"bias": True},
    {"tie_weights": False},
    {"qk_norm": True},
    {"embed_norm": True},
    {"logit_soft_cap": 5.0},
    {"ngrams": 3, "ngram_rows": 300},
    {"init": "zero"},
    {"n_kv_head": 1, "n_head": 4},
    {"window": 3},
    {"window": 3, "position": "alibi"},
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))
EOT = 0


def tiny(**keys) -> models.Transformer:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 12, "vocab_size": 11}
    model = models.build(ModelConfig(model="transformer", **sizes | keys))
    fill_ngrams(model)
    return model


def shaken(**keys) -> models.Transformer:
    """A model whose weights are all drawn large, so that none is as idle as it may be at the start."""
    model = tiny(**keys).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def with_padding(source: Tensor, lengths: list[int]) -> Tensor:
    return source.masked_fill(torch.arange(source.shape[1]) >= torch.tensor(lengths)[:, None], -1)


# --------------------------------------------------------------------------------------
# Beside torch's own


def their_transformer(norm_first: bool) -> nn.Transformer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an optimization that it cannot use
        theirs = nn.Transformer(
            d_model=48, nhead=4, num_encoder_layers=3, num_decoder_layers=3, dim_feedforward=96, dropout=0.0,
            batch_first=True, norm_first=norm_first,
        )  # fmt: skip
    if not norm_first:  # torch adds a last norm behind blocks that end with one; the paper does not
        theirs.encoder.norm = theirs.decoder.norm = None
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    return theirs.eval()


def as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch's weights under our names: its queries, keys and values are one matrix."""
    names = {
        ".layers.": ".blocks.",
        "self_attn": "attn",
        "multihead_attn": "cross_attn",
        "out_proj": "proj",
        "linear1": "mlp.fc",
        "linear2": "mlp.proj",
        "norm1": "attn_norm",
    }
    norms = {"encoder": {"norm2": "mlp_norm"}, "decoder": {"norm2": "cross_norm", "norm3": "mlp_norm"}}
    ours = {}
    for name, tensor in theirs.items():
        for old, new in (names | norms[name.partition(".")[0]]).items():
            name = name.replace(old, new)
        if "in_proj_" in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            ours |= {name.replace("in_proj_", f"{part}."): rows for part, rows in parts}
        else:
            ours[name] = tensor
    return ours


@pytest.mark.parametrize("block", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [4, 9, 1]], ids=["whole", "padded"])
def test_with_equal_weights_the_outputs_are_those_of_torchs_transformer(block, lengths):
    torch.manual_seed(0)
    ours = tiny(
        n_layer=3, n_head=4, n_embd=48, n_hidden=96, bias=True, activation="relu", position="none", block=block
    ).eval()
    theirs = their_transformer(norm_first=block == "pre_norm")
    missing, unexpected = ours.load_state_dict(as_ours(theirs.state_dict()), strict=False)
    assert not unexpected and set(missing) == {"wte.weight", "lm_head.weight"}
    source, idx = with_padding(tokens(3, 9), lengths), tokens(3, 7, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.bool)
    expected = theirs(
        ours.wte(source.clamp(min=0)),
        ours.wte(idx),
        tgt_mask=causal,
        src_key_padding_mask=source < 0,
        memory_key_padding_mask=source < 0,
    )
    context, padding = ours.encode(source)
    torch.testing.assert_close(ours.decoder(ours.wte(idx), None, context, padding), expected, atol=1e-5, rtol=1e-5)


def test_the_first_transformer_scales_its_one_table_by_the_root_of_its_width():
    model = shaken(position="sinusoidal")
    seen = []
    for stack in (model.encoder, model.decoder):
        stack.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    source, idx = tokens(2, 6), tokens(2, 4, seed=1)
    model(idx, source=source)
    for ids, x in zip((source, idx), seen, strict=True):
        waves = model.encoder.position.waves[: ids.shape[1]]
        torch.testing.assert_close(x, model.lm_head.weight[ids] * 32**0.5 + waves)


# --------------------------------------------------------------------------------------
# Every variant


@every_variant
def test_padding_changes_nothing(variant):
    model = shaken(**variant)
    source, idx = tokens(3, 10), tokens(3, 8, seed=1)
    lengths = [4, 10, 1]
    together, _ = model(idx, source=with_padding(source, lengths))
    for row, length in enumerate(lengths):
        alone, _ = model(idx[row : row + 1], source=source[row : row + 1, :length])
        torch.testing.assert_close(together[row], alone[0])


@every_variant
def test_every_token_of_the_source_reaches_every_token_of_the_translation(variant):
    model = shaken(**variant)
    source, idx = tokens(1, 6), tokens(1, 5, seed=1)
    before, _ = model(idx, source=source)
    for place in range(6):
        changed = source.clone()
        changed[0, place] = changed[0, place] % 10 + 1
        assert (model(idx, source=changed)[0] != before).any(dim=-1).all()


@every_variant
def test_what_stands_in_the_padding_never_reaches_the_decoder(variant):
    model = shaken(**variant)
    source, idx = with_padding(tokens(2, 9), [6, 9]), tokens(2, 5, seed=1)
    before, _ = model(idx, source=source)

    def disturb(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[0, 6:] = 100.0
        return (x, *args[1:])

    model.encoder.register_forward_pre_hook(disturb)
    torch.testing.assert_close(model(idx, source=source)[0], before)


@every_variant
def test_later_tokens_of_the_translation_do_not_change_earlier_logits(variant):
    model = shaken(**variant)
    source, idx = with_padding(tokens(2, 6), [3, 6]), tokens(2, 8, seed=1)
    logits, _ = model(idx, source=source)
    for t in range(1, 8):
        changed = idx.clone()
        changed[:, t:] = changed[:, t:] % 10 + 1
        torch.testing.assert_close(model(changed, source=source)[0][:, :t], logits[:, :t])


@every_variant
def test_the_cached_decoder_gives_the_same_logits_and_encodes_once(variant):
    model = shaken(**variant)
    source, idx = tokens(3, 10), tokens(3, 12, seed=1)
    together, _ = model(idx, source=source)
    encoded = []
    model.encoder.register_forward_hook(lambda *args: encoded.append(1))
    caches = model.make_caches(source)
    pieces = [model(piece, caches=caches)[0] for piece in idx.split([1, 5, 1, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), together, atol=1e-5, rtol=1e-5)
    assert len(encoded) == 1


@every_variant
def test_rows_of_the_caches_can_be_picked_and_repeated(variant):
    model = shaken(**variant)
    source, idx = tokens(3, 10), tokens(3, 9, seed=1)
    rows = torch.tensor([2, 0, 0])
    caches = model.make_caches(source)
    model(idx[:, :5], caches=caches)
    for cache in caches:
        cache.select(rows)
    together, _ = model(torch.cat([idx[rows, :5], idx[:, 5:]], dim=1), source=source[rows])
    torch.testing.assert_close(model(idx[:, 5:], caches=caches)[0], together[:, 5:], atol=1e-5, rtol=1e-5)


@every_variant
def test_one_batch_of_pairs_overfits(variant):
    model = tiny(**variant)
    source, target = tokens(4, 6), tokens(4, 5, seed=1)
    if "window" in variant or {"position": "none", "block": "plain"}.items() & variant.items():
        # without order, far sight or a residual path it learns no more than a word
        target = source[:, :1] * torch.ones(1, 5, dtype=torch.int64)
    batch = {"source": source, "idx": nn.functional.pad(target[:, :-1], (1, 0)), "targets": target}
    assert overfit(model, batch, steps=200, lr=5e-3, until=0.1) < 0.1


def test_the_blocks_of_a_window_are_as_wide_to_both_sides_in_the_encoder():
    model = shaken(n_layer=1, window=3)
    source = tokens(1, 9)
    before, _ = model.encode(source)
    changed = source.clone()
    changed[0, 4] = changed[0, 4] % 10 + 1
    after, _ = model.encode(changed)
    assert (after != before).any(dim=-1)[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_in_the_encoder_alibi_falls_to_both_sides():
    bias = tiny(position="alibi").encoder.position.bias(4, 4)
    assert torch.equal(bias, bias.mT) and (bias[:, 0, 1:] < 0).all()


@pytest.mark.parametrize("T", [1, 3])
def test_cross_attention_has_neither_rotation_nor_bias_nor_window(T):
    for position, window in itertools.product(("rotary", "alibi"), (0, 2)):
        model = shaken(n_layer=1, position=position, window=window, mlp="none")
        cross = model.decoder.blocks[0].cross_attn
        x, context = torch.randn(2, T, 32), torch.randn(2, 7, 32)
        swapped = context.flip(1)  # a sum over keys whose order says nothing
        args = (x, model.decoder.position, None)
        torch.testing.assert_close(cross(*args, context), cross(*args, swapped))


def test_with_qk_norm_the_size_of_keys_and_queries_has_no_say_in_cross_attention_either():
    model = shaken(n_layer=1, qk_norm=True)
    source, idx = tokens(2, 6), tokens(2, 5, seed=1)
    before, _ = model(idx, source=source)
    for linear in ("key", "query"):
        getattr(model.decoder.blocks[0].cross_attn, linear).weight.data.mul_(10)
        torch.testing.assert_close(model(idx, source=source)[0], before)


def test_caches_refuse_a_source_with_padding():
    with pytest.raises(AssertionError, match="caches do not remember padding"):
        tiny().make_caches(with_padding(tokens(2, 6), [3, 6]))


def test_the_branches_of_each_stack_are_counted_apart_for_gpt2s_first_weights():
    model = tiny(n_layer=3, n_embd=96)
    for stack, branches in ((model.encoder, 6), (model.decoder, 9)):
        stds = [parameter.std().item() for name, parameter in stack.named_parameters() if ".proj." in name]
        assert stds == pytest.approx([0.02 / branches**0.5] * branches, rel=0.05)


# --------------------------------------------------------------------------------------
# The loss


def test_label_smoothing_mixes_in_the_mean_over_all_tokens_and_only_in_training():
    model = tiny(label_smoothing=0.2)
    source, idx, targets = tokens(2, 6), tokens(2, 5, seed=1), tokens(2, 5, seed=2)
    targets[0, 3:] = -1
    logits, smoothed = model(idx, targets, source=source)
    logp = logits.log_softmax(dim=-1)[targets >= 0]
    plain = -logp.gather(1, targets[targets >= 0][:, None]).mean()
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * -logp.mean())
    torch.testing.assert_close(model.eval()(idx, targets, source=source)[1], plain)


def test_parameters_are_those_of_the_papers_base_model():
    with torch.device("meta"):
        base = models.build(
            ModelConfig(
                model="transformer", n_layer=6, n_head=8, n_embd=512, n_hidden=2048, block_size=256, vocab_size=37000,
                bias=True, position="sinusoidal", block="post_norm", activation="relu",
            )
        )  # fmt: skip
    # a layer of the decoder has one attention and one norm more than one of the encoder; all share a table of 37,000
    attention, feed_forward, norm = 4 * (512**2 + 512), 2 * 512 * 2048 + 2048 + 512, 2 * 512
    layers = 6 * (3 * attention + 2 * feed_forward + 5 * norm)
    assert models.count_parameters(base) == layers + 37000 * 512
