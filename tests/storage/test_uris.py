import _thread
import errno
import io
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import pyarrow as pa
import pytest
from moto.s3.responses import S3Response

from mi_ray import storage
from mi_ray.config.section import ConfigError
from mi_ray.inputs.prompts import read_prompts
from mi_ray.runs import folder as run_folder
from mi_ray.storage import gcs, uris

TABLE = pa.table({"prompt": ["a", "b"], "score": pa.array([1.5, None], pa.float32())})


@pytest.fixture(scope="module")
def endpoint(s3_server):
    """The address of an S3 server with the bucket `runs`."""
    with pytest.MonkeyPatch.context() as patch:
        put, one_at_a_time = S3Response.put_object, threading.RLock()

        def atomic_put(*arguments, **keywords):  # moto checks If-None-Match and writes in two steps, S3 in one
            with one_at_a_time:
                return put(*arguments, **keywords)

        patch.setattr(S3Response, "put_object", atomic_put)
        boto3.client("s3", endpoint_url=f"http://{s3_server}").create_bucket(Bucket="runs")
        yield s3_server


@pytest.fixture(params=["local", "s3_by_environment", "s3_by_query", "gs_by_environment", "gs_by_query"])
def root(request, tmp_path, monkeypatch) -> str:
    """The URI of an empty folder."""
    if request.param == "local":
        return str(tmp_path)
    scheme, _, by = request.param.partition("_by_")
    address = request.getfixturevalue("endpoint" if scheme == "s3" else "gcs_server")
    if by == "query":
        return f"{scheme}://runs/{tmp_path.name}?endpoint_override={address}&scheme=http"
    monkeypatch.setenv("AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST", f"http://{address}")
    return f"{scheme}://runs/{tmp_path.name}"


# ------------------------------------------------------------------------------------------ everywhere
def test_files_are_found_and_read_back(root):
    uri = storage.join(root, "round-0", "a.bin")
    assert not storage.exists(uri)
    assert storage.list_names(storage.join(root, "round-0")) == []
    storage.write_bytes(uri, b"\0\1")
    storage.write_bytes(uri, b"\2")
    storage.write_json(storage.join(root, "round-0", "b.json"), {"x": [1.5, "é"]})
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"\2"
    assert storage.read_json(storage.join(root, "round-0", "b.json")) == {"x": [1.5, "é"]}
    assert storage.list_names(storage.join(root, "round-0")) == ["a.bin", "b.json"]
    assert storage.list_names(root) == ["round-0"]


def test_a_folder_that_is_created_while_it_is_listed_is_listed(tmp_path, monkeypatch):
    """Arrow lists a folder first, and then looks whether it exists."""
    system, path = uris.filesystem(str(tmp_path / "lease"))

    class Slow:
        def get_file_info(self, select):
            if not (tmp_path / "lease").exists():
                storage.write_bytes(str(tmp_path / "lease" / "1.json"), b"{}")
                raise FileNotFoundError("Cannot list directory")
            return system.get_file_info(select)

    monkeypatch.setattr(uris, "filesystem", lambda uri: (Slow(), path) if uri == path else (system, uri))
    assert storage.list_names(path) == ["1.json"]


def test_tables_are_read_back_in_the_order_of_their_names(root):
    folder = storage.join(root, "candidates")
    names = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    for name in (names[2], names[0]):
        storage.write_table(storage.join(folder, name), TABLE.append_column("part", [[name, name]]))
    assert storage.read_tables(folder)["part"].to_pylist() == [names[0]] * 2 + [names[2]] * 2
    assert storage.read_table(storage.join(folder, names[0]), ["score"]) == TABLE.select(["score"])


# ------------------------------------------------------------------------------------------ exactly once
def part(value: float, errors: int = 0) -> pa.Table:
    return pa.table({"score": [value] * 3, "error": pa.array(["bad"] * errors + [None] * (3 - errors), pa.string())})


