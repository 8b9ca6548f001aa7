"""nanope/optim.py: parameters in groups, the arithmetic of batches, and what memory holds."""

import dataclasses
import itertools
import types

import pytest
import torch

from model import GPT, SCHEMES, GPTConfig
from nanope import optim
from nanope.config import RunConfig
from nanope.costs import Unfilled, memory, simulate
from nanope.distributed import Ranks
from nanope.optim import gpu_micro_batch, make_optimizer, resolve_batch, step_seed

CPU = torch.device("cpu")


def test_resolve_batch():
    config = RunConfig(block_size=16, batch_tokens=16 * 24)
    assert resolve_batch(config, Ranks()) == (24, 24)
    assert resolve_batch(dataclasses.replace(config, micro_batch_size=3), Ranks(1, 4)) == (6, 3)
    # At most 16,384 tokens, and at least one window
    assert resolve_batch(RunConfig(block_size=4096, batch_tokens=4096 * 30), Ranks()) == (30, 3)
    assert resolve_batch(RunConfig(block_size=32768, batch_tokens=32768 * 2), Ranks()) == (2, 1)
    with pytest.raises(ValueError, match="micro_batch_size 5 .*these do: 1, 2, 3, 4, 6, 8, 12, 24"):
        resolve_batch(dataclasses.replace(config, micro_batch_size=5), Ranks())
    with pytest.raises(ValueError, match="24 windows of 16, which .* over 5 ranks.*: 1, 2, 3, 4, 6, 8, 12, 24"):
        resolve_batch(config, Ranks(0, 5))


def groups_of(model, **fields):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, RunConfig(**fields)).param_groups
    return [{names[id(p)] for p in group["params"]} for group in groups], groups


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pos", SCHEMES)
def test_every_parameter_is_in_one_group(pos, bias):
    model = GPT(GPTConfig(16, 64, 2, 2, 16, pos=pos, bias=bias))
    (decayed, plain, positional), _ = groups_of(model)
    names = [name for name, _ in model.named_parameters()]
    assert sorted([*decayed, *plain, *positional]) == sorted(names)
    assert "transformer.wte.weight" in decayed and "lm_head.weight" not in decayed  # tied: once
    assert {"transformer.ln_f.weight", "transformer.h.0.ln_1.weight"} <= plain


@pytest.mark.parametrize(
    "pos, options, own_decayed, own_positional",
    [
        ("learned", {}, {"transformer.wpe.weight", "attn.c_attn.weight"}, set()),
        ("sinusoidal", {}, {"attn.c_attn.weight"}, set()),
        ("none", {}, {"attn.c_attn.weight"}, set()),
        ("rope", {}, {"attn.c_attn.weight"}, set()),
        ("crope", {}, {"attn.c_attn.A", "attn.c_attn.B"}, set()),
        ("comrope", {}, {"attn.c_attn.weight"}, {"attn.pos.P"}),
        ("comrope", {"kind": "ld"}, {"attn.c_attn.weight"}, {"attn.pos.P", "attn.pos.theta"}),
        ("carope", {}, {"attn.c_attn.weight", "attn.pos.c_pos.weight"}, {"attn.pos.c_pos.bias"}),
        ("rope", {"qkv": "low-rank"}, {"attn.c_attn.down", "attn.c_attn.up"}, set()),
        ("alibi", {}, {"attn.c_attn.weight"}, set()),
    ],
)
def test_what_is_decayed_and_what_is_positional(pos, options, own_decayed, own_positional):
    model = GPT(GPTConfig(16, 64, 1, 2, 16, bias=True, pos=pos, pos_options=options))
    (decayed, plain, positional), groups = groups_of(model, weight_decay=0.2, pos_lr_multiplier=3.0)
    short = lambda names: {name.removeprefix("transformer.h.0.") for name in names}  # noqa: E731
    common = {"transformer.wte.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert short(decayed) == common | own_decayed and short(positional) == own_positional
    assert all(model.get_parameter(name).dim() == 1 for name in plain)
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0, 0.0]
    assert [g["lr_multiplier"] for g in groups] == [1.0, 1.0, 3.0]


@pytest.mark.parametrize("pos, own", [("carope", {"attn.pos.c_pos.weight"}), ("comrope", set()), ("learned", set())])
def test_the_multiplier_reaches_matrices_of_the_scheme(pos, own):
    """Where pos_lr_matrices says so, and decayed all the same; the others stay where they were."""
    model = GPT(GPTConfig(16, 64, 1, 2, 16, bias=True, pos=pos))
    fields = dict(weight_decay=0.2, pos_lr_multiplier=3.0)
    before, _ = groups_of(model, **fields)
    (decayed, *others, matrices), groups = groups_of(model, **fields, pos_lr_matrices=True)
    assert matrices == {f"transformer.h.0.{name}" for name in own}
    assert [decayed | matrices, *others] == before
    assert groups[-1]["weight_decay"] == 0.2 and groups[-1]["lr_multiplier"] == 3.0


