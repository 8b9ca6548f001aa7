"""The same text for runs of two tokenizers, and their comparison in bits per byte."""

import json
import math

import numpy as np
import pytest
from evaluating import log_probabilities, prepare_texts, random_text, save_run

from data.tokenizer import load_tokenizer
from eval import main
from nanope.evaluation.options import Options
from nanope.evaluation.same_text import pieces_of, same_text

TEXTS = [random_text(i, 400 + 150 * i) for i in range(9)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One corpus in bytes and in GPT-2's tokens: val of the second has documents that the first has in train."""
    folder = tmp_path_factory.mktemp("both")
    sizes = {"byte": 5000, "gpt2": 2000}
    return [prepare_texts(folder / name, TEXTS, name, val_tokens=n) for name, n in sizes.items()]


def scored_texts(data, targets):
    """Text of the targets of each document, in order, and of each document up to its first target."""
    tokenizer, split = load_tokenizer(data.manifest["tokenizer"]["name"]), data.split("val")
    texts, before = [], []
    for number in dict.fromkeys(targets.document.tolist()):
        of = targets.document == number
        first, starts = int(targets.positions[of][0]), split.documents()[:, 0]
        texts.append(tokenizer.decode(targets.ids[of]))
        before.append(split.read(int(starts[starts <= first][-1]), first))
    return texts, before


@pytest.mark.parametrize("limit", [0, 1500])
def test_targets_of_two_tokenizers_are_the_same_text(both, limit):
    options = Options([16, 64], stride=8, max_targets=limit).resolved(16)
    targets, digest = same_text(both, options)
    (first, before), (second, _) = (scored_texts(data, t) for data, t in zip(both, targets))
    assert first == second and len(first) > 2
    assert all(len(ids) >= 64 for _, befores in map(scored_texts, both, targets) for ids in befores)
    if limit:
        assert 0.9 * limit < sum(map(len, first)) < 1.1 * limit
    else:  # to the documents' ends
        assert all(any(whole.endswith(text) for whole in TEXTS) for text in first)
    for t in targets:  # every window has 64 tokens; " darkness" has 9 bytes
        assert (t.blocks[:, 2] - t.blocks[:, 1] < 9).all() and (t.blocks[:, 2] - t.blocks[:, 0] >= 64).all()
    assert same_text(both, options)[1] == digest != same_text(both, Options([16, 64], stride=7).resolved(16))[1]


def test_documents_in_another_order_are_paired_by_their_text(both, tmp_path):
    """A difference for each document is of one text. By its place in each folder it was of two."""
    turned = prepare_texts(tmp_path, TEXTS[::-1], "gpt2", val_tokens=2000)
    targets, _ = same_text([both[0], turned], Options([16]).resolved(16))
    ours, theirs = (
        {n: load_tokenizer(name).decode(t.ids[t.document == n]) for n in np.unique(t.document).tolist()}
        for name, t in zip(("byte", "gpt2"), targets)
    )
    assert ours == theirs and len(ours) > 2


def test_pieces_end_where_every_tokenizer_has_a_boundary():
    edges = [np.arange(13), np.array([0, 3, 4, 9, 10, 12])]
    assert pieces_of(edges, 1, 4, 8) == [(3, 4), (4, 9), (9, 12)]  # 4 … 9 is one token
    assert pieces_of(edges, 1, 4, 4) == [(3, 4), (9, 12)]
    assert pieces_of(edges, 4, 100, 100) == [(10, 12)] and pieces_of(edges, 5, 100, 100) == []


@pytest.mark.slow
def test_runs_of_two_tokenizers_are_compared_in_bits_per_byte(both, tmp_path, capsys):
    names = [tmp_path / name for name in ("byte", "gpt2")]
    models = [save_run(name, data) for name, data in zip(names, both)]
    command = ["--compare", *map(str, names), "--lengths", "32", "--max_targets", "600"]
    main([*command, "--json", str(tmp_path / "c.json")])
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert "difference, bits/byte" in printed and "all scored the same text" in printed
    bits, sizes = {}, set()
    targets, _ = same_text(both, Options([32], max_targets=600).resolved(16))
    for name, data, gpt, mine in zip(names, both, models, targets):
        (path,) = (name / "eval").glob("*_text-*.json")
        row = json.loads(path.read_text())["results"][-1]
        nll, split = 0.0, data.split("val")
        for _, begin, end in mine.blocks.tolist():  # a window of 32 tokens that ends before the block's last
            table = log_probabilities(gpt, split.read(end - 32, end))
            nll -= sum(table[at - 1 - end + 32, split.read(at, at + 1)[0]].item() for at in range(begin, end + 1))
        bits[name.name] = nll / math.log(2) / sum(row["per_document"]["bytes"])
        assert row["length"] == 32 and row["bits_per_byte"] == pytest.approx(bits[name.name], abs=1e-6)
        sizes.add(tuple(row["per_document"]["bytes"]))
    assert len(sizes) == 1
    row = found["comparison"][-1]
    assert row["unit"] == "bits/byte" and row["difference"] == pytest.approx(bits["gpt2"] - bits["byte"], abs=1e-6)
    for more, word in ((["--stream"], "--stream"), (["--protocol", "per-position"], "per-position")):
        with pytest.raises(SystemExit, match=f"{word} does not score the same text"):
            main([*command, *more])


def test_folders_without_a_common_text_are_refused(both, tmp_path):
    other = prepare_texts(tmp_path, [random_text(i, 900) for i in range(30, 34)], "gpt2", val_tokens=500)
    with pytest.raises(ValueError, match="no text of more than 64 tokens .* prepare all of them from one source"):
        same_text([both[0], other], Options([64]).resolved(64))
