"""What a positional scheme is: hooks, of which a scheme overrides the few it needs.

Shapes: B batch, T positions of this forward pass, S = start + T positions so far, C model width, H heads, D = C/H head
width. Channels of a head are paired as neighbours, (0, 1)(2, 3)…, each pair one complex number, in every scheme.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanope.ops import Linear, double_sum, running_sums


@dataclass
class Context:
    """Where the tokens of this forward pass stand, as one layer sees it."""

    # float64, on the CPU for MPS: (T,); (B, T) where documents restart; (B, T, axes) for a scheme that asks for `axes`
    positions: torch.Tensor
    start: int  # tokens before these: 0, or the length of the cache
    dtype: torch.dtype  # of angles and biases: float32, or the model's if wider
    device: torch.device
    idx: torch.Tensor  # (B, T) int64, token ids
    embedding: torch.Tensor  # (B, T, C) token embeddings
    places: torch.Tensor  # int64, (T,) or (B, T): tokens of the same text before each, whatever `positions` are
    documents: torch.Tensor | None = None  # (B, S) int64: which text each token is of, where texts do not see others
    seed: int | None = None  # of what a scheme draws in this optimizer step; None outside of training
    attend: Callable | None = None  # the attention function, see nanope/attention.py
    block_mask: Any = None  # FlexAttention's mask, where this layer's attention goes through it
    constants: Any = None  # this layer's item of what `constants` made
    prepared: Any = None  # this layer's item of what `prepare` made
    cache: dict | None = None  # what this layer keeps for later tokens; None where nothing follows, as in training
    part: str = ""  # of a combination: the scheme that is asked, before its names in the cache
    parts: dict | None = None  # of a combination: what each of its schemes is told

    @property
    def length(self) -> int:
        """T."""
        return self.idx.size(1)

    def cos_sin(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of float64 angles, in the dtype and on the device of this pass."""
        return tuple(f(angles).to(device=self.device, dtype=self.dtype) for f in (torch.cos, torch.sin))

    def joined(self, name: str, new: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """`new`, of these tokens, behind the same of all tokens before; without a cache `new` itself."""
        return self.appended(self.key(name), new, dim)

    def key(self, name: str) -> str:
        """The name in the cache of what a scheme keeps, apart from attention's own k and v."""
        return f"pos.{self.part}{name}"

    def appended(self, key: str, new: torch.Tensor, dim: int) -> torch.Tensor:
        """`joined`, by the name in the cache. Without gradient the cached tensor is a view of a larger one, where later
        tokens have room: a token costs its own size, not that of the cache."""
        if self.cache is None:
            return new
        if key not in self.cache:
            self.cache[key] = new
        elif torch.is_grad_enabled() or torch.compiler.is_compiling() or self.cache[key].dtype != new.dtype:
            self.cache[key] = torch.cat((self.cache[key], new), dim)
        else:
            old, room = self.cache[key], self.cache.get(f"room for {key}")
            if room is None or not room.continues(old, new.size(dim)):
                size = 2 * (old.size(dim) + new.size(dim))
                room = self.cache[f"room for {key}"] = Room(old, dim, size + -size % 64)  # so that heads stay aligned
            self.cache[key] = room.append(new)
        return self.cache[key]

    def accumulated(self, name: str, new: torch.Tensor, modulus: float | None = None) -> torch.Tensor:
        """Σ over all tokens up to each of these, of `new` (B, T, …); with a modulus up to multiples of it. The cache
        keeps the sum of all so far in float64."""
        sums = running_sums(new, modulus)
        if self.cache is None:
            return sums
        key, total = self.key(name), double_sum(new, 1, keepdim=True)
        if key in self.cache:
            sums, total = sums + self.cache[key].to(sums), total + self.cache[key]
        self.cache[key] = total if modulus is None else total % modulus
        return sums

    def convolved(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The causal convolution of each channel of x (B, T, K) over tokens: (B, T, K). weight (K, n): its last column
        is for the token itself. What is before a text counts as 0. The cache keeps n - 1 tokens."""
        T, n = x.size(1), weight.size(1)
        seen = x
        if self.cache is not None:
            key = self.key(name)
            seen = torch.cat((self.cache[key], x), 1) if key in self.cache else x
            self.cache[key] = seen[:, max(0, seen.size(1) + 1 - n) :].clone()
        seen = F.pad(seen, (0, 0, T + n - 1 - seen.size(1), 0))  # (B, n - 1 + T, K)
        y = torch.zeros_like(x)
        for back in range(n):
            part = seen[:, n - 1 - back : n - 1 - back + T] * weight[:, -1 - back]
            if back and self.documents is not None:
                part = part * (self.places >= back).unsqueeze(-1)
            y = y + part
        return y

    def generator(self) -> torch.Generator:
        """A CPU generator that draws the same in every micro-batch and on every rank of an optimizer step."""
        return torch.Generator().manual_seed(self.seed if self.seed is not None else torch.initial_seed())


class Room:
    """A tensor with room for more along one dimension, and how much of it is filled."""

    def __init__(self, first: torch.Tensor, dim: int, size: int):
        shape = [*first.shape]
        shape[dim] = size
        self.whole, self.dim = first.new_empty(shape), dim
        self.filled = self.whole.narrow(dim, 0, 0)
        self.append(first)

    def continues(self, seen: torch.Tensor, more: int) -> bool:
        """Whether `seen` is all that is filled, with room for `more`. It is not where a scheme has changed it, where
        some of the sequences were chosen, and where another copy of the cache has gone on."""
        return seen is self.filled and seen.size(self.dim) + more <= self.whole.size(self.dim)

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """All that is filled, with `new` behind it."""
        filled, more = self.filled.size(self.dim), new.size(self.dim)
        self.whole.narrow(self.dim, filled, more).copy_(new)
        self.filled = self.whole.narrow(self.dim, 0, filled + more)
        return self.filled


AXES = ("token", "line", "sentence", "byte")  # coordinates of a token in its text; nanope/coordinates.py


def first_axis(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Positions without further coordinates, (T,) or (B, T) as places are, of positions that may have some."""
    if positions.dim() < 3:
        return positions
    return positions[0, :, 0] if places.dim() == 1 else positions[..., 0]


class Scheme(nn.Module):
    """No positions but the causal mask (`none`: Haviv 2203.16634, Kazemnejad 2305.19466), and the base of every scheme.

    One instance a layer. Keyword-only arguments of __init__ are the scheme's options, checked by their annotations.
    docs/adding-a-scheme.md has an example, and what each hook costs.

    Parameters: none.
    Beyond block_size: yes, by construction; what it sees of positions is how many keys there are.
    Cache: nothing of its own.
    Cost: nothing.
    """

    extends = True  # whether lengths beyond block_size are possible
    longest: int | None = None  # the last of these, where it is known
    reach: int = 0  # the last position in training, where `positions` may move them on
    undecayed: tuple[str, ...] = ()  # own parameters without weight decay, with pos_lr_multiplier
    shared: tuple[str, ...] = ()  # own modules that all layers share: they are the first layer's
    sole: tuple[str, ...] = ()  # hooks that no other scheme of a combination may override
    # What the channels are that `encode` adds behind a head's D: part of the score, or a bias, which no scale reaches
    wider: Literal["", "score", "bias"] = ""
    # Whether the bias of any two queries differs by one number for all keys, as in slope · (n - m); softmax cancels it
    of_keys: bool = False
    axes: tuple[str, ...] = ()  # coordinates that positions have, of AXES, "token" first; () for positions alone

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        if "bias" in vars(cls) and "of_keys" not in vars(cls):  # what holds of a bias need not hold of its successor
            cls.of_keys = False

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_embd = layer, config.n_head, config.n_embd
        self.head_width = config.n_embd // config.n_head
        self.dense = self.claims("scores") or self.claims("weights")  # leaves the fused attention kernels
        self.biased = self.claims("bias")

    # ---- hooks

    def embedding(self, config) -> nn.Module | None:
        """A module that maps positions (T,) int64 to (T, C), to be added to the token embeddings. Asked of one
        layer."""
        return None

    def projection(self, config) -> nn.Module:
        """The module `c_attn` that maps (B, T, C) to (B, T, 3C): q, k, v, each as H heads of D channels."""
        return Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)

    @classmethod
    def constants(cls, layers: list["Scheme"]) -> list | None:
        """An item a layer, ctx.constants, made of parameters alone, without gradient. Once a forward pass, or once an
        optimizer step within GPT.parameters_fixed."""
        return None

    @classmethod
    def prepare(cls, layers: list["Scheme"], ctx: Context) -> list | None:
        """An item a layer, ctx.prepared. Once a forward pass, outside compiled blocks. A layer sees no other's item, so
        that one compiled block serves all layers. ctx.constants is the list here."""
        return None

    def positions(self, ctx: Context) -> torch.Tensor:
        """The positions that are seen in training, from ctx.positions and draws of ctx.generator(). Asked of one
        layer."""
        return ctx.positions

    def project(self, c_attn: nn.Module, x: torch.Tensor, ctx: Context) -> torch.Tensor:
        """q, k, v of the block's normed input x (B, T, C): (B, T, 3C)."""
        return c_attn(x)

    def encode(self, qk: torch.Tensor, x: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Queries qk[:, :, 0] and keys qk[:, :, 1], (B, T, 2, H, D), with their positions: (B, T, 2, H, ≥ D). The
        result may be wider than D, which adds a low-rank bias; scores are divided by √D all the same."""
        return qk

    def bias(self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, ctx: Context) -> Callable | None:
        """f(batch, head, m, n), elementwise on index tensors: what is added to the score of query m and key n, both
        0 … S-1, after the division by √D. It may capture tensors of all S tokens. x (B, T, C), q (B, H, T, D),
        k (B, H, S, D). The same function serves FlexAttention and dense chunks."""
        return None

    def scores(self, q: torch.Tensor, k: torch.Tensor, x: torch.Tensor, rows: slice, ctx: Context) -> torch.Tensor:
        """Scores of the queries `rows` of this pass, before bias and mask: q (B, H, R, D) those queries, k (B, H, N, D)
        the keys that they may see and those before, x (B, T, C) the whole input: (B, H, R, N). The last query is at
        N - 1."""
        return (q / self.head_width**0.5) @ k.mT

    def weights(self, scores: torch.Tensor, ctx: Context) -> torch.Tensor:
        """Attention weights (B, H, R, N) of scores (B, H, R, N), which are -inf where a query may not see a key. The
        queries are the last R of the N positions."""
        return torch.softmax(scores, -1)

    def auxiliary(self) -> torch.Tensor | None:
        """A loss of the scheme's own, a scalar, asked for after a forward pass in training. It is added to the loss."""
        return None

    def initial(self, name: str, shape: torch.Size, normal: Callable[[float], torch.Tensor]) -> torch.Tensor:
        """The initial value of an own parameter; normal(std) draws one, keyed by seed and name."""
        raise KeyError(f"{type(self).__name__} gives no initial value to its parameter {name}")

    def as_rope(self, c_attn: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(weight (3C, C), bias (3C,) or None, frequencies (H, D/2) float64) of the plain rope layer that is equal to
        this one. ValueError where there is none."""
        raise ValueError(f"{self.name} has no equivalent as plain rope; rope, crope, comrope, prope and lerope have")

    @classmethod
    def complete_options(cls, options: dict, config) -> dict:
        """Options with everything that depends on the config written out."""
        return options

    # ---- what is asked about a scheme

    def scaled(self, q: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        """Encoded queries (B, H, T, ≥ D) whose scores, without a bias, are multiplied by `scale`."""
        if self.wider == "bias" and q.size(-1) > self.head_width:
            return torch.cat(((q[..., : self.head_width] * scale).to(q.dtype), q[..., self.head_width :]), -1)
        return (q * scale).to(q.dtype)

    @property
    def name(self) -> str:
        """As in the registry; that of the class where it is from a file outside."""
        kind = type(self)
        if kind is Scheme:
            return "none"
        return kind.__module__.rpartition(".")[2] if kind.__module__.startswith("schemes.") else kind.__name__

    def claims(self, hook: str) -> bool:
        """Whether this scheme overrides a hook."""
        own, base = getattr(type(self), hook), getattr(Scheme, hook)
        return getattr(own, "__func__", own) is not getattr(base, "__func__", base)

    def owner(self, hook: str) -> str | None:
        """The name of the scheme that overrides a hook."""
        return self.name if self.claims(hook) else None

    def parts(self) -> list["Scheme"]:
        """This one; of a combination its parts."""
        return [self]

    def told(self, ctx: Context) -> Context:
        """The context of this layer, completed outside of compiled code."""
        return ctx

    def undecayed_names(self) -> set[str]:
        """Names of own parameters that take no weight decay."""
        return set(self.undecayed) & {name for name, _ in self.named_parameters()}

    def plain_name(self, name: str) -> str:
        """The name that an own parameter has where the scheme stands alone, which keys its initial value."""
        return name
