"""Data sets of the library `datasets`: folders it loads, folders that save_to_disk wrote, and a small hub."""

import json
import shutil

import datasets
import pytest
from preparing import SMALL, all_documents, contents, documents, files, finish, start, times, verses, write_jsonl
from test_hub import environment, hub  # noqa: F401 (a fixture)
from test_interruptions import FINISHED

from data.library import Wanted
from data.prepare import prepare
from data.shards import DataError, open_data
from data.units import Sizes

TEXTS = verses(300)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    """What the library loads stays in the tests' folder, in this process and in those that it starts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of two .jsonl files that are one split, train."""
    folder = tmp_path_factory.mktemp("data set") / "texts"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", TEXTS[:170])
    write_jsonl(folder / "train-1.jsonl", TEXTS[170:])
    return folder


@pytest.fixture
def splits():
    """A DatasetDict with splits of its own, one of which we do not read."""
    parts = {"train": TEXTS[:200], "validation": TEXTS[200:230], "test": TEXTS[230:250], "extra": TEXTS[250:]}
    return datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})


def loaded(out, dataset, *, split=None, streaming=False, **options):
    return prepare("hub", out, None, "byte", wanted=Wanted(str(dataset), split=split, streaming=streaming), **options)


# ---- what load_dataset loads ----


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_comes_back(folder, tmp_path, streaming):
    data = loaded(tmp_path / "out", folder, streaming=streaming)
    assert all_documents(data) == sorted(TEXTS) and 5 < len(documents(data, "val")) < 40
    manifest = data.manifest
    assert manifest["hub"]["dataset"] == str(folder) and manifest["hub"]["streaming"] == streaming
    assert manifest["revision"] is None and manifest["source"]["fingerprint"]["texts:train"]
    files_ = files(tmp_path, folder, "files")  # the rule of the hash is the same for all ways to read
    assert documents(data, "val") == documents(files_, "val")


@pytest.mark.slow
def test_splits_of_its_own_are_used(splits, tmp_path, capsys):
    for name, part in splits.items():
        part.to_parquet(tmp_path / "texts" / f"{name}.parquet")
    data = loaded(tmp_path / "out", tmp_path / "texts")
    assert [documents(data, split) for split in ("train", "val", "test")] == [
        TEXTS[:200],
        TEXTS[200:230],
        TEXTS[230:250],
    ]
    assert data.manifest["val_rule"] == {"kind": "own"}
    one = loaded(tmp_path / "one", tmp_path / "texts", split="validation+test[:50%]")
    assert all_documents(one) == sorted(TEXTS[200:240]) and one.manifest["val_rule"]["kind"] == "hash"
    with pytest.raises(DataError, match="has a validation split of its own"):
        loaded(tmp_path / "more", tmp_path / "texts", val_bytes=9)


def test_a_split_that_is_not_read_is_said(splits, tmp_path, capsys):
    splits.save_to_disk(tmp_path / "texts")
    files(tmp_path, tmp_path / "texts")
    assert f"the splits extra are left out; one is read by --source {tmp_path}/texts/extra" in capsys.readouterr().err
    assert all_documents(files(tmp_path, tmp_path / "texts" / "extra", "extra")) == sorted(TEXTS[250:])
    del splits["validation"]
    splits.save_to_disk(tmp_path / "without")
    data = files(tmp_path, tmp_path / "without", "train only")
    assert all_documents(data) == sorted(TEXTS[:200])
    assert "the splits test, extra are left out" in capsys.readouterr().err
    del splits["train"]
    splits.save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match="none has the splits test, extra; name one: --source .*/none/test"):
        files(tmp_path, tmp_path / "none", "nothing")


