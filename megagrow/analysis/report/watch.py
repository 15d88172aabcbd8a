"""Local HTTP server of the page of a report, which follows runs while they train."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from megagrow.analysis.metrics_tail import MetricsTail
from megagrow.analysis.report.content import make_report
from megagrow.analysis.report.page import live_page, render_content, render_problem
from megagrow.analysis.report.plots import plot_sections
from megagrow.errors import InputError, ResourceError
from megagrow.train.reporting.metrics import METRICS_FILE

RENDER_SECONDS = 3.0
"""Minimum time between two renderings; each takes about a second of one core."""
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LiveReport:
    """Content of the page of runs that train; thread-safe.

    Args:
        directories: run directories.
        pause: minimum seconds between two renderings.
    """

    def __init__(self, directories: Sequence[Path], pause: float = RENDER_SECONDS) -> None:
        self._tails = {path: MetricsTail(path / METRICS_FILE) for path in directories}
        self._pause = pause
        self._lock = threading.Lock()
        self._next = 0.0
        self._version, self._content = 0, ""

    def content(self) -> tuple[str, str]:
        """Return the version and the HTML fragment of the current report, or of its error."""
        with self._lock:
            if time.monotonic() >= self._next:
                self._update()
                self._next = time.monotonic() + self._pause
            return f'"{self._version}"', self._content

    def _update(self) -> None:
        try:
            changed = [tail.poll() for tail in self._tails.values()]
            if not any(changed) and self._content:
                return
            content = self._render()
        except InputError as error:
            content = render_problem(str(error))
        if content != self._content:
            self._version += 1
            self._content = content

    def _render(self) -> str:
        report = make_report((path, tail.records) for path, tail in self._tails.items())
        return render_content(report, list(plot_sections(report)))


class WatchServer(ThreadingHTTPServer):
    """HTTP server of a `LiveReport`.

    Raises ResourceError if the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, report: LiveReport) -> None:
        self.report = report
        self.is_local = _is_loopback(host)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"{host}:{port}: the page cannot be served there ({error}); "
                "choose another --port or --host"
            ) from error

    @property
    def url(self) -> str:
        """Address of the page."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def serve(self) -> None:
        """Serve the page until the process is interrupted."""
        with self, suppress(KeyboardInterrupt):
            self.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    server_version, sys_version = "megagrow", ""

    def do_GET(self) -> None:
        """Answer a request for the page, its script or its content."""
        if not self._is_allowed():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "unknown host")
        elif self.path == "/live.js":
            script = files("megagrow.analysis.report") / "templates" / "live.js"
            self._answer(HTTPStatus.OK, "text/javascript", script.read_text(encoding="utf-8"))
        elif self.path == "/content":
            version, content = self.server.report.content()
            if self.headers.get("If-None-Match") == version:
                self._answer(HTTPStatus.NOT_MODIFIED, "text/html", "", ETag=version)
            else:
                self._answer(HTTPStatus.OK, "text/html", content, ETag=version)
        elif self.path == "/":
            _, content = self.server.report.content()
            self._answer(HTTPStatus.OK, "text/html", live_page(content))
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "not found")

    def _is_allowed(self) -> bool:
        """Return False for a foreign host name: DNS rebinding by a web page."""
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        return not self.server.is_local or _is_loopback(name.strip("[]"))

    def _answer(self, status: HTTPStatus, kind: str, text: str, **headers: str) -> None:
        body = text.encode("utf-8")
        with suppress(ConnectionError):  # closed by the browser
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            if status is not HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Length", str(len(body)))
            for name, value in (SECURITY_HEADERS | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
