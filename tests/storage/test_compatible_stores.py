"""Stores and file systems that lack something: checksums, hard links, an answer."""

import http.client
import http.server
import os
import pickle
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pyarrow.fs as pafs
import pytest

from mi_ray import storage
from mi_ray.inputs.pairs import Columns, plan_pairs, read_pairs
from mi_ray.runs import folder as run_folder
from mi_ray.storage import endpoints, s3, uris

OPTIONAL = ("x-amz-checksum-", "x-amz-sdk-checksum", "x-amz-trailer")


@pytest.fixture(scope="module")
def plain_store(s3_server):
    """The address of an S3 server with the bucket `plain` that refuses every request with a checksum."""
    boto3.client("s3", endpoint_url=f"http://{s3_server}").create_bucket(Bucket="plain")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = 501, {}, b"<Error><Code>NotImplemented</Code></Error>"
            if not any(name.lower().startswith(OPTIONAL) for name in self.headers):
                client = http.client.HTTPConnection(s3_server)
                client.request(self.command, self.path, body, dict(self.headers))
                answer = client.getresponse()
                status, headers, content = answer.status, dict(answer.getheaders()), answer.read()
            size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", size)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "{}:{}".format(*server.server_address)
    server.shutdown()


@pytest.fixture(autouse=True)
def nothing_asked_yet(monkeypatch):
    monkeypatch.setattr(endpoints, "_failed", {})


@pytest.fixture
def root(plain_store, tmp_path, monkeypatch) -> str:
    """An empty folder of the server without checksums."""
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    s3._client.cache_clear()
    s3._arrow.cache_clear()
    return f"s3://plain/{tmp_path.name}?endpoint_override={plain_store}&scheme=http"


def test_a_run_needs_no_checksums(root, tmp_path):
    run_folder.check_writable(root)
    assert storage.list_names(root) == []
    large = tmp_path / "large"
    large.write_bytes(b"x" * (20 << 20))
    with large.open("rb") as file:
        storage.put(storage.join(root, "large"), file)
    assert len(storage.read_bytes(storage.join(root, "large"))) == 20 << 20


def test_the_filesystem_of_another_process_needs_none_either(root):
    """Ray Train's workers receive it, and remove earlier checkpoints with it."""
    system, path = storage.filesystem(storage.join(root, "checkpoints"))
    received = pickle.loads(pickle.dumps(system))
    assert received == system
    received.create_dir(f"{path}/a/b")
    with received.open_output_stream(f"{path}/a/b/c") as stream:
        stream.write(b"x" * (12 << 20))
    with received.open_input_file(f"{path}/a/b/c") as file:
        assert file.size() == 12 << 20
    received.delete_dir(f"{path}/a")
    assert received.get_file_info(f"{path}/a").type == pafs.FileType.NotFound


def test_what_the_user_sets_counts(root, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    with pytest.raises(OSError, match=r"NotImplemented|501"):
        storage.write_bytes(storage.join(root, "a"), b"1")


def test_names_with_question_marks_are_read(root):
    names = ["why?.png", "a?b=c.png"]
    for name in names:
        storage.write_bytes(storage.join(root, name), b"image")
        storage.write_bytes(storage.join(root, name.replace(".png", ".txt")), b"a circle")
    pairs = [p for shard in plan_pairs(root, 9, "key", Columns()) for p in read_pairs(shard, Columns())]
    assert [(p.image, p.prompt, p.error) for p in pairs] == [(b"image", "a circle", None)] * 2
    assert storage.read_bytes(pairs[0].file) == b"image"


@pytest.mark.parametrize(
    ("uri", "path", "query"),
    [
        ("s3://b/a", "s3://b/a", ""),
        ("s3://b/a?region=x", "s3://b/a", "region=x"),
        ("s3://b/why?.png", "s3://b/why?.png", ""),
        ("s3://b/why?.png?region=x&scheme=http", "s3://b/why?.png", "region=x&scheme=http"),
        ("s3://b/a?x=1?", "s3://b/a?x=1", ""),
        ("s3://b/a?endpoint_override=http://h:1", "s3://b/a", "endpoint_override=http://h:1"),
    ],
)
def test_a_query_begins_at_the_last_question_mark(uri, path, query):
    assert uris.split_query(uri) == (path, query)
    assert uris.split_query(storage.join(uri, "x?y=z")) == (f"{path}/x?y=z", query)


def test_addressing_by_host_is_settable():
    assert s3._parts("s3://b/a?endpoint_override=h:1&scheme=http&force_virtual_addressing=true")[2] == (
        s3._Place("http://h:1", os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"), True)
    )
    with pytest.raises(ValueError, match="unknown query keys x; allowed are"):
        s3._parts("s3://b/a?x=1")


# ------------------------------------------------------------------------------------------ no answer
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_refused_connection_is_told_in_seconds(scheme):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"{address} does not answer \(Connection refused\); check the endpoint"):
        storage.check_reachable(f"{scheme}://b/r?endpoint_override={address}&scheme=http")
    assert time.monotonic() - began < 5


def test_a_server_that_speaks_no_tls_is_told(plain_store):
    with pytest.raises(OSError, match="does not answer"):
        storage.check_reachable(f"s3://b/r?endpoint_override=https://{plain_store}")


def test_a_certificate_that_is_not_trusted_is_told(plain_store, monkeypatch):
    def refuse(self, connection, server_hostname):
        raise ssl.SSLCertVerificationError(1, "self-signed certificate")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", refuse)
    with pytest.raises(OSError, match=r"is not trusted .* set AWS_CA_BUNDLE"):
        storage.check_reachable(f"s3://b/r?endpoint_override=https://{plain_store}")


# ------------------------------------------------------------------------------------------ no hard links
def no_links(*arguments, **keywords):
    raise PermissionError(1, "Operation not permitted")


def test_without_hard_links_a_file_is_created_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    run_folder.check_writable(str(tmp_path))
    for number in range(20):
        uri = str(tmp_path / f"{number}")
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, uri=uri: storage.create_bytes(uri, b"%d" % i), range(8)))
        assert sorted(won) == [False] * 7 + [True]
        assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert storage.list_names(str(tmp_path)) == sorted(map(str, range(20)))


def test_without_either_the_message_is_true(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(uris.ctypes, "CDLL", lambda *arguments, **keywords: object())
    with pytest.raises(OSError, match="neither hard links nor renames that replace nothing"):
        run_folder.check_writable(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