class LessElsewhere(Ranks):
    """Two ranks, of which the other has memory for 3 windows."""

    def max(self, tensor):
        return torch.maximum(tensor, torch.tensor(-3))


def gpu(monkeypatch, model, rows, reserved=10, memory=100, estimate=None):
    """What stands for a GPU of `memory` bytes, of which `reserved` are in use. It ends above `rows` windows. The
    estimate of what fits is `estimate` where it is given. Also the numbers of windows that were tried, in order."""
    names = dict(reset_peak_memory_stats=None, empty_cache=None, max_memory_reserved=reserved, get_device_name="a GPU")
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=memory))
    if estimate is not None:
        monkeypatch.setattr(optim, "windows_that_fit", lambda *_: estimate)
    tried = []

    def hungry(model, arguments):
        tried.append(len(arguments[0]))
        assert all(p.grad is not None for p in model.parameters())  # as in a step's second pass
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("no")

    return model.register_forward_pre_hook(hungry), tried


def test_the_largest_micro_batch(monkeypatch):
    """Whatever the estimate says; from a good one few are tried."""
    model = GPT(GPTConfig(16, 320, 1, 2, 16))
    auto = RunConfig(micro_batch_size="auto")
    largest = lambda ranks: gpu_micro_batch(auto, model, 24, ranks, CPU, torch.float32)  # noqa: E731
    for rows, expected, estimate in ((1, 1, 24), (5, 4, 1), (7, 6, 12), (100, 24, 0)):
        hook, _ = gpu(monkeypatch, model, rows, estimate=estimate)
        with hook:
            assert largest(Ranks()) == expected
            assert largest(LessElsewhere()) == min(3, expected)
    hook, tried = gpu(monkeypatch, model, 7, estimate=6)
    with hook:
        assert largest(Ranks()) == 6 and tried == [6, 8]
    hook, _ = gpu(monkeypatch, model, 8, reserved=95, estimate=8)  # nine tenths are full
    with hook:
        assert largest(Ranks()) == 1
    hook, _ = gpu(monkeypatch, model, 0, estimate=8)
    with hook, pytest.raises(ValueError, match="not even one window of 16 tokens fits the memory of a GPU"):
        largest(Ranks())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_whose_gradients_alone_are_too_large(monkeypatch):
    model = GPT(GPTConfig(16, 320, 1, 2, 16))
    gpu(monkeypatch, model, 100, estimate=0)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(ValueError, match="not even one window .*: try --activation_checkpointing true, or --fsdp true"):
        gpu_micro_batch(RunConfig(micro_batch_size="auto"), model, 24, Ranks(), CPU, torch.float32)


@pytest.mark.parametrize(
    "gigabytes, expected", [(85, 64), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 32), (1, 4)))]
)
def test_the_usual_micro_batch_of_a_gpu(monkeypatch, gigabytes, expected):
    """At most 65,536 tokens, and no more than the plan says that its memory holds; nothing is tried."""
    shape = GPTConfig(1024, 4096, 2, 12, 768)
    with torch.device("meta"):
        model = Unfilled(shape)
    hook, tried = gpu(monkeypatch, model, 0, memory=gigabytes * 10**9)
    assert gpu_micro_batch(RunConfig(), model, 256, Ranks(), CPU, torch.bfloat16) == expected and not tried
    total = lambda n: memory(simulate(shape, n, torch.bfloat16, True, True), n)["total"]  # noqa: E731
    usable = 0.93 * gigabytes * 1e9
    assert total(expected) <= usable and (expected == 64 or total(2 * expected) > usable)


def test_a_scheme_that_cannot_be_estimated_has_the_usual_micro_batch(monkeypatch, tmp_path, capsys):
    """One that reads values, which fake tensors do not have."""
    path = tmp_path / "reads.py"
    text = "from schemes.base import Scheme\n\nclass Reads(Scheme):\n    def encode(self, qk, x, ctx):\n"
    path.write_text(text + "        return qk * (2.0 if x.sum().item() > 0 else 1.0)\n")
    model = GPT(GPTConfig(1024, 320, 1, 2, 32, pos=f"{path}:Reads"))
    gpu(monkeypatch, model, 0, memory=10**11)
    assert gpu_micro_batch(RunConfig(), model, 512, Ranks(), CPU, torch.bfloat16) == 16
    assert "cannot be estimated with" in capsys.readouterr().err


def test_seeds_depend_on_seed_step_and_what_is_drawn():
    cases = itertools.product((1, 2), (0, 1), (0, 1, "positions"))
    seeds = {step_seed(RunConfig(seed=seed), step, what) for seed, step, what in cases}
    assert len(seeds) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(RunConfig(), 3, 0) == step_seed(RunConfig(data_seed=7), 3, 0)