def test_create_bytes_succeeds_once(root):
    uri = storage.join(root, "token")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(uri, b"%d" % i), range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)


def test_two_commits_of_a_shard_leave_one_part_and_one_receipt(root):
    folder = storage.join(root, "candidates")
    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda i: run_folder.commit(folder, "part-0.parquet", part(i), {"by": i}), range(4)))
    assert all(receipt == receipts[0] for receipt in receipts)
    assert run_folder.committed(folder, "part-0.parquet") == receipts[0]
    assert len(storage.read_tables(folder)) == 3
    before = storage.read_bytes(storage.join(folder, "part-0.parquet"))
    run_folder.commit(folder, "part-0.parquet", part(9), {"by": 9})
    assert storage.read_bytes(storage.join(folder, "part-0.parquet")) == before


def test_parts_without_a_receipt_are_missing(root):
    folder = storage.join(root, "candidates")
    names = ["part-0.parquet", "part-1.parquet", "part-2.parquet"]
    assert run_folder.missing_parts(folder, names) == names
    run_folder.commit(folder, names[1], part(1.0), {"rows": 3})
    assert run_folder.committed(folder, names[0]) is None
    assert run_folder.missing_parts(folder, names) == [names[0], names[2]]


def test_part_without_a_receipt_is_adopted(root):
    folder = storage.join(root, "candidates")
    names = ["part-0.parquet", "part-1.parquet"]
    storage.write_table(storage.join(folder, names[0]), part(1.0, errors=2))
    assert run_folder.adopt_parts(folder, names) == [names[0]]
    receipt = run_folder.committed(folder, names[0])
    assert (receipt["rows"], receipt["errors"], receipt["adopted"]) == (3, 2, True)
    assert run_folder.missing_parts(folder, names) == [names[1]]


def test_receipt_describes_the_stored_part(root):
    folder = storage.join(root, "candidates")
    storage.write_table(storage.join(folder, "part-0.parquet"), part(1.0, errors=1))
    assert run_folder.commit(folder, "part-0.parquet", part(2.0), {"rows": 3, "errors": 0})["errors"] == 1


def test_create_with_a_lost_response_succeeds(monkeypatch, root):
    """The response to the first attempt is lost. The second attempt is refused, because the object exists."""
    if not root.startswith("s3://"):
        pytest.skip("of S3")
    put = storage.s3.create
    monkeypatch.setattr(storage.s3, "create", lambda uri, content: put(uri, content) and put(uri, content))
    assert storage.create_bytes(storage.join(root, "token"), b"mine")
    assert not storage.create_bytes(storage.join(root, "token"), b"another's")


def test_s3_requests_are_retried(monkeypatch, root):
    if not root.startswith("s3://"):
        pytest.skip("of S3")
    uri = storage.join(root, "small.json")
    storage.write_bytes(uri, b"{}")
    get, calls = S3Response.get_object, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) < 3:
            return 500, {}, "<Error><Code>InternalError</Code><Message>longer than what was asked for</Message></Error>"
        return get(*arguments, **keywords)

    monkeypatch.setattr(S3Response, "get_object", failing)
    assert storage.read_json(uri) == {}
    assert len(calls) >= 3


@pytest.mark.parametrize("name", ["flaky", "lost"])
def test_google_cloud_storage_requests_are_retried(name, gcs_server, tmp_path):
    """Requests fail twice: with status 503, or the request is done and the connection is closed."""
    uri = f"gs://runs/{tmp_path.name}/{name}?endpoint_override={gcs_server}&scheme=http"
    with pytest.raises((HTTPException, HTTPError)):
        urlopen(f"http://{gcs_server}/storage/v1/b/runs/o/{tmp_path.name}%2F{name}")
    assert not storage.exists(uri)
    assert storage.create_bytes(uri, b"{}")
    assert not storage.create_bytes(uri, b"{1}")
    storage.write_bytes(uri, b"{2}")
    assert storage.read_bytes(uri) == b"{2}"


