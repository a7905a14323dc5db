"""A web server on this machine, for tests of files that are elsewhere."""

import contextlib
import http.server
import pathlib
import re
import threading
from collections.abc import Iterator


class _Handler(http.server.BaseHTTPRequestHandler):
    server: "Web"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        web, path = self.server, self.server.root / self.path.partition("?")[0].strip("/")
        web.asked.append((self.command, self.path))
        if path.is_dir():
            content = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in path.iterdir()).encode()
            return self._send(200, content, {"Content-Type": "text/html"}, with_body)
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        headers = {"Last-Modified": self.date_time_string(int(path.stat().st_mtime))} if web.has_dates else {}
        if not web.has_ranges or "Range" not in self.headers:
            return self._send(200, content, headers, with_body)
        begin, end = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = content[int(begin) : int(end) + 1]
        headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"
        return self._send(206, part, headers, with_body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            if self.server.cuts_left and len(content) > 200:
                self.server.cuts_left -= 1
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)


class Web(http.server.ThreadingHTTPServer):
    """Serves `root`; `url` is where. `cuts_left` long answers will end amid their bytes."""

    daemon_threads = True

    def __init__(self, root: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.has_ranges, self.has_dates, self.cuts_left = root, True, True, 0
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serve(root: pathlib.Path) -> Iterator[Web]:
    with Web(root) as web:
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield web
        finally:
            web.shutdown()
            thread.join()
