"""nanope/evaluation/harness.py: the model `nanope` of lm-evaluation-harness."""

import copy
import json

import numpy as np
import pytest
import torch
from evaluating import log_probabilities, save_run
from exporting import byte_data, save  # noqa: F401
from models import cases_of, uncached

from data.tokenizer import load_tokenizer
from nanope import checkpoint

harness = pytest.importorskip("nanope.evaluation.harness", reason="needs lm-eval, of requirements-dev.txt")
from lm_eval.api.instance import Instance  # noqa: E402

EOT = 256
MODELS = {
    "rope": {},
    "alibi": {},
    "learned": {},
    "cope": {},
    "path": {},
    "rope within documents": {"document_mask": True, "eot": EOT},
}
some = pytest.mark.parametrize("name", MODELS)


def opened(folder, data, name, double=True, **options):
    """(the harness's model of a run, the run's model), both float64 so that only mistakes differ."""
    run = folder / name
    shape = {"pos": name.split()[0], "block_size": 24, "n_layer": 2}
    model = save_run(run, data, **shape, **MODELS.get(name, {}))
    lm = harness.NanopeLM(str(run), device="cpu", **options)
    if double:
        lm.model.double()
    return lm, model.double() if double else model


def writers(folder, data, name, **options):
    """As `opened`; both write lower-case letters."""
    found = opened(folder, data, name, **options)
    others = [i for i in range(320) if i not in [*range(97, 123)]]  # not a … z
    for model in found[0].model, found[1]:
        with torch.no_grad():
            model.transformer["wte"].weight[others] *= 0.1
    return found


def requests(kind, arguments):
    return [Instance(kind, {}, one, i, metadata=("task", i, 1)) for i, one in enumerate(arguments)]


def expected(model, context, continuation, length):
    """Log-probability and greediness by a pass of its own; texts are bytes."""
    ids = ([*context.encode()] or [EOT]) + [*continuation.encode()]
    scored = len(continuation.encode())
    ids = ids[-length - 1 :]
    table = log_probabilities(model, np.array(ids[:-1]))[-scored:]
    targets = torch.tensor(ids[-scored:])
    return table[range(scored), targets].sum().item(), bool((table.argmax(1) == targets).all())


PAIRS = [
    ("", "light"),
    ("and the", " light"),
    ("and the", " darkness of"),
    ("and the ", "light"),  # its space belongs to the continuation
    ("of", " light"),
    ("earth and " * 9 + "the", " heaven"),  # longer than the training length
    ("day <|endoftext|>", " it"),
    (" ", "water"),
]


@some
def test_loglikelihoods_are_the_models_in_any_batch(byte_data, tmp_path, name):  # noqa: F811
    lm, model = opened(tmp_path, byte_data, name)
    truth = []
    for context, continuation in PAIRS:
        spaces = len(context) - len(context.rstrip())
        context, continuation = context.rstrip(), context[len(context) - spaces :] + continuation
        truth.append(expected(model, context, continuation, 24))
    # A continuation that the model would write itself
    _, _, greedy = PAIRS[1][0], None, uncached(model, torch.tensor([[*b"and the"]]), 3, 0)[0, 7:]
    for size in (1, 4, "auto"):
        lm.batch_size = size
        found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        assert [one for _, one in found] == [one for _, one in truth]
        np.testing.assert_allclose([one for one, _ in found], [one for one, _ in truth], atol=1e-9)
        ((_, likeliest),) = lm._loglikelihood_tokens([(("", ""), [*b"and the"], greedy.tolist())], disable_tqdm=True)
        assert likeliest


@some
def test_rolling_scores_every_token_once_with_as_much_context_as_fits(byte_data, tmp_path, name):  # noqa: F811
    lm, model = opened(tmp_path, byte_data, name, batch_size=3)
    texts = ["the light of day was good, and it was so: heaven, earth and water", "day", "", "x" * 24, "y" * 25]
    truth = []
    for text in texts:
        ids, total, done = [EOT, *text.encode()], 0.0, 0
        while done < len(ids) - 1:  # predicts ids[done + 1 :], at most 24 of them
            stop = min(done + 24, len(ids) - 1)
            begin = done if done == 0 else max(0, stop - 24)
            table = log_probabilities(model, np.array(ids[begin:stop]))
            total += sum(table[i - begin - 1, ids[i]].item() for i in range(done + 1, stop + 1))
            done = stop
        truth.append(total)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True)
    np.testing.assert_allclose(found, truth, atol=1e-9)


