"""Small models of every scheme, and what tests do with them.

Where exactness matters the models are float64 with random weights, large enough that positions matter.
"""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, SCHEMES, GPTConfig
from schemes.base import Context

BLOCK, VOCAB, LAYERS, HEADS, WIDTH = 12, 40, 2, 3, 48  # 3 heads of 16: no power of 2
D = WIDTH // HEADS
SHAPE = dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, bias=True)
DATA = Path(__file__).parent / "data"

# Every scheme, and every option of it away from its default at least once
CASES = {
    "learned": {},
    "sinusoidal": {},
    "sinusoidal base scale": {"base": 50.0, "scale": 0.3},
    "none": {},
    "rope": {},
    "rope base fraction": {"base": 50.0, "fraction": 0.5},
    "rope explicit": {"explicit": True, "base": 50.0, "fraction": 0.5},
    "rope base of D": {"base": "(1+ln2)^(D/2)"},
    "rope grouped": {"qkv": "grouped"},
    "rope low-rank": {"qkv": "low-rank"},
    "crope": {},
    "crope base fraction": {"base": 50.0, "fraction": 0.25},
    "comrope": {},
    "comrope 4 ld": {"block": 4, "kind": "ld", "base": 50.0},
    "comrope 2 unit": {"block": 2, "unit": 3.0},
    "comrope gaussian": {"init": "gaussian", "unit": 5},
    "comrope ld-shared": {"kind": "ld-shared", "init": "gaussian", "unit": 50.0},
    "carope": {},
    "carope embedding": {"source": "embedding", "base": 50.0},
    "carope paper": {"init": "paper"},
    "carope constant": {"content": False},
    "carope from 1": {"first_power": 1, "std": 0.3},
    "carope shared": {"share_layers": True, "std": 0.3},
    "alibi": {},
    "comrope axes": {"axes": ["token", "line", "byte"], "block": 4, "unit": [12.0, 3, 20.0]},
    "comrope axes ld": {"axes": ["token", "sentence", "byte"], "kind": "ld", "init": "gaussian", "unit": 9.0},
    "comrope axes ld-shared": {"axes": ["token", "byte", "line", "sentence"], "kind": "ld-shared", "block": 2},
    "t5": {},
    "t5 own": {"buckets": 8, "longest": 11, "std": 0.5, "share_layers": False},
    "kerple": {},
    "kerple power": {"kind": "power", "share_layers": True},
    "fire": {},
    "fire shared": {"c": 0.5, "L": 6.0, "share_layers": True},
    "fox": {},
    "fox start": {"start": 2.0},
    "fox divided": {"divided": True},
    "cable": {},
    "cable bias": {"bias": True},
    "prope": {},
    "prope base p": {"base": 50.0, "p": 0.4},
    "lerope": {},
    "lerope base": {"base": 50.0},
    "xpos": {},
    "xpos base scale": {"base": 50.0, "scale": 2.5},
    "pope": {},
    "pope base uniform": {"base": 50.0, "start": "uniform"},
    "gape": {},
    "gape base": {"base": 50.0},
    "selective": {},
    "selective base gate bias": {"base": 50.0, "silu": True, "gate": True, "phase_bias": True, "rank": 0},
    "path": {},
    "seqpe": {},
    "seqpe small": {"digits": 3, "width": 32, "layers": 1, "farthest": 400},
    "seqpe without losses": {"digits": 4, "farthest": 100, "shift": 1.0, "contrast": 0.0, "transfer": 0.0},
    "path rank width start": {"rank": 5, "width": 2, "start": -1.0},
    "cope": {},
    "cope positions": {"positions": 3},
    "urpe": {},
    "urpe none clip": {"bias": "none", "share_layers": False, "clip": True},
    "stickbreaking": {},
    "stickbreaking value": {"remainder": "value"},
    "grape": {},
    "grape width": {"width": 2},
}
ROTARY = ("rope", "crope", "comrope", "carope", "prope", "lerope")
TURNING = [case for case in CASES if case.split()[0] in ROTARY and "axes" not in case]
# Two matrices with half of the parameters of the one dense weight of Q, K, V
HALVED = dict.fromkeys(("crope", "crope base fraction", "rope grouped"), "A B".split())
HALVED |= {"rope low-rank": ["down", "up"]}


