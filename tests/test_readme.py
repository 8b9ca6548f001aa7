"""What the README shows, run."""

import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from model import GPT, SCHEMES, Attention, GPTConfig
from nanope import REPO, plan
from nanope.config import RunConfig

README = (REPO / "README.md").read_text()


def test_the_scheme_of_the_readme_is_kerple(monkeypatch):
    monkeypatch.setattr(model, "SCHEMES", dict(SCHEMES))
    (code,) = re.findall(r"```python\n(class Kerple.*?)```", README, re.S)
    exec(code, {"Attention": Attention, "SCHEMES": model.SCHEMES, "nn": nn, "F": F, "torch": torch})
    gpt = GPT(GPTConfig(16, 64, 2, 2, 16, pos="kerple", pos_options={"start": 0.7}), seed=0).double()
    idx = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    logits, _ = gpt(idx)
    assert torch.allclose(gpt(idx[:, :20])[0], logits[:, :20])  # causal, and beyond block_size
    assert torch.equal(gpt.generate(idx[:, :9], 1, temperature=0)[:, -1], logits[:, 8].argmax(-1))

    # attention against the paper's formula
    attention = gpt.transformer["h"][0].attn
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    ctx = model.Context(0, 24, torch.float64, x.device)
    q, k, v = attention.c_attn(x).view(24, 3, 2, 8).permute(1, 2, 0, 3)  # (H, T, D) each
    r = F.softplus(torch.tensor(0.7, dtype=torch.float64))
    distance = (torch.arange(24)[:, None] - torch.arange(24)).double()
    scores = q @ k.mT / 8**0.5 - r * torch.log1p(r * distance.clamp_min(0))
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    assert torch.allclose(attention(x, ctx)[0], attention.c_proj(expected.transpose(0, 1).reshape(24, 16)))

    gpt(idx[:, :-1], idx[:, 1:])[1].backward()
    assert all(
        block.attn.r1.grad.abs().min() > 0 and block.attn.r2.grad.abs().min() > 0 for block in gpt.transformer["h"]
    )
    with pytest.raises(ValueError, match="kerple takes start"):
        GPT(GPTConfig(pos="kerple", pos_options={"begin": 1.0}))


def test_the_table_of_schemes_is_what_the_command_prints():
    assert plan.scheme_table(RunConfig()).strip() in README


def test_the_tables_shown_are_those_of_the_results():
    rows = [
        line for line in (REPO / "results" / "schemes" / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    shown = README[README.index("Training, losses in nats per byte") : README.index("## Train\n")]
    rows_shown = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows_shown) == 23 and set(rows_shown) <= set(rows)


def test_files_and_fields_named_in_the_readme_exist():
    for name in re.findall(
        r"`((?:configs|scripts|data|tests|results)/[\w./]+\.(?:py|yaml|png|md))`", README
    ) + re.findall(r"\]\((results/[^)]+)\)", README):
        assert (REPO / name).exists(), name
    for name in set(re.findall(r"^\| `(\w+\.yaml)`", README, re.M)) - {"config.yaml"}:  # that one is in a run's folder
        assert (REPO / "configs" / name).exists(), name
    assert not re.search("@[A-Z]+@", README)  # nothing left to fill in
    for name in re.findall(r"^\| `(\w+)` \| .*arxiv", README, re.M):
        assert name in SCHEMES, name
