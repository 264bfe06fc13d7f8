"""A stand-in for the Hub: model repositories in memory, served on 127.0.0.1 to clients that set HF_ENDPOINT."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class HubStub(ThreadingHTTPServer):
    """Knows what pushing and loading a model need: commits, large files, file listings and downloads.

    with HubStub() as hub: hub.endpoint, hub.files("owner/name")
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit, oldest first -> path -> bytes
        self.large_files: dict[str, bytes] = {}  # sha256 -> bytes

    def __enter__(self):
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def resolve(self, repository: str, revision: str = "main") -> str | None:
        """The commit that a revision names."""
        commits = self.commits[repository]
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[repository][self.resolve(repository, revision)]

    def commit(self, repository: str, lines: list[dict]) -> str:
        """Apply the lines of a commit, as the client sends them, to the newest files."""
        files = dict(self.files(repository))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
        name = hashlib.sha1(f"{repository} {len(self.commits[repository])}".encode()).hexdigest()
        self.commits[repository][name] = files
        return name


class _Handler(BaseHTTPRequestHandler):
    server: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repository = f"{wanted['organization']}/{wanted['name']}"
            created = repository not in hub.commits
            if created:
                hub.commits[repository] = {"0" * 40: {}}
            return self.answer({"url": f"{hub.endpoint}/{repository}"}, 200 if created else 409)
        if match := re.fullmatch(r"/large-files/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.answer(status=400)
            hub.large_files[match[1]] = body
            return self.answer()

        match = re.fullmatch(r"(?:/api/models)?/([\w-]+/[\w-]+)(?:\.git)?(?:/(.*))?", path)
        if match is None or match[1] not in hub.commits:
            return self.answer(status=404, X_Error_Code="RepoNotFound")
        repository, action = match[1], match[2] or ""
        if action == "info/lfs/objects/batch":
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.endpoint}/large-files/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})

        action, revision, name = (*action.split("/", 2), "", "")[:3]
        commit = hub.resolve(repository, revision or "main")
        if commit is None:
            return self.answer(status=404, X_Error_Code="RevisionNotFound")
        files = hub.files(repository, commit)
        if action == "preupload":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in wanted]
            answers = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(wanted, modes, strict=True)
            ]
            return self.answer({"files": answers})
        if action == "commit":
            made = hub.commit(repository, [json.loads(line) for line in body.splitlines()])
            return self.answer({"commitOid": made, "commitUrl": f"{hub.endpoint}/{repository}/commit/{made}"})
        if action in ("", "revision"):
            return self.answer({"id": repository, "sha": commit})
        if action == "tree":
            listed = [path for path in files if path.startswith(f"{name}/" if name else "")]
            if not listed:
                return self.answer(status=404, X_Error_Code="EntryNotFound")
            return self.answer(
                [{"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])} for path in listed]
            )
        if action == "resolve":
            if name not in files:
                return self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return self.answer(files[name], X_Repo_Commit=commit, ETag=f'"{_oid(files[name])}"')
        self.answer(status=404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