def cases_of(cases, fast):
    """The parameter `case`, one of `cases`; all but those in `fast` are marked slow."""
    return pytest.mark.parametrize(
        "case", [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
    )


all_cases = pytest.mark.parametrize("case", CASES)
all_cases_fast_without_options = cases_of(CASES, fast=SCHEMES)
all_schemes = pytest.mark.parametrize("pos", SCHEMES)


# ---- models and tokens


def config(pos="rope", options=None, **shape):
    return GPTConfig(pos=pos, pos_options=options or {}, **(SHAPE | shape))


def build(case, dtype=torch.float64, seed=0, **fields):
    """A model of a case, with other fields of GPTConfig: everything in it is random and matters."""
    return shaken(config(case.split()[0], CASES[case], **fields), dtype, seed)


def described(model):
    """The model, which now knows the bytes of its tokens: the reference's vocabulary, over and over."""
    words = reference.VOCABULARY
    model.describe_tokens([words[i % len(words)] for i in range(model.config.vocab_size)])
    return model


def shaken(config, dtype=torch.float64, seed=0):
    """A model in which everything is random and matters: no zero bias, no small weight, no untouched frequency."""
    model = described(GPT(config, seed=seed)).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def randomise(module):
    """Every parameter of a model, ours or of another library, is drawn from N(0, 0.15)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


def extends(case):
    return case not in ("learned", "urpe")


def tokens(T, B=2, seed=0, V=VOCAB):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def gpt2_names(bias):
    """nanoGPT's names of parameters, less wpe."""
    kinds = ("weight", "bias") if bias else ("weight",)
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = [f"h.{i}.{part}" for i in range(LAYERS) for part in parts] + ["ln_f"]
    return {"transformer.wte.weight"} | {f"transformer.{name}.{kind}" for name in names for kind in kinds}


# ---- comparisons


def close(a, b, rtol=0.0, atol=1e-10, **kwargs):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, **kwargs)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_and_gradients(model, run, idx, targets):
    """Of one forward and backward pass by `run`: the model itself, or a compiled or parallel form of it."""
    model.zero_grad()
    loss = run(idx, targets)[1]
    loss.backward()
    return loss.detach(), gradients(model)


def refused(bad, words):
    """A config with the values `bad` is refused, and the message holds each of the regular expressions `words`."""
    with pytest.raises(ValueError) as error:
        GPT(GPTConfig(**(SHAPE | {"pos_options": {}} | bad)))
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} not in: {error.value}"


# ---- one layer of attention


def layer_context(pos, x, start=0, **fields):
    """What a layer with the scheme `pos` is told about its normed input x (B, T, C); the first token is at `start`."""
    positions = torch.arange(start, start + x.size(1), dtype=torch.float64)
    idx = torch.zeros(x.shape[:2], dtype=torch.int64)
    ctx = Context(positions, start, torch.promote_types(x.dtype, torch.float32), x.device, idx, x, positions.long())
    constants = pos.constants([pos])
    prepared = pos.prepare([pos], dataclasses.replace(ctx, constants=constants))
    own = {"constants": constants and constants[0], "prepared": prepared and prepared[0]}
    return dataclasses.replace(ctx, **own, **fields)


def heads(attn, x, start=0):
    """q, k and v, (H, T, D) each, as a layer gives them to the attention kernel, for the normed input x (T, C)."""
    seen = []

    def attend(scheme, q, k, v, x, ctx, window, dropout):
        seen.extend((q[0], k[0], v[0]))
        return v

    attn(x[None], layer_context(attn.pos, x[None], start, attend=attend))
    return seen


def causal_scores(q, k):
    """(…, T, D) → (…, T, T): dot products, 0 above the diagonal, as in vectors.json."""
    return (q @ k.mT).tril()


def layer_scores(attn, x, start=0):
    """(H, T, T) scores of one attention layer for the normed input x (T, C), the first token at position `start`."""
    q, k, _ = heads(attn, x, start)
    return causal_scores(q, k)


# ---- decoding


def uncached(model, idx, n, temperature=1.0, top_k=None, generator=None):
    """What generate must equal: every token from a forward pass over all before it."""
    for _ in range(n):
        logits = model(idx)[0][:, -1].float()
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
        p = torch.softmax(logits / (temperature or 1), -1)
        new = torch.multinomial(p, 1, generator=generator) if temperature else logits.argmax(-1, keepdim=True)
        idx = torch.cat((idx, new), 1)
    return idx


# ---- seams


def rows_of_logits(monkeypatch, rows):
    """So many rows of logits exist at a time in the loss, whatever the vocabulary."""
    monkeypatch.setattr("nanope.loss.chunk_rows", lambda vocab_size, device: rows)


# ---- what operators do, backward passes included


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


class Calls(TorchDispatchMode):
    """How often operators ran whose name holds a word."""

    def __init__(self, word):
        super().__init__()
        self.word, self.count = word, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.word in func.__name__
        return func(*args, **(kwargs or {}))
