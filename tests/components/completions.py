"""A server that speaks OpenAI's chat completions on loopback, as well or as badly as a test wants."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from components.interpretation.explanations.endpoint import Endpoint

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Completions

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body))
        self.server.reply(number, body)(self, body)

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def say(self, text: Any, usage: Any = None) -> None:
        tree = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}
        self.server.answered.append(usage)
        self.send(200, json.dumps(tree).encode())


class Completions(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answered: list[Any] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Completions]:
    server = Completions(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def usage(body: dict[str, Any], per_token: int = 4, written: int = 20) -> dict[str, int]:
    size = sum(len(message["content"].encode()) for message in body["messages"])
    return {"prompt_tokens": size // per_token, "completion_tokens": written}


def sensible(_number: int, _body: dict[str, Any]) -> Reply:
    """Takes a feature for its most frequent token, and judges texts by whether that is in them, and is what is marked."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        question, given = (message["content"] for message in body["messages"])
        handler.say(_answer(question, given), usage(body))

    return reply


def _answer(question: str, given: str) -> str:
    if "EXPLANATION" in question:
        listed = [
            token
            for line in re.findall(r"^Strengths: (.*)$", given, re.M)
            for token in re.findall(r'("(?:[^"\\]|\\.)*") \d+', line)
        ]
        return f"Let me see.\nEXPLANATION: fires on {Counter(listed).most_common(1)[0][0]}"
    if "does not belong" in question:
        marked = [
            [one.strip() for one in re.findall(r"<<(.*?)>>", text, re.S)]
            for text in re.split(r"(?:^|\n\n)Text \d+: ", given)[1:]
        ]
        common = Counter(one for some in marked for one in set(some)).most_common(1)[0][0]
        return str([next((number for number, some in enumerate(marked, 1) if common not in some), 1)])
    description, _, texts = given.partition("\n\n")
    token = json.loads(description.partition(" fires on ")[2])
    some = re.split(r"(?:^|\n\n)Text \d+: ", texts)[1:]
    if "from 0 to 3" in question:
        return str([3 if any(token.strip() in part for part in re.findall(r"<<(.*?)>>", text, re.S)) else 1 for text in some])
    if "marked" in question:
        return str([int(any(token.strip() in part for part in re.findall(r"<<(.*?)>>", text, re.S))) for text in some])
    return f"Sure: {[int(token.strip() in text) for text in some]}"


slept: list[float] = []
"""What the last `quick` endpoint would have waited, in seconds."""


def quick(base: str, model: str, key: str | None, timeout: float = 2.0, attempts: int = 3) -> Endpoint:
    slept.clear()
    return Endpoint(base, model, key, timeout, attempts, sleep=slept.append)