@pytest.mark.parametrize("size", [1 << 10, 20 << 20])
def test_interrupted_write_keeps_the_old_file(root, size, tmp_path):
    """Also for a large file that is put in pieces. The main thread is interrupted."""
    if "://" not in root:
        pytest.skip("a local file is renamed when it is whole")
    uri = storage.join(root, "table.parquet")

    class Cut(io.FileIO):
        def read(self, wanted=-1):
            if wanted < 0 or self.tell() + wanted > size // 2:
                _thread.interrupt_main()
                time.sleep(0.1)
            return super().read(wanted)

    (source := tmp_path / "source").write_bytes(bytes(size))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray leaves its own handler
    try:
        for before in (None, b"whole"):
            with Cut(source) as content, pytest.raises(KeyboardInterrupt):
                storage.put(uri, content)
            there = storage.read_bytes(uri) if storage.exists(uri) else None
            assert there in (before, bytes(size))
            storage.write_bytes(uri, b"whole")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_create_bytes_of_large_files_succeeds_once(root):
    """Google's client sends large files in pieces. The condition is checked when they are joined."""
    if not root.startswith("gs://"):
        pytest.skip("of Google Cloud Storage")
    uri = storage.join(root, "large")
    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(lambda i: storage.create_bytes(uri, b"%d" % i * (9 << 20)), range(2)))
    assert sorted(won) == [False, True]
    assert storage.read_bytes(uri)[:1] == b"%d" % won.index(True)


def test_google_cloud_storage_without_credentials_is_reported_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    with pytest.raises(OSError, match="there are no credentials"):
        storage.exists("gs://bucket/run")
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(ValueError, match=r"pip install 'mi-ray\[gcp\]'"):
        storage.exists("gs://bucket/run")


