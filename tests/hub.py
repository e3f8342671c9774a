"""A hub on this machine: the part of huggingface.co that lists, serves and accepts models and data sets.

`Hub(root)` serves the folders `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME` as they are at each request. The
commit of a folder is a hash of its files. Large files come from another host, as on the real hub. `gated` holds the
repositories that nobody may read. `log` holds every request with the size of its answer in bytes.
"""

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copyfile
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = {".arrow", ".bin", ".h5", ".jpg", ".parquet", ".png", ".safetensors", ".tar", ".zip"}
ME = {"type": "user", "name": "me", "fullname": "Me", "email": "me@example.org", "orgs": []}
PAGE = 50  # entries in one page of a listing
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted."}
KINDS = {"models": "", "datasets": "datasets/"}


class Answer(Exception):  # noqa: N818 - no error
    """The answer to a request: a status, a body, headers."""


class Hub:
    """The repositories under a folder, and the server's state."""

    def __init__(self, root: Path):
        self.root, self.gated, self.log, self.address = root, set(), [], ""
        (root / "large").mkdir(parents=True)

    def folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that uses this hub and a cache of its own."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return (
            inherited | own | {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_DISABLE_TELEMETRY": "1"} | more
        )

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        self.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield self
        server.shutdown()
        server.server_close()


