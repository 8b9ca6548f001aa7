"""The protocol task, against greedy generation and slow loops."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluating import model as random_model
from evaluating import save_run
from scipy.stats import norm

import eval as command
from data.prepare import prepare
from data.shards import open_data
from data.tasks import TASKS, Examples, evaluation_examples
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from nanope.config import RunConfig
from nanope.distributed import Ranks
from nanope.evaluation.compare import compare, comparison_table
from nanope.evaluation.options import Options
from nanope.evaluation.scoring import Compute
from nanope.evaluation.tasks import encoded, score_answers
from nanope.feed import TaskRows


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    global FLIPFLOP
    FLIPFLOP = tmp_path_factory.mktemp("task") / "data"
    return prepare("task", FLIPFLOP, examples=Examples("flipflop", 8, 400))


@functools.cache
def trained(folder, pos, steps):
    """A small model that has learned some of a task: right at times."""
    rows, generator = TaskRows(open_data(folder).split("train"), RunConfig(block_size=16)), np.random.default_rng(0)
    gpt = GPT(GPTConfig(16, 512, 1, 2, 32, pos=pos), seed=3)
    optimizer = torch.optim.Adam(gpt.parameters(), 1e-2)
    for _ in range(steps):
        x, y = rows.read(generator.integers(rows.total, size=64))
        gpt(torch.from_numpy(x), torch.from_numpy(y))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return gpt.eval()


def guesser(pos="rope"):
    """Half right in flip-flop."""
    return trained(FLIPFLOP, pos, 12)


def evaluate(gpt, data, lengths=None, compute=None, **options):
    report = command.evaluate(gpt, data, Options(lengths, ["task"], **options), compute)
    return report, {row["length"]: row for row in report["results"]}


def test_an_exact_match_is_a_greedy_generation_that_is_right(tmp_path):
    data = prepare("task", tmp_path / "data", examples=Examples("copy", 1, 500))
    gpt = trained(data.folder, "rope", 40)
    _, rows = evaluate(gpt, data, [1], examples=80)
    tokenizer, right = load_tokenizer("characters"), []
    for text in evaluation_examples("copy", 1, 80, seed=0):
        ids = tokenizer.encode(text).astype(np.int64)
        answer = gpt.generate(torch.from_numpy(ids[:2])[None], 2, temperature=0)[0, 2:].tolist()
        right.append(answer == [ids[2], 511])
    assert rows[1]["accuracy"] == np.mean(right) and 0 < np.mean(right) < 1
    assert [rows[1]["chance"], rows[1]["token_chance"]] == pytest.approx([1 / 62, (1 / 62 + 1) / 2])  # symbol and end


def test_figures_are_those_of_a_slow_loop(task):
    gpt = guesser("rope")
    report, rows = evaluate(gpt, task, examples=60)
    assert [*rows] == [8, 16, 32, 64] and report["task"]["name"] == "flipflop"
    tokenizer = load_tokenizer("characters")
    for length in 8, 32:
        row, exact, right, answers, nll = rows[length], [], [], [], 0.0
        for text in evaluation_examples("flipflop", length, 60, seed=0):
            ids = torch.from_numpy(tokenizer.encode(text).astype(np.int64))
            logits = gpt(ids[None])[0][0].detach()
            asked = [i for i, c in enumerate(text) if c == "r"]
            hits = [logits[i].argmax().item() == ids[i + 1].item() for i in asked]
            nll += sum(F.cross_entropy(logits[i], ids[i + 1]).item() for i in asked)
            exact.append(all(hits))
            right.append(sum(hits))
            answers.append(len(hits))
        n, p, z = 60, np.mean(exact), norm.ppf(0.975)
        middle, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))  # Wilson 1927
        assert row["interval"] == pytest.approx([(middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)])
        assert row["accuracy"] == p and row["token_accuracy"] == sum(right) / sum(answers)
        assert row["per_example"] == {"right": right, "answers": answers}
        assert row["nats_per_token"] == pytest.approx(nll / sum(answers), rel=1e-5)
        assert row["chance"] == pytest.approx(np.mean([0.5**k for k in answers])) and row["token_chance"] == 0.5
        assert row["inputs"] == 2 * length and row["examples"] == 60
    assert 0 < rows[8]["accuracy"] < 1 and 0.2 < rows[64]["token_accuracy"] < 0.8  # the test can fail


def test_the_cropped_model_sees_no_more_than_a_row(task):
    """Each answer from the window that ends at the next multiple of half a row, counted from the example's end."""
    gpt = trained(FLIPFLOP, "rope", 60)
    _, rows = evaluate(gpt, task, [8, 24], examples=20)
    tokenizer, right, answers = load_tokenizer("characters"), 0, 0
    for text in evaluation_examples("flipflop", 24, 20, seed=0):
        ids = torch.from_numpy(np.append(tokenizer.encode(text), 511).astype(np.int64))  # 48 inputs
        for target in (i + 1 for i, c in enumerate(text) if c == "r"):
            end = max(16, 48 - (48 - target) // 8 * 8)
            logits = gpt(ids[None, end - 16 : end])[0][0]
            right += int(logits[target - 1 - (end - 16)].argmax() == ids[target])
            answers += 1
    assert rows[24]["cropped"]["token_accuracy"] == pytest.approx(right / answers)
    assert rows[24]["cropped"]["token_accuracy"] != rows[24]["token_accuracy"]
    assert rows[8]["cropped"]["accuracy"] == rows[8]["accuracy"]  # it fits a row


def test_what_cannot_be_reached_is_na_and_examples_are_the_same_for_all(task):
    (_, learned), (_, rope) = (evaluate(guesser(pos), task, examples=10) for pos in ("learned", "rope"))
    assert learned[8]["accuracy"] is not None and learned[16]["accuracy"] is None
    assert learned[16]["reason"] == "learned positions end at block_size 16: a length of 32 is not possible"
    assert learned[16]["cropped"]["accuracy"] is not None and learned[16]["chance"] == rope[16]["chance"]
    assert all(learned[n]["targets_sha256"] == rope[n]["targets_sha256"] for n in rope)
    _, other = evaluate(guesser("rope"), task, examples=10, seed=1)
    assert other[8]["targets_sha256"] != rope[8]["targets_sha256"]


def test_batches_and_ranks_do_not_matter(task):
    gpt = guesser("rope")
    tokens, scored = encoded(evaluation_examples("flipflop", 24, 9, seed=0), task)
    expected = score_answers(gpt, tokens, scored, 16, Compute(), "")

    class Part(Ranks):
        def sum(self, tensor):  # each rank alone: the sum is formed below
            return tensor

    for batch_tokens, world in (1, 1), (50, 2), (50, 3):
        parts = [
            score_answers(gpt, tokens, scored, 16, Compute(batch_tokens, ranks=Part(rank, world)), "")
            for rank in range(world)
        ]
        assert np.allclose(sum(nll for nll, _ in parts), expected[0], rtol=1e-5)
        assert np.array_equal(sum(hits.astype(int) for _, hits in parts), expected[1])


def test_the_command(task, tmp_path, capsys):
    """Report, table, and a comparison of two schemes by exact match."""
    for pos in "rope", "none", "learned":
        for seed in 1, 2:
            save_run(tmp_path / f"{pos}{seed}", task, pos=pos, seed=seed, data_seed=seed)
    command.main(["--run", str(tmp_path / "learned1"), "--protocol", "task", "--examples", "20"])
    shown = capsys.readouterr().out
    assert "| length in instructions | exact match |" in shown and "| 16 | n/a |" in shown
    report = json.loads((tmp_path / "learned1" / "eval" / "step_4_task_examples-20.json").read_text())
    assert [row["length"] for row in report["results"]] == [8, 16, 32, 64]
    command.main(["--run", str(tmp_path / "learned1"), "--protocol", "task", "--examples", "20"])  # over its own file
    runs = [str(tmp_path / f"{pos}{seed}") for pos in ("rope", "none") for seed in (1, 2)]
    out = tmp_path / "compared.json"
    command.main(
        ["--compare", *runs, "--protocol", "task", "--examples", "20", "--lengths", "1x", "3x", "--json", str(out)]
    )
    rows = json.loads(out.read_text())["comparison"]
    reports = [json.loads((tmp_path / f"{pos}{s}" / "eval" / "step_4_task_8-24_examples-20.json").read_text())
               for pos in ("rope", "none") for s in (1, 2)]  # fmt: skip
    means = [np.mean([r["results"][1]["accuracy"] for r in pair]) for pair in (reports[:2], reports[2:])]
    assert rows[1]["length"] == 24 and rows[1]["unit"] == "exact match" and rows[1]["paired_seeds"]
    assert rows[1]["difference"] == pytest.approx(means[1] - means[0])
    same = comparison_table(compare([reports[0], reports[2] | {"results": reports[0]["results"]}]))
    assert "| +0.0000 | -0.1611 … +0.1611 |  | 1, 1, paired |" in same  # z² / (20 + z²): nothing else tells
    assert "over examples, for these checkpoints" in same


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--protocol", "task", "same-targets"], "--protocol task is for runs on a task, the others for runs on text"),
        (["--protocol", "task", "--probe", "5"], "--probe is not for --protocol task"),
        (["--lengths", "16", "--examples", "5"], "--examples is for --protocol task"),
        (["--lengths", "16"], "holds examples of a task, whose answers alone are scored: --protocol task"),
        (["--protocol", "task", "--lengths", "1"], "flipflop begins at length 2, in instructions: 1 is not possible"),
    ],
)
def test_bad_input_is_one_clear_line(task, tmp_path, capsys, arguments, message):
    save_run(tmp_path / "run", task, pos="rope")
    with pytest.raises(SystemExit) as end:
        command.main(["--run", str(tmp_path / "run"), *arguments])
    said = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert message in said