def test_another_field(tmp_path):
    rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "body": ["one", "two", "three"]})
    rows.to_json(tmp_path / "texts" / "a.jsonl")
    with pytest.raises(DataError, match=r"texts:train: no text column 'text'; it has id \(int64\), body \(string\)"):
        loaded(tmp_path / "out", tmp_path / "texts")
    assert all_documents(loaded(tmp_path / "out", tmp_path / "texts", field="body")) == ["one", "three", "two"]
    with pytest.raises(DataError, match="other options.*field 'body' there, None now"):
        loaded(tmp_path / "out", tmp_path / "texts")
    with pytest.raises(DataError, match="other options.*'streaming': True"):
        loaded(tmp_path / "out", tmp_path / "texts", field="body", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_types(tmp_path, streaming):
    rows = {
        "a": [{"b": "one"}, {"b": "two"}, {"b": None}],
        "list": [["x", "y"], [], ["z"]],
        "bytes": [b"1", None, b"3"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "texts" / "a.parquet")
    for field, texts in (("a.b", ["one", "two"]), ("list", ["x\ny", "z"]), ("bytes", ["1", "3"])):
        data = loaded(tmp_path / field, tmp_path / "texts", streaming=streaming, field=field)
        assert all_documents(data) == texts and data.manifest["source"]["empty"] == 3 - len(texts)


def test_what_cannot_be_loaded_is_refused(folder, tmp_path):
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(DataError, match="script cannot be loaded.*code of a data set is not run.*parquet"):
        loaded(tmp_path / "out", tmp_path / "script")
    with pytest.raises(DataError, match="Unknown split \"dev\". Should be one of \\['train'\\]"):
        loaded(tmp_path / "out", folder, split="dev")
    with pytest.raises(DataError, match="nowhere cannot be loaded"):
        loaded(tmp_path / "out", tmp_path / "nowhere")
    with pytest.raises(DataError, match="'c' not found"):
        prepare("hub", tmp_path / "out", None, "byte", wanted=Wanted(str(folder), config="c"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jsonl").write_text('{"text": "one"}\n{"text": \n')
    for streaming in (False, True):
        with pytest.raises(DataError, match="broken.* cannot be (loaded|read).*JSON parse error"):
            loaded(tmp_path / "out", tmp_path / "broken", streaming=streaming)
    with pytest.raises(DataError, match="train-0.jsonl; a file is read as a source: files --source"):
        loaded(tmp_path / "out", folder / "train-0.jsonl")
    with pytest.raises(DataError, match="Bad split.*reads a split as a whole"):
        loaded(tmp_path / "out", folder, split="train[:10%]", streaming=True)
    with pytest.raises(DataError, match="--revision does not apply.*is a folder"):
        prepare("hub", tmp_path / "out", None, "byte", wanted=Wanted(str(folder), revision="main"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_format_is_no_data_set(folder, tmp_path, monkeypatch):
    """The library's `json` would be all such files where one is. A folder of that name is itself."""
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="--dataset json is a format of the library"):
        loaded(tmp_path / "out", "json")
    shutil.copytree(folder, tmp_path / "here" / "json")
    write_jsonl(tmp_path / "here" / "other.jsonl", ["not this"])
    monkeypatch.chdir(tmp_path / "here")
    assert all_documents(loaded(tmp_path / "out", "json")) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["train.txt", "train.parquet"])
def test_a_pointer_is_no_text(tmp_path, name):
    (tmp_path / "cloned").mkdir()
    (tmp_path / "cloned" / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 9\n")
    with pytest.raises(DataError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
        loaded(tmp_path / "out", tmp_path / "cloned")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_split_without_rows(splits, tmp_path, streaming):
    splits["train"].to_parquet(tmp_path / "texts" / "train.parquet")
    splits["validation"].select([]).to_parquet(tmp_path / "texts" / "validation.parquet")
    with pytest.raises(DataError, match="--split NAME reads"):
        loaded(tmp_path / "out", tmp_path / "texts", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_its_text(folder, tmp_path, monkeypatch, streaming):
    """Not its place, the way to name it, or its files' times. Other text is noticed, also after the work."""
    data = loaded(tmp_path / "out", folder, streaming=streaming)
    other = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, other, copy_function=shutil.copyfile)
    manifest = loaded(tmp_path / "again", other, streaming=streaming).manifest
    assert manifest | {"hub": None} == data.manifest | {"hub": None}
    monkeypatch.chdir(other)
    assert loaded(tmp_path / "out", ".", streaming=streaming).hash == data.hash  # nothing to do
    with open("train-1.jsonl", "a") as f:
        f.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="other text in the source"):
        loaded(tmp_path / "out", ".", streaming=streaming)


# ---- interruptions and workers ----


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [["--streaming"]])
def test_killed_it_continues_and_workers_make_the_same_bytes(folder, tmp_path, drawn_figures, capsys, streaming):
    """With processes, beside what this one makes of it."""
    options, command = ["--dataset", str(folder), "--split", "train", *streaming], {"corpus": "hub", "val_tokens": None}
    wanted = Wanted(str(folder), split="train", streaming=bool(streaming))

    def here(name):
        return prepare("hub", tmp_path / name, wanted=wanted, **{**SMALL, "val_tokens": None})

    whole = contents(here("one").folder)
    assert len([name for name in whole if name.startswith("train_")]) > 9
    finish(start(tmp_path / "two", *options, "--workers", 2, **command))
    assert contents(tmp_path / "two") == whole
    process = start(tmp_path / "killed", *options, fault=["os.rename", FINISHED, 6, "kill"], **command)
    process.communicate(timeout=60)
    made = times(tmp_path / "killed.partial", "*.bin")
    assert process.returncode == -9 and len(made) == 5
    here("killed")
    assert contents(tmp_path / "killed") == whole
    kept = {time for time in times(tmp_path / "killed", "*.bin").values()} & set(made.values())
    assert len(kept) == 5
    capsys.readouterr()
    here("killed")
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stream_is_cut_by_its_files(folder, tmp_path, monkeypatch):
    """Whatever the library's cache knows of them: else a run that continues would be cut in another way."""
    made = []
    for name in ("new", "known"):
        made.append(loaded(tmp_path / name, folder, streaming=True, shard_tokens=20_000))
        datasets.load_dataset(str(folder))
    assert made[0].hash == made[1].hash and made[0].manifest["groups"] == 2
    with pytest.raises(DataError, match="nobody knows how large"):
        loaded(tmp_path / "out", folder, streaming=True, val_bytes=9_000, sizes=Sizes(survey=10_000))


@pytest.mark.slow
def test_parts_merge_to_the_same_bytes(folder, tmp_path, drawn_figures):
    options, command = ["--dataset", str(folder), "--split", "train"], {"corpus": "hub", "val_tokens": None}
    prepare("hub", tmp_path / "one", wanted=Wanted(str(folder), split="train"), **{**SMALL, "val_tokens": None})
    for i in (1, 2):
        finish(start(tmp_path / "out", *options, "--part", f"{i}/2", **command))
    finish(start(tmp_path / "out", *options, "--merge", **command))
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


# ---- save_to_disk ----


@pytest.mark.slow
def test_folders_of_save_to_disk(splits, tmp_path):
    splits.save_to_disk(tmp_path / "saved")
    data = files(tmp_path, tmp_path / "saved", "out")
    assert [documents(data, split) for split in ("train", "val", "test")] == [
        TEXTS[:200],
        TEXTS[200:230],
        TEXTS[230:250],
    ]
    rows = splits["train"].shuffle(seed=1).select(range(50))
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    one = files(tmp_path, tmp_path / "one", "shuffled")
    assert documents(one, "train") == [text for text in rows["text"] if text not in documents(one, "val")]  # in order
    assert one.manifest["source"]["fingerprint"] == {"one": datasets.load_from_disk(tmp_path / "one")._fingerprint}
    files(tmp_path, tmp_path / "one", "shuffled")  # nothing to do
    with pytest.raises(DataError, match="one was written by save_to_disk; read it as a source: files --source"):
        loaded(tmp_path / "new", tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    splits["train"].select(range(50)).save_to_disk(tmp_path / "one", num_shards=3)
    with pytest.raises(DataError, match="other text in the source"):
        files(tmp_path, tmp_path / "one", "shuffled")


@pytest.mark.slow
def test_units_do_not_depend_on_how_it_was_saved(splits, tmp_path):
    """Nor the bytes on the Arrow files' number: rows are cut, not files."""
    made, options = [], {"shard_tokens": 20_000, "sizes": Sizes(least_unit=20_000, processes=0)}
    for number in (1, 4):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        splits["train"].save_to_disk(tmp_path / "saved", num_shards=number)
        data = files(tmp_path, tmp_path / "saved", f"out {number}", **options)
        made.append({name: content for name, content in contents(data.folder).items() if name.endswith(".bin")})
    assert made[0] == made[1] and len(made[0]) > 9


def test_a_corpus_keeps_its_own_splits(splits, tmp_path):
    splits["train"].save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no split for validation, and this corpus has its own"):
        prepare("pg19", tmp_path / "out", tmp_path / "saved", "byte")
    splits.save_to_disk(tmp_path / "all")
    assert documents(prepare("pg19", tmp_path / "out", tmp_path / "all", "byte"), "val") == TEXTS[200:230]


def test_a_damaged_folder_of_save_to_disk(splits, tmp_path):
    splits["train"].save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match="saved cannot be read"):
        files(tmp_path, tmp_path / "saved")


# ---- a hub ----


@pytest.fixture
def small_hub(hub, corpus):  # noqa: F811
    hub.repo, hub.commit = "someone/texts", "a" * 40
    hub.files = {
        f"data/train-{i:05d}-of-00003.parquet": f.read_bytes() for i, f in enumerate(sorted(corpus[0].iterdir()))
    }
    return hub


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_from_a_hub(small_hub, corpus, tmp_path, streaming):
    """By name, at the commit that the hub has now. A run that is taken up again stays at its commit."""
    environ = environment(small_hub, tmp_path / "home")
    environ.pop("HF_DATASETS_CACHE", None)
    command = {"corpus": "hub", "val_tokens": None, "env": environ}
    options = ["--dataset", "someone/texts", "--split", "train", *streaming]
    process = start(tmp_path / "out", *options, fault=["os.rename", FINISHED, 3, "kill"], **command)
    process.communicate(timeout=120)
    plan = json.loads((tmp_path / "out.partial" / "plan.json").read_text())
    assert plan["revision"] == "a" * 40
    small_hub.asked.clear()
    finish(start(tmp_path / "out", *options, **command))
    data = open_data(tmp_path / "out")
    assert all_documents(data) == sorted(text for text in corpus[1] if text and text.strip())
    assert data.manifest["revision"] == "a" * 40 and list(data.manifest["source"]["fingerprint"])
    assert all("/resolve/" not in path or "a" * 40 in path for _, path in small_hub.asked)


@pytest.mark.slow
def test_without_the_hub(small_hub, corpus, tmp_path):
    """The library's cache serves, but not for another commit than it has."""
    command = {"corpus": "hub", "val_tokens": None}
    environ = environment(small_hub, tmp_path / "home")
    environ.pop("HF_DATASETS_CACHE", None)
    finish(start(tmp_path / "one", "--dataset", "someone/texts", env=environ, **command))
    environ["HF_HUB_OFFLINE"] = "1"
    finish(start(tmp_path / "two", "--dataset", "someone/texts", "--revision", "a" * 40, env=environ, **command))
    made = [open_data(tmp_path / name).manifest for name in ("one", "two")]
    assert made[0]["splits"] == made[1]["splits"] and made[1]["revision"] == "a" * 40
    other = start(tmp_path / "out", "--dataset", "someone/texts", "--revision", "b" * 40, env=environ, **command)
    assert f"at {'b' * 40} is neither on the hub nor in the library's cache" in finish(other, code=1)
