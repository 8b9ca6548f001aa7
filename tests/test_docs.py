"""What README and docs show and claim: examples run, commands and files exist, figures are those of the results."""

import dataclasses
import functools
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_house import FILES, imports

import model
import schemes
from model import GPT, SCHEMES, GPTConfig
from nanope import REPO, cards, checkpoint, conformance
from nanope.config import RunConfig, check
from nanope.conformance import CHECKS, Case
from nanope.study.grid import Grid
from schemes.base import Scheme

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(REPO)): path.read_text() for path in PAGES}
README = TEXTS["README.md"]
# Programs that are not ours, and flags of theirs that prose names
THEIRS = {"--help", "--max-restarts", "--rdzv_id", "--shutdown_timeout"}
# Options that scripts/lm_eval.py hands to the harness; tests/scripts/test_lm_eval.py asks it for them
HARNESS = {"--tasks", "--model", "--model_args", "--metadata", "--include_path", "--output_path", "--batch_size"}
HARNESS |= {"--gen_kwargs"}


def blocks(language):
    """(page, content) of the code blocks in a language."""
    return [
        (page, code) for page, text in TEXTS.items() for code in re.findall(rf"```{language}\n(.*?)```", text, re.S)
    ]


def prose(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def table_under(text, header):
    """Cells of the rows of the first table whose header starts so."""
    rows = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


# ---- form


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", TEXTS)
def test_lines_of_prose_and_code_have_at_most_120_characters(page):
    assert [line for line in TEXTS[page].splitlines() if len(line) > 120 and not line.startswith("|")] == []


# ---- schemes that are shown


EXAMPLES = [
    (code, f"{path}:{name}")
    for page, code in blocks("python")
    for name in re.findall(r"^class (\w+)\(", code, re.M)
    for path in [f"{name.lower()}.py"]
]


def test_schemes_are_shown():
    assert [name for _, name in EXAMPLES][:2] == ["kerple.py:Kerple", "forget.py:Forget"] and len(EXAMPLES) == 3


@pytest.mark.slow
@pytest.mark.parametrize("code,name", EXAMPLES, ids=[name for _, name in EXAMPLES])
def test_a_scheme_that_is_shown_passes_every_check(code, name, tmp_path):
    (tmp_path / name.partition(":")[0]).write_text(code)
    found = conformance.run(Case(f"{tmp_path}/{name}"))
    assert found == dict.fromkeys(CHECKS)


@pytest.fixture(scope="module")
def kerple(tmp_path_factory):
    """`pos` of the README's scheme, in a file outside of the repository."""
    path = tmp_path_factory.mktemp("outside") / "kerple.py"
    path.write_text(EXAMPLES[0][0])
    return f"{path}:Kerple"


def test_the_readmes_scheme_is_kerple(kerple):
    gpt = GPT(GPTConfig(16, 64, 2, 2, 16, pos=kerple, pos_options={"start": 0.7}), seed=0).double()
    idx = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    logits, _ = gpt(idx)
    assert torch.allclose(gpt(idx[:, :20])[0], logits[:, :20])  # causal, and beyond block_size
    assert torch.equal(gpt.generate(idx[:, :9], 1, temperature=0)[:, -1], logits[:, 8].argmax(-1))

    # attention against the paper's formula
    attention = gpt.transformer["h"][0].attn
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    positions = torch.arange(24, dtype=torch.float64)
    ctx = model.Context(positions, 0, torch.float64, x.device, idx[:1], x, positions.long(), attend=gpt.attend)
    q, k, v = attention.c_attn(x).view(24, 3, 2, 8).permute(1, 2, 0, 3)  # (H, T, D) each
    r = F.softplus(torch.tensor(0.7, dtype=torch.float64))
    distance = positions[:, None] - positions
    scores = q @ k.mT / 8**0.5 - r * torch.log1p(r * distance.clamp_min(0))
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    assert torch.allclose(attention(x, ctx)[0], attention.c_proj(expected.transpose(0, 1).reshape(24, 16)))

    gpt(idx[:, :-1], idx[:, 1:])[1].backward()
    for block in gpt.transformer["h"]:
        assert block.attn.pos.r1.grad.abs().min() > 0 and block.attn.pos.r2.grad.abs().min() > 0
    with pytest.raises(ValueError, match="Kerple takes start"):
        GPT(GPTConfig(pos=kerple, pos_options={"begin": 1.0}))


def test_the_page_on_schemes_names_every_hook_and_every_check():
    page = TEXTS["docs/adding-a-scheme.md"]
    named = [re.match(r"`(\w+)\(", row[0]).group(1) for row in table_under(page, "| hook |")]
    source = (REPO / "schemes" / "base.py").read_text()
    hooks = re.findall(
        r"^    def (\w+)", source[source.index("# ---- hooks") : source.index("# ---- what is asked")], re.M
    )
    assert sorted(named) == sorted(hooks)
    for name in re.findall(
        r"`(?:ctx\.)?(\w+)(?:\([\w, =]*\))?`", " ".join(row[0] for row in table_under(page, "| `ctx.`"))
    ):
        assert hasattr(schemes.Context, name) or name in {f.name for f in dataclasses.fields(schemes.Context)}, name
    for attribute in ("extends", "longest", "reach", "axes", "undecayed", "shared", "sole", "wider", "of_keys"):
        assert f"`{attribute}`" in page and hasattr(Scheme, attribute)
    checks = ", ".join(row[0] for row in table_under(page, "| check |")).replace(" ", "_").split(",_")
    assert sorted(checks) == sorted(CHECKS)


def test_every_scheme_has_a_card_of_what_its_file_says():
    """Equation, options, and the lines on parameters, lengths, cache and cost, as docs/schemes.md has them; a picture;
    and no card of what is no scheme."""
    page = TEXTS["docs/schemes.md"]
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert sections.keys() == SCHEMES.keys() == {p.stem for p in (REPO / "docs" / "schemes").glob("*.png")}
    for name, cls in SCHEMES.items():
        told = [cards.about(cls), *cards.shown(schemes.options_of(cls)), *cards.facts_of(cls).values()]
        page = " ".join(sections[name].split())
        assert all(" ".join(text.split()) in page for text in told), f"{name}: python scripts/cards.py writes it anew"


@pytest.mark.slow
def test_the_cards_costs_are_those_of_the_schemes():
    for card in cards.cards(["rope", "fox"]):
        assert f"{card.own:+,} parameters, {card.flops:.3f} of" in TEXTS["docs/schemes.md"].split(f"## {card.name}")[1]


def test_the_readme_has_all_schemes_by_their_kinds_and_the_leaderboard_as_it_was_measured():
    (kinds,) = re.findall(r"^Positions are.*?\n\n", README, re.M | re.S)
    assert sorted(re.findall(r"`(\w+)`", kinds)) == sorted(SCHEMES)
    where = REPO / "results" / "all-schemes"
    board = table_under((where / "README.md").read_text(), "| arm | seeds | rate |")
    assert table_under(README, "| arm |") == board
    assert {fields["pos"] for fields in Grid.of_folder(where).arms.values()} == set(SCHEMES)
    assert {row[0] for row in board} == set(Grid.of_folder(where).arms)


# ---- other examples


def test_python_examples_run(tmp_path, monkeypatch):
    """In a folder that holds a run and a GPT-2 of a few parameters."""
    from safetensors.torch import save_file

    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 64}
    run = tmp_path / "runs" / "mine"
    config = dataclasses.asdict(RunConfig(**shape, pos="crope"))
    checkpoint.save_step(
        run, {"model": GPT(GPTConfig(**shape, pos="crope")).state_dict(), "config": config, "step": 1}, 1
    )
    (run / "best.pt").symlink_to("last.pt")
    theirs = GPT(GPTConfig(**shape, pos="learned", bias=True)).state_dict()
    names = {name: name.removeprefix("transformer.") for name in theirs if name != "lm_head.weight"}
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    (tmp_path / "gpt2").mkdir()
    save_file(
        {new: (theirs[old].t() if old.endswith(turned) else theirs[old]).contiguous() for old, new in names.items()},
        tmp_path / "gpt2" / "model.safetensors",
    )
    gpt2 = {"model_type": "gpt2", "n_positions": 8, "n_ctx": 8} | {k: v for k, v in shape.items() if k != "block_size"}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(gpt2))
    monkeypatch.chdir(tmp_path)
    codes = [code for _, code in blocks("python") if "class " not in code]
    assert codes
    for code in codes:
        found = {}
        exec(code, found)
        assert {found[name].config.pos for name in ("rope", "gpt2")} == {"rope", "learned"}


