"""A W&B server for tests: it answers the real client's questions, refuses its key, or says nothing."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VIEWER = {"id": "1", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}
SAVED = {"upsertView": {"view": {"id": "view", "name": "nw-1"}, "inserted": True}}


@contextlib.contextmanager
def wandb_server(
    *, refuses: bool = False, stalls: bool = False
) -> Iterator[tuple[str, list[dict]]]:
    """Its address, and the GraphQL requests it has received. One that stalls takes them and says nothing."""
    received: list[dict] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = json.loads(body)
            received.append(request)
            if stalls:
                ended.wait()
            elif refuses:
                self._say(401, {"errors": [{"message": "permission denied"}]})
            elif "upsertView" in request.get("query", ""):
                self._say(200, {"data": SAVED})
            else:
                self._say(200, {"data": {"viewer": VIEWER, "serverInfo": {}}})

        def do_GET(self) -> None:
            self._say(404, {})

        def _say(self, status: int, answer: dict) -> None:
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
