"""Tasks: their answers are right, everything follows from the seed, and shards say what the answer is."""

import itertools
import re

import numpy as np
import pytest
from preparing import contents, documents

from data.prepare import main, prepare
from data.shards import DataError, open_data
from data.tasks import TASKS, Examples, evaluation_examples
from data.tokenizer import CHARACTERS, load_tokenizer


def answer_of(name, text):
    """The question of an example, and what it should be answered, worked out in another way."""
    if name == "recall":
        pairs, _, asked = text.partition("|")
        known = dict(zip(pairs[::2], pairs[1::2]))
        assert len(known) == len(pairs) // 2  # a key has one value
        assert {*asked[::2]} <= {*known} and len(asked) == 16
        return f"{pairs}|", [known[key] for key in asked[::2]]
    if name == "flipflop":
        assert text[0] == "w" and text[-2] == "r" and re.fullmatch("([wir][01])+", text)
        writes = [(m.start(), m[1]) for m in re.finditer("w(.)", text)]
        reads = [m.start() for m in re.finditer("r", text)]
        return text, [[bit for at, bit in writes if at < read][-1] for read in reads]
    question = text[: text.index("=") + 1]
    if name == "addition":
        a, b = (sum(int(d) * 10**i for i, d in enumerate(part)) for part in question[:-1].split("+"))
        return question, [str((a + b) // 10**i % 10) for i in range(len(question) // 2)] + ["end"]
    symbols = question[:-1]
    order = {"copy": symbols, "reverse": reversed(symbols), "sort": sorted(symbols, key=CHARACTERS.index)}[name]
    return question, [*order, "end"]


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_right_and_nothing_else_is_scored(name):
    for length in (TASKS[name].shortest, 3, 9, 40):
        sizes = set()
        for text in evaluation_examples(name, length, 30, seed=0):
            question, expected = answer_of(name, text)
            scored = TASKS[name].scored(text)
            found = [c for c, is_answer in zip([*text, "end"], scored) if is_answer]
            assert found == expected and len(scored) == len(text) + 1
            assert name in ("recall", "flipflop") or not scored[: len(question)].any()
            sizes.add(len(text))
        assert len(sizes) == 1  # examples of one length have one number of tokens


def test_sums_may_be_longer_than_pythons_limit_of_digits():
    (text,) = evaluation_examples("addition", 5000, 1, seed=0)
    assert len(text) == 5000 + 1 + 5000 + 1 + 5001


def test_flipflop_has_the_probabilities_of_the_paper():
    text = "".join(evaluation_examples("flipflop", 400, 50, seed=0))
    assert [text.count(c) / (len(text) / 2) for c in "wir"] == pytest.approx([0.1, 0.8, 0.1], abs=0.01)
    assert text.count("i1") / text.count("i") == pytest.approx(0.5, abs=0.02)


def test_everything_follows_from_the_seed():
    assert evaluation_examples("copy", 9, 2, seed=0)[:1] == evaluation_examples("copy", 9, 1, seed=0)
    assert evaluation_examples("copy", 9, 5, seed=0) != evaluation_examples("copy", 9, 5, seed=1)
    texts = [*Examples("sort", 12, 2000, seed=3).texts()]
    assert texts == [*Examples("sort", 12, 2000, seed=3).texts()] != [*Examples("sort", 12, 2000, seed=4).texts()]
    lengths = np.bincount([text.index("=") for text in texts])
    assert lengths[0] == 0 and len(lengths) == 13 and lengths[1:].min() > 2000 / 12 * 0.7  # all lengths alike


def test_examples_are_those_of_every_version_of_python():
    """Written down once; only Random.random() is used, whose sequence Python keeps."""
    found = {name: evaluation_examples(name, 6, 1, seed=0)[0] for name in TASKS}
    assert found == {
        "copy": "bOCDUy=bOCDUy",
        "reverse": "y7MBLU=ULBM7y",
        "sort": "opZMpm=MZmopp",
        "addition": "223777+632004=8557711",
        "recall": "Ĵ6ĹJįjĻSĞzĆr|ĞzĻSĹJĻSĻSĴ6ĆrĴ6",
        "flipflop": "w1i0i1i0i0r1",
    }


def test_a_folder_of_a_task(tmp_path, capsys):
    """Shards, masks over the edges of shards, manifest; the same command makes the same bytes; equal texts are on one
    side of the split."""
    command = ["task", "flipflop", "--length", "6", "--examples", "900", "--seed", "5", "--shard_tokens", "3000"]
    main([*command, "--out", str(tmp_path / "a")])
    main([*command, "--out", str(tmp_path / "b")])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    data = open_data(tmp_path / "a")
    assert data.manifest["task"] == {"name": "flipflop", "length": 6, "examples": 900, "seed": 5}
    assert len(data.records("train")) > 1
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(Examples("flipflop", 6, 900, 5).texts()) and not {*train} & {*val}
    split = data.split("train")
    scored = np.concatenate([TASKS["flipflop"].scored(text) for text in train])
    for start, stop in itertools.pairwise([0, 5, 2990, 3300, len(split)]):
        assert np.array_equal(split.read_mask(start, stop), scored[start:stop])
    capsys.readouterr()
    main([*command, "--out", str(tmp_path / "a")])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(DataError, match="task .*'seed': 5.* there, .*'seed': 0.* now"):
        prepare("task", tmp_path / "a", shard_tokens=3000, examples=Examples("flipflop", 6, 900, 0))


def test_validation_tokens_are_as_many_as_were_asked_for(tmp_path):
    data = prepare("task", tmp_path / "d", examples=Examples("copy", 9, 600), val_tokens=1000)
    tokens = sum(record["tokens"] - record["documents"] for record in data.records("val"))
    assert tokens == pytest.approx(1000, rel=0.25)  # by hash, so not exactly


@pytest.mark.parametrize("harm", ["cut", "altered", "gone"])
def test_a_mask_is_verified_as_a_shard_is(tmp_path, harm):
    prepare("task", tmp_path / "d", examples=Examples("copy", 4, 200))
    mask = tmp_path / "d" / "train_00000.mask"
    content = mask.read_bytes()
    mask.unlink()
    if harm != "gone":
        mask.write_bytes(content[:-1] if harm == "cut" else content[:50] + bytes([1 - content[50]]) + content[51:])
    with pytest.raises(
        DataError, match=r"train_00000.mask .*prepare.py task copy .*--length 4 --examples 200 --seed 0"
    ):
        open_data(tmp_path / "d")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["task"], "which task\\? One of copy, reverse"),
        (["task", "cpoy"], "unknown task 'cpoy'; did you mean 'copy'"),
        (
            ["task", "recall", "--length", "500"],
            "recall at length 500 needs 500 different keys, .* has 128: .* at most",
        ),
        (["task", "copy", "--length", "0"], "copy begins at length 1, in symbols: 0 is not possible"),
        (["task", "copy", "--examples", "1"], "--examples must be at least 2"),
        (["task", "copy", "--examples", "0"], "--examples must be at least 2.*, not 0"),
        (["task", "copy", "--tokenizer", "byte"], "--tokenizer byte: tasks have tokenizer characters"),
        (["task", "copy", "--source", "x"], "corpus task takes no --source"),
        (["task", "copy", "--field", "x"], "--field does not apply"),
        (["builtin", "--length", "3"], "--length: only for the corpus task, not builtin"),
        (["builtin", "copy"], "copy: only for the corpus task, not builtin"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as end:
        main([*arguments, "--out", str(tmp_path / "x")])
    assert "\n" not in str(end.value.code) and not any(tmp_path.iterdir())


def test_characters_are_tokens():
    tokenizer = load_tokenizer("characters")
    assert tokenizer.n_vocab == 512 and len({*CHARACTERS}) == 511 and tokenizer.eot == 511
    assert tokenizer.encode(CHARACTERS).tolist() == [*range(511)] and tokenizer.decode(range(511)) == CHARACTERS
    for strange in "a b", "×", "語":
        with pytest.raises(DataError, match="tokenizer characters cannot encode this text: .* not in its alphabet"):
            tokenizer.encode(strange)


@pytest.mark.parametrize("name, options", [("task-copy", "copy"), ("task-copy-9", "copy --length 9"), ("x-1", "")])
def test_a_folder_that_is_not_there_is_told_how_to_be_made(tmp_path, name, options):
    command = f"prepare.py task {options} --out" if options else "prepare.py builtin --out"
    with pytest.raises(DataError, match=command):
        open_data(tmp_path / name)
