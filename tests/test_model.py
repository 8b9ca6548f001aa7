"""model.py, GPT-2 itself: config checks, parameters, loss, dropout, generation, weights of the transformers library.

What holds for every positional scheme is in tests/schemes/.
"""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from models import (
    BLOCK,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    build,
    close,
    config,
    gpt2_names,
    gradients,
    randomise,
    refused,
    rows_of_logits,
    tokens,
    uncached,
)

from model import GPT, GPTConfig
from nanope import attention

# ------------------------------------------------------------------------------------------------
# Config and inputs: errors name the thing


@pytest.mark.parametrize(
    "bad,words",
    [
        (dict(n_embd=50), ["n_embd 50", "n_head 3"]),
        (dict(n_layer=0), ["n_layer", "0"]),
        (dict(n_head=-1), ["n_head", "-1"]),
        (dict(vocab_size=2.5), ["vocab_size", "2.5"]),
        (dict(block_size="9"), ["block_size", "'9'"]),
        (dict(block_size=True), ["block_size", "True"]),
        (dict(dropout=1.0), ["dropout", "1.0"]),
        (dict(dropout="a lot"), ["dropout", "a lot"]),
        (dict(bias="no"), ["bias", "no"]),
        (dict(window=-1), ["window", "-1"]),
        (dict(window=[]), ["window", r"\[\]"]),
        (
            dict(pos="comrope", n_layer=0, dropout=2.0, pos_options={"blok": 8, "kind": 1}),
            ["n_layer", "dropout", "blok.*did you mean block", "kind"],
        ),
        (dict(pos="ropee", n_layer=0), ["n_layer", "ropee.*did you mean rope"]),
    ],
    ids=str,
)
def test_config_errors_name_the_thing(bad, words):
    refused(bad, words)


def test_bad_tokens_and_reduction():
    model, idx = build("rope"), tokens(BLOCK)
    for bad in (VOCAB, -1):
        with pytest.raises(ValueError, match=rf"idx.*{bad}.*{VOCAB - 1}"):
            model(torch.where(idx == idx[0, 0], bad, idx))
    for bad in (VOCAB, -2, -100):  # -100 is ignored by others: here it is refused, not trained on
        with pytest.raises(ValueError, match=rf"targets.*{bad}.*{VOCAB - 1}"):
            model(idx, torch.where(idx == idx[0, 0], bad, idx))
        with pytest.raises(ValueError, match="targets"):
            model(idx, torch.where(idx == idx[0, 0], bad, idx), reduction="none")
    with pytest.raises(ValueError, match="reduction.*'sum'"):
        model(idx, idx, reduction="sum")


# ------------------------------------------------------------------------------------------------
# Parameters


