"""The live page: its server over HTTP, and its script in a browser."""

import http.client
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagrow.analysis.report.watch import LiveReport, WatchServer
from megagrow.errors import ResourceError

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
STAGES = [(20, 1000), (30, 4000, 1e8)]


class Writing(LiveReport):
    """The report of a run whose first lines are there; the others come with the third request."""

    def __init__(self, folder: Path) -> None:
        super().__init__([folder], pause=0.0)
        self.path, self.requests = folder / "metrics.jsonl", 0
        self.lines = self.path.read_text().splitlines(keepends=True)
        self.path.write_text("".join(self.lines[:20]))

    def content(self) -> tuple[str, str]:
        self.requests += 1
        if self.requests == 3:
            self.path.write_text("".join(self.lines))
        return super().content()


@contextmanager
def serving(report: LiveReport) -> Iterator[WatchServer]:
    with WatchServer("127.0.0.1", 0, report) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: WatchServer, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET", path, headers=names)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.headers)


def test_the_content_follows_the_run(make_run: Callable[..., Path]) -> None:
    with serving(Writing(make_run("live", STAGES))) as server:
        status, page, headers = get(server, "/")
        assert status == 200 and "live is not finished: step 18 of 50." in page
        assert '<meta http-equiv="refresh" content="10">' in page
        assert "script-src 'self'" in headers["Content-Security-Policy"]
        status, first, headers = get(server, "/content")
        assert status == 200 and first in page
        status, later, changed = get(server, "/content", If_None_Match=headers["ETag"])
        assert status == 200 and "not finished" not in later
        assert get(server, "/content", If_None_Match=changed["ETag"])[0] == 304
        assert "fetch(" in get(server, "/live.js")[1]
        assert get(server, "/metrics.jsonl")[0] == get(server, "/../content")[0] == 404


def test_a_run_without_records_shows_the_reason(tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    run.mkdir()
    with serving(LiveReport([run], pause=0.0)) as server:
        text = get(server, "/content")[1]
        assert "&lt;b&gt;run/metrics.jsonl: no such file; wait until the run has started" in text


def test_foreign_host_names_are_refused(make_run: Callable[..., Path]) -> None:
    with serving(LiveReport([make_run("live", STAGES)])) as server:
        assert get(server, "/live.js", Host="evil.example:8765")[0] == 403
        for host in ("localhost:8765", "localhost", "127.0.0.1", "[::1]:80"):
            assert get(server, "/live.js", Host=host)[0] == 200, host


def test_a_port_in_use_is_an_error(tmp_path: Path) -> None:
    with serving(LiveReport([tmp_path])) as server:
        port = server.server_port
        with pytest.raises(ResourceError, match=f"127.0.0.1:{port}: .* choose another --port"):
            WatchServer("127.0.0.1", port, LiveReport([tmp_path]))


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_shows_the_new_records(make_run: Callable[..., Path], tmp_path: Path) -> None:
    assert BROWSER is not None
    with serving(Writing(make_run("live", STAGES))) as server:
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000"]
        done = subprocess.run([*command, server.url], capture_output=True, text=True, timeout=120)
    assert "updated " in done.stdout.split('id="state"')[1]
    assert "<title>live</title>" in done.stdout
    assert "Final validation loss of live" in done.stdout
    assert "not finished" not in done.stdout
