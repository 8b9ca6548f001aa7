"""Every hook on a toy scheme, combinations, patterns over layers, windows, and schemes from files outside."""

import copy
import functools
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from models import Largest

import schemes
from model import GPT, GPTConfig
from nanope import attention, checkpoint
from nanope.block_masks import causal_block_mask

TOYS = Path(__file__).with_name("toys.py")
TOKENS = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))


def toy(*names):
    return "+".join(name if name in schemes.SCHEMES else f"{TOYS}:{name}" for name in names)


def build(pos, seed=0, **fields):
    """A model in float64 whose weights are large enough that attention is not flat."""
    shape = {"block_size": 64, "vocab_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 32, **fields}
    model = GPT(GPTConfig(pos=pos, **shape), seed).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return model


def softmax(scores):
    return torch.softmax(scores, -1)


def naive(scheme, q, k, v, x, ctx, window, dropout, bias=None, weights=softmax):
    """Attention by its definition, one query at a time; `bias(head, m, n)` and `weights` are plain functions."""
    out = torch.zeros_like(v)
    for m in range(q.size(2)):
        first = max(0, m - window + 1) if window else 0
        for h in range(q.size(1)):
            scores = torch.stack(
                [(q[:, h, m] * k[:, h, n]).sum(-1) / math.sqrt(v.size(-1)) for n in range(first, m + 1)], -1
            )
            if bias:
                scores = scores + torch.tensor([bias(h, m, n) for n in range(first, m + 1)], dtype=scores.dtype)
            out[:, h, m] = (weights(scores)[..., None] * v[:, h, first : m + 1]).sum(1)
    return out


def same_logits(model, other):
    return torch.allclose(model(TOKENS)[0], other(TOKENS)[0], rtol=0, atol=1e-10)


def with_attention(model, **options):
    """A copy of the model whose attention is the naive one."""
    other = copy.deepcopy(model)
    other.attend = functools.partial(naive, **options)
    return other


# ---- hooks


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 6])
def test_one_bias_in_three_ways(window):
    """bias, a wider encode and dense scores give the same as the definition, at all lengths of chunks."""
    expected = with_attention(build("none", window=window), bias=lambda h, m, n: (n - m) / 8)(TOKENS)[0]
    for name in ("Slope", "WideSlope", "DenseSlope"):
        model = build(toy(name), window=window)
        for queries in (40, 1, 7):
            model.attend = functools.partial(attention.attend, chunk=2 * 2 * 40 * queries)
            assert torch.allclose(model(TOKENS)[0], expected, rtol=0, atol=1e-10), (name, queries)


@pytest.mark.slow
def test_weights():
    model = build(toy("Sigmoid"))
    assert same_logits(model, with_attention(build("none"), weights=lambda scores: torch.sigmoid(scores - 2)))


def test_project_and_projection():
    model = build(toy("Halved"))
    half = build("none")
    for block in half.transformer["h"]:
        block.attn.c_attn.weight.data.div_(2)
    assert same_logits(model, half) and type(model.transformer["h"][0].attn.c_attn) is torch.nn.Linear


def test_positions_are_drawn_in_training_alone_and_are_the_steps_own():
    model = build(toy("Stretch"))
    plain = model(TOKENS, TOKENS)[1]
    model.train()

    def loss(seed, tokens=TOKENS):
        with model.parameters_fixed(seed):
            return model(tokens, tokens)[1]

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    halves = (loss(1, TOKENS[:1]) + loss(1, TOKENS[1:])) / 2  # the micro-batches of a step see the same positions
    assert torch.allclose(halves, loss(1), rtol=0, atol=1e-12)
    assert torch.equal(model.eval()(TOKENS, TOKENS)[1], plain)


def test_a_relative_scheme_does_not_feel_positions_that_move_together():
    model = build(toy("rope", "Jitter"))
    plain = model(TOKENS, TOKENS)[1]
    with model.train().parameters_fixed(5):
        assert torch.allclose(model(TOKENS, TOKENS)[1], plain, rtol=0, atol=1e-10)
    positions = model.hidden(TOKENS, offset=1000)
    assert torch.allclose(positions, model.hidden(TOKENS), rtol=0, atol=1e-9)


def test_auxiliary_losses_add_up_and_have_gradients():
    model = build(toy("rope", "Penalty"))
    model(TOKENS, TOKENS)
    loss = model.auxiliary()
    assert loss.item() == pytest.approx(3 * 2 * 0.125**2)
    loss.backward()
    slope = model.transformer["h"][1].attn.pos.get_parameter("Penalty.slope")
    assert torch.equal(slope.grad, 2 * slope)
    assert build("rope").auxiliary() is None


def test_drawn_positions_reach_a_table_of_positions():
    model = build(toy("learned", "Skip")).train()

    def loss(seed):
        with model.parameters_fixed(seed):
            return model(TOKENS, TOKENS)[1].item()

    assert len({loss(seed) for seed in range(4)}) > 1 and loss(1) == loss(1)


