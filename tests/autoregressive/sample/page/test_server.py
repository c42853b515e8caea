"""HTTP of the demo page: what is served, refused and queued."""

import json
import socket
import threading
import urllib.error
import urllib.request

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


def fetch(server, path: str, data: bytes | None = None) -> tuple[int, bytes, dict]:
    request = urllib.request.Request(server.url.rstrip("/") + path, data)
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


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b'{"name": "nobody"}'])
def test_bad_requests_get_one_line(server, body):
    status, content, _ = fetch(server, "/api/greet", body)
    assert status == 400 and json.loads(content)["error"]


@pytest.mark.parametrize("length", [str(LARGEST_REQUEST + 1), "x", "-1"])
def test_requests_that_are_too_large_are_not_read(server, length):
    with socket.create_connection(server.server_address) as connection:
        head = f"POST /api/greet HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
