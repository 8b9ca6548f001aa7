"""Switches of the model beside its scheme: document_mask, qk_norm, logit_scale."""

import dataclasses
import math

import pytest
import reference
import torch
import torch.nn.attention.flex_attention as flex
from models import (
    BLOCK,
    LAYERS,
    VOCAB,
    WIDTH,
    Largest,
    all_schemes,
    build,
    cases_of,
    close,
    config,
    gradients,
    refused,
    tokens,
)

from model import GPT, GPTConfig
from nanope import attention, conformance
from nanope.block_masks import BlockMasks

EOT = 7
PACKED = dict(document_mask=True, eot=EOT)
SIZES = (1, 5, 4, 2)  # of documents, their end included; the last has none


def packed(sizes=SIZES, rows=2, seed=0):
    """Documents in a row, and where they begin and end: idx (rows, Σ sizes), [(begin, end)]. The second row begins
    with the last size, so that the rows differ."""
    idx = tokens(sum(sizes), rows, seed)
    idx[idx == EOT] = EOT + 1
    places = []
    for row in range(rows):
        order, at = (sizes if row % 2 == 0 else sizes[::-1]), 0
        places.append([])
        for size in order:
            places[-1].append((at, at + size))
            at += size
            if at < idx.size(1):
                idx[row, at - 1] = EOT
    return idx, places


# ---- document_mask


@all_schemes
def test_documents_in_a_row_are_as_each_alone(pos):
    """Values and every gradient, and with a cache in pieces that do not end where documents do."""
    model = build(pos, **PACKED)
    idx, places = packed()
    alone = torch.stack(
        [torch.cat([model.hidden(idx[row : row + 1, a:b])[0] for a, b in places[row]]) for row in range(2)]
    )
    together = model.hidden(idx)
    close(together, alone)
    weights = torch.randn(together.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for hidden in (together, alone):
        model.zero_grad()
        (hidden * weights).sum().backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        close(gradient, results[1][name], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        for sizes in ([1] * BLOCK, [3, 1, 6, 2]):
            caches = [{} for _ in range(LAYERS)]
            close(torch.cat([model.hidden(part, caches) for part in idx.split(sizes, 1)], 1), together)


@pytest.mark.parametrize("fields", [{}, {"window": 3}, {"window": [2, 0]}])
def test_documents_in_windows_and_chunks(fields):
    """Queries a few at a time, and within windows, see what they see in one pass over their document."""
    model = build("alibi", **PACKED, **fields)
    idx, places = packed((20, 9, 1, 40))
    model.attend = lambda *args: attention.attend(*args, chunk=2 * 3 * 70 * 7)
    with torch.no_grad():
        for row in range(2):
            alone = [model.hidden(idx[row : row + 1, a:b])[0] for a, b in places[row]]
            close(model.hidden(idx)[row], torch.cat(alone))


@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_no_mask_of_all_queries_and_keys(pos):
    T = 2048
    model = GPT(GPTConfig(T, 64, 1, 2, 16, pos=pos, document_mask=True, eot=0))
    with Largest() as largest:
        idx = torch.randint(64, (1, T))
        model(idx, idx)[1].backward()
    assert largest.elements < T * T / 4


@pytest.mark.parametrize(("fields", "chunk"), [({}, 2**14), (PACKED, 2**14), (PACKED, 2**18)])
def test_no_masks_are_kept_that_are_more_than_a_chunk_together(fields, chunk):
    """For the backward pass, beside what a model without positions and documents keeps."""

    def kept(fields):
        model, idx, sizes = GPT(GPTConfig(256, VOCAB, 1, 4, 16, **fields)), tokens(256, 4), {}
        model.attend = lambda *args: attention.attend(*args, chunk=chunk)

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx, idx)
        return sum(sizes.values())

    assert kept({"pos": "alibi", **fields}) < kept({"pos": "none"}) + 4 * chunk


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 5])
def test_flex_attention_has_the_same_documents(window, monkeypatch):
    """What a GPU runs in training, here uncompiled on a CPU and forward alone."""
    monkeypatch.setattr(attention, "flex_fits", lambda *_: True)
    monkeypatch.setattr(attention, "compiled_flex_attention", lambda: flex.flex_attention)
    idx, _ = packed((30, 70, 28))
    for pos in ("rope", "alibi"):
        model = build(pos, torch.float32, window=window, **PACKED)
        with torch.no_grad():
            by_flex = model.hidden(idx)
            monkeypatch.setattr(BlockMasks, "of", lambda *_: None)
            close(by_flex, model.hidden(idx), atol=2e-4)
            monkeypatch.undo()
            monkeypatch.setattr(attention, "flex_fits", lambda *_: True)
            monkeypatch.setattr(attention, "compiled_flex_attention", lambda: flex.flex_attention)