def test_credentials_are_sent_except_over_plain_http(monkeypatch):
    """A private endpoint of Google needs credentials like the public one."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    places = [gcs._parts(f"gs://b/a{query}")[2] for query in ("", "?endpoint_override=x.p.googleapis.com")]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:1")
    places += [gcs._parts(f"gs://b/a{query}")[2] for query in ("", "?endpoint_override=localhost:2&scheme=http")]
    assert places == [None, "https://x.p.googleapis.com", "http://localhost:1", "http://localhost:2"]
    assert [gcs._is_emulator(place) for place in places] == [False, False, True, True]


def test_permanent_error_is_raised_at_once(monkeypatch):
    def denied():
        raise OSError("AWS Error ACCESS_DENIED during GetObject operation")

    monkeypatch.setattr(uris.time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        uris._with_retries(denied)


def test_store_without_conditional_writes_is_refused(monkeypatch, root):
    def heedless(uri, content):
        storage.write_bytes(uri, content)
        return True

    monkeypatch.setattr(storage, "create_bytes", heedless)
    with pytest.raises(OSError, match="conditional writes"):
        run_folder.check_writable(root)


def test_events_are_appended(root):
    run_folder.check_writable(root)
    storage.write_json(storage.join(root, "run.json"), {})
    run_folder.log_event(root, "started", shards=3)
    run_folder.log_event(root, "finished")
    lines = storage.read_bytes(storage.join(root, "events.jsonl")).decode().splitlines()
    events = [json.loads(line) for line in lines]
    assert [(e["event"], e.get("shards")) for e in events] == [("started", 3), ("finished", None)]
    assert storage.list_names(root) == ["events.jsonl", "run.json"]


def test_shard_events_are_delayed_on_object_stores(root):
    run_folder.log_event(root, "started") if "://" in root else storage.write_json(storage.join(root, "run.json"), {})
    for index in range(3):
        run_folder.log_event(root, "shard_written", index=index)
    run_folder.log_event(root, "finished")
    events = storage.read_lines(storage.join(root, "events.jsonl"))
    assert [e.get("index") for e in events if e["event"] == "shard_written"] == [0, 1, 2]
    assert events[-1]["event"] == "finished"


def test_prompts_are_read_from_object_stores(root):
    uri = storage.join(root, "prompts.txt")
    storage.write_bytes(uri, b"a cat\nan owl\n")
    assert read_prompts(uri)[0]["prompt"].to_pylist() == ["a cat", "an owl"]


def test_local_folder_copies_a_remote_folder(root):
    storage.write_bytes(storage.join(root, "adapter", "weights"), b"12")
    copy = storage.local_folder(storage.join(root, "adapter"))
    assert storage.list_names(copy) == ["weights"]
    assert storage.read_bytes(storage.join(copy, "weights")) == b"12"


# ------------------------------------------------------------------------------------------ URIs, local files
@pytest.mark.parametrize(
    ("uri", "joined"),
    [
        ("runs/a", "runs/a/b/c.json"),
        ("runs/a/", "runs/a/b/c.json"),
        ("what?/a", "what?/a/b/c.json"),
        ("s3://bucket/a/", "s3://bucket/a/b/c.json"),
        ("s3://bucket/a/?region=x&scheme=http", "s3://bucket/a/b/c.json?region=x&scheme=http"),
    ],
)
def test_join(uri, joined):
    assert storage.join(uri, "b", "c.json") == joined


def test_incomplete_line_is_skipped(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "started"}\n{"event": "sha')
    run_folder.log_event(str(tmp_path), "resumed")
    events = storage.read_lines(str(tmp_path / "events.jsonl"))
    assert [e["event"] for e in events] == ["started", "resumed"]


@pytest.mark.parametrize(
    ("uri", "reported"),
    [
        ("s3://AKIAEXAMPLE:secret@bucket/run", "instance role"),
        ("s3://AKIAEXAMPLE:a/secret/with/slashes@bucket/run", "instance role"),
        ("s3://bucket/run?region=x&secret_key=secret", "instance role"),
        ("s3://bucket/run?colour=red", "colour"),
        ("gs://user:secret@bucket/run", "service account"),
        ("gs://bucket/run?colour=red", "colour"),
    ],
)
def test_invalid_uris_are_refused(uri, reported):
    with pytest.raises(ValueError, match=reported) as fault:
        storage.filesystem(uri)
    assert "secret" not in str(fault.value)


def test_names_similar_to_credentials_are_accepted():
    assert storage.filesystem("s3://bucket/user@home/run?region=x")[1] == "bucket/user@home/run"


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "part.parquet"
    storage.write_bytes(str(target), b"before")

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(uris.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        storage.write_bytes(str(target), b"after")
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_json_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "report.json"), {"auc": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folders_are_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        run_folder.check_writable(str(tmp_path / "file" / "run"))


def test_check_writable_does_not_create_the_folder(tmp_path):
    run_folder.check_writable(str(tmp_path / "runs" / "new"))
    assert not list(tmp_path.iterdir())


def test_equals_sign_in_a_folder_makes_no_column(tmp_path):
    uri = storage.join(str(tmp_path), "lr=1", "part.parquet")
    storage.write_table(uri, TABLE)
    assert storage.read_table(uri) == TABLE


# ------------------------------------------------------------------------------------------ full disk
def write_on_a_full_disk(folder: str, wrapped: bool):
    try:
        run_folder.commit(folder, "part.parquet", TABLE, {})
    except OSError as error:
        if wrapped:
            raise RuntimeError("an actor failed") from error
        raise


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_gives_one_message(wrapped, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError) as reported, run_folder.full_disk_as_config_error("runs/x"):
        write_on_a_full_disk(str(tmp_path), wrapped)
    (fault,) = reported.value.faults
    assert fault.startswith("run_dir: the disk of 'runs/x' is full; free some space")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_errors_are_not_reported_as_a_full_disk():
    with pytest.raises(FileNotFoundError), run_folder.full_disk_as_config_error("runs/x"):
        storage.read_bytes("/nowhere/at/all")