@cases_of(MODELS, fast=("rope", "learned"))
def test_greedy_texts_are_the_models_in_any_batch(byte_data, tmp_path, case):  # noqa: F811
    """Of prompts of equal and other lengths, of which some lose their beginning."""
    lm, model = writers(tmp_path, byte_data, case)
    prompts = ["and the", "of dayX", "light a", "earth and " * 9, "water and " * 9, "it", "\n", "of dayX"]
    whole = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt.encode()][-14:]])
        whole.append(uncached(model, ids, 10, 0)[0, ids.size(1) :].tolist())
    stop = lm.tokenizer.decode(whole[0][4:6])
    assert len(stop) == 2 and EOT not in sum(whole, [])
    for size in (1, 4, "auto"):
        lm.batch_size = size
        for until in ([], [stop, "never"], stop):
            asked = {"max_gen_toks": 10, "until": until, "do_sample": False, "temperature": 0.0}
            found = lm.generate_until(requests("generate_until", [(p, asked) for p in prompts]), disable_tqdm=True)
            texts = [lm.tokenizer.decode(ids) for ids in whole]
            assert found == [text.split(stop)[0] if until else text for text in texts]


def test_requests_of_other_options_are_apart(byte_data, tmp_path):  # noqa: F811
    """Also where their prompts are of one length."""
    lm, _ = writers(tmp_path, byte_data, "rope", batch_size=4)
    asked = [("and the", {"max_gen_toks": n, "until": []}) for n in (2, 9, 5)]
    texts = lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert [len(text) for text in texts] == [2, 9, 5] and texts[1].startswith(texts[2])


def test_generation_ends_when_every_text_of_a_batch_has_its_end(byte_data, tmp_path):  # noqa: F811
    """At a stop text of several tokens, or at an end of text; what stands in the prompt ends nothing."""
    lm, model = writers(tmp_path, byte_data, "rope", batch_size=2)
    prompts = ["and the", "of dayX"]
    ids = [uncached(model, torch.tensor([[*p.encode()]]), 12, 0)[0, 7:].tolist() for p in prompts]
    passes, forward = [], lm.model.hidden
    lm.model.hidden = lambda new, caches: passes.append(new.size(1)) or forward(new, caches)

    def generate(until):
        passes.clear()
        asked = {"max_gen_toks": 12, "until": until}
        return lm.generate_until(requests("generate_until", [(p, asked) for p in prompts]), disable_tqdm=True)

    stops = [lm.tokenizer.decode(own[3:6]) for own in ids]
    texts = [lm.tokenizer.decode(own).split(stop)[0] for own, stop in zip(ids, stops)]
    assert generate([*stops, "the", "never " * 4]) == texts
    assert passes == [7, 1, 1, 1, 1, 1]
    assert generate([stops[0]])[0] == texts[0] and len(passes) == 12
    lm.tokenizer = copy.copy(lm.tokenizer)
    lm.tokenizer.eot = ids[0][4]
    first = generate([stops[1]])[0]
    assert first == lm.tokenizer.decode(ids[0][: ids[0].index(ids[0][4])])


def test_sampling_takes_the_harness_options(byte_data, tmp_path):  # noqa: F811
    lm, model = writers(tmp_path, byte_data, "rope")
    ids = torch.tensor([[*b"and the"]])
    torch.manual_seed(5)
    truth = lm.tokenizer.decode(uncached(model, ids, 8, 0.7, 3)[0, 7:])
    torch.manual_seed(5)
    asked = {"max_gen_toks": 8, "until": [], "do_sample": True, "temperature": 0.7, "top_k": 3}
    assert lm.generate_until(requests("generate_until", [("and the", asked)]), disable_tqdm=True) == [truth]