def test_generation_knows_where_documents_end():
    model = build("rope", **PACKED)
    idx, _ = packed()
    out = model.generate(idx, 8, temperature=0)
    for t in range(idx.size(1), out.size(1)):
        assert torch.equal(model(out[:, :t])[0][:, -1].argmax(-1), out[:, t])


# ---- qk_norm, logit_scale


@pytest.mark.parametrize("fields", [{"qk_norm": True}, {"logit_scale": "log"}, {"logit_scale": "log", "window": 4}])
@cases_of(
    ["rope", "gape", "crope", "comrope", "carope", "alibi", "grape", "pope", "seqpe", "xpos"], fast=["rope", "gape"]
)
def test_norms_and_scales_equal_the_reference(case, fields):
    model = build(case, **fields)
    idx, targets = tokens(2 * BLOCK), tokens(2 * BLOCK, seed=1)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference.cross_entropy(reference.logits(model.config, parameters, idx), targets)
    expected.backward()
    loss = model(idx, targets)[1]
    loss.backward()
    close(loss, expected)
    for name, gradient in gradients(model).items():
        close(gradient, parameters[name].grad, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["crope", "comrope", "rope base fraction"])
def test_plain_rope_keeps_the_switches(case):
    model = build(case, qk_norm=True, logit_scale="log", window=9, **PACKED)
    idx, _ = packed()
    rope = model.to_rope()
    close(rope(idx)[0], model(idx)[0])
    assert rope.config.qk_norm and rope.config.logit_scale == "log" and rope.config.window == 9


@pytest.mark.parametrize("qk_norm", [False, True])
def test_yarn_scales_scores_whether_normed_or_not(qk_norm):
    """Its factor reaches the scores: as one of the queries' weights, where no norm undoes that."""
    model, idx = build("rope", qk_norm=qk_norm), tokens(BLOCK)
    scaled, plain = model.scaled("yarn", 4.0), model.scaled("yarn", 4.0)
    factor = (0.1 * math.log(4) + 1) ** 2
    for block in plain.transformer.h:
        block.attn.logit_factor = 1.0
        for parameter in block.attn.c_attn.parameters():
            parameter.data[:WIDTH] *= factor
    same = (plain(idx)[0] - scaled(idx)[0]).abs().max() < 1e-10
    assert same != qk_norm


OWN_SCALE = """
import torch
from schemes.base import Scheme


class Own(Scheme):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.logit_scale = torch.nn.Parameter(torch.empty(1))

    def initial(self, name, shape, normal):
        return torch.full(shape, 7.0)
"""


def test_initial_scales():
    for start, expected in ((0.168, 0.168), (None, 1 / torch.tensor(float(BLOCK)).log().item()), (2.0, 2.0)):
        model = GPT(config("rope", logit_scale="log", logit_scale_start=start))
        for block in model.transformer.h:
            assert block.attn.logit_scale.tolist() == pytest.approx([expected] * 3)
    assert not any("logit_scale" in name for name, _ in GPT(config("rope")).named_parameters())


def test_a_parameter_of_a_scheme_may_have_the_name_of_the_scale(tmp_path):
    (tmp_path / "own.py").write_text(OWN_SCALE)
    model = GPT(config(f"{tmp_path}/own.py:Own", logit_scale="log"))
    assert [value.tolist() for name, value in model.named_parameters() if name.endswith("pos.logit_scale")] == [
        [7.0]
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize("check", ["chunks", "gradients", "low_precision", "compilation", "saving", "cached_decoding"])
@pytest.mark.parametrize("pos", [["rope", "rope", "none"], "carope", "alibi"])
def test_all_switches_at_once_pass_the_checks(pos, check):
    switches = dict(qk_norm=True, logit_scale="log", window=[6, 6, 0], document_mask=True, eot=3)
    conformance.CHECKS[check](conformance.Case(pos, {}, switches))


@pytest.mark.parametrize(("fields", "words"), [
    ({"document_mask": True}, ["document_mask needs eot"]),
    ({"document_mask": "yes", "qk_norm": 1}, ["document_mask must be True or False", "qk_norm must be"]),
    ({"logit_scale": "exp"}, ["logit_scale must be 'none' or 'log', not 'exp'"]),
    ({"logit_scale_start": 0}, ["logit_scale_start must be a positive number or None, not 0"]),
])  # fmt: skip
def test_bad_switches(fields, words):
    refused(fields, words)


def test_a_model_without_switches_is_the_one_before():
    """Their defaults add no parameter, and leave the config of a checkpoint as it was."""
    plain = dataclasses.asdict(GPT(config("rope")).config)
    assert plain["document_mask"] is False and plain["eot"] is None and plain["logit_scale"] == "none"
