"""A Hugging Face hub of the tests' own: repositories in memory that are uploaded to and downloaded from."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants

MAIN = "0123456789abcdef0123456789abcdef01234567"
"""The commit that every repository is at."""


class FakeHub(BaseHTTPRequestHandler):
    """What `create_repo`, `upload_folder` and `snapshot_download` ask of the hub."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._get(body=False)

    def do_GET(self):
        self._get(body=True)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repositories, path = self.server.repositories, self.path.partition("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            repositories.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            self.server.validated.append(json.loads(content))
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(content)["files"]]  # fmt: skip
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in content.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    data = base64.b64decode(item["value"]["content"])
                    repositories[match[1]][item["value"]["path"]] = data
            self._json(
                {
                    "commitUrl": f"{self.server.address}/{match[1]}/commit/{MAIN}",
                    "commitOid": MAIN,
                    "success": True,
                }
            )
        else:
            self._json({"error": "not found"}, 404)

    def _get(self, *, body):
        repositories, path = self.server.repositories, self.path.partition("?")[0]
        if match := re.fullmatch(rf"/api/models/([^/]+/[^/]+)(?:/revision/(?:main|{MAIN}))?", path):
            if match[1] in repositories:
                return self._json({"id": match[1], "sha": MAIN, "siblings": []})
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if (match := re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/(?:main|{MAIN})", path)) and match[
            1
        ] in repositories:
            return self._json([
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in repositories[match[1]].items()
            ])  # fmt: skip
        match = re.fullmatch(rf"/([^/]+/[^/]+)/resolve/(?:main|{MAIN})/(.+)", path)
        if match and match[2] in repositories.get(match[1], {}):
            data = repositories[match[1]][match[2]]
            headers = {"X-Repo-Commit": MAIN, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            return self._send(200, data, headers, body=body)
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": MAIN}, body=body)

    def _json(self, content, status=200, headers=None):
        self._send(
            status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, status, data, headers, *, body=True):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextmanager
def fake_hub(monkeypatch, cache) -> Iterator[ThreadingHTTPServer]:
    """The hub, in place of the real one; `cache` is the empty folder of downloads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.repositories, server.validated = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    huggingface_hub.close_session()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()