def files_of(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def commit_of(folder: Path) -> str:
    return sha1(repr([(name, hash_of(path)) for name, path in files_of(folder).items()]).encode()).hexdigest()


def hash_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def blob_of(path: Path) -> str:
    """Git's own hash of a file."""
    content = path.read_bytes()
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entries_of(folder: Path, below: str = "", recursive: bool = True) -> list[dict[str, Any]]:
    """The files and folders in a folder of a repository, as a listing describes them."""
    entries = []
    for path in sorted((folder / below).rglob("*") if recursive else (folder / below).glob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            entries.append({"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name})
            continue
        entry = {"type": "file", "oid": blob_of(path), "size": path.stat().st_size, "path": name}
        if path.suffix in LARGE:
            entry["lfs"] = {"oid": hash_of(path), "size": entry["size"], "pointerSize": 130}
        entries.append(entry)
    return entries


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a client would wait 40 ms for the second
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            self.route(body)
            raise Answer(404, b"not found", {})
        except Answer as answer:
            status, content, headers = answer.args
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        length = len(content)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and span:
            first = int(span[1]) if span[1] else max(0, length - int(span[2]))
            last = min(int(span[2]) if span[1] and span[2] else length - 1, length - 1)
            status, content = (206, content[first : last + 1]) if first < length else (416, b"")
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{length}"}
        self.send_response(status)
        for name, value in {"Accept-Ranges": "bytes", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        sent = 0 if self.command == "HEAD" else self.wfile.write(content)
        self.hub.log.append((self.command, self.path, status, sent))

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def route(self, body: bytes) -> None:
        """Raises the `Answer` to this request."""
        address = urlsplit(self.path)
        path, query = unquote(address.path).strip("/"), parse_qs(address.query)
        if path == "":
            raise Answer(200, b"a hub", {})
        if match := re.fullmatch(r"large/(\w+)", path):
            file = self.hub.root / "large" / match[1]
            if self.command == "PUT":
                file.write_bytes(body)
            raise Answer(200, file.read_bytes() if self.command != "PUT" else b"", {"ETag": f'"{match[1]}"'})
        if path == "api/whoami-v2":
            raise Answer(200, ME, {}) if "Authorization" in self.headers else Answer(401, b"", {})
        if path == "api/validate-yaml":
            raise Answer(200, {"errors": [], "warnings": []}, {})
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            folder = self.hub.folder(f"{wanted.get('type') or 'model'}s", name)
            status = 409 if folder.exists() else 200
            folder.mkdir(parents=True, exist_ok=True)
            raise Answer(status, {"url": f"{self.hub.address}/{name}", "name": name}, {})
        if match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.large_files(json.loads(body))
        if match := re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            self.repository(*match.groups(), query, body)
        if match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file("datasets" if match[1] else "models", *match.groups()[1:])

    def find(self, kind: str, name: str, revision: str | None) -> tuple[Path, str]:
        """A repository's folder and commit."""
        folder = self.hub.folder(kind, name)
        if not folder.is_dir():  # without a token the hub does not say whether a repository exists
            has_token = "Authorization" in self.headers
            headers = {"X-Error-Code": "RepoNotFound"} if has_token else {}
            raise Answer(404 if has_token else 401, {"error": "Invalid username or password."}, headers)
        commit = commit_of(folder)
        if revision not in (None, "main", commit):
            raise Answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return folder, commit

    def repository(self, kind: str, name: str, call: str | None, revision: str | None, below: str | None, query: dict,
                   body: bytes) -> None:  # fmt: skip
        folder, commit = self.find(kind, name, revision)
        if call in (None, "revision"):
            siblings = [{"rfilename": file} for file in files_of(folder)]
            gated = "auto" if name in self.hub.gated else False
            info = {"_id": "0" * 24, "id": name, "sha": commit, "private": False, "gated": gated, "tags": []}
            raise Answer(200, info | {"siblings": siblings, "downloads": 0, "likes": 0, "disabled": False}, {})
        if call == "tree":
            if not (folder / (below or "")).is_dir():
                raise Answer(404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
            recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
            entries, start = entries_of(folder, below or "", recursive), int(query.get("cursor", ["0"])[0])
            page = f"{self.hub.address}/api/{kind}/{name}/tree/{revision}/{below or ''}".rstrip("/")
            link = f'<{page}?recursive={recursive}&cursor={start + PAGE}>; rel="next"'
            raise Answer(200, entries[start : start + PAGE], {"Link": link} if start + PAGE < len(entries) else {})
        if call == "paths-info":
            form = body.startswith(b"{")
            paths = json.loads(body)["paths"] if form else parse_qs(body.decode()).get("paths", [])
            wanted = [path.strip("/") for path in ([paths] if isinstance(paths, str) else paths)]
            raise Answer(200, [entry for entry in entries_of(folder) if entry["path"] in wanted], {})
        if call == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if Path(file["path"]).suffix in LARGE else "regular"}
                     for file in files]  # fmt: skip
            raise Answer(200, {"files": modes}, {})
        if call == "commit":
            self.commit(folder, [json.loads(line) for line in body.splitlines()])
            commit = commit_of(folder)
            place = f"{self.hub.address}/{KINDS[kind]}{name}/commit/{commit}"
            raise Answer(200, {"success": True, "commitOid": commit, "commitUrl": place}, {})

    def commit(self, folder: Path, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            target = folder / value.get("path", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                copyfile(self.hub.root / "large" / value["oid"], target)
            elif operation["key"] == "deletedFile":
                target.unlink()

    def large_files(self, request: dict[str, Any]) -> None:
        objects = []
        for wanted in request["objects"]:
            place = {"upload": {"href": f"{self.hub.address}/large/{wanted['oid']}"}}
            is_stored = (self.hub.root / "large" / wanted["oid"]).exists()
            objects.append(wanted if is_stored else wanted | {"actions": place})
        raise Answer(200, {"transfer": "basic", "objects": objects}, {})

    def file(self, kind: str, name: str, revision: str, path: str) -> None:
        folder, commit = self.find(kind, name, revision)
        if name in self.hub.gated:
            raise Answer(403 if "Authorization" in self.headers else 401, b"", GATED)
        file = folder / path
        if not file.is_file():
            raise Answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if file.suffix not in LARGE:
            raise Answer(200, file.read_bytes(), {"ETag": f'"{blob_of(file)}"', "X-Repo-Commit": commit})
        number = hash_of(file)
        copyfile(file, self.hub.root / "large" / number)
        place = f"{self.hub.address.replace('127.0.0.1', 'localhost')}/large/{number}"
        linked = {"X-Linked-ETag": f'"{number}"', "X-Linked-Size": file.stat().st_size, "X-Repo-Commit": commit}
        raise Answer(302, b"", {"Location": place} | linked)


if __name__ == "__main__":  # python tests/hub.py FOLDER: serves it until it is stopped
    with Hub(Path(sys.argv[1])).serving() as served:
        print(served.address, flush=True)
        threading.Event().wait()