def test_what_a_scheme_keeps_is_apart_from_attentions_own_cache():
    model = build(toy("KeepsK"))
    prompt = TOKENS[:, :5]
    tokens = model.generate(prompt, 6, temperature=0)
    for n in range(5, 11):
        assert torch.equal(model(tokens[:, :n])[0][:, -1].argmax(-1), tokens[:, n])


@pytest.mark.parametrize(("name", "expected"), [("alibi", (1, False)), ("Forget", (2, True)), ("Penalty", (1, True))])
def test_a_chunk_counts_a_bias_once_where_sequences_share_it(name, expected):
    found = []

    def spy(scheme, q, k, v, x, ctx, window, dropout):
        found.append(attention.of_bias(scheme.bias(x, q, k, ctx), 2, 2, q.device))
        return attention.attend(scheme, q, k, v, x, ctx, window, dropout)

    model = build(toy(name))
    model.attend = spy
    model(TOKENS)
    assert set(found) == {expected}


def test_a_scheme_that_adds_to_rope_has_no_plain_form():
    with pytest.raises(ValueError, match="Biased has a bias of its own"):
        build(toy("Biased")).to_rope()


@pytest.mark.slow
def test_many_kinds_of_layers_compile_for_training_and_validation():
    model = build("rope", n_layer=4, window=[4, 8, 16, 0])
    model.compile_parts(backend="eager")
    for rows in (2, 1):
        model.train()(TOKENS[:rows], TOKENS[:rows])[1].backward()
        with torch.no_grad():
            model.eval()(TOKENS[:rows], TOKENS[:rows], reduction="none")


# ---- combinations


@pytest.mark.slow
def test_a_combination_is_its_parts_in_order():
    """rope turns, alibi adds its bias: alibi's own slopes on rope's attention."""
    slopes = build("alibi").transformer["h"][0].attn.pos.slopes()
    reference = with_attention(build("rope"), bias=lambda h, m, n: slopes[h] * (n - m))
    assert same_logits(build("rope+alibi"), reference)
    both = build(toy("alibi", "Slope"))
    assert same_logits(both, with_attention(build("none"), bias=lambda h, m, n: (slopes[h] + 1 / 8) * (n - m)))


def test_parts_have_their_own_parameters_options_and_initial_values():
    options = {"rope": {"base": 500.0}, "Forget": {"start": 3.0}}
    pair, alone = build(toy("rope", "Forget"), 4, pos_options=options), build(toy("Forget"), 4)
    gates = [m.state_dict() for m in (pair, alone)]
    name = "transformer.h.2.attn.pos.{}gate.weight"
    assert torch.equal(gates[0][name.format("Forget.")], gates[1][name.format("")])
    assert pair.config.pos_options["rope"] == build("rope", pos_options={"base": 500.0}).config.pos_options
    assert gates[0]["transformer.h.0.attn.pos.Forget.gate.bias"].tolist() == [3.0, 3.0]
    assert "transformer.h.0.attn.pos.Forget.gate.bias" in pair.position_parameters()


def test_the_length_of_a_combination_is_that_of_its_shortest_part():
    with pytest.raises(ValueError, match="learned.* end at block_size 64"):
        build("learned+alibi").check_length(65)
    build("rope+alibi").check_length(65)


# ---- patterns over layers


def test_a_pattern_cycles_over_the_layers():
    model = build(["rope", "none"], n_layer=5)
    names = [block.attn.pos.name for block in model.transformer["h"]]
    assert names == ["rope", "none", "rope", "none", "rope"]
    calls = []
    plain = attention.attend

    def spy(scheme, q, k, v, x, ctx, window, dropout):
        calls.append(ctx.prepared is not None)
        return plain(scheme, q, k, v, x, ctx, window, dropout)

    model.attend = spy
    model(TOKENS)
    assert calls == [True, False, True, False, True]


# ---- windows


@pytest.mark.parametrize("pos", ["none", "rope", "alibi", "carope"])
def test_a_window_is_the_mask_by_its_definition(pos):
    model = build(pos, window=[5, 0, 1])
    slopes = build("alibi").transformer["h"][0].attn.pos.slopes()
    bias = {"bias": lambda h, m, n: slopes[h] * (n - m)} if pos == "alibi" else {}
    assert same_logits(model, with_attention(model, **bias))
    wide = build(pos, window=40)
    assert torch.equal(
        wide(TOKENS)[0], build(pos)(TOKENS)[0]
    )  # as long as the input: full attention, by the same kernel


@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_a_window_forms_no_scores_of_all_queries_and_keys(pos):
    T = 2048
    model = GPT(GPTConfig(T, 64, 1, 2, 16, pos=pos, window=32))
    tokens = torch.randint(64, (1, T))
    with Largest() as largest:
        model(tokens, tokens)[1].backward()
    assert largest.elements < T * T / 8


