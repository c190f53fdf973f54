"""The pages served on this machine, live while a sweep runs: read-only, for this machine alone."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import unquote

from lora_lab.registry import WrongInput
from lora_lab.report import page
from lora_lab.report.live import Live
from lora_lab.store import Store

HOST = "127.0.0.1"
"""The address that is served: nothing outside of this machine reaches it."""
LONGEST = 400
"""Characters of a path."""
PART = re.compile(r"/data/([a-z]+(?:/[0-9a-f+]{1,64})?)\.json")
FIGURE = re.compile(r"/data/claim/([A-Za-z0-9_]{1,80})\.png")

HEADERS = {
    "Content-Security-Policy": page.policy(served=True) + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, but asked for each time: what has not changed costs no bytes.
    "Cache-Control": "no-cache",
}


class Pages(BaseHTTPRequestHandler):
    """Answers GET and HEAD of a few paths; `live` is what it tells of."""

    live: Live
    protocol_version = "HTTP/1.1"
    server_version = "lora_lab"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """Send what stands under the path."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Send the headers of what stands under the path."""
        self._answer(body=False)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # every other method
            return lambda: self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
        raise AttributeError(name)

    def _answer(self, body: bool) -> None:
        port = cast(Server, self.server).port
        # Another name for this machine is how a page from elsewhere would read this one.
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self._refuse(HTTPStatus.FORBIDDEN, f"only as http://{HOST}:{port}")
        try:
            found = self._find(unquote(self.path.partition("?")[0])[:LONGEST])
        except WrongInput as error:
            return self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        if found is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")
        data, kind = found
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            return self._send(HTTPStatus.NOT_MODIFIED, b"", {"ETag": tag}, body=False)
        headers = {"ETag": tag, "Content-Type": f"{kind}; charset=utf-8"}
        return self._send(HTTPStatus.OK, data, headers, body)

    def _find(self, path: str) -> tuple[bytes, str] | None:
        """What stands under a path and its type; paths are no files."""
        if path == "/":
            return page.served().encode(), "text/html"
        if path == "/plotly.js":
            return page.plotly().encode(), "text/javascript"
        if named := PART.fullmatch(path):
            data = self.live.part(named[1])
            return None if data is None else (data, "application/json")
        if named := FIGURE.fullmatch(path):
            picture = self.live.figure(named[1])
            return None if picture is None else (picture, "image/png")
        return None

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        # What was sent with the request is not read: the connection ends.
        headers = {"Content-Type": "text/plain; charset=utf-8", "Connection": "close"}
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        self._send(status, f"{why}\n".encode(), headers, self.command != "HEAD")

    def _send(self, status: HTTPStatus, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (HEADERS | headers).items():
            self.send_header(name, value)
        if status is not HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a terminal full of polls helps nobody."""


class Server(ThreadingHTTPServer):
    """The pages of one results folder; a reader who leaves early is no error."""

    daemon_threads = True

    @property
    def port(self) -> int:
        """Where it listens on `HOST`."""
        return int(self.socket.getsockname()[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Errors of the connection pass, others are shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def server(store: Store, port: int = 0) -> Server:
    """A server that listens on 127.0.0.1; `serve_forever` starts it.

    Parameters
    ----------
    store : Store
        Only read.
    port : int
        0: any free one (`port` tells).

    Raises
    ------
    WrongInput
        Where the port is taken or may not be used.
    """
    pages = type("OwnPages", (Pages,), {"live": Live(store)})
    try:
        return Server((HOST, port), pages)
    except (OSError, OverflowError) as error:
        raise WrongInput(
            f"port {port} cannot be used ({error}); --port 0 takes a free one."
        ) from None
