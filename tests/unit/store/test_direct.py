"""The short way: what it signs, sends and reads, held against botocore and against servers of every manner."""

from __future__ import annotations

import gc
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import botocore.auth
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.utils import percent_encode

from trimtab_api.contract import Connection
from trimtab_store import S3, connect
from trimtab_store.errors import AccessDenied, ShortRead, StorageUnreachable
from trimtab_store.signature import EMPTY, Signer

from .conftest import keys_folder

HEAD = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"


@pytest.mark.parametrize("token", [None, "session/token+with=signs"])
@pytest.mark.parametrize("key", ["model.safetensors", "ä +1.txt", "a=b&c?d#e%20f", "~/.-_/(x)!*'", "a//b/"])
@pytest.mark.parametrize(
    ("method", "headers", "body"),
    [
        ("GET", {}, b""),
        ("GET", {"range": "bytes=0-9", "if-match": '"abc"'}, b""),
        ("PUT", {}, b"content"),
    ],
)
def test_the_signature_is_botocore_s(
    monkeypatch: pytest.MonkeyPatch, token: str | None, key: str, method: str, headers: dict[str, str], body: bytes
) -> None:
    monkeypatch.setattr(time, "gmtime", lambda seconds=0: time.struct_time((2026, 2, 3, 4, 5, 6, 1, 34, 0)))
    moment = botocore.auth.get_current_datetime().replace(2026, 2, 3, 4, 5, 6)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: moment)
    keys = ReadOnlyCredentials("AKID", "se/cret", token)
    path = f"/bucket/{percent_encode(key, safe='/~')}"
    request = AWSRequest(method, f"http://s3.example.org:9000{path}", headers, body)
    S3SigV4Auth(keys, "s3", "eu-central-1").add_auth(request)
    digest = botocore.auth.sha256(body).hexdigest()
    whole = {"host": "s3.example.org:9000", **headers}
    signer = Signer("eu-central-1")
    for _ in range(2):
        ours = signer.sign(keys, method, path, whole, digest)
        assert ours["authorization"] == request.headers["Authorization"]
    assert {name.lower(): value for name, value in request.headers.items()} | {"host": whole["host"]} == ours
    signer.sign(ReadOnlyCredentials("AKID", "rotated", token), method, path, whole, digest)
    assert signer.sign(keys, method, path, whole, digest) == ours


def test_the_digest_of_nothing() -> None:
    assert botocore.auth.EMPTY_SHA256_HASH == EMPTY


# ------------------------------------------------------------------------------------------------ servers


@dataclass
class Script:
    """A server that answers each request with what `answer` makes of its number, and notes the requests' heads."""

    answer: Callable[[int], bytes | None]
    """None hangs up."""
    reads: int | None = None
    """Bytes of a body that are read before it answers; None reads it whole."""
    stays: bool = True
    """Waits for another request after an answer."""
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            while head := "".join(line.decode() for line in takewhile(bytes.strip, reader)):
                length = next(
                    (int(line[16:]) for line in head.lower().split("\r\n") if line[:16] == "content-length: "), 0
                )
                reader.read(length if self.reads is None else min(length, self.reads))
                self.heads.append(head)
                answer = self.answer(len(self.heads))
                if answer is None:
                    return
                with suppress(ConnectionError):
                    connection.sendall(answer)
                if not self.stays or (self.reads is not None and length > self.reads):
                    return


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., tuple[Script, S3]]]:
    """Starts a server and connects to it."""
    running: list[tuple[Script, S3]] = []

    def start(
        answer: Callable[[int], bytes | None], reads: int | None = None, stays: bool = True, **fields: Any
    ) -> tuple[Script, S3]:
        server = Script(answer, reads, stays)
        threading.Thread(target=server.run, daemon=True).start()
        settings = {
            "endpoint": f"http://127.0.0.1:{server.port}",
            "path_style": True,
            "credentials_dir": keys_folder(tmp_path / "keys"),
            **fields,
        }
        opened = connect(Connection(**settings), patience=1)
        running.append((server, opened))
        return server, opened

    yield start
    for server, opened in running:
        opened.close()
        server.listener.close()


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + "content",
        "HTTP/1.1 100 Continue\r\n\r\n" + HEAD + "content",
        HEAD.replace("\r\n", "\n") + "content",
        HEAD.replace("OK", ""),
        "HTTP/1.1 200 OK\r\nX-Long: " + "x" * 40_000 + "\r\ncontent-length:7\r\n\r\ncontent",
    ],
    ids=["plain", "continue", "bare newlines", "no reason", "long head"],
)
def test_answers_that_are_read(script: Callable[..., tuple[Script, S3]], answer: str) -> None:
    whole = answer if answer.endswith("content") else answer + "content"
    server, s3 = script(lambda _: whole.encode())
    for _ in range(3):
        assert s3.get_object("s3://bucket/x") == b"content"
    assert len(server.heads) == 3
    assert server.connections == 1, "the connection stays"


