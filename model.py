"""GPT-2 in one file. What it does about positions is a scheme, a member of attention; schemes/ has one file each.

Read it from top to bottom: config, attention, MLP, block, the model. nanope/ops.py has the matrix products,
nanope/loss.py the fused loss, nanope/attention.py the kernels of attention.

Shapes: B batch, T positions, C model width, H heads, D = C/H head width, V vocabulary, L layers.

    from model import GPT, GPTConfig, SCHEMES
    model = GPT(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128, pos="rope"), seed=0)
    logits, _ = model(idx)              # idx (B, T) int64 -> (B, T, V)
    _, loss = model(idx, targets)       # mean cross-entropy, scalar; targets of -1 are ignored
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import schemes
from nanope import attention, checks, convert, coordinates, hf, pairs
from nanope.block_masks import BlockMasks
from nanope.loss import linear_cross_entropy, linear_nll
from nanope.ops import Linear, double_device, fuse_rotations, gelu, wide
from schemes import SCHEMES as SCHEMES  # for those who import it from here
from schemes.base import Context, first_axis

LOSSES = {"mean": linear_cross_entropy, "none": linear_nll}  # by `reduction`


@dataclass
class GPTConfig:
    """Shape of a model. `pos` names a scheme, several, or a pattern over the layers, and `pos_options` are its options
    (schemes/__init__.py)."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    pos: str | list[str] = "rope"
    pos_options: dict = field(default_factory=dict)
    # A token sees itself and the window - 1 before it; 0: all. A list cycles over the layers
    window: int | list[int] = 0
    # A token sees its own document alone, in which positions start at 0. `eot` is the id of the token that ends one
    document_mask: bool = False
    eot: int | None = None
    # q and k of every head are divided by their root mean square, before their positions and without a gain
    qk_norm: bool = False
    # `log`: scores are multiplied by s log(visible keys), s trained for each head (SSMax 2501.19399). It starts at the
    # paper's 0.168, or where None at 1/log(block_size)
    logit_scale: Literal["none", "log"] = "none"
    logit_scale_start: float | None = 0.168