def test_learned_has_nanogpts_names():
    """The other schemes: tests/schemes/test_scheme_parameters.py."""
    model = GPT(config("learned"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert set(shapes) == gpt2_names(True) | {"transformer.wpe.weight"}
    assert shapes["transformer.wpe.weight"] == (BLOCK, WIDTH)
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (3 * WIDTH, WIDTH)
    assert model.lm_head.weight is model.transformer.wte.weight and "lm_head.weight" in model.state_dict()


class Uninitialised(GPT):
    """Its parameters have shapes and no values."""

    def initialise(self, seed):
        pass


def test_gpt2_small_has_124m_parameters():
    """The figure everyone knows: 124,439,808 with 50,257 tokens, 1,024 positions and biases."""
    with torch.device("meta"):
        model = Uninitialised(GPTConfig(1024, 50257, 12, 12, 768, 0.0, True, "learned"))
    assert model.parameter_count() == 124_439_808


def test_flops_per_token():
    """nanoGPT's estimate: 6 N + 12 L C T."""
    assert build("rope").flops_per_token() == 6 * (LAYERS * 12 * WIDTH**2 + VOCAB * WIDTH) + 12 * LAYERS * WIDTH * BLOCK


# ------------------------------------------------------------------------------------------------
# Loss and dropout


@pytest.mark.parametrize("pos", ["learned", "comrope"])
def test_gradient_accumulation_equals_one_batch(pos, monkeypatch):
    rows_of_logits(monkeypatch, 7)
    model, idx, targets = build(pos), tokens(BLOCK, B=6), tokens(BLOCK, B=6, seed=1)
    model(idx, targets)[1].backward()
    whole = gradients(model)
    model.zero_grad()
    for x, y in zip(idx.split(2), targets.split(2)):
        (model(x, y)[1] / 3).backward()
    for name, gradient in gradients(model).items():
        close(gradient, whole[name], msg=name)


def test_dropout_is_on_in_training_only_and_seeded():
    model = build("alibi", dropout=0.3)
    idx = tokens(BLOCK)
    plain = build("alibi")(idx)[0]
    assert torch.equal(model.eval()(idx)[0], plain)
    torch.manual_seed(0)
    first = model.train()(idx)[0]
    torch.manual_seed(0)
    assert torch.equal(model(idx)[0], first) and not torch.allclose(first, plain, atol=1e-2)


# ------------------------------------------------------------------------------------------------
# Generation


def test_generate_computes_each_token_once_and_keeps_the_mode():
    model, lengths = build("rope").train(), []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    model.generate(tokens(4), 5)
    assert lengths == [4, 1, 1, 1, 1]
    assert model.training
    with pytest.raises(ValueError):
        model.generate(torch.full((1, 4), VOCAB), 5)
    assert model.training, "the mode is restored after an error too"


def test_a_token_does_not_copy_the_cache():
    """Keys are moved at each doubling: 7 times for 400 tokens."""
    model, places = build("rope"), []

    def attend(scheme, q, k, *rest):
        if scheme.layer == 0:
            places.append(k.data_ptr())
        return attention.attend(scheme, q, k, *rest)

    with attention.attending(model, attend):
        model.generate(tokens(4), 400, temperature=0)
    assert len(places) == 400 and sum(a != b for a, b in itertools.pairwise(places)) <= 7


def test_generate_ends_where_until_says_so():
    gpt, idx, seen = build("rope"), tokens(5), []
    whole = gpt.generate(idx, 6, 0)
    until = lambda so_far: seen.append(so_far.size(1)) or so_far.size(1) == 8  # noqa: E731
    assert torch.equal(gpt.generate(idx, 6, 0, until=until), whole[:, :8]) and seen == [6, 7, 8]


def test_generate_with_dropout_is_the_model_without():
    model = build("rope", dropout=0.5).train()
    assert torch.equal(model.generate(tokens(4), 9, temperature=0), uncached(model.eval(), tokens(4), 9, temperature=0))


@pytest.mark.parametrize("options", [{"n": -1}, {"temperature": -1.0}, {"top_k": 0}, {"idx": tokens(0)}], ids=str)
def test_generate_refuses(options):
    with pytest.raises(ValueError, match="generate needs"):
        build("rope").generate(**({"idx": tokens(4), "n": 3} | options))


# ------------------------------------------------------------------------------------------------
# GPT-2 of the transformers library


@pytest.mark.slow  # transformers takes seconds to import
def test_learned_equals_transformers_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=VOCAB, n_positions=BLOCK, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == GPTConfig(BLOCK, VOCAB, LAYERS, HEADS, WIDTH, 0.0, True, "learned", {})
    assert torch.equal(ours.lm_head.weight, theirs.transformer.wte.weight)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    idx, targets = tokens(BLOCK), tokens(BLOCK, seed=1)
    ours, theirs = ours.double(), theirs.double()
    close(ours(idx)[0], theirs(idx).logits)
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss = ours(idx, targets)[1]
    loss.backward()
    close(loss, expected)
    close(ours.transformer.wte.weight.grad, theirs.transformer.wte.weight.grad)
    close(ours.transformer.h[1].attn.c_attn.weight.grad, theirs.transformer.h[1].attn.c_attn.weight.grad.T)
    greedy = theirs.generate(idx[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(idx[:, :4], 8, temperature=0), greedy)


GPT2 = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None)


@pytest.fixture
def gpt2_folder(tmp_path):
    """A GPT-2 of random weights in the layout of transformers, whose linear layers are (in, out)."""
    from safetensors.torch import save_file

    shape = dict(vocab_size=8, n_embd=8, n_layer=1, n_head=2)
    ours = GPT(GPTConfig(block_size=4, **shape, bias=True, pos="learned")).state_dict()
    del ours["lm_head.weight"]  # tied: only wte is saved
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {name: (w.t() if name.endswith(turned) else w).contiguous() for name, w in ours.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | shape | {"n_positions": 4}))
    return tmp_path


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_from_pretrained_transposes_linear_layers(gpt2_folder):
    ours = GPT.from_pretrained(gpt2_folder)
    same = GPT(ours.config)  # of the same seed as the folder
    idx = tokens(4, V=8)
    assert torch.equal(ours(idx)[0], same(idx)[0])


@pytest.mark.parametrize(
    "key,value",
    [
        ("model_type", "gpt_neox"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 12),
        ("tie_word_embeddings", False),
        ("scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_from_pretrained_refuses_what_is_not_gpt2(gpt2_folder, key, value):
    edit(gpt2_folder, **{key: value})
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        GPT.from_pretrained(gpt2_folder)


def test_from_pretrained_refuses_a_broken_folder(gpt2_folder):
    edit(gpt2_folder, n_inner=32)  # 4 C, written out: the same architecture
    GPT.from_pretrained(str(gpt2_folder))
    edit(gpt2_folder, n_layer=2)
    with pytest.raises(ValueError, match=r"lack h\.1"):
        GPT.from_pretrained(gpt2_folder)
    edit(gpt2_folder, n_layer=1, vocab_size=16)
    with pytest.raises(ValueError, match=r"wte\.weight.*\(8, 8\).*\(16, 8\)"):
        GPT.from_pretrained(gpt2_folder)
    weights = gpt2_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        GPT.from_pretrained(gpt2_folder)
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        GPT.from_pretrained(gpt2_folder)
    (gpt2_folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        GPT.from_pretrained(gpt2_folder)


def test_from_pretrained_says_what_was_not_found(monkeypatch):
    """A name that is no folder goes to the hub; whatever the hub answers is an OSError that holds the name. No network
    here."""
    import huggingface_hub

    def offline(name, **kwargs):
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match="gpt2-missing is no local folder.*no network"):
        GPT.from_pretrained("gpt2-missing")