@pytest.mark.parametrize(
    "asked, found",
    [
        ({}, (256, (), 0.0, None)),
        ({"until": "\n", "max_new_tokens": 5, "temperature": 0.0}, (5, ("\n",), 0.0, None)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 4, "num_beams": 1}, (256, (), 0.0, None)),
        ({"temperature": 0.7, "top_k": 4, "top_p": 1.0, "until": ["", "x"]}, (256, ("x",), 0.7, 4)),
    ],
)
def test_options_of_generation(asked, found):
    own = harness.Generation.of(asked)
    assert (own.tokens, own.until, own.temperature, own.top_k) == found


@pytest.mark.parametrize("asked", [{"num_beams": 4}, {"do_sample": True, "temperature": 1.0, "top_p": 0.9}, {"x": 1}])
def test_options_of_generation_that_are_not_here_are_refused(asked):
    with pytest.raises(ValueError, match=f"generation with {[*asked][-1]}="):
        harness.Generation.of(asked)


# ---- lengths and what is opened


def test_lengths_beyond_training(byte_data, tmp_path):  # noqa: F811
    lm, model = opened(tmp_path, byte_data, "alibi", max_length=96)
    context = "earth and " * 12
    found = lm.loglikelihood(requests("loglikelihood", [(context + "the", " heaven")]), disable_tqdm=True)
    assert found[0][0] == pytest.approx(expected(model, context + "the", " heaven", 96)[0], abs=1e-9)
    assert found[0][0] != pytest.approx(expected(model, context + "the", " heaven", 24)[0], abs=1e-3)
    ids = torch.tensor([[*context.encode()][-86:]])
    asked = {"max_gen_toks": 10, "until": []}
    texts = lm.generate_until(requests("generate_until", [(context, asked)]), disable_tqdm=True)
    assert texts == [lm.tokenizer.decode(uncached(model, ids, 10, 0)[0, 86:])]


def test_scaled_frequencies(byte_data, tmp_path):  # noqa: F811
    lm, model = opened(tmp_path, byte_data, "rope", max_length=96, scaling="pi", factor=4.0)
    context = "earth and " * 8
    found = lm.loglikelihood(requests("loglikelihood", [(context, "heaven")]), disable_tqdm=True)
    truth = expected(model.scaled("pi", 4.0), context.rstrip(), " heaven", 96)
    assert found[0][0] == pytest.approx(truth[0], abs=1e-9)


def test_coordinates_in_the_text_come_with_the_checkpoint(byte_data, tmp_path):  # noqa: F811
    run, model = save(tmp_path, byte_data, "comrope", axes=["token", "line", "byte"], kind="ld")
    tokenizer = load_tokenizer("byte")
    model.describe_tokens(tokenizer.tokens, tokenizer.eot)
    state = checkpoint.load(checkpoint.find(run))
    checkpoint.save_step(run, state | {"model": model.state_dict()}, keep=1)
    lm = harness.NanopeLM(str(run), device="cpu")
    found = lm.loglikelihood(requests("loglikelihood", [("and\nthe\n\nlight", " day")]), disable_tqdm=True)
    assert found[0][0] == pytest.approx(expected(model, "and\nthe\n\nlight", " day", 24)[0], abs=1e-4)


def test_no_data_folder_is_needed_and_the_report_tells_the_checkpoint(byte_data, tmp_path):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "alibi")
    state = checkpoint.load(checkpoint.find(run))
    state["config"]["data_dir"] = "gone"
    checkpoint.save_step(run, state, keep=1)
    about = harness.NanopeLM(str(run), 4, device="cpu", max_length=30).get_model_info()
    digest = checkpoint.hash_path(checkpoint.find(run).resolve()).read_text().strip()
    assert json.loads(json.dumps(about)) == about and about["checkpoint_sha256"] == digest
    assert (about["step"], about["pos"], about["max_length"]) == (4, "alibi", 30)


