"""train.py and eval.py with the switches of the model, and weights that start a run of another scheme."""

# ruff: noqa: F811 - pytest finds fixtures by their names; those of training.py are imported

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from training import at_step, folders, kill, last, make, metrics, one_thread, same_run  # noqa: F401 - fixtures

import eval as evaluation
from data.shards import batch, open_data
from model import GPT, GPTConfig
from nanope import checkpoint, initial
from nanope.config import parse
from train import train

SWITCHES = dict(document_mask=True, qk_norm=True, logit_scale="log", window=[8, 0], n_layer=2, pos=["rope", "none"])


def test_a_run_with_all_switches_resumes_exactly_and_is_evaluated(make, capsys):
    whole, cut = make("whole", **SWITCHES), make("cut", **SWITCHES)
    train(whole)
    train(cut, at_step({5: kill(signal.SIGTERM)}))
    train(dataclasses.replace(cut, resume=True))
    assert same_run(whole.out_dir, cut.out_dir)
    data = open_data(whole.data_dir)
    assert last(whole.out_dir)["config"]["eot"] == data.eot
    with pytest.raises(ValueError, match="document_mask was True, now False"):
        train(dataclasses.replace(cut, resume=True, document_mask=False))
    evaluation.main(["--run", whole.out_dir, "--lengths", "16", "32", "--json", whole.out_dir + "/eval.json"])
    with open(whole.out_dir + "/eval.json") as file:
        assert all(row["nats_per_token"] for row in json.load(file)["results"])


def test_a_trained_model_sees_each_document_alone(make):
    """The tokens behind an end of a window have the logits that they have by themselves."""
    config = make(document_mask=True, max_steps=1)
    train(config)
    model = checkpoint.build_model(last(config.out_dir))
    data = open_data(config.data_dir)
    ends = [i for i in range(0, len(data.split("train")) - 17) if data.split("train").read(i, i + 16)[8] == data.eot]
    x = torch.from_numpy(batch(data.split("train"), [ends[0]], 16)[0])
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0][:, 9:], model(x[:, 9:])[0], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(x)[0][:, 9:], without_mask(model, x), atol=1e-4)


def without_mask(model, x):
    """The last logits of the same weights without the mask."""
    model.config = dataclasses.replace(model.config, document_mask=False)
    found = model(x)[0][:, 9:]
    model.config = dataclasses.replace(model.config, document_mask=True)
    return found


def test_weights_of_another_scheme(make, tmp_path, capsys):
    """DroPE: positions are dropped, and the run says what was left and what is new. All other weights are taken."""
    source = make("comrope", pos="comrope", max_steps=2)
    train(source)
    before = last(source.out_dir)["model"]
    fields = dict(init_from=source.out_dir, pos="carope", qk_norm=True, logit_scale="log", max_steps=1)
    with pytest.raises(ValueError, match="--init_pos_from_config true to leave what the weights have"):
        train(make("no", **fields))
    assert not (tmp_path / "no").exists()
    capsys.readouterr()
    still = dict(learning_rate=1e-30, min_lr=0.0, weight_decay=0.0)
    config = make("carope", **fields, **still, init_pos_from_config=True, pos_options={"std": 0.3})
    train(config)
    said = capsys.readouterr().err
    assert "left behind: h.*.attn.pos.P; new: h.*.attn.logit_scale, h.*.attn.pos.c_pos.bias" in said
    after = last(config.out_dir)["model"]
    for name in before.keys() & after.keys():
        torch.testing.assert_close(after[name], before[name])
    with pytest.raises(ValueError, match="pos_options was .*, now"):  # none came with the weights
        train(dataclasses.replace(config, resume=True, pos_options={}))
    shutil.rmtree(source.out_dir)  # no longer needed
    train(dataclasses.replace(config, resume=True, max_steps=2))
    assert metrics(config.out_dir)[-1]["step"] == 2


def test_parameters_of_another_scheme_are_not_taken_for_its_own():
    """FoX's gates and PaTH's have one name and one shape."""
    shape = dict(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
    state = lambda model: {"config": dataclasses.asdict(model.config), "model": model.state_dict()}  # noqa: E731
    fox, path = GPT(GPTConfig(pos=["fox", "path"], **shape), seed=0), GPT(GPTConfig(pos="path", **shape), seed=1)
    model, said = initial.with_weights(path, state(fox), "it")
    gates = [block.attn.pos.gate.weight for block in model.transformer["h"]]
    assert not torch.equal(gates[0], fox.transformer["h"][0].attn.pos.gate.weight)
    assert torch.equal(gates[1], fox.transformer["h"][1].attn.pos.gate.weight)
    assert "new: h.*.attn.pos.conv" in said
    both = [GPT(GPTConfig(pos="rope+fox", pos_options={"rope": {"base": b}}, **shape)) for b in (1e4, 5e5)]
    assert initial.with_weights(both[1], state(both[0]), "it")[1].endswith("left behind: none; new: none")
    longer = GPT(GPTConfig(pos="comrope", **shape | {"block_size": 64}))  # whose frequencies are in another unit
    _, said = initial.with_weights(longer, state(GPT(GPTConfig(pos="comrope", **shape))), "it")
    assert said.endswith("left behind: h.*.attn.pos.P; new: h.*.attn.pos.P")


def test_weights_of_an_earlier_checkpoint_of_the_same_scheme(make):
    """Its names are those from before schemes were members of attention."""
    train(make("comrope", pos="comrope", max_steps=1))
    state = last(make("comrope").out_dir)
    names = [name for name in state["model"] if ".attn.pos." in name]
    old = {name.replace(".attn.pos.", ".attn."): value for name, value in state["model"].items()}
    model, said = initial.with_weights(
        GPT(make(pos="comrope", vocab_size=320).model_config()), state | {"model": old}, "it"
    )
    assert names and said.endswith("left behind: none; new: none")
    assert all(torch.equal(model.state_dict()[name], state["model"][name]) for name in names)


def test_weights_of_another_scheme_must_have_the_shape(make, tmp_path):
    train(make("learned", pos="learned", max_steps=1))
    more = dict(init_from=str(tmp_path / "learned"), init_pos_from_config=True, max_steps=1)
    with pytest.raises(ValueError, match="it needs --n_embd 16 .the config says 32."):
        train(make("wide", **more, pos="rope", n_embd=32))
    with pytest.raises(ValueError, match="learned positions of .* end at 16, before 32"):
        train(make("long", **more, pos="learned", block_size=32))
    train(make("long", **more, pos="rope", block_size=32))


def test_what_cannot_be_asked_for(make):
    with pytest.raises(ValueError, match="init_pos_from_config says what of init_from's weights to leave"):
        train(make(init_pos_from_config=True))
    with pytest.raises(ValueError, match="eot 3 is not the end-of-text of .*, which is 256"):
        train(make(document_mask=True, eot=3))


@pytest.mark.parametrize("name", ["rnope", "drope"])
def test_the_configs_parse(name):
    config = parse(["--config", f"configs/{name}.yaml"])
    assert config.pos == {"rnope": ["rope", "rope", "rope", "none"], "drope": "none"}[name]
    assert config.init_pos_from_config == (name == "drope")
