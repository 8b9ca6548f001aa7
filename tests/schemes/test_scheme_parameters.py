"""Parameters of every scheme: names, shapes, order, counts, seeds, initial values, gradients, weight decay."""

import hashlib
import math

import pytest
import torch
from models import BLOCK, CASES, HALVED, HEADS, LAYERS, VOCAB, WIDTH, D, all_cases, build, config, gpt2_names, tokens

from model import GPT

FIRE = {"log_c": (), "log_L": (), "hidden.weight": (32, 1), "hidden.bias": (32,), "out.weight": (HEADS, 32)}


def path(rank, width):
    maps = {"down.weight": (rank, WIDTH), "up.weight": (WIDTH, rank)}
    return {"conv": (WIDTH, width)} | maps | {"gate.weight": (HEADS, WIDTH), "gate.bias": (HEADS,)}


def seqpe(digits=5, width=WIDTH, layers=2):
    sizes = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    sizes |= {"fc": (4 * width, width), "out": (width, 4 * width)}
    names = {f"layers.{i}.{name}.weight": size for i in range(layers) for name, size in sizes.items()}
    names |= {"digit": (10, width), "place": (digits, width), "cls": (1, width), "out.weight": (WIDTH, width)}
    names |= {"to_q.weight": (WIDTH, WIDTH), "to_k.weight": (WIDTH, WIDTH)}
    return {f"encoder.{name}": size for name, size in names.items()}