class Attention(nn.Module):
    """Causal self-attention with the positional scheme of its layer.

    Without a bias, windows and documents `ctx.attend` is F.scaled_dot_product_attention(q, k, v, is_causal=True), which
    is softmax(q kᵀ / √D) v over the keys up to each query. nanope/attention.py adds these, and caches.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        pos = schemes.make(config, layer)
        windows = config.window if isinstance(config.window, list) else [config.window]
        self.n_head, self.dropout, self.window = config.n_head, config.dropout, windows[layer % len(windows)]
        self.qk_norm, self.logit_factor = config.qk_norm, 1.0  # of all scores: evaluation at other lengths sets it
        # Optimizer states and gradient norms know parameters by their order, which is that of earlier checkpoints:
        # first the scheme's own, then q, k, v and output, last those of the scheme's modules
        if next(pos.parameters(recurse=False), None) is not None:
            self.pos = pos
        self.c_attn = pos.projection(config)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.logit_scale = nn.Parameter(torch.empty(config.n_head)) if config.logit_scale == "log" else None
        self.pos = pos

    def forward(self, x: torch.Tensor, ctx: Context) -> torch.Tensor:
        B, T, C = x.size()
        qk, v = self.pos.project(self.c_attn, x, ctx).split((2 * C, C), dim=2)
        qk = qk.unflatten(2, (2, self.n_head, -1))  # (B, T, 2, H, D)
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:], eps=1e-6)
        qk = self.pos.encode(qk, x, ctx)
        q, k = (part.transpose(1, 2) for part in qk.unbind(2))  # (B, H, T, D)
        if self.logit_scale is not None:
            scale = self.logit_scale.to(ctx.dtype).view(-1, 1, 1) * self.log_visible(ctx)  # ((B,) H, T, 1)
            q = self.pos.scaled(q, scale)
        if self.logit_factor != 1:
            q = self.pos.scaled(q, self.logit_factor)
        v = v.unflatten(2, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
        k, v = ctx.appended("k", k, 2), ctx.appended("v", v, 2)  # (B, H, start + T, D): behind those in the cache
        dropout = self.dropout if self.training else 0.0
        y = ctx.attend(self.pos, q, k, v, x, ctx, self.window, dropout)  # (B, H, T, D), with the scheme's bias
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)

    def log_visible(self, ctx: Context) -> torch.Tensor:
        """The logarithm of how many keys each query sees: (T, 1), or (B, 1, T, 1) where documents restart."""
        count = ctx.places + 1
        if self.window:
            count = count.clamp_max(self.window)
        count = count.to(ctx.dtype).log().unsqueeze(-1)
        return count.unsqueeze(1) if count.dim() == 3 else count


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, eps 1e-5 as GPT-2."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, ctx):
        x = x + self.attn(self.ln_1(x), ctx)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (pre-norm, tanh GELU, tied embeddings) with the positional scheme `config.pos`.

    Parameters that two schemes share have equal initial values for equal seeds: each is drawn from a generator
    of its own, keyed by (seed, parameter name). `self.config` is the config with all options written out.
    Raises ValueError, listing every problem, for a config that cannot be built.
    """

    def __init__(self, config: GPTConfig, seed: int = 0):
        super().__init__()
        self.config = config = resolve(config)
        with torch.random.fork_rng(devices=[]):  # the layers' own initial values are replaced below
            blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
            schemes.share([block.attn.pos for block in blocks])
            self.groups = groups_of_layers(config)
            self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
            owners = {blocks[group[0]].attn.pos.owner("embedding"): n for n, group in enumerate(self.groups)}
            if len(owners := {owner: n for owner, n in owners.items() if owner}) > 1:
                raise ValueError(f"pos {schemes.label(config.pos)} adds two tables of positions to one embedding")
            self.table_group = next(iter(owners.values()), None)  # the group whose scheme adds a table of positions
            if self.table_group is not None:
                self.transformer["wpe"] = blocks[self.groups[self.table_group][0]].attn.pos.embedding(config)
            self.transformer["h"] = blocks
            self.transformer["ln_f"] = LayerNorm(config.n_embd, config.bias)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.losses, self.attend = dict(LOSSES), attention.attend  # tools and compile_parts put their own here
        self.fixed_constants, self.draw_seed = None, None  # set within parameters_fixed
        self.activation_checkpointing = False  # in training, keep each block's input and compute the rest again
        # What each token is made of, for schemes that ask for coordinates in the text; see describe_tokens
        asked = any(blocks[group[0]].attn.pos.axes for group in self.groups)
        text = torch.zeros(config.vocab_size, coordinates.COLUMNS, dtype=torch.int32) if asked else None
        self.register_buffer("token_text", text)
        self.described = text is None
        self.initialise(seed)

    def __getstate__(self):
        """What copies and pickles have: neither compiled code, which nn.Module leaves out of the blocks' too, nor fixed
        constants."""
        return super().__getstate__() | {"losses": dict(LOSSES), "fixed_constants": None, "draw_seed": None}

    # ---- parameters

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """GPT-2's initial values: N(0, 0.02), or a module's `initial_std`, projections into the residual stream scaled
        by 1/√(2L), LayerNorm 1, biases 0; a scheme's own parameters as the scheme says."""
        for name, parameter in self.named_parameters():
            parent, _, last = name.rpartition(".")
            layer, _, own = name.removeprefix("transformer.h.").partition(".attn.pos.")
            pos = self.transformer["h"][int(layer)].attn.pos if own else None
            # Names as they are where a scheme stands alone, and as they were before schemes were members
            key = f"transformer.h.{layer}.attn.{pos.plain_name(own)}" if own else name

            def normal(std, key=key, shape=parameter.shape):
                digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)

            if own:
                value = pos.initial(own, parameter.shape, normal)
            elif last == "logit_scale":
                start = self.config.logit_scale_start
                value = torch.full(parameter.shape, start or 1 / math.log(max(self.config.block_size, 2)))
            elif isinstance(self.get_submodule(parent), (LayerNorm, nn.LayerNorm, nn.RMSNorm)):
                value = torch.full(parameter.shape, float(last == "weight"))
            elif last == "bias":
                value = torch.zeros(parameter.shape)
            else:
                std = getattr(self.get_submodule(parent), "initial_std", 0.02)
                value = normal(std / math.sqrt(2 * self.config.n_layer) if parent.endswith("c_proj") else std)
            parameter.copy_(value)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As nn.Module's; names may be those of earlier checkpoints."""
        found = super().load_state_dict(self.renamed(state_dict), *args, **kwargs)
        self.described = self.token_text is None or self.token_text.is_meta or bool(self.token_text.any())
        return found

    def renamed(self, state_dict) -> dict:
        """A state dict with today's names, where a scheme's own parameters may have those from before schemes were
        members of attention (attn.P for attn.pos.P)."""
        own, names = ".attn.pos.", {name: name for name in self.state_dict()}
        names = {name.replace(own, ".attn."): name for name in names if own in name} | names
        return {names.get(k, k): v for k, v in state_dict.items()}

    def describe_tokens(self, tokens: list[bytes], eot: int | None = None) -> None:
        """Tell the model the bytes of each token and the id of end of text. A scheme that asks for coordinates in the
        text, `axes`, needs it; the state dict holds it from then on. Nothing happens where no scheme does."""
        if self.token_text is not None:
            self.token_text.copy_(coordinates.table(tokens, self.config.vocab_size, eot))
            self.described = True

    def position_parameters(self) -> set[str]:
        """Names of the schemes' own parameters that take no weight decay and the multiplied learning rate."""
        layers = enumerate(self.transformer["h"])
        found = {f"transformer.h.{i}.attn.pos.{name}" for i, b in layers for name in b.attn.pos.undecayed_names()}
        return found & {name for name, _ in self.named_parameters()}  # what layers share has the name of the first

    def parameter_count(self) -> int:
        """All parameters, the tied embedding once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs of a token at length block_size by the convention of MFU: 6 per parameter of a dense GPT-2's
        matrix products and 12·L·C·T for attention, whatever the scheme and the window (PaLM 2204.02311, appendix B,
        without its causal halving)."""
        c = self.config
        n = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    # ---- forward

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """idx (B, T) int64 → (logits (B, T, V), None); with targets (B, T), -1 ignored, (None, loss).

        The loss is the mean cross-entropy, a scalar, or with reduction="none" that of each target, (B, T),
        without gradient; float32 or the model's dtype if wider. T may exceed block_size where the scheme can;
        otherwise, and for ids outside the vocabulary (checked on the CPU), ValueError.
        """
        if reduction not in LOSSES:
            raise ValueError(f"reduction must be 'mean' or 'none', not {reduction!r}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have the shape of idx, {tuple(idx.shape)}, not {tuple(targets.shape)}")
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        self.check_tokens(targets, -1, "targets")
        return None, self.losses[reduction](x, self.lm_head.weight, targets)

    def hidden(self, idx: torch.Tensor, caches: list[dict] | None = None, offset: int = 0) -> torch.Tensor:
        """Final hidden states (B, T, C) of tokens idx (B, T), which follow those in `caches` (a dict a layer).
        `offset` is added to all positions, to which a relative scheme is indifferent."""
        if idx.dim() != 2:
            raise ValueError(f"idx must be (B, T), not of shape {tuple(idx.shape)}")
        start = caches[0]["k"].size(2) if caches and "k" in caches[0] else 0
        end = start + idx.size(1)
        self.check_length(end, offset)
        self.check_tokens(idx, 0, "idx")
        x = self.transformer["wte"](idx)  # (B, T, C)
        places, documents = torch.arange(start, end, device=idx.device), None
        if self.config.document_mask:
            places, documents = pairs.places_in_documents(idx, self.config.eot, caches[0] if caches else None)
        # Positions in float64, which is exact for every length. The embedding as a view: torch.compile would make
        # another graph for the first layer, whose x is the embedding itself
        steps = places.to(double_device(idx.device), torch.float64) + offset
        told = {"documents": documents, "seed": self.draw_seed, "attend": self.attend}
        ctx = Context(steps, start, wide(x.dtype), idx.device, idx, x.view_as(x), places, **told)
        positions = self.positions(ctx, offset, caches)  # of each group of layers
        if self.table_group is not None:
            whole = first_axis(positions[self.table_group], places).round().to(torch.int64).to(idx.device)
            x = x + self.transformer["wpe"](whole).to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        again = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block, own in zip(self.transformer["h"], self.contexts(ctx, positions, caches)):
            x = checkpoint(block, x, own, use_reentrant=False) if again else block(x, own)
        return self.transformer["ln_f"](x)

    def positions(self, ctx: Context, offset: int, caches: list[dict] | None) -> list[torch.Tensor]:
        """The positions of the tokens for each group of layers, with further coordinates where its scheme asks for
        `axes`: then (B, T, axes). In training as the scheme changes them."""
        if not self.described:
            raise ValueError(
                "coordinates in the text need the bytes of each token: call model.describe_tokens(tokenizer.tokens, "
                "tokenizer.eot), as train.py does"
            )
        found, at = [], None
        if self.token_text is not None:
            at = coordinates.of_tokens(self.token_text, ctx, offset, caches and caches[0])
        for pos in (self.transformer["h"][group[0]].attn.pos for group in self.groups):
            own = dataclasses.replace(ctx, positions=at(pos.axes)) if pos.axes else ctx
            found.append(pos.positions(own) if self.training else own.positions)
        return found

    def contexts(self, ctx: Context, positions: list[torch.Tensor], caches: list[dict] | None) -> list[Context]:
        """A Context for each layer: with the positions of its group of layers, what their scheme made for all of
        them, its own mask and its cache."""
        layers, found = [block.attn for block in self.transformer["h"]], {}
        dropout = self.config.dropout if self.training else 0.0
        made = self.constants() if self.fixed_constants is None else self.fixed_constants
        masks = BlockMasks(ctx, dropout, caches is not None)
        for group, seen, constants in zip(self.groups, positions, made):
            members = [layers[i].pos for i in group]
            shared = dataclasses.replace(ctx, positions=seen, constants=constants)
            prepared = members[0].prepare(members, shared)
            for n, i in enumerate(group):
                own = dataclasses.replace(
                    shared,
                    constants=None if constants is None else constants[n],
                    prepared=None if prepared is None else prepared[n],
                    block_mask=masks.of(members[n], layers[i].window),
                    cache=None if caches is None else caches[i],
                )
                found[i] = members[n].told(own)
        return [found[i] for i in range(self.config.n_layer)]

    def constants(self) -> list[list | None]:
        """What the schemes make of parameters alone, for each group of layers."""
        members = [block.attn.pos for block in self.transformer["h"]]
        return [members[group[0]].constants([members[i] for i in group]) for group in self.groups]

    @contextlib.contextmanager
    def parameters_fixed(self, seed: int | None = None):
        """Within `with model.parameters_fixed():` the parameters do not change, as over the micro-batches of an
        optimizer step. What depends on them alone and takes no gradient (comrope's frames and frequencies) is
        computed once, at the entry. Values and gradients have the same bits as without it. Nothing is cached outside
        of it. `seed`: of what schemes draw in this step."""
        before = self.fixed_constants, self.draw_seed
        self.fixed_constants, self.draw_seed = self.constants(), seed
        try:
            yield
        finally:
            self.fixed_constants, self.draw_seed = before

    def auxiliary(self) -> torch.Tensor | None:
        """The losses of the schemes' own after a forward pass in training, a scalar to be added to the loss; None
        where no scheme has one."""
        found = [loss for block in self.transformer["h"] if (loss := block.attn.pos.auxiliary()) is not None]
        return sum(found) if found else None

    def compile_parts(self, **options) -> None:
        """torch.compile in place, by parts: each block, with one graph for all layers of a kind, and the loss.
        `options` are those of torch.compile; shapes are static, and a graph break is an error. The names in the state
        dict stay.

        Under DistributedDataParallel a block's gradients are there when its own backward ends, so that their reduction
        overlaps with the backward of the blocks before it; one graph of the whole model has them all at its end.
        """
        import torch._dynamo

        # A block is the grain that overlaps: without this, dynamo cuts its graph again at the sizes of DDP's buckets
        torch._dynamo.config.optimize_ddp = False
        # One graph a kind of layer, shape and mode: training, validation, sampling
        limit = 8 * len(self.groups) * len({block.attn.window for block in self.transformer["h"]})
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        fuse_rotations()
        options = {"fullgraph": True, "dynamic": False, **options}
        for block in self.transformer["h"]:
            block.compile(**options)
        self.losses = {reduction: torch.compile(loss, **options) for reduction, loss in self.losses.items()}

    def check_length(self, length: int, offset: int = 0) -> None:
        """ValueError where a scheme cannot go to this length, or its positions moved by `offset` to this end."""
        size = self.config.block_size
        for pos in (block.attn.pos for block in self.transformer["h"]):
            if not pos.extends and length > size:
                raise ValueError(f"{pos.name} positions end at block_size {size}: a length of {length} is not possible")
            if pos.longest is not None and length + offset > pos.longest:
                raise ValueError(
                    f"{pos.name} positions end at length {pos.longest}: a length of {length + offset} is not possible"
                )

    def check_tokens(self, ids: torch.Tensor, lowest: int, what: str) -> None:
        """ValueError for ids outside the vocabulary; on the CPU alone, since a GPU would make the host wait."""
        if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
            return
        if not (lowest <= ids.min() and ids.max() < self.config.vocab_size):
            raise ValueError(
                f"{what} holds ids {ids.min()} … {ids.max()}, "
                f"outside {lowest} … vocab_size-1 = {self.config.vocab_size - 1}"
            )

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        n: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        until: Callable[[torch.Tensor], bool] | None = None,
    ) -> torch.Tensor:
        """Append n sampled tokens: idx (B, T) int64, T ≥ 1 → (B, T + n). Temperature 0 is greedy; top_k keeps the
        k likeliest. Cached: each token is computed once. It ends sooner where `until`, called with all tokens after
        each new one, says so. ValueError where the scheme cannot reach T + n - 1."""
        if idx.size(1) < 1 or n < 0 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
            raise ValueError(
                "generate needs a prompt of ≥ 1 tokens, n ≥ 0, a finite temperature ≥ 0, top_k ≥ 1; "
                f"got {idx.size(1)}, {n}, {temperature}, {top_k}"
            )
        self.check_length(idx.size(1) + n - 1)
        caches, new, training = [{} for _ in self.transformer["h"]], idx, self.training
        self.eval()
        try:
            with self.parameters_fixed():
                for _ in range(n):
                    logits = self.lm_head(self.hidden(new, caches)[:, -1]).float()  # (B, V)
                    if top_k is not None:
                        kth = logits.topk(min(top_k, logits.size(1))).values[:, -1:]
                        logits = logits.masked_fill(logits < kth, -math.inf)
                    if temperature == 0:
                        new = logits.argmax(1, keepdim=True)
                    else:  # beyond the bounds float32 overflows, and the distribution is the same as at them
                        logits = logits / min(max(temperature, 1e-30), 1e30)
                        new = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)
                    idx = torch.cat((idx, new), 1)
                    if until is not None and until(idx):
                        break
        finally:
            self.train(training)
        return idx

    # ---- other forms of the same model

    def to_rope(self) -> "GPT":
        """The equivalent model that is plain `rope`, with explicit frequencies and dense weights. For rope,
        crope, comrope, prope and lerope; other schemes have none: ValueError."""
        return convert.to_rope(self)

    def scaled(self, rule: str, factor: float) -> "GPT":
        """The plain rope model whose frequencies are scaled by `rule` (pi, ntk, yarn, yarn-code) for contexts of
        factor × block_size. ValueError where to_rope() has none."""
        return convert.scaled(self, rule, factor)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "GPT":
        """GPT-2 in the transformers layout: a local folder, or a name on the Hugging Face hub such as "gpt2". A
        `learned` model with biases. ValueError for another architecture, OSError where nothing is found."""
        return hf.load_gpt2(name, lambda **fields: cls(GPTConfig(**fields)))


def groups_of_layers(config: GPTConfig) -> list[list[int]]:
    """Layers that have the same schemes, which prepare their work together."""
    kinds = {}
    for layer in range(config.n_layer):
        kinds.setdefault(schemes.layer_schemes(config.pos, layer), []).append(layer)
    return list(kinds.values())


def resolve(config: GPTConfig) -> GPTConfig:
    """The config with every option of its scheme written out. ValueError, listing every problem, for what cannot be
    built."""
    if problems := checks.problems_of(config):
        raise ValueError("; ".join(problems))
    return dataclasses.replace(config, pos_options=schemes.complete_options(config))