def test_yaml_examples_are_configs_and_grids(tmp_path, kerple, monkeypatch):
    (tmp_path / "configs").symlink_to(REPO / "configs")
    (tmp_path / "my_file.py").symlink_to(kerple.partition(":")[0])
    monkeypatch.chdir(tmp_path)
    found = blocks("yaml")
    assert len(found) == 2
    for _, code in found:
        if "arms:" in code:
            (tmp_path / "grid.yaml").write_text(code)
            grid = Grid.read(tmp_path / "grid.yaml")
            assert list(grid.arms) == ["rope", "kerple"] and grid.fields["n_embd"] == 128
        else:
            check(RunConfig(**yaml.safe_load(code), n_layer=6))


# ---- commands


def logical_lines(code):
    """Command lines, without comments and continued ones joined."""
    for line in code.replace("\\\n", " ").splitlines():
        if line := re.sub(r"(^|\s)#.*", "", line).strip():
            yield line


COMMANDS = sorted(
    {
        line
        for page, text in TEXTS.items()
        if page != "CHANGELOG.md"
        for code in [*re.findall(r"```sh\n(.*?)```", text, re.S), *re.findall(r"`([^`\n]+)`", prose(text))]
        for line in logical_lines(code)
        if re.match(r"(\S*python|torchrun|python|scripts/\S+\.py|train\.py|eval\.py|data/\S+\.py) .*", line)
    }
)
FIELDS = RunConfig.__dataclass_fields__
SCRIPT = re.compile(r"(?:^|\s)((?:scripts/|data/)?\w+\.py)(?=\s|$)")


