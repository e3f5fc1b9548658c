"""A hub of our own on this machine: the few answers of the hub's HTTP interface that a download or an upload asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

COMMIT: Final = "1" * 40


@contextmanager
def serving(models: Mapping[str, Mapping[str, bytes]], *, gated: str = "") -> Iterator[tuple[str, list[str]]]:
    """(address, names of the files that were fetched) of a server with `models`: id to file name to content.

    A repository that is made and filled is in `models` afterwards, which then must be mutable. Only the token "writer" may.
    """
    fetched: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            api = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([\w.-]+))?", path)
            file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
            name = api[1] if api else file[1] if file else ""
            if not name:
                self.answer(404, b"{}")
            elif name == gated:
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif name not in models:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif api and api[3] not in (None, "main", COMMIT):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif api and api[2] == "tree":
                entries = [self.entry(path, content) for path, content in models[name].items()]
                self.answer(200, json.dumps(entries).encode())
            elif api:
                siblings = [{"rfilename": file} for file in models[name]]
                self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            else:
                assert file
                content = models[name][file[3]]
                if self.command == "GET":
                    fetched.append(file[3])
                self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            call = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/([\w.-]+)", self.path.partition("?")[0])
            if self.headers.get("Authorization") != "Bearer writer":
                self.answer(401, b'{"error": "Invalid username or password."}')
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                assert isinstance(models, dict)
                models.setdefault(name, {})
                self.answer(200, json.dumps({"url": f"http://{self.headers['Host']}/{name}", "name": name}).encode())
            elif call and call[2] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
                self.answer(200, json.dumps({"files": files}).encode())
            else:
                assert call
                entries = [json.loads(line) for line in body.splitlines()]
                files = {entry["value"]["path"]: entry["value"] for entry in entries if entry["key"] == "file"}
                models[call[1]] = {path: base64.b64decode(file["content"]) for path, file in files.items()}  # type: ignore[index]
                url = f"http://{self.headers['Host']}/{call[1]}/commit/{COMMIT}"
                self.answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())

        def entry(self, path: str, content: bytes) -> dict[str, object]:
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
