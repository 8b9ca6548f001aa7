"""What must hold for every positional scheme, and is tested on it: `python scripts/check_scheme.py
my_file.py:MyScheme`.

A check is a function of a Case. It returns nothing, or raises AssertionError that says what is wrong. All checks run
on a tiny model in float64, whose own parameters are moved away from their initial values: at these, a gate may be shut.
"""

import functools
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import schemes
from model import GPT, GPTConfig
from nanope import attention, coordinates

LENGTH, VOCABULARY = 24, 61
OWN = ".attn.pos."


@dataclass
class Case:
    """A scheme with its options in a tiny model; further fields of GPTConfig in `fields`."""

    pos: str | list[str]
    options: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)

    @property
    def config(self) -> GPTConfig:
        fields = {
            "block_size": LENGTH,
            "vocab_size": VOCABULARY,
            "n_layer": 3,
            "n_head": 2,
            "n_embd": 32,
            **self.fields,
        }
        return GPTConfig(pos=self.pos, pos_options=self.options, **fields)

    def model(self, seed: int = 0, moved: bool = True) -> GPT:
        """A new model in float64, its own parameters moved by noise."""
        model = GPT(self.config, seed).double()
        model.describe_tokens(coordinates.made_up(model.config.vocab_size))
        if moved:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    # Weights ten times as large as at the start, so that attention is not flat
                    p.copy_(p * (1 + 0.1 * noise) + 0.02 * noise if OWN in name else p * 10 if p.dim() > 1 else p)
        return model.eval()

    @functools.cached_property
    def longest(self) -> int:
        """A length that the scheme can do: twice block_size, or block_size where it ends there."""
        model = GPT(self.config)
        return LENGTH * (2 if all(block.attn.pos.extends for block in model.transformer["h"]) else 1)

    def tokens(self, length: int = LENGTH, rows: int = 2) -> torch.Tensor:
        return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def loss_of(model: GPT, tokens: torch.Tensor, seed: int = 3, added: bool = True) -> torch.Tensor:
    """The training loss, with what the scheme adds to it unless `added` is false; draws are those of one seed."""
    with model.parameters_fixed(seed):
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        auxiliary = model.auxiliary()
    return loss + auxiliary if added and auxiliary is not None else loss


def far(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return not torch.allclose(a, b, rtol=0, atol=tolerance)


# ---- the checks, in the order in which a new scheme meets them


def options_are_announced(case: Case) -> None:
    """Options are keyword-only arguments with defaults and plain types."""
    for name in schemes.names_in(case.pos):
        cls = schemes.scheme_class(name)
        for option, (annotation, default) in schemes.options_of(cls).items():
            assert default is not inspect.Parameter.empty, f"option {option} of {cls.__name__} has no default"
            assert annotation is not None, f"option {option} of {cls.__name__} has no type: annotate it"
            assert schemes.fits(default, annotation), f"the default {default!r} of {option} is no {annotation}"


def initial_values(case: Case) -> None:
    """Every own parameter gets a finite initial value, and the names in `undecayed` are such parameters."""
    model = case.model(moved=False)
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), f"{name} is not finite at the start"
    for pos in (module for module in model.modules() if isinstance(module, schemes.Scheme)):
        for undecayed in pos.undecayed:
            holder, _, last = undecayed.rpartition(".")
            try:
                found = getattr(pos.get_submodule(holder), last)
            except AttributeError:  # an option may leave its module out: then that is None
                found = getattr(pos, undecayed.partition(".")[0], ...)
            there = found is None or isinstance(found, torch.nn.Parameter)
            assert there, f"undecayed names {undecayed!r}, and {pos.name} has no such parameter"


def shared_initial_values(case: Case) -> None:
    """Parameters that the scheme shares with `none` have equal values for equal seeds."""
    mine, plain = (
        case.model(7, moved=False).state_dict(),
        Case("none", {}, case.fields).model(7, moved=False).state_dict(),
    )
    for name in mine.keys() & plain.keys():
        assert torch.equal(mine[name], plain[name]), (
            f"{name} starts with other values than in a model without positions"
        )
    other = case.model(8, moved=False).state_dict()
    assert not torch.equal(other["lm_head.weight"], mine["lm_head.weight"]), "two seeds give the same weights"


def determinism(case: Case) -> None:
    """Two models of one seed, and two passes of one model, give the same bits."""
    a, b, tokens = case.model(), case.model(), case.tokens()
    first = a(tokens)[0]
    assert torch.equal(first, a(tokens)[0]), (
        "a second forward pass gives other logits: does the scheme draw, or keep state?"
    )
    assert torch.equal(first, b(tokens)[0]), "two models of one seed give different logits"
    losses = [loss_of(a.train(), tokens) for _ in range(2)]
    assert torch.equal(*losses), "two training passes of one step differ: draw from ctx.generator() alone"


