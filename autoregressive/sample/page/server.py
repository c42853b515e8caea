"""HTTP for the demo page: its files, the models, jobs and their events. The standard library's
server; nothing is asked of any other host.

=======================  ===========================================================
GET  /                   the page; /page.css, /page.js, ... beside it
GET  /api/models         the models that can be used
GET  /api/order?...      an order: grid, n, schedule
POST /api/generate       parameters as JSON -> name of a job; /api/edit likewise
GET  /api/jobs/NAME      the job's events, as server-sent events
GET  /api/files/NAME/F   a file that the job made
=======================  ===========================================================
"""

from __future__ import annotations

import json
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
LARGEST_REQUEST = 16 << 20  # bytes
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

    @property
    def url(self) -> str:
        """Address to open in a browser."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte

    def do_GET(self) -> None:
        """Answer with a file of the page, JSON, events, or a file of a job."""
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
        if not length.isdigit() or int(length) > LARGEST_REQUEST:
            self.close_connection = True  # what comes is not read
            self._fail(f"at most {LARGEST_REQUEST >> 20} MiB can be sent", 413)
        elif self.path not in self.server.works:
            self.rfile.read(int(length))
            self._fail("there is no such page", 404)
        else:
            body = self.rfile.read(int(length))
            self._try(lambda: self._queue(body))

    def _queue(self, body: bytes) -> None:
        try:
            parameters = json.loads(body)
        except ValueError:
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
            pass

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
