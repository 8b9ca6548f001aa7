"""Several schemes in one layer, such as rope+alibi."""

import dataclasses

import torch

from schemes.base import Context, Scheme, first_axis

# Hooks with one answer; the others are asked in order, and their answers chain (encode) or add (bias, auxiliary)
EXCLUSIVE = ("embedding", "projection", "positions", "project", "scores", "weights")


class Combined(Scheme):
    """`a+b`: encodings in order, biases and auxiliary losses add. Any other hook belongs to the one scheme that
    overrides it. ValueError where two do."""

    def __init__(self, config, layer: int, parts: dict[str, Scheme]):
        super().__init__(config, layer)
        self.owners = {}
        for hook in EXCLUSIVE:
            owners = [name for name, part in parts.items() if part.claims(hook)]
            if len(owners) > 1:
                raise ValueError(f"{' and '.join(owners)} cannot be combined: each has its own {hook}")
            self.owners[hook] = owners[0] if owners else None
        for name, part in parts.items():
            others = [other for other, p in parts.items() if p is not part and any(map(p.claims, part.sole))]
            if others:
                raise ValueError(
                    f"{name} cannot be combined with {others[0]}: it needs {', '.join(part.sole)} for itself"
                )
            self.add_module(name, part)
        asked = {part.axes: name for name, part in parts.items() if part.axes}
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked.values())} cannot be combined: they ask for different axes")
        table = self.owners["embedding"]
        for name, part in parts.items():
            if table and not parts[table].extends and part.reach >= config.block_size:
                raise ValueError(
                    f"{table} cannot be combined with {name}: its table ends at block_size {config.block_size}, and "
                    f"{name} trains at positions up to {part.reach}"
                )
        self.axes = next(iter(asked), ())
        self.names = tuple(parts)
        self.extends = all(part.extends for part in parts.values())
        self.longest = min((part.longest for part in parts.values() if part.longest), default=None)
        self.dense = any(part.dense for part in parts.values())
        self.biased = any(part.biased for part in parts.values())
        self.of_keys = all(part.of_keys for part in parts.values() if part.biased)
        encoders = [name for name, part in parts.items() if part.claims("encode")]
        for name, then in zip(encoders, encoders[1:]):
            if parts[name].wider:
                text = "+".join([other for other in parts if other != name] + [name])
                raise ValueError(f"{then} cannot turn what {name} has made wider: give {name} last, as {text}")
        self.wider = parts[encoders[-1]].wider if encoders else ""

    def told(self, ctx):
        parts = {}
        for name in self.names:
            own = {"constants": ctx.constants[name], "prepared": ctx.prepared[name], "part": f"{name}."}
            parts[name] = dataclasses.replace(seen_by(self.part(name), ctx), **own)
        return dataclasses.replace(ctx, parts=parts)

    def of(self, name: str, ctx: Context) -> Context:
        """What one part is told. Not made here: a compiled block would then depend on each of its fields."""
        return ctx.parts[name]

    def part(self, name: str) -> Scheme:
        return self._modules[name]

    # ---- hooks that have one owner

    def embedding(self, config):
        owner = self.owners["embedding"]
        return self.part(owner).embedding(config) if owner else None

    def projection(self, config):
        owner = self.owners["projection"]
        return self.part(owner).projection(config) if owner else super().projection(config)

    def positions(self, ctx):
        if not (owner := self.owners["positions"]):
            return ctx.positions
        part = self.part(owner)
        seen = part.positions(seen_by(part, ctx))
        if self.axes and not part.axes:  # its positions, with the coordinates that another part asks for
            seen = torch.cat((seen.expand_as(ctx.positions[..., 0]).unsqueeze(-1), ctx.positions[..., 1:]), -1)
        return seen

    def project(self, c_attn, x, ctx):
        owner = self.owners["project"]
        return self.part(owner).project(c_attn, x, self.of(owner, ctx)) if owner else c_attn(x)

    def scores(self, q, k, x, rows, ctx):
        owner = self.owners["scores"]
        if not owner:
            return super().scores(q, k, x, rows, ctx)
        return self.part(owner).scores(q, k, x, rows, self.of(owner, ctx))

    def weights(self, scores, ctx):
        owner = self.owners["weights"]
        return self.part(owner).weights(scores, self.of(owner, ctx)) if owner else super().weights(scores, ctx)

    # ---- hooks of all parts

    @classmethod
    def constants(cls, layers):
        return each_part(layers, lambda name, kind, parts: kind.constants(parts))

    @classmethod
    def prepare(cls, layers, ctx):
        def item(name, kind, parts):
            constants = None if ctx.constants is None else [c[name] for c in ctx.constants]
            own = seen_by(parts[0], ctx)
            return kind.prepare(parts, dataclasses.replace(own, constants=constants, part=f"{name}."))

        return each_part(layers, item)

    def encode(self, qk, x, ctx):
        for name in self.names:
            qk = self.part(name).encode(qk, x, self.of(name, ctx))
        return qk

    def bias(self, x, q, k, ctx):
        found = [self.part(name).bias(x, q, k, self.of(name, ctx)) for name in self.names]
        found = [bias for bias in found if bias is not None]
        if len(found) < 2:
            return found[0] if found else None
        return lambda batch, head, m, n: sum(bias(batch, head, m, n) for bias in found)

    def auxiliary(self):
        found = [loss for name in self.names if (loss := self.part(name).auxiliary()) is not None]
        return sum(found) if found else None

    def initial(self, name, shape, normal):
        part, _, own = name.partition(".")
        return self.part(part).initial(own, shape, normal)

    # ---- what is asked about it

    @property
    def name(self):
        return "+".join(self.names)

    def owner(self, hook):
        return self.owners[hook]

    def parts(self):
        return [self.part(name) for name in self.names]

    def claims(self, hook):
        return any(part.claims(hook) for part in self._modules.values())

    def undecayed_names(self):
        return {f"{name}.{own}" for name in self.names for own in self.part(name).undecayed_names()}

    def plain_name(self, name):
        """Its own name in the first part that has it; path+fox has two gates, which start with values of their own."""
        part, _, own = name.partition(".")
        return own if part == next(p for p in self.names if own in dict(self.part(p).named_parameters())) else name


def seen_by(part: Scheme, ctx: Context) -> Context:
    """The context with the positions that a part asks for: without the coordinates that another one does."""
    return ctx if part.axes else dataclasses.replace(ctx, positions=first_axis(ctx.positions, ctx.places))


def each_part(layers: list[Combined], make) -> list[dict]:
    """An item a layer, {part: what `make` gives for that layer}; make(name, class, that part of every layer)."""
    columns = {}
    for name in layers[0].names:
        parts = [layer.part(name) for layer in layers]
        made = make(name, type(parts[0]), parts)
        columns[name] = [None] * len(layers) if made is None else made
    return [{name: column[i] for name, column in columns.items()} for i in range(len(layers))]