def causality(case: Case) -> None:
    """A token changes no logits before it."""
    model, tokens, at = case.model(), case.tokens(case.longest), case.longest // 2
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % VOCABULARY
    moved = (model(tokens)[0] - model(changed)[0]).abs().amax((0, 2))  # (T,)
    assert moved[:at].max() < 1e-9, (
        f"token {at} changes the logits of token {int(moved[:at].argmax())}: the future is seen"
    )
    assert moved[at] > 0, f"token {at} does not change its own logits"


def separate_rows(case: Case) -> None:
    """The sequences of a batch do not see one another."""
    model, tokens = case.model(), case.tokens(rows=3)
    alone = model(tokens[1:2])[0]
    assert not far(model(tokens)[0][1:2], alone), (
        "a sequence has other logits in a batch than alone: mind the batch index"
    )


def cached_decoding(case: Case) -> None:
    """Tokens that come in pieces, with a cache, give the hidden states of one whole pass."""
    model, tokens = case.model(), case.tokens(case.longest)
    whole = model.hidden(tokens)
    for sizes, what in (
        ([1] * tokens.size(1), "one by one"),
        ([7, 1, 5, tokens.size(1) - 13], "in pieces of 7, 1, 5 …"),
    ):
        caches = [{} for _ in range(model.config.n_layer)]
        pieces = torch.cat([model.hidden(piece, caches) for piece in tokens.split(sizes, 1)], 1)
        gap = (pieces - whole).abs().amax((0, 2))
        first = int((gap > 1e-8).int().argmax())
        assert gap.max() < 1e-8, (
            f"tokens {what} differ from the whole pass from token {first} on, by {gap.max():.1e}: what later tokens "
            "need of earlier ones goes through ctx.joined or ctx.cache, and positions come from ctx.positions"
        )


def lengths(case: Case) -> None:
    """1, 2 and 7 tokens and block_size; where the scheme extends 4 and 16 times that, and 1,024 tokens; a clear error
    where it does not."""
    model, short = case.model(), (1, 2, 7, LENGTH)
    for length in short if case.longest == LENGTH else (*short, 4 * LENGTH, 16 * LENGTH, 1024):
        logits = model(case.tokens(length, rows=1))[0]
        assert torch.isfinite(logits).all(), f"logits at length {length} are not finite"
    if case.longest == LENGTH:
        try:
            model(case.tokens(LENGTH + 1))
        except ValueError:
            return
        raise AssertionError("extends is False, and a longer input passes")


def far_positions(case: Case) -> None:
    """From position 65,536 on a float32 model has the logits of a float64 one, where positions reach as far."""
    model, tokens = case.model(), case.tokens()
    if "wpe" in model.transformer and isinstance(model.transformer["wpe"], torch.nn.Embedding):
        return  # a table ends
    exact = model.lm_head(model.hidden(tokens, offset=65536))
    gap = model.float().lm_head(model.hidden(tokens, offset=65536)).double() - exact
    assert gap.abs().max() < 1e-3 * exact.std(), (
        f"at position 65,536 float32 logits are off by {gap.abs().max() / exact.std():.1e} of their standard "
        "deviation: compute angles in float64, by ctx.cos_sin"
    )


def chunks(case: Case) -> None:
    """Attention over a few queries at a time, as at long lengths, equals that over all."""
    model, tokens = case.model(), case.tokens(case.longest)
    whole = loss_of(model.train(), tokens)
    gradients = torch.autograd.grad(whole, [*model.parameters()], allow_unused=True)
    model.attend = functools.partial(attention.attend, chunk=2 * 2 * case.longest * 5)  # 5 queries
    cut = loss_of(model, tokens)
    assert not far(whole, cut), (
        f"the loss is {whole:.6f}, and {cut:.6f} where queries come in chunks: see rows, m and n"
    )
    others = torch.autograd.grad(cut, [*model.parameters()], allow_unused=True)
    for (name, _), g, other in zip(model.named_parameters(), gradients, others):
        same = g is None and other is None or g is not None and other is not None and not far(g, other, 1e-8)
        assert same, f"the gradient of {name} differs where queries come in chunks"


def evaluation(case: Case) -> None:
    """Without gradient, where attention may take other kernels, the logits are the same."""
    model, tokens = case.model(), case.tokens(case.longest)
    plain = model(tokens)[0]
    with torch.no_grad():
        assert not far(model(tokens)[0], plain), (
            "without gradient the logits differ: `of_keys` is for a bias that differs between any two queries by one "
            "number for all keys"
        )


