"""
A Hub on loopback that takes pushes and serves downloads. Everything is in memory.

The name of a repo says how it misbehaves:

| repo | behaviour |
|---|---|
| `create-403` | answers 403 to its creation |
| `commit-500` | answers 500 to every commit but the first |
| `once-429` | answers 429 to the first try of its second commit |
| `away` | closes the connection instead of answering |
| `slow` | answers a commit after somebody has asked for `/release` |
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml


@dataclass
class Commit:
    id: str
    message: str
    files: dict[str, bytes]
    time: float


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        commits = [commit for branch in self.branches.values() for commit in branch]
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commit in commits if commit.id == revision), None)


class FakeHub(ThreadingHTTPServer):
    """
    `with FakeHub(token) as hub:` serves at `hub.url`.

    Attributes:
        repos (`dict[str, Repo]`): The repos that have been created, with their commits.
        log (`list[tuple[str, str]]`): Method and path of each request.
        refused (`list[str]`): Paths of the requests that came without the token.
    """

    daemon_threads = True

    def __init__(self, token: str, user: str = "me"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.user, self.url = token, user, f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.released = threading.Event()
        self.failed: set[str] = set()
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def add(self, name: str, folder: Path) -> None:
        """Create a repo from the files of a folder."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos[name] = Repo(private=False, branches={"main": [Commit("1" * 40, "all of it", files, time.time())]})

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo].at(revision).files

    def messages(self, repo: str, revision: str = "main") -> list[str]:
        """Messages of the commits, without the empty first one."""
        return [commit.message for commit in self.repos[repo].branches[revision][1:]]


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, error=None, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if error is not None:
            headers |= {"X-Error-Code": error, "X-Error-Message": error}
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        self.server.log.append(("POST", path))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.server.refused.append(path)
            return self.answer({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        name, action, revision = re.fullmatch(r"/api/models/(.+?)/(preupload|commit|branch)/(.+)", path).groups()
        repo = self.server.repos.get(name)
        if repo is None:
            return self.answer({"error": "Repository not found"}, status=404, error="RepoNotFound")
        if action == "branch":
            if revision in repo.branches:
                return self.answer({"error": "exists"}, status=409)
            repo.branches[revision] = list(repo.branches["main"])
            return self.answer({})
        if repo.at(revision) is None:
            return self.answer({"error": "Revision not found"}, status=404, error="RevisionNotFound")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        return self.commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])

    def validate(self, content):
        """Check a model card as the Hub does: its header is YAML, with values of the right kinds."""
        errors = []
        try:
            data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL).group(1))
        except (AttributeError, yaml.YAMLError) as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        strings = ("library_name", "pipeline_tag", "base_model", "base_model_relation", "license", "license_name")
        errors += [name for name in strings if not isinstance(data.get(name, ""), str)]
        errors += ["tags"] if not all(isinstance(tag, str) for tag in data.get("tags", [])) else []
        if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
            errors.append("base_model_relation")
        errors += ["widget" for sample in data.get("widget", []) if not isinstance(sample.get("text"), str)]
        messages = [{"message": f'"{name}" is not valid'} for name in errors]
        self.answer({"errors": messages, "warnings": []}, status=400 if errors else 200)

    def create(self, payload):
        name = f"{payload.get('organization') or self.server.user}/{payload['name']}"
        status = re.search(r"create-(\d+)", name)
        if status:
            return self.answer({"error": "as its name says"}, status=int(status.group(1)))
        with self.server.lock:
            if name in self.server.repos:
                return self.answer({"error": "exists", "url": f"{self.server.url}/{name}"}, status=409)
            repo = self.server.repos[name] = Repo(
                private=payload.get("visibility") == "private" or bool(payload.get("private"))
            )
            repo.branches["main"] = [Commit("0" * 40, "initial commit", {}, time.time())]
        self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def commit(self, name, repo, revision, lines):
        status = re.search(r"(commit|once)-(\d+)", name)
        if len(repo.branches[revision]) > 1:
            is_again = name in self.server.failed
            self.server.failed.add(name)
            if status and not (status.group(1) == "once" and is_again):
                # huggingface_hub waits a second before the next try, its shortest pause.
                return self.answer({"error": "as its name says"}, status=int(status.group(2)), Retry_After=0)
            if name.endswith("away"):
                self.close_connection = True
                return self.connection.close()
        if name.endswith("slow"):
            self.server.released.wait(timeout=60)
        with self.server.lock:
            files = dict(repo.at(revision).files)
            for line in lines[1:]:
                if line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
                else:
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            sha = hashlib.sha1(repr((len(repo.branches[revision]), sorted(files))).encode()).hexdigest()
            repo.branches[revision].append(Commit(sha, lines[0]["value"]["summary"], files, time.time()))
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.server.log.append((self.command, path))
        if path == "/release":
            self.server.released.set()
            return self.answer({})
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (info.group(1), info.group(3)) if info else file.groups()[:2] if file else (None, None)
        repo = self.server.repos.get(name)
        if repo is None:
            return self.answer({"error": "Repository not found"}, status=404, error="RepoNotFound")
        found = repo.at(revision or "main")
        if found is None:
            return self.answer({"error": "Revision not found"}, status=404, error="RevisionNotFound")
        if info and info.group(2) == "tree":
            return self.answer(
                [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in found.files.items()]
            )
        if info:
            siblings = [{"rfilename": p} for p in found.files]
            return self.answer({"id": name, "sha": found.id, "siblings": siblings, "private": repo.private, "tags": []})
        data = found.files.get(file.group(3))
        if data is None:
            return self.answer({"error": "Entry not found"}, status=404, error="EntryNotFound", X_Repo_Commit=found.id)
        self.answer(data, ETag=f'"{_oid(data)}"', X_Repo_Commit=found.id, Content_Type="application/octet-stream")

    do_HEAD = do_GET


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
