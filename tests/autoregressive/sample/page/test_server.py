"""HTTP of the demo page: what is served, refused and queued."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial

import pytest

from autoregressive.sample.page.server import FOLDER, LARGEST_REQUEST, PageServer


def greet(body: dict):
    if body.get("name") == "nobody":
        raise ValueError("name: expected somebody")

    def work(job) -> None:
        job.tell("hello", name=body["name"])
        job.files["a.txt"] = "text/plain", b"hello"

    return work


@pytest.fixture(scope="module")
def server():
    looks = {"/api/models": lambda query: {"asked": query}}
    with PageServer(("127.0.0.1", 0), looks, {"/api/greet": greet}) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def fetch(
    server, path: str, data: bytes | None = None, more: dict | None = None
) -> tuple[int, bytes, dict]:
    headers = {} if data is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url.rstrip("/") + path, data, headers | (more or {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_the_page_is_served_and_nothing_else(server):
    status, content, headers = fetch(server, "/")
    assert status == 200 and content == (FOLDER / "index.html").read_bytes()
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert fetch(server, "/page.js")[0] == 200
    for path in ("/server.py", "/../demo.py", "/%2e%2e/demo.py", "//etc/passwd", "/api/x"):
        status, content, _ = fetch(server, path)
        assert status == 404 and json.loads(content)["error"], path
    assert json.loads(fetch(server, "/api/models?a=1&a=2")[1]) == {"asked": {"a": "2"}}


def test_a_job_is_queued_told_and_its_file_fetched(server):
    name = json.loads(fetch(server, "/api/greet", b'{"name": "Ada"}')[1])["job"]
    _, content, headers = fetch(server, f"/api/jobs/{name}")
    events = [json.loads(line[6:]) for line in content.decode().split("\n\n") if line]
    assert headers["Content-Type"].startswith("text/event-stream")
    assert [e["event"] for e in events if e["event"] != "waiting"] == ["queued", "hello"]
    status, content, headers = fetch(server, f"/api/files/{name}/a.txt")
    assert (status, content) == (200, b"hello") and "a.txt" in headers["Content-Disposition"]
    assert fetch(server, f"/api/files/{name}/b.txt")[0] == 404
    assert fetch(server, "/api/jobs/guessed")[0] == 404


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b"[" * 10**5, b'{"name": "nobody"}'])
def test_bad_requests_get_one_line(server, body):
    status, content, _ = fetch(server, "/api/greet", body)
    assert status == 400 and json.loads(content)["error"]


@pytest.mark.parametrize(
    "length, status", [(str(LARGEST_REQUEST + 1), b"413"), ("x", b"411"), ("-1", b"411")]
)
def test_requests_that_are_too_large_are_not_read(server, length, status):
    with socket.create_connection(server.server_address) as connection:
        head = "POST /api/greet HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 " + status)


def test_pages_of_other_sites_cannot_ask(server):
    """A browser sends text/plain for any page, and JSON only for those of this address."""
    body = b'{"name": "Ada"}'
    assert fetch(server, "/api/greet", body, {"Content-Type": "text/plain"})[0] == 415
    for path, data in (("/api/greet", body), ("/api/models", None)):
        assert fetch(server, path, data, {"Host": "evil.example"})[0] == 403


def test_connections_are_counted(server, monkeypatch):
    monkeypatch.setattr(server, "connections", threading.BoundedSemaphore(1))
    connect = partial(socket.create_connection, server.server_address)
    with connect(), connect() as second:
        assert second.recv(10) == b""
    for _ in range(100):
        if server.connections.acquire(blocking=False):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a connection that has ended still counts")
    server.connections.release()