@functools.cache
def sources(path):
    """Text of a file and of all of the project that it imports."""
    seen, todo = set(), [module for module, file in FILES.items() if file == path]
    while todo:
        if (module := todo.pop()) not in seen:
            seen.add(module)
            todo += imports(module)
    return "\n".join(FILES[module].read_text() for module in sorted(seen))


def knows(script, flag, kind=None):
    """Whether a script takes a flag, by its sources or as a field of a run. kind: of benchmark, one or any."""
    if script == "scripts/lm_eval.py" and flag in HARNESS:
        return True
    files = [REPO / script]
    if script == "scripts/bench.py":
        files += [REPO / "nanope" / "bench" / f"{kind}.py"] if kind else (REPO / "nanope" / "bench").glob("*.py")
    takes_fields = script in ("train.py", "scripts/trace.py") or kind == "feed"
    field = flag.removeprefix("--").partition(".")[0]
    return any(f'"{flag}"' in sources(file) for file in files) or takes_fields and field in FIELDS


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_that_is_shown_parses(line):
    if re.match(r"\S*python -m ", line):
        return
    found = SCRIPT.search(line)
    if not found:
        assert re.match(r"(torchrun|python) ", line) is None, f"no script in: {line}"
        return
    script = found.group(1)
    assert (REPO / script).is_file(), f"{script} does not exist"
    flags = re.findall(r"(?:^|\s)(--[a-z][\w.-]*)", line[found.end() :])
    kind = re.search(r"bench\.py (train|eval|data|feed)\b", line)
    assert [flag for flag in flags if not knows(script, flag, kind and kind.group(1))] == [], line
    for name in re.findall(r"(?:sweep|reproduce)\.py ([a-z][\w-]*)(?=\s|$)", line):
        assert (REPO / "configs" / "sweeps" / f"{name}.yaml").is_file(), f"no grid {name}"


def test_commands_are_found():
    assert len(COMMANDS) > 40