def test_arguments_as_the_harness_gives_them(byte_data, tmp_path):  # noqa: F811
    """Its batch size and device are always there; what stands in model_args comes first."""
    run, _ = save(tmp_path, byte_data, "rope")
    theirs = {"batch_size": 1, "device": "cuda:0", "max_batch_size": None}
    if not torch.cuda.is_available():
        assert harness.NanopeLM.create_from_arg_obj({"run": run}, theirs).device.type in ("cpu", "mps")
    lm = harness.NanopeLM.create_from_arg_string(f"run={run},batch_size=4,device=cpu,max_length=12", theirs)
    assert (lm.batch_size, lm.max_length, lm.device.type, lm.rows(12)) == (4, 12, "cpu", 4)
    auto = harness.NanopeLM.create_from_arg_obj(
        {"run": run, "device": "cpu"}, theirs | {"batch_size": "auto:4", "max_batch_size": 9}
    )
    assert (auto.rows(12), auto.rows(1024), auto.rows(10**6)) == (9, 4, 1)


@pytest.mark.parametrize(
    "pos, options, message",
    [
        ("rope", {"run": None}, "needs a run"),
        ("rope", {"run": "nowhere"}, "no run nowhere"),
        ("rope", {"checkpoint": "best"}, "no checkpoint 'best'"),
        ("rope", {"max_lenght": 3}, "no argument 'max_lenght'; did you mean max_length"),
        ("learned", {"max_length": 25}, "learned positions end at block_size 24"),
        ("rope", {"max_length": 0}, "max_length must be a whole number of at least 1"),
        ("rope", {"max_length": "4x"}, "max_length must be a whole number of at least 1"),
        ("rope", {"dtype": "int8"}, "dtype must be one of"),
        ("rope", {"batch_size": "many"}, "batch_size must be a whole number of at least 1"),
        ("rope", {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ("alibi", {"scaling": "pi", "factor": 2}, "alibi"),
        ("rope", {"scaling": "pi"}, "go together"),
        ("rope", {"factor": 2}, "go together"),
        ("rope", {"scaling": "linear", "factor": 2}, "no frequency scaling 'linear'"),
        ("rope", {"device": "tpu"}, "device 'tpu' cannot be used"),
    ],
)
def test_what_cannot_be_opened_is_said(byte_data, tmp_path, pos, options, message):  # noqa: F811
    run, _ = save(tmp_path, byte_data, pos)
    with pytest.raises((ValueError, OSError), match=message):
        harness.NanopeLM(**{"run": str(run), "device": "cpu", **options})


def test_another_vocabulary_is_refused(byte_data, tmp_path):  # noqa: F811
    run, _ = save(tmp_path, byte_data, "rope")
    state = checkpoint.load(checkpoint.find(run))
    state["tokenizer"]["sha256"] = "0" * 64
    checkpoint.save_step(run, state, keep=1)
    with pytest.raises(ValueError, match="tokenizer byte had another vocabulary"):
        harness.NanopeLM(str(run), device="cpu")


def test_requests_that_cannot_be_answered(byte_data, tmp_path):  # noqa: F811
    lm, _ = opened(tmp_path, byte_data, "rope", double=False)
    with pytest.raises(ValueError, match="task task wants generation from an empty context"):
        lm.generate_until(requests("generate_until", [("a", {"max_gen_toks": 2}), ("", {"max_gen_toks": 2})]))
    with pytest.raises(ValueError, match="up to 256 tokens, which leave no context in a max_length of 24"):
        lm.generate_until(requests("generate_until", [("a", {})]))
    with pytest.raises(ValueError, match="continuation of 30 tokens does not fit into max_length 24"):
        lm.loglikelihood(requests("loglikelihood", [("a", "b" * 30)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="continuation '' has no tokens of its own behind 'a'"):
        lm.loglikelihood(requests("loglikelihood", [("a", "")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="no chat template"):
        lm.apply_chat_template([])
    assert lm.generate_until([]) == lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == []


def test_bfloat16_is_near(byte_data, tmp_path):  # noqa: F811
    lm, _ = opened(tmp_path, byte_data, "rope", double=False)
    exact = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    lm.dtype = torch.bfloat16
    near = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    differences = [abs(a - b) for (a, _), (b, _) in zip(exact, near)]
    assert 1e-5 < max(differences) < 0.5
