"""Other forms of the same model: plain rope with explicit frequencies, and frequencies scaled for longer contexts."""

import dataclasses
import math

import torch

from nanope.errors import nearest

SCALINGS = ("pi", "ntk", "yarn", "yarn-code")


@torch.no_grad()
def to_rope(model):
    """The equivalent GPT that is plain `rope`, with explicit frequencies and dense weights. ValueError where a layer's
    scheme has no such form."""
    config = dataclasses.replace(model.config, pos="rope", pos_options={"explicit": True})
    state = {k: v for k, v in model.state_dict().items() if ".attn.pos." not in k and ".c_attn." not in k}
    for i, block in enumerate(model.transformer["h"]):
        pos = block.attn.pos
        weight, bias, freqs = pos.as_rope(block.attn.c_attn)
        for hook in ("project", "encode", "bias", "scores", "weights"):
            if not issubclass(definer(pos, "as_rope"), definer(pos, hook)):
                raise ValueError(f"{pos.name} has a {hook} of its own, and no as_rope that knows of it")
        prefix = f"transformer.h.{i}.attn."
        state |= {f"{prefix}c_attn.weight": weight, f"{prefix}pos.freqs": freqs}
        if bias is not None:
            state[f"{prefix}c_attn.bias"] = bias
    weight = model.lm_head.weight
    rope = type(model)(config).to(weight.device, weight.dtype)
    rope.load_state_dict(state)
    for before, block in zip(model.transformer["h"], rope.transformer["h"]):
        block.attn.logit_factor = before.attn.logit_factor
        for name in ("base", "fraction"):  # not used by explicit frequencies, but by their scaling
            if hasattr(before.attn.pos, name):
                setattr(block.attn.pos, name, getattr(before.attn.pos, name))
    return rope.train(model.training)


def definer(pos, hook: str) -> type:
    """The class that defines a scheme's hook."""
    return next(c for c in type(pos).__mro__ if hook in vars(c))


@torch.no_grad()
def scaled(model, rule: str, factor: float):
    """The plain rope GPT whose frequencies are scaled by `rule` (see scale_frequencies) for contexts of factor ×
    block_size: evaluation beyond the training length. ValueError where to_rope has no such model."""
    rope, length = to_rope(model), model.config.block_size
    for before, block in zip(model.transformer["h"], rope.transformer["h"]):
        old, new = before.attn.pos, block.attn.pos
        width = round(getattr(old, "fraction", 1.0) * old.head_width)
        freqs, logits = scale_frequencies(new.frequencies(), rule, factor, length, width, getattr(old, "base", 10000.0))
        new.freqs.copy_(freqs)
        block.attn.logit_factor *= logits
    return rope


def scale_frequencies(
    freqs: torch.Tensor, rule: str, factor: float, length: int, width: int, base: float
) -> tuple[torch.Tensor, float]:
    """Frequencies for a context `factor` times the training length, and what all attention logits are multiplied by.

    freqs: any shape, float64, radians per token, of a model trained at `length` tokens.
    pi    position interpolation, ω/s (Chen 2306.15595)
    ntk   NTK-aware: RoPE's base becomes base·s^(D/(D-2)), D = `width` turning channels. Of a frequency alone, that is
          ω·s^(-log ω / log ω_last) with ω_last = base^(-(D-2)/D), RoPE's slowest: the fastest stays, the slowest is
          interpolated. Trained frequencies follow the same curve, clamped at both ends.
    yarn  ω/s where a wavelength exceeds the training length, ω where 32 or more fit into it, a ramp in their number
          between; logits times (0.1 ln s + 1)² (Peng 2309.00071)
    yarn-code  the same with the ramp of the authors' code and of transformers: linear in the pair's index, which is in
          log ω, between whole indices. It keeps more of what is on the ramp, at factor 4 up to 0.3 of a frequency.
    ValueError for another rule, factor < 1, or ntk and yarn-code with fewer than 4 turning channels.
    """
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor must be at least 1, not {factor}: it is the new context over the training length")
    if rule not in SCALINGS:
        raise ValueError(f"no frequency scaling {rule!r}{nearest(rule, SCALINGS)} There are: {', '.join(SCALINGS)}")
    if rule == "pi":
        return freqs / factor, 1.0
    if rule == "yarn":
        kept = ((length * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    else:
        if width < 4 or base <= 1:
            raise ValueError(
                f"{rule} needs at least 4 turning channels a head and a base above 1, not {width} and {base}"
            )
        one = 2 / width * math.log(base)  # -log ω of the pair of index 1
        index = -freqs.clamp_min(torch.finfo(freqs.dtype).tiny).log() / one
        if rule == "ntk":
            return freqs * factor ** -(index / (width / 2 - 1)).clamp(0, 1), 1.0
        first, last = (math.log(length / (2 * math.pi * turns)) / one for turns in (32, 1))
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        kept = 1 - ((index - first) / max(last - first, 1e-3)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / factor), (0.1 * math.log(factor) + 1) ** 2