def test_flags_in_prose_exist():
    scripts = [
        path.relative_to(REPO) for path in [*REPO.glob("*.py"), *REPO.glob("data/*.py"), *REPO.glob("scripts/*.py")]
    ]
    for page, text in TEXTS.items():
        for flag in set(re.findall(r"`(--[a-z]\w[\w.-]*)", prose(text))) - THEIRS:
            assert any(knows(str(script), flag) for script in scripts), f"{page}: {flag}"


# ---- files and links


def test_the_file_trees_have_every_file_at_the_top_and_in_nanope_and_name_only_files_that_exist():
    (tree,) = re.findall(r"```\n(model\.py.*?)```", README, re.S)
    (inner,) = re.findall(r"```\n(config\.py.*?)```", TEXTS["CONTRIBUTING.md"], re.S)
    there = set()
    for folder, lines in (("", tree), ("nanope", inner)):
        for name in re.split(r"\s{2,}|\n", lines):
            if re.fullmatch(r"\S+/|\S*\.\w+|\S+/run|[A-Z]+|Makefile", name):
                assert (REPO / folder / name).exists(), f"{folder}/{name}"
                there.add((folder, name.rstrip("/")))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    named = {name.partition("/")[0] for folder, name in there if not folder} | {"README.md", ".gitignore"}
    assert {name.partition("/")[0] for name in tracked} <= named
    inside = {Path(name).parts[1] for name in tracked if name.startswith("nanope/")} - {"__init__.py"}
    assert inside <= {name for folder, name in there if folder}


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*TEXTS, "results/README.md"])
def test_relative_links_exist(page):
    path = REPO / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(page):
    pattern = r"`((?:configs|scripts|data|tests|results|schemes|nanope|docs)/[\w./-]+\.\w+)`"
    for name in re.findall(pattern, TEXTS[page]):
        assert (REPO / name).exists(), name
    in_folder = re.findall(r"file in `(\S+)` \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXTS[page])
    for folder, rows in in_folder:
        for name in re.findall(r"`(\w+\.py)`", rows):
            assert (REPO / folder / name).exists(), name
    for name in re.findall(r"`([a-z_]\w*\.yaml)`", TEXTS[page]):
        assert (REPO / "configs" / name).exists() or name == "config.yaml", name


def test_nothing_is_left_to_fill_in():
    for text in TEXTS.values():
        assert not re.search("@[A-Z]+@|TODO|XXX", text.replace("No TODO", ""))


# ---- figures


@pytest.mark.slow
def test_the_table_of_schemes_is_what_the_command_prints():
    from nanope import plan

    printed, page = plan.scheme_table(RunConfig(), ["rope", "learned", "fox"]), TEXTS["docs/speed.md"]
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert all(line in page for line in rows) and " ".join(printed.split("|")[0].split()) in " ".join(page.split())


def gains(study, baseline="rope"):
    """(arm, length) of what lies below the baseline beyond noise, at the same target tokens."""
    text = (REPO / "results" / study / "README.md").read_text()
    text = text[text.index(f"less {baseline}, same-targets (far)**") :]
    lengths = re.search(r"\| arm \|(.*)\|\n", text).group(1).replace(" ", "").split("|")
    return {
        (row[0], int(length))
        for row in table_under(text, "| arm |")
        for length, cell in zip(lengths, row[1:])
        if cell.startswith("**-")
    }


def test_what_is_said_of_the_two_corpora_is_so():
    bible, novels = gains("schemes"), gains("schemes-novels")
    rotary = {(arm, length) for arm, length in bible if arm in ("crope", "comrope", "carope")}
    assert (len(rotary), len(rotary & novels)) == (7, 1)
    page = " ".join(TEXTS["docs/sweeps-and-papers.md"].split())
    assert "one of the rotary schemes' seven gains over rope is found again; six are inside noise" in page
    found = {("comrope", 2048), ("none", 4096), ("alibi", 2048), ("alibi", 4096)}
    assert bible & novels == found
    assert not {gain for gain in rotary & novels if gain[1] == 4096}
