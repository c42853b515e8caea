"""HTTP for the demo page: its files, the models, jobs and their events. The standard library's
server; nothing is asked of any other host.

=======================  ===========================================================
GET  /                   the page; /page.css, /page.js, ... beside it
GET  /api/models         the models that can be used
GET  /api/order?...      an order: grid, n, schedule, layout
POST /api/generate       parameters as JSON -> name of a job; /api/edit likewise
GET  /api/jobs/NAME      the job's events, as server-sent events
GET  /api/files/NAME/F   a file that the job made
=======================  ===========================================================
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from autoregressive.sample.page.jobs import Job, Jobs

FOLDER = Path(__file__).parent
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE = {f"/{p.name}": p for p in FOLDER.iterdir() if p.suffix in TYPES}
LARGEST_REQUEST = 12 << 20  # bytes
CONNECTIONS = 64  # at once
READING = 4  # requests at once whose content is read and checked
SECONDS = 30  # for the content of a request
LOCAL = ("127.0.0.1", "::1", "localhost")
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"


class PageServer(ThreadingHTTPServer):
    """Serves the page. looks: path -> answer of a query; works: path -> work of a request."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        looks: Mapping[str, Callable[[dict[str, str]], Any]],
        works: Mapping[str, Callable[[dict[str, Any]], Callable[[Job], None]]],
    ):
        super().__init__(address, Handler)
        self.looks, self.works, self.jobs = looks, works, Jobs()
        self.connections = threading.BoundedSemaphore(CONNECTIONS)
        self.reading = threading.BoundedSemaphore(READING)

    @property
    def url(self) -> str:
        """Address to open in a browser."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread of its own, if there are not too many."""
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of visitors who leave early."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte

    def is_foreign(self) -> bool:
        """Refuse requests in the name of another site, to which a visitor's browser may be led."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.server.server_address[0] in LOCAL and host not in LOCAL:
            self._fail("this page is on 127.0.0.1", 403)
            return True
        return False

    def do_GET(self) -> None:
        """Answer with a file of the page, JSON, events, or a file of a job."""
        if self.is_foreign():
            return
        url = urlsplit(self.path)
        path = "/index.html" if url.path == "/" else url.path
        parts = path.strip("/").split("/")
        if path in PAGE:
            self._answer(PAGE[path].read_bytes(), TYPES[PAGE[path].suffix])
        elif path in self.server.looks:
            query = {k: v[-1] for k, v in parse_qs(url.query).items()}
            self._try(lambda: self._json(self.server.looks[path](query)))
        elif parts[:2] == ["api", "jobs"] and len(parts) == 3:
            self._events(self.server.jobs.find(parts[2]))
        elif parts[:2] == ["api", "files"] and len(parts) == 4:
            job = self.server.jobs.find(parts[2])
            file = job.files.get(parts[3]) if job else None
            if file is None:
                self._fail("there is no such file; jobs are forgotten after a while", 404)
            else:
                self._answer(file[1], file[0], parts[3])
        else:
            self._fail("there is no such page", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Queue a job; the answer is its name."""
        length = self.headers.get("Content-Length", "")
        self.close_connection = True  # what is refused is not read
        if self.is_foreign():
            return
        if self.headers.get_content_type() != "application/json":
            self._fail("expected application/json", 415)
        elif not length.isdigit():
            self._fail("expected a Content-Length", 411)
        elif int(length) > LARGEST_REQUEST:
            self._fail(f"at most {LARGEST_REQUEST >> 20} MiB can be sent", 413)
        elif self.path not in self.server.works:
            self._fail("there is no such page", 404)
        elif not self.server.reading.acquire(blocking=False):
            self._fail("too many requests at once; try again", 503)
        else:
            try:
                body = self._read(int(length))
                self.close_connection = False
                self._try(lambda: self._queue(body))
            finally:
                self.server.reading.release()

    def _read(self, length: int) -> bytes:
        """Read the content of a request; ``TimeoutError`` if it comes too slowly."""
        parts, started = [], time.monotonic()
        while length > 0 and (part := self.rfile.read1(length)):
            parts.append(part)
            length -= len(part)
            if time.monotonic() - started > SECONDS:
                raise TimeoutError
        return b"".join(parts)

    def _queue(self, body: bytes) -> None:
        try:
            parameters = json.loads(body)
        except (ValueError, RecursionError):
            parameters = None
        if not isinstance(parameters, dict):
            raise ValueError("the request is not a JSON object")
        work = self.server.works[self.path](parameters)
        self._json({"job": self.server.jobs.add(Job(work)).name})

    def _events(self, job: Job | None) -> None:
        if job is None:
            self._fail("there is no such job", 404)
            return
        self.close_connection = True  # its end is the end of the answer
        self._start(HTTPStatus.OK, "text/event-stream", None)
        try:
            for event in job.watch():
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        except OSError:  # nobody looks any more
            job.cancelled = True

    def _try(self, answer: Callable[[], None]) -> None:
        try:
            answer()
        except ValueError as error:
            self._fail(str(error), 400)

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), "application/json")

    def _fail(self, message: str, status: int) -> None:
        content = json.dumps({"error": message}).encode()
        self._answer(content, "application/json", status=HTTPStatus(status))

    def _answer(
        self,
        content: bytes,
        kind: str,
        download: str | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self._start(status, kind, len(content), download)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _start(
        self, status: HTTPStatus, kind: str, length: int | None, download: str | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if "text" in kind else kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if download:
            self.send_header("Content-Disposition", f'attachment; filename="{download}"')
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""