@pytest.mark.parametrize(
    "answer",
    [HEAD.replace("\r\n\r\n", "\r\nConnection: Close\r\n\r\n"), HEAD.replace("HTTP/1.1", "HTTP/1.0")],
    ids=["close", "1.0"],
)
def test_connections_that_do_not_stay(script: Callable[..., tuple[Script, S3]], answer: str) -> None:
    server, s3 = script(lambda _: (answer + "content").encode())
    for _ in range(3):
        assert s3.get_object("s3://bucket/x") == b"content"
    assert server.connections == len(server.heads) == 3


def test_a_connection_that_was_closed_meanwhile_is_not_used_again(script: Callable[..., tuple[Script, S3]]) -> None:
    server, s3 = script(lambda number: (HEAD + "content").encode() if number != 2 else None)
    assert s3.get_object("s3://bucket/x") == b"content"
    assert s3.get_object("s3://bucket/x") == b"content", "asked again when it is hung up on"
    assert server.connections == 2


def test_who_forgets_to_close_leaves_no_socket_behind(script: Callable[..., tuple[Script, S3]], tmp_path: Path) -> None:
    server, _ = script(lambda _: (HEAD + "content").encode())
    place = {"endpoint": f"http://127.0.0.1:{server.port}", "path_style": True}
    forgotten: S3 | None = connect(Connection(**place, credentials_dir=keys_folder(tmp_path / "keys")))
    assert forgotten is not None
    forgotten.get_object("s3://bucket/x")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        forgotten = None
        gc.collect()
    assert [str(each.message) for each in said if each.category is ResourceWarning] == []


def test_what_is_not_of_the_simplest_form_is_left_to_botocore(script: Callable[..., tuple[Script, S3]]) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    server, s3 = script(lambda _: chunked)
    s3.put_object("s3://bucket/x", b"content")
    s3.put_object("s3://bucket/x", b"content")
    assert len(server.heads) == 3, "once each way, then botocore's at once"
    assert "Boto" not in server.heads[0]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"nonsense\r\n\r\n", StorageUnreachable),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", StorageUnreachable),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 20_000, StorageUnreachable),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, StorageUnreachable),
        (HEAD.encode() + b"con", ShortRead),
    ],
    ids=["nonsense", "no status", "endless head", "endless line", "short"],
)
def test_answers_that_are_none(script: Callable[..., tuple[Script, S3]], answer: bytes, error: type[Exception]) -> None:
    _, s3 = script(lambda _: answer, stays=False)
    with pytest.raises(error, match="s3://bucket/x: "):
        s3.get_object("s3://bucket/x")


def test_a_body_that_is_refused_before_it_is_read(script: Callable[..., tuple[Script, S3]]) -> None:
    refusal = b"<Error><Code>AccessDenied</Code></Error>"
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(refusal)}\r\n\r\n".encode()
    _, s3 = script(lambda _: head + refusal, 1000)
    with pytest.raises(AccessDenied, match="s3://bucket/x: the keys may not put this"):
        s3.put_object("s3://bucket/x", bytes(16 << 20))


def test_where_a_bucket_is(tmp_path: Path) -> None:
    def where(**fields: Any) -> tuple[str, str, str]:
        with connect(Connection(credentials_dir=keys_folder(tmp_path / "keys"), **fields)) as opened:
            base = opened._direct._base("bucket")
        assert base is not None
        return base.origin.url, base.host, base.path

    amazon = "bucket.s3.amazonaws.com"
    assert where() == (f"https://{amazon}:443", amazon, "/")
    path = "s3.eu-central-1.amazonaws.com"
    assert where(region="eu-central-1", path_style=True) == (f"https://{path}:443", path, "/bucket/")
    own = where(endpoint="http://[::1]:9000/prefix", path_style=True)
    assert own == ("http://[::1]:9000", "[::1]:9000", "/prefix/bucket/")


def test_region_and_session_token(script: Callable[..., tuple[Script, S3]], tmp_path: Path) -> None:
    server, s3 = script(lambda _: (HEAD + "content").encode(), region="eu-central-1")
    (tmp_path / "keys/AWS_SESSION_TOKEN").write_text("a token\n")
    assert s3.get_object("s3://bucket/a/ä") == b"content"
    lines = server.heads[0].split("\r\n")
    assert lines[0] == "GET /bucket/a/%C3%A4 HTTP/1.1"
    assert f"host: 127.0.0.1:{server.port}" in lines
    assert "x-amz-security-token: a token" in lines
    assert "/eu-central-1/s3/aws4_request" in server.heads[0]


def test_no_keys_no_signature(script: Callable[..., tuple[Script, S3]]) -> None:
    server, s3 = script(lambda _: (HEAD + "content").encode(), anonymous=True)
    assert s3.get_object("s3://bucket/x") == b"content"
    assert "authorization" not in server.heads[0].lower()
    assert "x-amz" not in server.heads[0].lower()
