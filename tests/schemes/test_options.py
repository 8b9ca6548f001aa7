"""Options of every scheme: each does something, all are written out in model.config, errors name the thing."""

import dataclasses
import inspect
import json
import math

import pytest
import torch
from models import BLOCK, CASES, all_cases, close, config, described, refused, tokens

from model import GPT, SCHEMES, GPTConfig

ALTERNATIVES = {
    "sinusoidal": {"base": 50.0, "scale": 0.5},
    "rope": {"base": "(1+ln2)^(D/2)", "fraction": 0.5, "explicit": True, "qkv": "grouped"},
    "crope": {"base": 50.0, "fraction": 0.5},
    "comrope": {"kind": "ld", "block": 4, "init": "gaussian", "base": 50.0, "unit": 3.0}
    | {"axes": ["token", "byte"], "jitter": 0.1},
    "carope": {
        "base": 50.0,
        "source": "embedding",
        "init": "paper",
        "std": 0.3,
        "content": False,
        "first_power": 1,
        "share_layers": True,
    },
    "prope": {"base": 50.0, "p": 0.5},
    "lerope": {"base": 50.0},
    "xpos": {"base": 50.0, "scale": 3.0},
    "pope": {"base": 50.0, "start": "uniform"},
    "gape": {"base": 50.0, "unit": 7.0},
    "selective": {"base": 50.0, "rank": 0, "silu": True, "gate": True, "phase_bias": True, "std": 0.02},
    "t5": {"buckets": 8, "longest": 40, "std": 0.5, "share_layers": False},
    "kerple": {"kind": "power", "share_layers": True},
    "fire": {"c": 2.0, "L": 6.0, "share_layers": True},
    "fox": {"start": 3.0, "divided": True},
    "cope": {"positions": 3},
    "urpe": {"bias": "none", "share_layers": False, "clip": True},
    "cable": {"bias": True},
    "stickbreaking": {"remainder": "value"},
    "grape": {"width": 4},
    "path": {"rank": 4, "width": 2, "start": -2.0},
    "seqpe": {"digits": 3, "width": 32, "layers": 1, "farthest": 100, "shift": 1.0, "contrast": 0.0, "transfer": 0.0},
}
# Whose parameters start where the option makes no difference to logits
SAME_AT_START = {
    ("rope", "explicit"),
    ("comrope", "unit"),
    ("comrope", "kind"),
    ("comrope", "block"),
    ("cope", "positions"),
    ("urpe", "bias"),
    ("cable", "bias"),
}
# What differs in the number of parameters alone, beyond block_size, or in a step of train.py
ELSEWHERE = {("urpe", "share_layers"), ("urpe", "clip")}
ELSEWHERE |= {("seqpe", option) for option in ("farthest", "shift", "contrast", "transfer")}
NEEDS = {("carope", "share_layers"): {"std": 0.3}, ("t5", "longest"): {"buckets": 8}}
NEEDS |= {("seqpe", "digits"): {"farthest": 100}}  # options without which one does nothing


def options_of(pos):
    return {p.name for p in inspect.signature(SCHEMES[pos].__init__).parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_every_scheme_has_a_case_and_every_option_an_alternative():
    assert {case.split()[0] for case in CASES} == set(SCHEMES)
    with_options = {pos: options_of(pos) for pos in SCHEMES if options_of(pos)}
    assert with_options == {pos: set(found) for pos, found in ALTERNATIVES.items()}


@pytest.mark.parametrize(
    "pos,option", sorted({(pos, option) for pos, found in ALTERNATIVES.items() for option in found} - ELSEWHERE)
)
def test_every_option_does_something(pos, option):
    """It makes another function of the same weights, or other weights of the same function at step 0."""

    def made(options):
        model = described(GPT(config(pos, options)).double())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "c_attn" in name:
                    parameter *= 20
                if "encoder" in name:
                    parameter *= 15
                if "c_pos.weight" in name or "c_p.weight" in name:
                    parameter += torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter)
        return model.state_dict(), model(tokens(BLOCK))[0]

    others = NEEDS.get((pos, option), {})
    (state, logits), (other, changed) = made(others), made({**others, option: ALTERNATIVES[pos][option]})
    if (pos, option) in SAME_AT_START:
        assert state.keys() != other.keys() or any(not torch.equal(state[name], other[name]) for name in state)
        close(changed, logits, atol=1e-5)
    else:
        assert (changed - logits).abs().max() > 1e-3


@all_cases
def test_resolved_config_makes_the_same_model(case):
    """A checkpoint holds model.config: all options written out, plain types, and the caller's config is not touched."""
    asked = config(case.split()[0], dict(CASES[case]))
    before = dataclasses.asdict(asked)
    model = GPT(asked)
    assert dataclasses.asdict(asked) == before
    assert set(model.config.pos_options) == options_of(asked.pos)
    again = GPT(GPTConfig(**json.loads(json.dumps(dataclasses.asdict(model.config)))))
    assert torch.equal(described(again)(tokens(BLOCK))[0], described(model)(tokens(BLOCK))[0])