def gradients(case: Case) -> None:
    """Every parameter has a gradient, and it is that of finite differences, but for an auxiliary loss."""
    model, tokens = case.model().train(), case.tokens()
    loss_of(model, tokens).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} gets no gradient: DistributedDataParallel would fail"
        assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
    model.zero_grad(set_to_none=False)
    loss_of(model, tokens, added=False).backward()  # an auxiliary loss may take no gradient of a part of it
    generator = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if OWN not in name and "h.0.attn" not in name:
            continue
        along, size = torch.randn(p.shape, generator=generator, dtype=torch.float64), 1e-6
        along = along / along.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                p.add_(along, alpha=sign * size)
                values.append(loss_of(model, tokens, added=False))
        measured, own = float(values[0] - values[1]) / (2 * size), float((p.grad * along).sum())
        limit = 1e-6 + 1e-4 * max(abs(measured), float(p.grad.norm()))
        assert abs(measured - own) < limit, f"{name}: the gradient says {own:.3e}, finite differences {measured:.3e}"


def low_precision(case: Case) -> None:
    """Under bfloat16 autocast losses and gradients are finite and near those of float32."""
    model, tokens = case.model(moved=False).float().train(), case.tokens()
    exact = float(loss_of(model, tokens).detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, tokens)
    loss.backward()
    assert loss.dtype == torch.float32, f"the loss has dtype {loss.dtype} under autocast"
    rounded = float(loss.detach())
    assert abs(rounded - exact) < 0.05, f"the loss is {rounded:.4f} in bfloat16 and {exact:.4f} in float32"
    for name, p in model.named_parameters():
        assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite in bfloat16"


def compilation(case: Case) -> None:
    """torch.compile makes one graph for all layers of a kind, without a break, and the same loss and gradients."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, tokens = case.model().train(), case.tokens()
    plain = loss_of(model, tokens)
    plain.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.compile_parts(backend="aot_eager")
    try:
        loss_of(model, tokens, seed=5)  # another step's draws must not make another graph
        loss = loss_of(model, tokens)
        loss.backward()
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    graphs, kinds = counters["stats"]["unique_graphs"], len({(*kind, w) for kind, w in kinds_of(model)})
    torch._dynamo.reset()
    assert not far(plain, loss), f"the loss is {plain:.6f}, and {loss:.6f} compiled"
    for (name, p), g in zip(model.named_parameters(), gradients):
        assert not far(p.grad, g, 1e-8), f"the gradient of {name} differs when compiled"
    assert graphs <= kinds + 1, (
        f"{graphs - 1} graphs for {kinds} kind(s) of layers: a hook reads something that differs by layer, such as "
        "self.layer; make it in prepare, outside of compiled code"
    )


def kinds_of(model: GPT) -> list[tuple]:
    """The schemes and the window of each layer."""
    layers = enumerate(block.attn for block in model.transformer["h"])
    return [(schemes.layer_schemes(model.config.pos, i), attn.window) for i, attn in layers]


def saving(case: Case) -> None:
    """A state dict loads into a new model, which then computes the same."""
    model, tokens = case.model(), case.tokens()
    other = case.model(seed=5, moved=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens)[0], other(tokens)[0]), (
        "a loaded model differs: is a tensor no parameter and no buffer?"
    )


def plain_rope(case: Case) -> None:
    """Where to_rope() gives an equivalent model, it has the same logits."""
    model, tokens = case.model(), case.tokens()
    try:
        rope = model.to_rope()
    except ValueError:
        return
    assert not far(rope(tokens)[0], model(tokens)[0]), "the model of to_rope() has other logits: see as_rope"


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        options_are_announced,
        initial_values,
        shared_initial_values,
        determinism,
        causality,
        separate_rows,
        cached_decoding,
        lengths,
        far_positions,
        chunks,
        evaluation,
        gradients,
        low_precision,
        saving,
        plain_rope,
        compilation,
    )
}


def run(case: Case) -> dict[str, str | None]:
    """{check: what is wrong, or None}. A config that cannot be built at all is a ValueError."""
    GPT(case.config)
    found = {}
    for name, check in CHECKS.items():
        try:
            check(case)
            found[name] = None
        except AssertionError as error:
            found[name] = str(error)
        except Exception as error:  # of the scheme's own code: it is what the report is about
            found[name] = f"{type(error).__name__}: {error}{place_of(error, case)}"
    return found


def place_of(error: Exception, case: Case) -> str:
    """Where in the files of the case's schemes an error comes from, " (FILE, line N)"; empty where it is elsewhere."""
    files = {str(path) for path in schemes.sources(case.pos)}
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
