"""A second GPT-2 with every positional scheme, for the tests: slow, differentiable, written from the papers' formulas.

It shares nothing with model.py and schemes/ but the names of parameters and options. Every rotation is a dense (D, D)
matrix for each position, comrope's by torch.matrix_exp; the scores and the softmax are written out.
B batch, T positions, H heads, D head width, C = H·D. Everything has the dtype of the parameters: use float64.
"""

import dataclasses
import itertools
import math

import torch

J = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # one radian per unit, counterclockwise


def rotations(angles):
    """(..., n) angles → (..., 2n, 2n): block-diagonal rotations of neighbouring channels."""
    c, s = angles.cos(), angles.sin()
    blocks = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)  # (..., n, 2, 2)
    return block_diagonal(blocks)


def block_diagonal(blocks):
    """(..., n, b, b) → (..., nb, nb)."""
    n, b = blocks.size(-3), blocks.size(-1)
    full = blocks.new_zeros(*blocks.shape[:-3], n * b, n * b)
    for j in range(n):
        full[..., j * b : (j + 1) * b, j * b : (j + 1) * b] = blocks[..., j, :, :]
    return full


def rope_angles(T, D, base, fraction=1.0, start=0):
    """(T, D/2): m·base^(-2i/width) for the leading `fraction` of the channels, 0 for the rest."""
    width = round(D * fraction)
    angles = torch.zeros(T, D // 2, dtype=torch.float64)
    for m in range(T):
        for i in range(width // 2):
            angles[m, i] = (start + m) * base ** (-2 * i / width)
    return angles


def carope_phases(source, weight, bias, D, first=0):
    """(B, T, H, D/2): φ_i(m) = Σ_{t≤m} f(x_t)^(first+i), f = 1/(1 + softplus(x W + b)), added up one token at a time.

    No weight: W = 0.
    """
    weight = torch.zeros(bias.numel(), source.size(-1), dtype=source.dtype) if weight is None else weight
    z = source @ weight.T + (0 if bias is None else bias)  # (B, T, H)
    f = 1 / (torch.log(1 + torch.exp(z)) + 1)
    powers = torch.stack([f ** (first + i) for i in range(D // 2)], -1)  # (B, T, H, D/2)
    return torch.stack(list(itertools.accumulate(powers.unbind(1))), 1)


def comrope_rotations(P, theta, unit, T, start=0):
    """(T, H, D, D): exp((m/unit)·θ(P - Pᵀ)), one matrix exponential for each position."""
    A = P - P.transpose(-1, -2)
    A = A if theta is None else theta[..., None, None] * A
    return torch.stack([block_diagonal(torch.matrix_exp(A * (start + m) / unit)) for m in range(T)])


VOCABULARY = [b" and", b"\n", b"lo", b".\n\n ", b"\xc3\xa9t", b"st?", b"able,", b'.") ']  # the bytes of token i mod 8


def coordinates(ids, axes):
    """(T, axes) of the tokens ids (T,), counted in the text itself, for each token anew."""
    found = torch.zeros(len(ids), len(axes), dtype=torch.float64)
    words = [VOCABULARY[i % len(VOCABULARY)] for i in ids.tolist()]
    for t in range(len(ids)):
        text = b"".join(words[:t])
        ended = [s + 1 for s in range(t) if words[s].rstrip(b' \n)"')[-1:] in (b".", b"?")]  # sentences
        sentence = b"".join(words[ended[-1] if ended else 0 : t])
        values = {"token": t, "line": text.count(b"\n"), "sentence": len(ended)}
        values["byte"] = len(sentence) if "sentence" in axes and "line" not in axes else len(text.split(b"\n")[-1])
        found[t] = torch.tensor([values[axis] for axis in axes])
    return found


def comrope_on_axes(P, theta, units, x):
    """(T, H, D, D): exp(Σ_i A_i x_i/unit_i) at the coordinates x (T, N), one matrix exponential for each token."""
    S, found = P - P.transpose(-1, -2), []  # (H, blocks, b, b)
    for at in x:
        exponents = []
        for j in range(S.size(1)):
            if theta is None:
                share = at[j % len(at)] / units[j % len(at)]
            else:
                share = sum(theta[i, :, j, None, None] * at[i] / units[i] for i in range(len(at)))
            exponents.append(S[:, j] * share)
        found.append(block_diagonal(torch.matrix_exp(torch.stack(exponents, 1))))
    return torch.stack(found)


def alibi_slopes(H):
    """The function in the paper's repository (ofirpress/attention_with_linear_biases, get_slopes)."""

    def power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(H).is_integer():
        return power_of_2(H)
    closest = 2 ** math.floor(math.log2(H))
    return power_of_2(closest) + alibi_slopes(2 * closest)[0::2][: H - closest]


def sinusoids(T, C, base, scale):
    """Vaswani 1706.03762, section 3.5."""
    table = torch.zeros(T, C, dtype=torch.float64)
    for m in range(T):
        for i in range(C // 2):
            table[m, 2 * i] = scale * math.sin(m / base ** (2 * i / C))
            table[m, 2 * i + 1] = scale * math.cos(m / base ** (2 * i / C))
    return table


def complex_linear(x, A, B):
    """ỹ = (A + iB) x̃ on neighbouring channels: x (..., C), A and B (n, C/2) → (..., 2n)."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) @ torch.complex(A, B).T).flatten(-2)


def grouped_linear(x, A, B):
    """Even channels by A, odd ones by B: x (..., C), A and B (n, C/2) → (..., 2n)."""
    y = x.new_zeros(*x.shape[:-1], 2 * A.size(0))
    y[..., 0::2], y[..., 1::2] = x[..., 0::2] @ A.T, x[..., 1::2] @ B.T
    return y


def layer_norm(x, p, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * p[name + ".weight"] + p.get(name + ".bias", 0)


def linear(x, p, name):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- the schemes, by what they change: each function gets a Layer


@dataclasses.dataclass
class Layer:
    """One layer of attention, as a scheme's formula sees it."""

    x: torch.Tensor  # (B, T, C) the normed input
    q: torch.Tensor  # (B, T, H, D), k likewise: before positions in ROTATIONS, with them later
    k: torch.Tensor
    options: dict
    embedding: torch.Tensor  # (B, T, C) of the tokens
    config: object
    parameters: dict
    name: str  # transformer.h.0.attn
    idx: torch.Tensor  # (B, T) token ids
    unturned: tuple = ()  # q and k before positions, always

    def own(self, name):
        """A parameter of the scheme's: this layer's, or that of layer 0 which all share; None where there is none."""
        found = self.parameters.get(f"{self.name}.pos.{name}")
        return self.parameters.get(f"transformer.h.0.attn.pos.{name}") if found is None else found

    @property
    def sizes(self):
        """B, T, H, D."""
        return self.q.shape

    @property
    def distance(self):
        """(T, T): m - n of query m and key n."""
        T = self.q.size(1)
        return torch.arange(T).view(-1, 1) - torch.arange(T)


ROTATIONS, ENCODINGS, BIASES, SCORES, WEIGHTS = {}, {}, {}, {}, {}


def of(table, *schemes):
    """A decorator: the function is what these schemes do.

    ROTATIONS  (layer) → (B, T, H, D, D), or what broadcasts to it: a matrix for q and k
    ENCODINGS  (layer) → q, k (B, T, H, any width): for what is no such matrix
    BIASES     (layer) → (B, H, T, T), or what broadcasts to it: added after the division by √D
    SCORES     (layer) → (B, H, T, T), divided by √D already, instead of q kᵀ / √D
    WEIGHTS    (layer, scores (B, H, T, T), -inf where a key is hidden) → attention weights instead of the softmax
    """

    def enter(function):
        table.update(dict.fromkeys(schemes, function))
        return function

    return enter


@of(ROTATIONS, "rope", "crope")
def rope(layer):
    _, T, _, D = layer.sizes
    return rotations(rope_angles(T, D, layer.options["base"], layer.options["fraction"])).view(1, T, 1, D, D)


@of(ROTATIONS, "prope")
def prope(layer):
    _, T, _, D = layer.sizes
    angles = rope_angles(T, D, layer.options["base"])
    for i in range(D // 2):
        if i + 1 > layer.options["p"] * D / 2:
            angles[:, i] = 0
    return rotations(angles).view(1, T, 1, D, D)


@of(ROTATIONS, "lerope")
def lerope(layer):
    _, T, _, D = layer.sizes
    scales = torch.stack([layer.own("scale.log")[i].exp() for i in range(D // 2)])
    return rotations(rope_angles(T, D, layer.options["base"]) * scales).view(1, T, 1, D, D)


@of(ROTATIONS, "selective")
def selective(layer):
    """φ_i(m) = temp_i Σ_{t≤m} ω_t, one token after another; ω_t by four taps, the last for t itself."""
    (B, T, H, D), options = layer.sizes, layer.options
    slices = layer.x.view(B, T, H, D)
    normed = (slices / torch.sqrt((slices**2).sum(-1, keepdim=True) + 1e-6)).reshape(B, T, H * D)
    if options["rank"]:
        mapped = normed @ (layer.own("up") @ layer.own("down")).T
    else:
        full = layer.own("full")
        normal = full / (full**2).sum(1, keepdim=True).sqrt()
        heads = [layer.own("scale")[h] * normed.view(B, T, H, D)[:, :, h] @ normal[h] for h in range(H)]
        mapped = torch.cat(heads, -1)
    conv = layer.own("conv")
    temperature = torch.tensor([options["base"] ** (-2 * i / D) for i in range(D // 2)], dtype=layer.x.dtype)
    total, phases = torch.zeros(B, H, D // 2, dtype=layer.x.dtype), []
    for t in range(T):
        omega = sum(conv[:, 3 - back] * mapped[:, t - back] for back in range(min(4, t + 1))).view(B, H, D // 2)
        if options["silu"]:
            omega = omega / (1 + torch.exp(-omega))
        if options["phase_bias"]:
            omega = omega + torch.exp(layer.own("phase_bias"))
        if options["gate"]:
            z = normed[:, t] @ layer.own("gate.weight").T + layer.own("gate.bias")
            omega = omega / (1 + torch.exp(-z)).unsqueeze(-1)
        total = total + omega
        phases.append(temperature * total)
    return rotations(torch.stack(phases, 1))


@of(ENCODINGS, "xpos")
def xpos(layer):
    """Separate factors ζ^(m/scale) and ζ^(-n/scale): in float64, at few positions."""
    _, T, _, D = layer.sizes
    R = rotations(rope_angles(T, D, layer.options["base"]))
    zeta = torch.tensor([(2 * (c // 2) / D + 0.4) / 1.4 for c in range(D)], dtype=layer.x.dtype)
    factor = torch.stack([zeta ** (m / layer.options["scale"]) for m in range(T)]).view(1, T, 1, D)
    q, k = (torch.einsum("tij,bthj->bthi", R, z) for z in (layer.q, layer.k))
    return q * factor, k / factor


@of(SCORES, "pope")
def pope(layer):
    _, T, H, D = layer.sizes
    q, k = torch.log1p(torch.exp(layer.q)), torch.log1p(torch.exp(layer.k))
    delta = layer.own("delta").clamp(-2 * math.pi, 0)
    scores = 0
    for c in range(D):
        angle = -layer.distance.to(q) * layer.options["base"] ** (-c / D) + delta[:, c].view(H, 1, 1)
        scores = scores + torch.einsum("bmh,bnh->bhmn", q[..., c], k[..., c]) * torch.cos(angle)
    return scores / math.sqrt(D)


@of(ROTATIONS, "gape")
def gape_rotation(layer):
    _, T, _, D = layer.sizes
    return rotations(rope_angles(T, D, layer.options["base"])).view(1, T, 1, D, D)


@of(BIASES, "gape")
def gape(layer):
    B, T, H, D = layer.sizes
    q, k = layer.unturned
    g = torch.log1p(torch.exp((q * layer.own("w_g")).sum(-1) + layer.own("b_g")))
    protected = 1 / (1 + torch.exp(-(k * layer.own("w_l")).sum(-1) - layer.own("b_l")))
    strength = torch.log1p(torch.exp(layer.own("gamma")))
    gates = torch.einsum("h,bmh,bnh->bhmn", strength, g, 1 - protected)
    return -gates * layer.distance.to(gates) / layer.config.block_size


@of(ROTATIONS, "comrope")
def comrope(layer):
    T, axes, unit = layer.sizes[1], layer.options["axes"], layer.options["unit"]
    if len(axes) > 1:
        units = unit if isinstance(unit, list) else [unit] * len(axes)
        P, theta = layer.own("P"), layer.own("theta")
        return torch.stack([comrope_on_axes(P, theta, units, coordinates(ids, axes)) for ids in layer.idx])
    return comrope_rotations(layer.own("P"), layer.own("theta"), layer.options["unit"], T).unsqueeze(0)


@of(ROTATIONS, "carope")
def carope(layer):
    source = layer.x if layer.options["source"] == "hidden" else layer.embedding
    weight, bias = layer.own("c_pos.weight"), layer.own("c_pos.bias")
    return rotations(carope_phases(source, weight, bias, layer.sizes[3], layer.options["first_power"]))


@of(BIASES, "alibi")
def alibi(layer):
    slopes = torch.tensor(alibi_slopes(layer.sizes[2]), dtype=layer.x.dtype)
    return -slopes.view(-1, 1, 1) * layer.distance


def t5_bucket(distance, buckets, longest):
    """The bucket of a distance ≥ 0, one at a time."""
    exact = buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(longest / exact)
    return min(buckets - 1, exact + math.floor(share * (buckets - exact) + 1e-9))  # + of rounding


@of(BIASES, "t5")
def t5(layer):
    T, own = layer.sizes[1], layer.options
    rows = [[t5_bucket(max(m - n, 0), own["buckets"], own["longest"]) for n in range(T)] for m in range(T)]
    return layer.own("table")[torch.tensor(rows)].permute(2, 0, 1)


@of(BIASES, "kerple")
def kerple(layer):
    r1 = torch.log(1 + layer.own("r1").exp()).view(-1, 1, 1)
    r2 = layer.own("r2").view(-1, 1, 1)
    distance = layer.distance.abs().to(r1.dtype)
    if layer.options["kind"] == "power":
        return -r1 * distance ** (2 / (1 + torch.exp(-r2)))
    return -r1 * torch.log(1 + torch.log(1 + r2.exp()) * distance)


@of(BIASES, "fire")
def fire(layer):
    T = layer.sizes[1]
    c, L = layer.own("log_c").exp(), layer.own("log_L").exp()
    zero, rows = torch.zeros_like(c), []
    for m in range(T):
        span = torch.log(c * max(L, zero + m) + 1)
        y = torch.stack([torch.log(c * max(m - n, 0) + 1) / span for n in range(T)]).unsqueeze(-1)  # (T, 1)
        hidden = (y @ layer.own("hidden.weight").T + layer.own("hidden.bias")).clamp_min(0)
        rows.append(hidden @ layer.own("out.weight").T)  # (T, H)
    return torch.stack(rows).permute(2, 0, 1)


def between(steps):
    """Σ_{t=n+1..m} of steps (B, T, H), 0 where n ≥ m: (B, H, T, T)."""
    B, T, H = steps.shape
    sums = steps.new_zeros(B, H, T, T)
    for m in range(T):
        for n in range(m):
            sums[:, :, m, n] = steps[:, n + 1 : m + 1].sum(1)
    return sums


@of(BIASES, "fox")
def fox(layer):
    gate = 1 / (1 + torch.exp(-(layer.x @ layer.own("gate.weight").T + layer.own("gate.bias"))))
    return between(gate.log()) / (math.sqrt(layer.sizes[3]) if layer.options["divided"] else 1)


@of(BIASES, "cable")
def cable(layer):
    biases = [layer.own(f"{name}.bias") if layer.options["bias"] else 0 for name in ("distance", "slope")]
    steps = (layer.x @ layer.own("distance.weight").T + biases[0]).clamp_min(0)
    weights = torch.log(1 + torch.exp(layer.x @ layer.own("slope.weight").T + biases[1]))  # (B, T, H)
    return -weights.transpose(1, 2).unsqueeze(-1) * between(steps)


@of(SCORES, "path")
def path(layer):
    """k_nᵀ H_{n+1} … H_m q_m / √D, with a (D, D) matrix for each pair of tokens."""
    B, T, H, D = layer.sizes
    maps = layer.x @ layer.own("down.weight").T @ layer.own("up.weight").T
    conv = layer.own("conv")  # (C, width)
    w = torch.stack([sum(maps[:, t - j] * conv[:, -1 - j] for j in range(conv.size(1)) if j <= t) for t in range(T)], 1)
    w = (w / (1 + torch.exp(-w))).view(B, T, H, D)
    w = w / (w**2).sum(-1, keepdim=True).sqrt()
    beta = 2 / (1 + torch.exp(-(layer.x @ layer.own("gate.weight").T + layer.own("gate.bias"))))  # (B, T, H)
    eye = torch.eye(D, dtype=w.dtype)
    each = eye - beta[..., None, None] * w.unsqueeze(-1) * w.unsqueeze(-2)  # (B, T, H, D, D)
    products, rows = torch.zeros(B, 0, H, D, D, dtype=w.dtype), []
    for m in range(T):
        products = torch.cat((products @ each[:, m : m + 1], eye.expand(B, 1, H, D, D)), 1)  # of n = 0 … m
        scores = torch.einsum("bnhi,bnhij,bhj->bhn", layer.k[:, : m + 1], products, layer.q[:, m])
        rows.append(torch.cat((scores, torch.zeros(B, H, T - m - 1, dtype=w.dtype)), -1))
    return torch.stack(rows, 2) / math.sqrt(D)


@of(ENCODINGS, "seqpe")
def seqpe(layer):
    """e(m)W_Q and e(m)W_K beside q and k: their dot products add up."""
    B, T, H, D = layer.sizes
    e = seqpe_embeddings(range(T), layer.own, D)  # (T, C)
    extra = [(e @ layer.own(f"encoder.to_{name}.weight").T).view(1, T, H, D).expand(B, -1, -1, -1) for name in "qk"]
    return [torch.cat(pair, -1) for pair in zip((layer.q, layer.k), extra)]


def seqpe_embeddings(positions, own, D):
    """e (N, C) of each position: GPT-2's blocks over its digits, left-padded, and CLS; own: parameter by name; D: the
    width of their heads."""
    digit, place, cls = (own(f"encoder.{name}") for name in ("digit", "place", "cls"))
    found = []
    for m in positions:
        symbols = [digit[int(symbol)] + place[i] for i, symbol in enumerate(str(m).rjust(len(place), "0"))]
        x, layer = torch.stack([*symbols, cls[0]]), 0  # (digits + 1, width)
        while (q := own(f"encoder.layers.{layer}.q.weight")) is not None:
            kv, proj, fc, out = (own(f"encoder.layers.{layer}.{name}.weight") for name in ("kv", "proj", "fc", "out"))
            h = standardised(x)
            q, k, v = ((h @ w.T).unflatten(-1, (-1, D)).transpose(0, 1) for w in (q, *kv.chunk(2)))  # (heads, n, D)
            scores = (q @ k.transpose(1, 2) / math.sqrt(D)).exp().tril()
            y = (scores / scores.sum(-1, keepdim=True)) @ v
            x = x + y.transpose(0, 1).flatten(1) @ proj.T
            x, layer = x + gelu(standardised(x) @ fc.T) @ out.T, layer + 1
        found.append(standardised(x[-1]) @ own("encoder.out.weight").T)
    return torch.stack(found)


def standardised(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)


@of(SCORES, "cope")
def cope(layer):
    _, T, _, D = layer.sizes
    z = torch.einsum("bmhd,bnhd->bhmn", layer.q, layer.k) / math.sqrt(D)
    table = layer.own("e")  # (D, P)
    values = torch.einsum("bmhd,dp->bhmp", layer.q, table)
    grid, out = torch.arange(table.size(1)), torch.zeros_like(z)
    for m in range(T):
        for n in range(m + 1):
            p = z[:, :, m, n : m + 1].sigmoid().sum(-1, keepdim=True).clamp(max=table.size(1) - 1)  # (B, H, 1)
            tents = (1 - (p - grid).abs()).clamp(min=0)  # (B, H, P): linear interpolation
            out[:, :, m, n] = z[:, :, m, n] + (values[:, :, m] * tents).sum(-1)
    return out


@of(WEIGHTS, "urpe")
def urpe(layer, scores):
    distance = layer.distance.clamp(0, layer.own("C.table").size(1) - 1)
    if layer.options["bias"] == "toeplitz":
        scores = scores + layer.own("B.table")[:, distance]
    return scores.exp() / scores.exp().sum(-1, keepdim=True) * layer.own("C.table")[:, distance]


@of(WEIGHTS, "stickbreaking")
def stickbreaking(layer, scores):
    shares, weights = scores.sigmoid(), torch.zeros_like(scores)
    for m in range(scores.size(2)):
        left = torch.ones_like(scores[:, :, m, 0])
        for n in reversed(range(m)):
            weights[:, :, m, n] = shares[:, :, m, n] * left
            left = left * (1 - shares[:, :, m, n])
        weights[:, :, m, m] = left if layer.options["remainder"] == "value" else 0
    return weights


@of(BIASES, "grape")
def grape(layer):
    (B, T, H, _), d = layer.sizes, layer.options["width"]
    p = (layer.x @ layer.own("c_p.weight").T).view(B, T, H, d)
    turned = torch.zeros_like(p)
    for m in range(T):
        normed = p[:, m] / p[:, m].square().mean(-1, keepdim=True).sqrt()
        turned[:, m] = normed @ rotations(torch.full((d // 2,), float(m), dtype=p.dtype)).T
    steps = (torch.einsum("bmhd,blhd->bhml", p, turned) / d).sigmoid().log()
    slopes = torch.tensor(alibi_slopes(H), dtype=p.dtype)
    bias = torch.zeros_like(steps)
    for n in range(T):
        for m in range(n + 1, T):
            bias[:, :, m, n] = slopes * steps[:, :, m, n + 1 : m + 1].sum(-1)
    return bias


# ---- the model


def attention(x, embedding, config, p, name, idx, seen):
    """x (B, T, C), the normed input, the token embeddings (B, T, C) and ids idx (B, T) → (B, T, C). The weights
    (B, H, T, T) go into the list `seen`."""
    pos, options = config.pos, config.pos_options
    B, T, C = x.shape
    H, D = config.n_head, config.n_embd // config.n_head
    if pos == "crope" or options.get("qkv") == "grouped":
        halved = complex_linear if pos == "crope" else grouped_linear
        qkv = halved(x, p[name + ".c_attn.A"], p[name + ".c_attn.B"]) + p.get(name + ".c_attn.bias", 0)
    elif options.get("qkv") == "low-rank":
        few = x @ p[name + ".c_attn.down"].T
        qkv = few @ p[name + ".c_attn.up"].T + p.get(name + ".c_attn.bias", 0)
    else:
        qkv = linear(x, p, name + ".c_attn")
    q, k, v = (part.reshape(B, T, H, D) for part in qkv.split(C, -1))

    if config.qk_norm:
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    layer = Layer(x, q, k, options, embedding, config, p, name, idx, (q, k))
    if pos in ROTATIONS:
        R = ROTATIONS[pos](layer).expand(B, T, H, D, D)
        layer.q, layer.k = (torch.einsum("bthij,bthj->bthi", R, z) for z in (q, k))
    if pos in ENCODINGS:
        layer.q, layer.k = ENCODINGS[pos](layer)
    scores = SCORES[pos](layer) if pos in SCORES else torch.einsum("bmhd,bnhd->bhmn", layer.q, layer.k) / math.sqrt(D)
    if config.logit_scale == "log":
        visible = torch.arange(1, T + 1).clamp_max(config.window or T)
        scores = scores * p[name + ".logit_scale"].view(H, 1, 1) * visible.to(x.dtype).log().view(T, 1)
    if pos in BIASES:
        scores = scores + BIASES[pos](layer)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    if config.window:
        future = future | (layer.distance >= config.window)
    scores = scores.masked_fill(future, -math.inf)
    if pos in WEIGHTS:
        weights = WEIGHTS[pos](layer, scores)
    else:
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    seen.append(weights)
    return linear(torch.einsum("bhmn,bnhd->bmhd", weights, v).reshape(B, T, C), p, name + ".c_proj")


def logits(config, p, idx):
    """config (options written out), parameters by name, idx (B, T) → logits (B, T, V)."""
    return logits_and_weights(config, p, idx)[0]


def logits_and_weights(config, p, idx):
    """Logits (B, T, V), and the attention weights (B, H, T, T) of each layer."""
    (T, C), seen = (idx.size(1), config.n_embd), []
    embedding = x = p["transformer.wte.weight"][idx]
    if config.pos == "learned":
        x = x + p["transformer.wpe.weight"][:T]
    if config.pos == "sinusoidal":
        x = x + sinusoids(T, C, config.pos_options["base"], config.pos_options["scale"])
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        x = x + attention(layer_norm(x, p, block + ".ln_1"), embedding, config, p, block + ".attn", idx, seen)
        h = layer_norm(x, p, block + ".ln_2")
        x = x + linear(gelu(linear(h, p, block + ".mlp.c_fc")), p, block + ".mlp.c_proj")
    return layer_norm(x, p, "transformer.ln_f") @ p["transformer.wte.weight"].T, seen


def cross_entropy(logits, targets):
    """Mean over the targets that are not -1."""
    keep = targets >= 0
    logp = logits - logits.logsumexp(-1, keepdim=True)
    return -logp[keep].gather(-1, targets[keep].unsqueeze(-1)).mean()
