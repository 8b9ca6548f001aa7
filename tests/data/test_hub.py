"""Downloads, from a small hub on this machine: lists of files, proxies, caches, and what breaks."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from urllib.parse import unquote

import pytest
from preparing import all_documents, contents, finish, start

from data.corpora import CORPORA
from data.hub import _cached, fetch
from data.shards import DataError, open_data

KILLED_BEFORE_JOINING = ["os.rename", r"/train_00000\.bin$", 1, "kill"]


class Answers(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's HTTP interface that huggingface_hub uses to list and download a data set."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, re.sub("^http://hub.invalid", "", self.path.split("?")[0])  # whole for a proxy
        server.asked.append((self.command, path))
        if server.failures:
            return self.answer(server.failures.pop(), b"busy")
        data_set = f"/api/datasets/{server.repo}"
        if path == data_set or path.startswith(f"{data_set}/revision/"):
            return self.answer_json({"id": server.repo, "sha": server.commit})
        if path.startswith(f"{data_set}/tree/{server.commit}"):
            return self.answer_json(self.listing(unquote(path.split(server.commit)[1]).strip("/")))
        name = path.removeprefix(f"/datasets/{server.repo}/resolve/{server.commit}/")
        if self.command == "GET" and name in server.files:
            server.before(name)
        if name not in server.files:
            return self.answer(404, b"not there", {"X-Error-Code": "EntryNotFound"})
        content = server.served.get(name, server.files[name])
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if part := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):  # as streams are read
            first, last = map(int, part.groups())
            where = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            return self.answer(206, content[first : last + 1], where)
        self.answer(200, content, {"ETag": etag, "X-Repo-Commit": server.commit})

    def listing(self, folder):
        """The files and folders in a folder of the repository, or recursively, its files."""
        listed, before = {}, f"{folder}/" if folder else ""
        for name, content in self.server.files.items():
            if name.startswith(before):
                path = name
                if "recursive=true" not in self.path.lower():
                    path = before + name.removeprefix(before).split("/")[0]
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                file = {"type": "file", "size": len(content), "lfs": lfs}
                listed[path] = {"path": path, "oid": "0" * 40} | (file if path == name else {"type": "directory"})
        return list(listed.values())

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, code, content, headers=None):
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(corpus):
    """A server. files: name → content; served: other contents; failures: codes to answer first; asked: what was;
    before(name): called before a file is sent."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.repo, server.commit = CORPORA["fineweb-edu"].repo, CORPORA["fineweb-edu"].revision
    server.files = {f"sample/10BT/{path.name}": path.read_bytes() for path in sorted(corpus[0].iterdir())}
    server.asked, server.failures, server.served, server.before = [], [], {}, lambda name: None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(hub, home, **more):
    """Ours, without proxies and what concerns the real hub."""
    ours = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    url = f"http://127.0.0.1:{hub.server_address[1]}"
    return ours | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more


def from_hub(hub, out, *options, fault=None, **more):
    return start(out, *options, fault=fault, env=environment(hub, out.parent / "home", **more))


def downloads(hub):
    return [path for command, path in hub.asked if command == "GET" and "/resolve/" in path]


@pytest.mark.slow
def test_from_the_hub(hub, corpus, tmp_path):
    """Files are downloaded one by one, and deleted when they are done."""
    there = []

    def wait_for_the_one_before_the_last(name):
        files, limit = 2, time.monotonic() + 30
        while files > 1 and time.monotonic() < limit:  # the program works on them while this download waits
            files = len(list((tmp_path / "out.partial").rglob("*.parquet")))
            time.sleep(0.02)
        there.append(files)

    hub.before = wait_for_the_one_before_the_last
    finish(from_hub(hub, tmp_path / "out", "--workers", 2))
    data = open_data(tmp_path / "out")
    assert all_documents(data) == sorted(text for text in corpus[1] if text and text.strip())
    assert data.manifest["revision"] == hub.commit and data.manifest["subset"] == "sample-10BT"
    assert data.manifest["val_rule"]["text_bytes"] == 400_000 * 4.3  # the table's, not what the files have
    assert len(downloads(hub)) == len(there) == 3 and max(there) < 2  # never all three at once
    assert not (tmp_path / "out.downloads").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_second_run_downloads_nothing(hub, tmp_path):
    hub.failures = [503, 429]  # the library waits and tries again
    finish(from_hub(hub, tmp_path / "out"))
    hub.asked.clear()
    assert "nothing to do" in finish(from_hub(hub, tmp_path / "out"))
    assert not hub.asked  # a folder that is complete is checked without the network
    # interrupted, with downloads kept, and in another place: the same bytes, and what is finished is not fetched again
    again = tmp_path / "again"
    from_hub(hub, again, "--keep_downloads", fault=KILLED_BEFORE_JOINING).communicate(timeout=60)
    hub.asked.clear()
    finish(from_hub(hub, again, "--keep_downloads"))
    assert not any("/resolve/" in path for _, path in hub.asked)
    assert contents(again) == contents(tmp_path / "out")
    kept = sorted((tmp_path / "again.downloads").rglob("*.parquet"))
    assert [path.read_bytes() for path in kept] == list(hub.files.values())