@pytest.mark.slow
@pytest.mark.parametrize(("pos", "window"), [("alibi", 0), ("rope", 9), ("Forget", 9), ("WideSlope", 9)])
def test_flex_attention_gives_the_same(pos, window, monkeypatch):
    """The way of CUDA, here uncompiled on a CPU, whose compiled kernel gives NaN in windows."""
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: flex.flex_attention)
    model = build(toy(pos), n_layer=1, window=window).float()
    x, seen = model.hidden(TOKENS), {}

    def by_flex(scheme, q, k, v, x, ctx, window, dropout):
        ctx.block_mask = causal_block_mask(ctx.length, window, ctx.device)
        seen["mask"] = True
        return attention.attend(scheme, q, k, v, x, ctx, window, dropout)

    model.attend = by_flex
    with torch.no_grad():
        assert torch.allclose(model.hidden(TOKENS), x, atol=2e-4) and seen


# ---- files outside of the registry


def test_a_model_of_an_outside_scheme_is_copied_pickled_and_loaded(tmp_path):
    model = build(toy("rope", "Forget"), 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(TOKENS)[0], model(TOKENS)[0])
    state = {"model": model.state_dict(), "config": vars(model.config), "step": 1}
    checkpoint.save(tmp_path / "x.pt", state)
    loaded = checkpoint.build_model(checkpoint.load(tmp_path / "x.pt")).double().eval()
    assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    assert TOYS in schemes.sources(model.config.pos)
    assert schemes.label(model.config.pos) == "rope+Forget" and schemes.label(["rope", toy("Slope")]) == "rope, Slope"


@pytest.mark.parametrize(
    "pos, used", [("grape", ["alibi"]), ("gape", ["rope"]), ("rope+fox", ["rope", "fox"]), ("t5", [])]
)
def test_sources_are_those_of_every_scheme_that_is_used(pos, used):
    """On them the rows of an evaluation depend."""
    always = ["__init__", "_combined", "_skew", "base"]
    assert {path.stem for path in schemes.sources(pos)} == {*always, *used, *pos.split("+")}


def test_spaces_and_a_table_that_two_kinds_of_layers_share():
    assert same_logits(build("rope + alibi"), build("rope+alibi"))
    assert "transformer.wpe.weight" in build(["learned", "learned+alibi"]).state_dict()


@pytest.mark.parametrize(("fields", "text"), [
    ({"pos": "learned+sinusoidal"}, "learned and sinusoidal cannot be combined: each has its own embedding"),
    ({"pos": "comrope+rope"}, "comrope cannot be combined with rope"),
    ({"pos": "grape+rope"}, "rope cannot turn what grape has made wider: give grape last, as rope+grape"),
    ({"pos": "path+cope"}, "path and cope cannot be combined: each has its own scores"),
    ({"pos": toy("DenseSlope") + "+" + toy("rope") + "+rope"}, "has two schemes of one name in"),
    ({"pos": "rope+rop"}, "did you mean rope?"),
    ({"pos": []}, "pos must be a scheme's name or a list of them, not []"),
    ({"pos": ["rope", 3]}, "pos must be a scheme's name or a list of them"),
    ({"pos": ["rope"] * 4}, "pos has 4 entries for 3 layers"),
    ({"pos": ["learned", "sinusoidal"]}, "adds two tables of positions"),
    ({"pos": "gone.py:Mine"}, "gone.py, which is not there"),
    ({"pos": f"{TOYS}:Forgot"}, "has no scheme 'Forgot'; did you mean Forget?"),
    ({"pos": "rope+alibi", "pos_options": {"base": 3.0}}, "'base' is no scheme of pos rope+alibi"),
    ({"pos": "rope+alibi", "pos_options": {"rope": 3.0}}, "rope must be a mapping of option to value"),
    ({"pos": "rope+alibi", "pos_options": {"rope": {"bas": 3.0}}}, "unknown option 'bas'; did you mean base?"),
    ({"pos": toy("Forget"), "pos_options": {"start": "now"}}, "start of Forget cannot be 'now'; expected float"),
    ({"pos": 3}, "pos must be a scheme's name or a list of them"),
    ({"pos": ("rope", "none")}, "pos must be a scheme's name or a list of them"),
    ({"pos": str(TOYS)}, "names a file alone: give the class too"),
    ({"pos": toy("NoDefault")}, "NoDefault needs a value of start, which has no default"),
    ({"pos": toy("NoLayer")}, "NoLayer cannot be built: TypeError"),
    ({"window": -1}, "window must be a whole number from 0 on"),
    ({"window": [4, 0, 0, 0]}, "window has 4 entries for 3 layers"),
    ({"window": []}, "window must be"),
])  # fmt: skip
def test_what_cannot_be_built_says_why(fields, text):
    with pytest.raises(ValueError, match=r".*") as caught:
        build(**{"pos": "rope", **fields})
    assert text in str(caught.value)


def test_a_file_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match="bad.py cannot be loaded: ModuleNotFoundError: No module named"):
        build(f"{tmp_path}/bad.py:Mine")