@pytest.mark.parametrize(
    "pos,words",
    [
        ("crop", ["pos 'crop'", "did you mean crope", *SCHEMES]),
        ("xyzzy", ["xyzzy", ", ".join(SCHEMES)]),
        (None, ["pos", "None"]),
        ([], ["pos", r"\[\]"]),
        (["rope", 1], ["pos", r"\['rope', 1\]"]),
    ],
)
def test_errors_name_the_schemes(pos, words):
    refused({"pos": pos}, words)


@pytest.mark.parametrize(
    "pos,options,words",
    [
        ("rope", {"bas": 1.0}, ["unknown option 'bas'", "did you mean base", "base, fraction, explicit, qkv"]),
        ("none", {"base": 1.0}, ["unknown option 'base'", "no options"]),
        ("rope", {"base": "1e4"}, ["base of rope", "'1e4'", "float"]),
        ("rope", {"base": True}, ["base of rope", "True"]),
        ("rope", {"base": math.nan}, ["base of rope", "nan"]),
        ("rope", {"explicit": 1}, ["explicit of rope", "bool"]),
        ("rope", {"base": -1.0}, ["base", "positive", "-1"]),
        ("rope", {"fraction": 1.5}, ["fraction 1.5"]),
        ("rope", {"fraction": 0.0}, ["fraction 0.0"]),
        ("rope", {"fraction": 0.19}, ["fraction 0.19", "16"]),  # 3 channels of 16
        ("rope", {"fraction": 0.01}, ["fraction 0.01", "16"]),  # none of 16: rope without positions
        ("rope", {"qkv": "sparse"}, ["qkv of rope", "'sparse'", "dense", "grouped", "low-rank"]),
        ("rope", {"base": "2^D"}, ["base of rope", "float or", r"\(1\+ln2\)\^\(D/2\)"]),
        ("crope", {"base": "(1+ln2)^(D/2)"}, ["base of crope", "float"]),
        ("sinusoidal", {"base": -1.0}, ["base", "positive", "-1"]),  # would be nan
        ("sinusoidal", {"base": 0.0}, ["base", "positive", "0"]),
        ("comrope", {"block": 3}, ["block of comrope", "3", "2, 4, 8"]),
        ("comrope", {"block": 8.0}, ["block of comrope", "8.0"]),
        ("comrope", {"kind": "lp"}, ["kind of comrope", "'lp'", "ap", "ld"]),
        ("comrope", {"unit": "x"}, ["unit of comrope", "'x'", "float or list or null"]),
        ("comrope", {"unit": 0}, ["unit", "positive", "0"]),
        ("comrope", {"unit": [3.0, 4.0]}, ["unit", "one for each of token$"]),
        ("comrope", {"unit": [3.0, "x"], "axes": ["token", "byte"]}, ["unit", "'x'", "token, byte"]),
        ("comrope", {"axes": []}, ["axes", "token", "line, sentence, byte"]),
        ("comrope", {"axes": ["byte"]}, ["axes", r"\['byte'\]", "token"]),
        ("comrope", {"axes": ["token", "word"]}, ["axes", "'word'", "line, sentence, byte"]),
        ("comrope", {"axes": ["token", "byte", "byte"]}, ["axes", "once"]),
        ("comrope", {"axes": ["token", "line", "byte"]}, ["3 axes", "2 blocks of 8", "smaller", "ld"]),
        ("comrope", {"jitter": -0.1}, ["jitter", "-0.1"]),
        ("carope", {"source": "x"}, ["source of carope", "hidden", "embedding"]),
        ("carope", {"base": 1.0}, ["base", "1.0"]),
        ("carope", {"init": "paper", "content": False}, ["content false", "init rope"]),
        ("carope", {"std": 0.1, "content": False}, ["content false", "std must be 0"]),
        ("carope", {"std": -0.1}, ["std", "negative", "-0.1"]),
        ("carope", {"first_power": 2}, ["first_power of carope", "2", "0, 1"]),
        ("rope", None, ["pos_options", "None"]),
        ("rope", [1], ["pos_options", r"\[1\]"]),
    ],
)
def test_errors_name_the_option(pos, options, words):
    refused({"pos": pos, "pos_options": options}, words)


@pytest.mark.parametrize(
    "pos,shape,words",
    [
        ("sinusoidal", {"n_head": 5, "n_embd": 15}, ["15", "even"]),
        ("comrope", {"n_embd": 36}, ["block 8", "12"]),
        ("rope", {"n_head": 2, "n_embd": 20, "pos_options": {"qkv": "low-rank"}}, ["low-rank", "20", "8"]),
        ("rope", {"n_embd": 45}, ["rope", "15", "even"]),
        ("crope", {"n_embd": 45}, ["crope", "15", "even"]),
        ("carope", {"n_embd": 45}, ["carope", "15", "even"]),
    ],
)
def test_errors_name_the_width(pos, shape, words):
    refused({"pos": pos, **shape}, words)
