"""A small OpenAI-compatible HTTP server that misbehaves on purpose, in ways that a test scripts beforehand."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = {"data": [{"id": "scripted", "owned_by": "someone"}]}


class MisbehavingServer(ThreadingHTTPServer):
    """Answers each prompt with `n` responses after doing, in turn, what `script` names for that prompt.

    "500", "400" and other numbers are answered with that status, "hang" with nothing until the server is closed,
    "half" with half of the JSON, "lie" with fewer bytes than announced, "close" by closing the connection, "odd" with
    responses that hold none, "few" with one response too few, "abort" with responses cut off as by a pause of vLLM;
    `api_key` is asked of every request.
    """

    daemon_threads = True

    def __init__(self, script: tuple[str, ...] = (), api_key: str | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.api_key = script, api_key
        self.seen: Counter[str] = Counter()
        self.in_flight, self.most_in_flight = 0, 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def __enter__(self) -> "MisbehavingServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MisbehavingServer

    def do_GET(self) -> None:
        self.answer(200, MODELS) if self.allowed() else self.answer(401, {"error": {"message": "wrong key"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            self.answer(401, {"error": {"message": "wrong key"}})
            return
        server, prompt = self.server, json.dumps(body["messages"])
        with server.lock:
            step = server.seen[prompt]
            server.seen[prompt] += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        self.act(server.script[step] if step < len(server.script) else "answer", body)
        with server.lock:
            server.in_flight -= 1

    def act(self, action: str, body: dict) -> None:
        said = body["messages"][-1]["content"]
        count = body["n"] - (action == "few")
        reason = "abort" if action == "abort" else "stop"
        choices = [{"index": i, "message": {"content": f"{said}, {i}"}, "finish_reason": reason} for i in range(count)]
        if action.isdigit():
            self.answer(int(action), {"error": {"message": f"the server says {action}"}})
        elif action == "odd":
            self.answer(200, {"choices": [{"index": i, "message": None} for i in range(count)]})
        elif action == "hang":
            self.server.closing.wait()
        elif action == "half":
            self.answer(200, {"choices": choices}, cut=True)
        elif action == "lie":
            self.send_response(200)
            self.send_header("Content-Length", "10000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif action == "close":
            self.close_connection = True
        else:
            self.answer(200, {"choices": choices[::-1]})

    def allowed(self) -> bool:
        key = self.server.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def answer(self, status: int, content: dict, cut: bool = False) -> None:
        data = json.dumps(content).encode()
        data = data[: len(data) // 2] if cut else data
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing on the test's terminal."""