@pytest.mark.slow
def test_the_hub_fails(hub, tmp_path):
    hub.files.clear()
    assert "has no file sample/10BT/*.parquet" in finish(from_hub(hub, tmp_path / "out"), code=1)
    message = finish(from_hub(hub, tmp_path / "out", HF_HUB_OFFLINE="1"), code=1)
    assert "cannot be fetched" in message and "--source" in message
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_offline_from_the_cache(hub, tmp_path):
    """What `hf download` brought before is used where it lies; without it, the error says so."""
    code = (
        f"import huggingface_hub\nhuggingface_hub.snapshot_download({hub.repo!r}, repo_type='dataset', "
        f"revision={hub.commit!r}, allow_patterns='sample/10BT/*.parquet')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(hub, tmp_path / "home"))
    hub.asked.clear()
    finish(from_hub(hub, tmp_path / "out", HF_HUB_OFFLINE="1"))
    assert not hub.asked and list((tmp_path / "home").rglob("*.parquet"))  # not deleted: it is not ours
    finish(from_hub(hub, tmp_path / "online"))
    assert contents(tmp_path / "out") == contents(tmp_path / "online")
    blob = sorted((tmp_path / "home").rglob("*.parquet"))[1].resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    assert "is damaged" in finish(from_hub(hub, tmp_path / "damaged", HF_HUB_OFFLINE="1"), code=1)


def test_a_cache_that_lacks_a_file_is_not_taken_for_the_corpus(tmp_path, monkeypatch):
    for i in (0, 2):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"train-{i:05d}-of-00003-0f92e{i}.parquet").write_text("x")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **more: str(tmp_path))
    with pytest.raises(DataError, match="only a part of owner/name: a/train-00001-of-00003 is not there"):
        _cached("owner/name", "main", ["a/train-*.parquet"])
    (tmp_path / "a" / "train-00001-of-00003-77.parquet").write_text("x")
    assert len(_cached("owner/name", "main", ["a/train-*.parquet"])[1]) == 3
    assert _cached("owner/name", "main", ["b/*.parquet"])[1] == []  # of another subset


@pytest.mark.slow
def test_through_a_proxy(hub, tmp_path):
    proxy = f"http://127.0.0.1:{hub.server_address[1]}"
    finish(from_hub(hub, tmp_path / "out", HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=proxy))
    assert open_data(tmp_path / "out").manifest["revision"] == hub.commit


@pytest.mark.slow
def test_a_download_with_other_bytes_is_refused(hub, tmp_path):
    name = sorted(hub.files)[1]
    good = hub.files[name]
    hub.served[name] = good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    assert "001_00000.parquet was not downloaded whole" in finish(from_hub(hub, tmp_path / "out"), code=1)
    hub.served.clear()
    finish(from_hub(hub, tmp_path / "out"))


@pytest.mark.slow
def test_a_download_that_breaks_can_be_continued(hub, tmp_path):
    """Of three files the last is gone: the first two are done, and the same command continues when it is back."""
    last = sorted(hub.files)[-1]

    def disappear(name):
        if name == last:
            while not list((tmp_path / "out.partial").glob("*.unit.json")):  # not before something is finished
                time.sleep(0.01)
            del hub.files[last]

    hub.before, there = disappear, dict(hub.files)
    assert "002_00000.parquet cannot be fetched" in finish(from_hub(hub, tmp_path / "out", "--workers", 2), code=1)
    assert list((tmp_path / "out.partial").glob("*.unit.json"))
    hub.before, hub.files = lambda name: None, there
    hub.asked.clear()
    finish(from_hub(hub, tmp_path / "out"))
    assert any(path.endswith(last) for path in downloads(hub))
    assert len(open_data(tmp_path / "out").manifest["splits"]["train"]) > 15


def test_a_connection_that_breaks_off(monkeypatch, tmp_path):
    """urllib says nothing when fewer bytes come than were announced; and a 404 is not tried again."""

    class Short(Answers):
        def do_GET(self):
            self.server.asked.append(self.path)
            if self.path == "/gone":
                return self.answer(404, b"")
            self.close_connection = True
            self.answer(200, b"ab", {"Content-Length": "2" if len(self.server.asked) == 3 else "9"})

    waits = []
    monkeypatch.setattr("data.hub.time.sleep", waits.append)
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.HTTPServer(("127.0.0.1", 0), Short)
    server.asked = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    fetch(f"{url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"ab" and len(server.asked) == 3 and waits == [1, 2]
    with pytest.raises(OSError, match="404"):
        fetch(f"{url}/gone", tmp_path / "gone")
    assert len(server.asked) == 4 and not (tmp_path / "gone").exists()
    server.shutdown()
    server.server_close()