OWN = {  # a layer's, by case: name → shape
    "comrope": {"P": (HEADS, D // 8, 8, 8)},
    "comrope 4 ld": {"P": (HEADS, D // 4, 4, 4), "theta": (HEADS, D // 4)},
    "comrope 2 unit": {"P": (HEADS, D // 2, 2, 2)},
    "comrope gaussian": {"P": (HEADS, D // 8, 8, 8)},
    "comrope ld-shared": {"P": (HEADS, D // 8, 8, 8), "theta": (1, D // 8)},
    "carope": {"c_pos.weight": (HEADS, WIDTH), "c_pos.bias": (HEADS,)},
    "carope from 1": {"c_pos.weight": (HEADS, WIDTH), "c_pos.bias": (HEADS,)},
    "carope shared": {"c_pos.weight": (HEADS, WIDTH), "c_pos.bias": (HEADS,)},
    "carope embedding": {"c_pos.weight": (HEADS, WIDTH), "c_pos.bias": (HEADS,)},
    "carope paper": {"c_pos.weight": (HEADS, WIDTH)},
    "carope constant": {"c_pos.bias": (HEADS,)},
    "comrope axes": {"P": (HEADS, D // 4, 4, 4)},
    "comrope axes ld": {"P": (HEADS, D // 8, 8, 8), "theta": (3, HEADS, D // 8)},
    "comrope axes ld-shared": {"P": (HEADS, D // 2, 2, 2), "theta": (4, 1, D // 2)},
    "t5": {"table": (32, HEADS)},
    "t5 own": {"table": (8, HEADS)},
    "kerple": {"r1": (HEADS,), "r2": (HEADS,)},
    "kerple power": {"r1": (HEADS,), "r2": (HEADS,)},
    "fire": FIRE,
    "fire shared": FIRE,
    "fox": {"gate.weight": (HEADS, WIDTH), "gate.bias": (HEADS,)},
    "fox start": {"gate.weight": (HEADS, WIDTH), "gate.bias": (HEADS,)},
    "fox divided": {"gate.weight": (HEADS, WIDTH), "gate.bias": (HEADS,)},
    "cable": {"distance.weight": (HEADS, WIDTH), "slope.weight": (HEADS, WIDTH)},
    "cable bias": dict.fromkeys(("distance.weight", "slope.weight"), (HEADS, WIDTH))
    | dict.fromkeys(("distance.bias", "slope.bias"), (HEADS,)),
    "lerope": {"scale.log": (D // 2,)},
    "lerope base": {"scale.log": (D // 2,)},
    "pope": {"delta": (HEADS, D)},
    "pope base uniform": {"delta": (HEADS, D)},
    "gape": dict.fromkeys(("w_g", "w_l"), (HEADS, D)) | dict.fromkeys(("b_g", "b_l", "gamma"), (HEADS,)),
    "gape base": dict.fromkeys(("w_g", "w_l"), (HEADS, D)) | dict.fromkeys(("b_g", "b_l", "gamma"), (HEADS,)),
    "selective": {"down": (16, WIDTH), "up": (WIDTH // 2, 16), "conv": (WIDTH // 2, 4)},
    "selective base gate bias": {
        "full": (HEADS, D, D // 2),
        "scale": (HEADS,),
        "conv": (WIDTH // 2, 4),
        "phase_bias": (HEADS, D // 2),
        "gate.weight": (HEADS, WIDTH),
        "gate.bias": (HEADS,),
    },
    "path": path(rank=32, width=3),
    "seqpe": seqpe(),
    "seqpe small": seqpe(digits=3, width=32, layers=1),
    "seqpe without losses": seqpe(digits=4),
    "path rank width start": path(rank=5, width=2),
    "cope": {"e": (D, 64)},
    "cope positions": {"e": (D, 3)},
    "urpe": {"C.table": (HEADS, BLOCK), "B.table": (HEADS, BLOCK)},
    "urpe none clip": {"C.table": (HEADS, BLOCK)},
    "grape": {"c_p.weight": (8 * HEADS, WIDTH)},
    "grape width": {"c_p.weight": (2 * HEADS, WIDTH)},
}


# Own parameters without weight decay, by scheme, where a case has them
UNDECAYED = {
    "comrope": {"P", "theta"},
    "carope": {"c_pos.bias"},
    "t5": {"table"},
    "kerple": {"r1", "r2"},
    "fire": {"log_c", "log_L", "hidden.bias"},
    "fox": {"gate.bias"},
    "cable": {"distance.bias", "slope.bias"},
    "lerope": {"scale.log"},
    "pope": {"delta"},
    "gape": {"b_g", "b_l", "gamma"},
    "selective": {"scale", "gate.bias", "phase_bias"},
    "path": {"gate.bias"},
    "seqpe": {f"encoder.{name}" for name in ("digit", "place", "cls")},
}
UNDECAYED |= {"cope": {"e"}, "urpe": {"C.table", "B.table"}}
# Own parameters whose initial values differ, and are not drawn, by case or scheme
SET = {"comrope": {"P"}, "comrope gaussian": set(), "comrope ld-shared": set()}
SET |= {"comrope axes ld": set(), "comrope axes ld-shared": {"P", "theta"}}
# Cases in which all layers share all of their own parameters: these are the first layer's
SHARED = {"carope shared", "t5", "fire shared", "lerope", "lerope base", "seqpe", "seqpe small", "seqpe without losses"}
SHARED |= {"urpe", "kerple power"}


def owners(case):
    """How many layers have own parameters."""
    return 1 if case in SHARED else LAYERS


@all_cases
@pytest.mark.parametrize("bias", [False, True])
def test_names_shapes_and_counts(case, bias):
    pos, C, V, L = case.split()[0], WIDTH, VOCAB, LAYERS
    model = GPT(config(pos, CASES[case], bias=bias))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = gpt2_names(bias)
    if case in HALVED:
        expected -= {f"transformer.h.{i}.attn.c_attn.weight" for i in range(L)}
        expected |= {f"transformer.h.{i}.attn.c_attn.{part}" for i in range(L) for part in HALVED[case]}
    else:
        assert shapes["transformer.h.0.attn.c_attn.weight"] == (3 * C, C)
    if pos == "learned":
        expected.add("transformer.wpe.weight")
    names = OWN.get(case, {})
    own = {f"transformer.h.{i}.attn.pos.{name}": names[name] for i in range(owners(case)) for name in names}
    assert set(shapes) == expected | set(own)
    assert all(shapes[name] == shape for name, shape in own.items())
    buffers = {f"transformer.h.{i}.attn.pos.freqs" for i in range(L)} if case == "rope explicit" else set()
    buffers |= {"token_text"} if "axes" in case else set()
    tied = {f"transformer.h.{i}.attn.pos.{name}" for i in range(owners(case), L) for name in names}
    assert set(model.state_dict()) == set(shapes) | buffers | tied | {"lm_head.weight"}
    assert model.lm_head.weight is model.transformer.wte.weight

    count = V * C + L * 12 * C * C + (2 * L + 1) * C  # embedding, matrices, LayerNorm weights
    count += L * (3 + 1 + 4 + 1 + 2) * C + C if bias else 0
    count += BLOCK * C if pos == "learned" else 0
    count += owners(case) * sum(math.prod(shape) for shape in names.values())
    count -= L * 3 * C * C // 2 if case in HALVED else 0
    assert model.parameter_count() == count == sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    "case,parts",
    [
        ("crope", ["c_attn.A", "c_attn.B", "c_attn.bias", "c_proj.weight", "c_proj.bias"]),
        ("comrope 4 ld", ["P", "theta", "c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"]),
        ("carope", ["c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias", "c_pos.weight", "c_pos.bias"]),
    ],
)
def test_order_is_that_of_earlier_checkpoints(case, parts):
    """Optimizer states know parameters by their order: a layer's own, then its modules, last those of its scheme."""
    names = [name.replace(".attn.pos.", ".attn.") for name, _ in build(case).named_parameters()]
    prefix = "transformer.h.1.attn."
    assert [name.removeprefix(prefix) for name in names if name.startswith(prefix)] == parts


@pytest.mark.parametrize("case", ["rope explicit", "comrope 4 ld", "carope"])
def test_names_of_earlier_checkpoints_load(case):
    """The scheme's own were named without `pos`."""
    model = build(case)
    before = {name.replace(".attn.pos.", ".attn."): value for name, value in model.state_dict().items()}
    assert before.keys() != model.state_dict().keys()
    other = GPT(model.config, seed=9).double()
    other.load_state_dict(before)
    assert torch.equal(other(tokens(BLOCK))[0], model(tokens(BLOCK))[0])


def test_initial_values_are_keyed_by_the_names_of_earlier_checkpoints():
    """So that a seed still means the values that it meant before schemes were members of attention."""
    model = GPT(config("comrope", {"init": "gaussian"}), seed=5)
    for name in ("attn.P", "attn.c_attn.weight"):
        digest = hashlib.sha256(f"5/transformer.h.1.{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        ours = model.get_parameter(f"transformer.h.1.{name.replace('attn.P', 'attn.pos.P')}")
        std = 1.0 if name == "attn.P" else 0.02
        assert torch.equal(ours, torch.empty(ours.shape).normal_(0.0, std, generator=generator))


@all_cases
def test_seeds(case):
    """Equal seeds give equal shared parameters in every scheme; another seed gives others; the global generator is left
    alone."""
    pos = case.split()[0]
    state = torch.random.get_rng_state()
    model = GPT(config(pos, CASES[case]), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)  # the global generator has no influence either
    again = dict(GPT(config(pos, CASES[case]), seed=5).named_parameters())
    learned = dict(GPT(config("learned"), seed=5).named_parameters())
    other = dict(GPT(config(pos, CASES[case]), seed=6).named_parameters())
    shared = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again[name])
        if name in learned:
            shared += 1
            assert torch.equal(parameter, learned[name]), name
        own = name.partition(".attn.pos.")[2]
        random = parameter.numel() > 1 and parameter.std() > 0 and own not in SET.get(case, SET.get(pos, ()))
        assert torch.equal(parameter, other[name]) != random, name
    assert shared >= len(gpt2_names(True)) - (LAYERS if case in HALVED else 0)


@all_cases
def test_initial_values_are_gpt2s(case):
    """N(0, 0.02), 0.02/√(2L) into the residual stream, LayerNorm 1, biases 0; matrices differ from each other."""
    model = GPT(config(case.split()[0], CASES[case], n_layer=3, n_embd=96))
    values = dict(model.named_parameters())
    for name, parameter in values.items():
        if ".attn.pos." in name:
            continue
        part, kind = name.split(".")[-2:]
        if part.startswith("ln"):
            assert (parameter == (kind == "weight")).all()
        elif kind == "bias":
            assert not parameter.any()
        else:
            controls = {"rope grouped": 0.02 * math.sqrt(2), "rope low-rank": math.sqrt(0.02 / math.sqrt(36))}
            std = controls.get(case, 0.02) if part == "c_attn" else 0.02 / math.sqrt(6) if part == "c_proj" else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert not torch.equal(values["transformer.h.0.mlp.c_fc.weight"], values["transformer.h.1.mlp.c_fc.weight"])


def test_position_parameters():
    """The ones without weight decay: P, θ and CARoPE's bias, and no matrix that acts on activations."""
    for case in CASES:
        names = GPT(config(case.split()[0], CASES[case])).position_parameters()
        own = UNDECAYED.get(case.split()[0], set()) & set(OWN.get(case, ()))
        assert {name.split(".attn.pos.")[-1] for name in names} == own, case
    assert len(build("carope shared").position_parameters()) == 1
    model = build("comrope 4 ld")
    assert len(model.position_parameters()) == 2 * LAYERS
    assert model.position_parameters() <= dict(model.named_parameters()).keys()


def test_two_parts_start_with_values_of_their_own():
    """path+fox has two gates of one name and shape. Those of the first are those of the scheme alone."""
    both, path = (GPT(config(pos), seed=3).transformer["h"][0].attn.pos for pos in ("path+fox", "path"))
    gates = [both.part(name).gate.weight for name in ("path", "fox")]
    assert torch.equal(gates[0], path.gate.weight) and not torch.equal(*gates)
