"""`sae features open`: the feature browser, served from wherever it lies."""

from __future__ import annotations

import mimetypes
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated
from urllib.parse import quote, unquote, urlsplit

import typer

from flows.cli.line import checked
from flows.cli.terminal import Config, Overrides, command, terminal


def open_(
    config: Config = "quickstart",
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65_535)] = 0,
    launch: Annotated[bool, typer.Option(help="Open it in a web browser, too.")] = True,
) -> None:
    """Serve the pages of CONFIG's features on this machine, wherever they lie, and open them."""
    with command(False):
        from components import steps, storage
        from components.settings import UserError

        run = checked(config, overrides)
        address = steps.browser_address(run)
        if not storage.exists(address):
            raise UserError(f"sae: {run.sae_url} has no pages of its features yet; run `sae features make {config}`")
        root, name, *page = address.rsplit("/", 3)
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), pages_of(root))
        except OSError as error:
            raise UserError(f"--port: {port} cannot be listened on: {error.strerror}; 0 takes a free one") from error
        with server, suppress(KeyboardInterrupt):
            served = f"http://127.0.0.1:{server.server_address[1]}/{quote('/'.join([name, *page]))}"
            terminal(stderr=True).print(f"Features of {run.sae_url}: {served}  (Ctrl-C ends it)")
            if launch:
                typer.launch(served)
            server.serve_forever()


def pages_of(root: str) -> type[BaseHTTPRequestHandler]:
    """What answers with the browsers of the SAEs under `root`, local or `s3://`, and with nothing else: a page links those of
    earlier versions."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            from components import storage

            name = unquote(urlsplit(self.path).path).lstrip("/")
            match name.split("/"):
                case [_, "browser", _, *_] as parts if ".." not in parts:
                    pass
                case _:
                    return self.send_error(HTTPStatus.NOT_FOUND)
            try:
                content = storage.read_bytes(storage.join(root, name))
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
                return self.send_error(HTTPStatus.NOT_FOUND)
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", mimetypes.guess_type(name)[0] or "application/octet-stream")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Pages