def test_text_has_no_task(data, tmp_path):
    with pytest.raises(ValueError, match="--protocol task is for runs on a task .*, and .* holds text"):
        evaluate(random_model(), data)


def test_recall_ends_where_its_keys_end(tmp_path):
    data = prepare("task", tmp_path / "data", examples=Examples("recall", 60, 50))
    gpt = GPT(GPTConfig(16, 512, 1, 2, 16, pos="none"))
    with pytest.raises(ValueError, match="recall at length 240 needs 240 different keys.*at most 128 pairs"):
        evaluate(gpt, data, examples=2)
    assert TASKS["recall"].longest == 128


def test_a_run_on_a_task_is_neither_exported_nor_asked_in_text(task, tmp_path):
    from export import export

    save_run(tmp_path / "run", task, pos="rope")
    with pytest.raises(ValueError, match="run is a run on a task: its tokenizer of 511 characters has no counterpart"):
        export(str(tmp_path / "run"), "last", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pytest.importorskip("lm_eval")
    from nanope.evaluation.harness import NanopeLM

    with pytest.raises(ValueError, match="run is a run on a task, and cannot read other text: eval.py --protocol task"):
        NanopeLM(run=str(tmp_path / "run"))


def test_scaled_models_have_the_crop_of_the_plain_one(task):
    gpt = trained(FLIPFLOP, "rope", 60)
    report, _ = evaluate(gpt, task, [8, 24], examples=20, scaling=["none", "yarn"], factor=4)
    plain, scaled = ({r["length"]: r for r in report["results"] if r["scaling"] == s} for s in ("none", "yarn"))
    assert all(scaled[n]["cropped"] == plain[n]["cropped"] for n in (8, 24))
    assert scaled[8]["nats_per_token"] != plain[8]["nats_per_token"]
