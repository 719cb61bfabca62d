"""A stand-in for the Hugging Face Hub on loopback: its repositories, and a network's faults.

    python hub_server.py [--xet DIR]    prints its port, serves until stdin ends

It answers what huggingface_hub 2.4 asks of model repositories, from memory. With `--xet` large
files go to DIR through hf_xet, past this server, which knows their sizes and hashes but no content.
It is a process of its own, started by `HubServer`: tests fork and kill the client's.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode

import yaml

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "*.png")
LFS_SIZE = 10 * 2**20  # bytes; a larger file is LFS whatever its name
FAULTS = ("status", "reset", "slow", "lost", "lie")
XET_EXPIRY = 4102444800  # the year 2100
FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPO_ID = re.compile(r"(?!.*(?:\.\.|--))[\w.-]+(?:/[\w.-]+)?")
NO_OBJECT = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
    "Offending file: - {}"
)

Tree = dict[str, dict[str, Any]]  # path: mode, oid (git's), size and, of an LFS file, sha256


class Token(NamedTuple):
    user: str
    role: str
    orgs: dict[str, str]  # name: role

    def sees(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.orgs

    def creates(self, namespace: str) -> bool:
        return self.role == "write" and self.sees(namespace)

    def writes(self, namespace: str) -> bool:
        granted = self.role == "fineGrained" and namespace == self.user
        return granted or self.creates(namespace)


TOKENS = {
    "hf_writer": Token("me", "write", {"org": "write"}),
    "hf_reader": Token("me", "read", {"org": "write"}),
    "hf_fine": Token("me", "fineGrained", {"org": "write"}),
    "hf_other": Token("other", "write", {}),
}


class Refusal(Exception):
    """An answer of failure; `code` is what the client chooses its exception by."""

    def __init__(self, status: int, error: str, code: str | None = None, **more: Any):
        headers = {"X-Error-Code": code} if code else {}
        if code or status == 401:  # by it the client tells a wrong token from a hidden repository
            headers["X-Error-Message"] = error
        self.answer = Answer(status, {"error": error, **more}, headers)


class Answer(NamedTuple):
    status: int
    content: Any = None  # bytes as they are, all else as JSON
    headers: dict[str, Any] = {}  # noqa: RUF012  never written to


@dataclass
class Request:
    method: str
    path: str  # quoted, without the query
    query: dict[str, list[str]]
    body: bytes
    authorization: str
    origin: str

    @property
    def parts(self) -> list[str]:
        """Split first, then unquoted: `merge%2Fstep-1` is one revision."""
        return [unquote(part) for part in self.path.strip("/").split("/")]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def token(self, required: bool = True) -> Token | None:
        token = TOKENS.get(self.authorization.removeprefix("Bearer "))
        if token is None and (required or self.authorization):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token


@dataclass
class Fault:
    """What is to go wrong with the requests that `match`, a regex searched in "METHOD /path".

    Attributes:
        kind: status: answer `status` and do nothing; reset: read half of the body, then break the
            connection; slow: do nothing, and never come to the end of the answer's headers; lost:
            do as asked, then break the connection; lie: do as asked, and report each size one up.
        times: how often; -1: until it is cleared.
        skip: so many matching requests pass first.
        after: seconds to wait before it goes wrong.
    """

    match: str
    kind: str
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = field(default_factory=lambda: {"error": "fault"})
    times: int = 1
    skip: int = 0
    after: float = 0
    cleared: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise Refusal(400, f"kind: {self.kind!r} is none of {FAULTS}")

    def strikes(self, line: str) -> bool:
        if not self.times or not re.search(self.match, line):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Repo:
    id: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def tree(self, revision: str) -> Tree:
        return self.commits[self.resolve(revision)]["tree"]

    def entry(self, revision: str, path: str) -> dict[str, Any]:
        try:
            return self.tree(revision)[path]
        except KeyError:
            raise Refusal(404, "Entry not found", "EntryNotFound") from None

    def history(self, revision: str) -> list[dict[str, Any]]:
        """Newest first, in the Hub's words."""
        listed, oid = [], self.resolve(revision)
        while oid:
            commit = self.commits[oid]
            said = {name: commit[name] for name in ("title", "message", "date")}
            listed.append({"id": oid, "authors": [{"user": commit["user"]}], **said})
            oid = commit["parent"]
        return listed


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    version = "version https://git-lfs.github.com/spec/v1"
    return f"{version}\noid sha256:{sha256}\nsize {size}\n".encode()


def described(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    size, sha256 = entry["size"], entry.get("sha256")
    file = {"type": "file", "oid": entry["oid"], "size": size, "path": path}
    if sha256:
        file["lfs"] = {"oid": sha256, "size": size, "pointerSize": len(pointer(sha256, size))}
    return file


def refs(under: str, at: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": f"refs/{under}/{name}", "targetCommit": oid}
        for name, oid in at.items()
    ]


def listing(tree: Tree, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What is in `folder`, "" or "a/b/": files, and the folders that they imply."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in tree if path.startswith(folder)):
        above = path[len(folder) :].split("/")[:-1]
        for parent in itertools.accumulate(above, "{}/{}".format):
            at, oid = folder + parent, hashlib.sha1(parent.encode()).hexdigest()
            found.setdefault(at, {"type": "directory", "oid": oid, "size": 0, "path": at})
            if not recursive:
                break
        if recursive or not above:
            found[path] = described(path, tree[path])
    if folder and not found:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    return list(found.values())


def check_card(content: str) -> dict[str, list[dict[str, str]]]:
    """Errors and warnings about a model card's front matter, as the Hub words them."""
    errors, warnings = [], []
    block = FRONT_MATTER.search(content)
    if block is None:
        warnings.append("empty or missing yaml metadata in repo card")
    try:
        card = (block and yaml.safe_load(block[1])) or {}
    except yaml.YAMLError as error:
        card, errors = {}, [f"bad YAML: {error}"]
    if not isinstance(card, dict):
        card, errors = {}, ["the metadata has to be a mapping"]
    for key in ("base_model", "datasets"):
        values = card.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from the Hub.')
    if not isinstance(card.get("license", ""), str):
        errors.append('"license" must be a string')
    if card.get("license") == "other" and "license_name" not in card:
        warnings.append('"license_name" is missing beside "license: other"')
    tags = card.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    found = {"errors": errors, "warnings": warnings}
    return {kind: [{"message": line} for line in lines] for kind, lines in found.items()}


class Hub:
    """The state, and what each request makes of it. The lock is held by who calls."""

    def __init__(self, xet: str | None = None):
        self.lock = threading.RLock()
        self.xet = xet
        self.faults: list[Fault] = []
        self.reset()

    def reset(self) -> None:
        self.clear()
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # LFS contents by sha256, of all repositories
        self.small: dict[str, bytes] = {}  # regular contents by git oid
        self.blob_log: list[tuple[str, str, int]] = []
        self.requests: list[list[Any]] = []
        self.authorizations: set[str] = set()
        self.counter = itertools.count()

    def clear(self) -> None:
        for fault in self.faults:
            fault.cleared.set()
        self.faults = []

    def arrival(self, method: str, path: str, authorization: str) -> tuple[list[Any], Fault | None]:
        """Note a request; the entry's last field is for the status that answers it."""
        self.requests.append([method, path, None])
        if authorization:
            self.authorizations.add(authorization)
        line = f"{method} {path}"
        return self.requests[-1], next((f for f in self.faults if f.strikes(line)), None)

    def stored(self, content: bytes) -> dict[str, Any]:
        oid = git_oid(content)
        self.small[oid] = content
        return {"mode": "regular", "oid": oid, "size": len(content)}

    def content(self, entry: dict[str, Any]) -> bytes:
        if entry["mode"] == "regular":
            return self.small[entry["oid"]]
        if entry["sha256"] not in self.large:
            raise Refusal(501, "the content went to xet storage, past this server")
        return self.large[entry["sha256"]]

    def commit(self, repo: Repo, branch: str, tree: Tree, **said: str) -> str:
        """Move the branch on; `said`: title, message and user."""
        commit = {"tree": tree, "parent": repo.branches.get(branch), **said}
        made_of = json.dumps([commit, next(self.counter)], sort_keys=True)
        oid = repo.branches[branch] = hashlib.sha1(made_of.encode()).hexdigest()
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        repo.commits[oid] = {**commit, "date": date}
        return oid

    def answer(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        match [method, *request.parts]:
            case ["POST", "api", "repos", "create"]:
                return self._create(request)
            case ["GET", "api", "whoami-v2"]:
                return self._whoami(request.token())
            case ["POST", "api", "validate-yaml"]:
                found = check_card(request.json["content"])
                return Answer(400 if found["errors"] else 200, found)
            case ["PUT", "lfs-up", sha256]:
                if hashlib.sha256(request.body).hexdigest() != sha256:
                    raise Refusal(422, "the content has another SHA-256")
                self.large[sha256] = request.body
                return Answer(200)
            case ["POST", "lfs-verify"]:
                return Answer(200, {"size": self._lfs_size(**request.json)})
            case [_, "api", "models", owner, name, *rest]:
                repo = self._visible(request, f"{owner}/{name}")
                return self._read(request, repo, method, rest) or self._write(request, repo, rest)
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                repo = self._visible(request, f"{owner}/{name.removesuffix('.git')}")
                self._writer(request, repo)
                return self._batch(request)
            case ["GET", owner, name, "resolve", revision, *path]:
                repo = self._visible(request, f"{owner}/{name}")
                return self._file(request, repo, revision, "/".join(path))
        raise Refusal(404, f"{request.method} {request.path} is not served here")

    def _read(self, request: Request, repo: Repo, method: str, rest: list[str]) -> Answer | None:
        match [method, *rest]:
            case ["GET"]:
                return self._info(request, repo, "main")
            case ["GET", "revision", revision]:
                return self._info(request, repo, revision)
            case ["GET", "auth-check"]:
                return Answer(200, {})
            case ["GET", "refs"]:
                heads, tags = refs("heads", repo.branches), refs("tags", repo.tags)
                return Answer(200, {"branches": heads, "tags": tags, "converts": []})
            case ["GET", "tree", revision, *path]:
                folder, recursive = "".join(f"{part}/" for part in path), request.flag("recursive")
                return Answer(200, listing(repo.tree(revision), folder, recursive))
            case ["POST", "paths-info", revision]:
                wanted = parse_qs(request.body.decode()).get("paths", [])
                known = listing(repo.tree(revision), "", recursive=True)
                return Answer(200, [entry for entry in known if entry["path"] in wanted])
            case ["GET", "commits", revision]:
                return Answer(200, repo.history(revision))
        return None

    def _write(self, request: Request, repo: Repo, rest: list[str]) -> Answer:
        self._writer(request, repo)
        match [request.method, *rest]:
            case ["GET", "auth-check", "write"]:
                return Answer(200, {})
            case ["POST", "preupload", revision]:
                return self._preupload(request, repo, revision)
            case ["GET", "xet-write-token", revision] if self.xet:
                repo.resolve(revision)
                url = f"local://{self.xet}"
                headers = {"Cas-Url": url, "Access-Token": "x", "Token-Expiration": XET_EXPIRY}
                told = {"casUrl": url, "accessToken": "x", "exp": XET_EXPIRY}
                return Answer(200, told, {f"X-Xet-{key}": value for key, value in headers.items()})
            case ["POST", "commit", branch]:
                return self._committed(request, repo, branch)
            case ["POST", "branch", name]:
                start = repo.resolve(request.json.get("startingPoint") or "main")
                return self._point(repo.branches, name, start)
            case ["POST", "tag", revision]:
                return self._point(repo.tags, request.json["tag"], repo.resolve(revision))
            case ["DELETE", "branch", "main"]:
                raise Refusal(403, "main cannot be deleted")
            case ["DELETE", "branch" | "tag" as kind, name]:
                at = repo.branches if kind == "branch" else repo.tags
                if at.pop(name, None) is None:
                    raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
                return Answer(200, {})
        raise Refusal(404, f"{request.method} {request.path} is not served here")

    def _visible(self, request: Request, repo_id: str) -> Repo:
        token, repo = request.token(required=False), self.repos.get(repo_id)
        if repo is None or (repo.private and not (token and token.sees(repo.namespace))):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _writer(self, request: Request, repo: Repo) -> None:
        if not request.token().writes(repo.namespace):
            raise Refusal(403, "Forbidden: you need write access")

    def _create(self, request: Request) -> Answer:
        asked, token = request.json, request.token()
        namespace = asked.get("organization") or token.user
        if not token.creates(namespace):
            rights = "You don't have the rights to create a model under the namespace"
            raise Refusal(403, f'{rights} "{namespace}"')
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{request.origin}/{repo_id}"
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repo = self.repos[repo_id] = Repo(repo_id, private)
        lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS]
        tree = {".gitattributes": self.stored("".join(lines).encode())}
        self.commit(repo, "main", tree, title="initial commit", message="", user=token.user)
        return Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def _whoami(self, token: Token) -> Answer:
        orgs = [{"name": name, "roleInOrg": role} for name, role in token.orgs.items()]
        access: dict[str, Any] = {"displayName": "tests", "role": token.role}
        if token.role == "fineGrained":
            granted = [
                {"entity": {"type": "model", "name": repo.id}, "permissions": ["repo.write"]}
                for repo in self.repos.values()
                if token.writes(repo.namespace)
            ]
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": granted}
        auth = {"type": "access_token", "accessToken": access}
        return Answer(200, {"type": "user", "name": token.user, "orgs": orgs, "auth": auth})

    def _info(self, request: Request, repo: Repo, revision: str) -> Answer:
        oid, siblings = repo.resolve(revision), []
        for path, entry in sorted(repo.tree(oid).items()):
            file = {"rfilename": path}
            if request.flag("blobs"):
                file |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := described(path, entry).get("lfs"):
                    file["lfs"] = {**lfs, "sha256": lfs["oid"]}
            siblings.append(file)
        named = {"id": repo.id, "modelId": repo.id, "sha": oid, "private": repo.private}
        return Answer(200, {**named, "tags": [], "siblings": siblings})

    def _preupload(self, request: Request, repo: Repo, revision: str) -> Answer:
        asked, tree = request.json, repo.tree(revision)
        ignored = asked.get("gitIgnore")
        if ignored is None:
            ignored = self.content(tree[".gitignore"]).decode() if ".gitignore" in tree else ""
        files = []
        for file in asked["files"]:
            path, entry = file["path"], tree.get(file["path"], {})
            named = any(fnmatchcase(path, pattern) for pattern in LFS_PATTERNS)
            mode = "lfs" if named or file["size"] > LFS_SIZE else "regular"
            skipped = any(fnmatchcase(path, pattern) for pattern in ignored.split("\n"))
            oid = entry.get("sha256") or entry.get("oid")
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": skipped, "oid": oid})
        return Answer(200, {"files": files})

    def _batch(self, request: Request) -> Answer:
        objects = []
        for asked in request.json["objects"]:
            thing = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.large:
                upload = {"href": f"{request.origin}/lfs-up/{asked['oid']}"}
                verify = {"href": f"{request.origin}/lfs-verify"}
                thing["actions"] = {"upload": upload, "verify": verify}
            objects.append(thing)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_size(self, oid: str, size: int | None = None, path: str = "") -> int:
        """A copy names no size; with xet the content is elsewhere, and the client is believed."""
        sizes = {len(self.large[oid])} if oid in self.large else set()
        if self.xet and not sizes:
            trees = (c["tree"] for repo in self.repos.values() for c in repo.commits.values())
            entries = (entry for tree in trees for entry in tree.values())
            sizes = {entry["size"] for entry in entries if entry.get("sha256") == oid} or {size}
        known = sizes.pop() if sizes else None
        if known is None or size not in (None, known):
            raise Refusal(400, NO_OBJECT.format(path or oid))
        return known

    def _committed(self, request: Request, repo: Repo, branch: str) -> Answer:
        header, *operations = map(json.loads, request.body.splitlines())
        said = header["value"]
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if said.get("parentCommit") not in (None, repo.branches[branch]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree, user = dict(repo.tree(branch)), request.token().user
        for operation in operations:
            self._apply(tree, operation["key"], **operation["value"])
        message = said.get("description", "")
        oid = self.commit(repo, branch, tree, title=said["summary"], message=message, user=user)
        url = f"{request.origin}/{repo.id}/commit/{oid}"
        return Answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, tree: Tree, key: str, path: str, **value: Any) -> None:
        if key == "file":
            tree[path] = self.stored(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            sha256, size = value["oid"], self._lfs_size(value["oid"], value.get("size"), path)
            oid = git_oid(pointer(sha256, size))
            tree[path] = {"mode": "lfs", "oid": oid, "size": size, "sha256": sha256}
        else:
            folder = f"{path.rstrip('/')}/"
            inside = [name for name in tree if name.startswith(folder)]
            gone = {"deletedFile": [path] if path in tree else [], "deletedFolder": inside}[key]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]

    def _point(self, at: dict[str, str], name: str, oid: str) -> Answer:
        if name in at:
            raise Refusal(409, f"Reference already exists: {name}")
        at[name] = oid
        return Answer(200, {})

    def _file(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        oid = repo.resolve(revision)
        entry = repo.entry(oid, path)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry.get("sha256") or entry["oid"]}"'}
        if request.method == "HEAD":  # does not take the content, which xet may have
            return Answer(200, None, {**headers, "Content-Length": entry["size"]})
        return Answer(200, self.content(entry), headers)

    def control(self, request: Request) -> Answer:
        """What tests ask of the server itself: never faulted, never logged."""
        match request.parts[1:]:
            case ["fault"]:
                self.faults.append(Fault(**request.json))
            case ["clear"]:
                self.clear()
            case ["reset"]:
                self.reset()
            case ["state"]:
                return Answer(200, json.dumps(self._state()).encode())
            case ["file"]:
                repo, revision, path = (request.query[name][0] for name in ("repo", "rev", "path"))
                return Answer(200, self.content(self.repos[repo].entry(revision, path)))
            case ["commit"]:
                asked = request.json
                repo, files = self.repos[asked["repo"]], asked["files"]
                new = {path: self.stored(text.encode()) for path, text in files.items()}
                tree, said = {**repo.tree(asked["rev"]), **new}, f"Update {', '.join(files)}"
                oid = self.commit(repo, asked["rev"], tree, title=said, message="", user="somebody")
                return Answer(200, {"commitOid": oid})
            case _:
                raise Refusal(404, f"{request.path} is not served here")
        return Answer(200, {})

    def _state(self) -> dict[str, Any]:
        repos = {repo.id: asdict(repo) for repo in self.repos.values()}
        logs = {"blobs": self.blob_log, "requests": self.requests, "stored": sorted(self.large)}
        return {"repos": repos, **logs, "authorizations": sorted(self.authorizations)}


def one_up(value: Any) -> Any:
    if isinstance(value, list):
        return [one_up(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item + 1 if key == "size" and isinstance(item, int) else one_up(item)
        for key, item in value.items()
    }


class Handler(BaseHTTPRequestHandler):
    """HTTP, and the faults in it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: else 40 ms between them
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a client that was killed, or had enough
            self.close_connection = True

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        authorization = self.headers.get("Authorization", "")
        origin = f"http://{self.headers['Host']}"

        def asked(body: bytes) -> Request:
            return Request(self.command, path, parse_qs(query), body, authorization, origin)

        if path.startswith("/_control/"):
            return self._send(self._answer(self.hub.control, asked(self._body())))
        with self.hub.lock:
            entry, fault = self.hub.arrival(self.command, path, authorization)
        if fault:
            fault.cleared.wait(fault.after)
        kind = fault.kind if fault else None
        body = self._body(halfway=kind == "reset")
        if kind == "reset":
            return self._break()
        if kind == "slow":
            return self._drip(fault)
        if kind == "status":
            answer = Answer(fault.status, fault.body, fault.headers)
        else:
            answer = self._answer(self.hub.answer, asked(body))
        if kind == "lost":
            return self._break()
        if kind == "lie":
            answer = answer._replace(content=one_up(answer.content))
        entry[2] = answer.status
        self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self, act: Any, request: Request) -> Answer:
        with self.hub.lock:
            try:
                return act(request)
            except Refusal as refusal:
                return refusal.answer

    def _send(self, answer: Answer) -> None:
        content, kind = answer.content, "application/octet-stream"
        if content is None:
            content = b""
        if not isinstance(content, bytes):
            content, kind = json.dumps(content).encode(), "application/json"
        self.send_response(answer.status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content))}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self, halfway: bool = False) -> bytes:
        """All of it, even where it is not wanted: the next request begins where it ends."""
        body = bytearray()
        limit = int(self.headers.get("Content-Length") or 2) // 2 if halfway else sys.maxsize
        try:
            for left in self._stretches():
                while left and len(body) < limit:
                    piece = self.rfile.read1(min(left, limit - len(body), 2**16))
                    if not piece:
                        raise ConnectionResetError("the client left")
                    body += piece
                    left -= len(piece)
                if len(body) >= limit:
                    break
        finally:
            if self.path.startswith("/lfs-up/"):
                with self.hub.lock:
                    sha256 = self.path.rpartition("/")[2]
                    self.hub.blob_log.append((self.command, sha256, len(body)))
        return bytes(body)

    def _stretches(self) -> Any:
        """Lengths of what the body comes in: one, or one for each chunk."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield int(self.headers.get("Content-Length") or 0)
            return
        size = -1
        while size:
            line = self.rfile.readline()
            if not line:
                raise ConnectionResetError("the client left")
            size = int(line, 16)
            yield size
            self.rfile.readline()

    def _break(self) -> None:
        """RST: a linger of 0 s, and no shutdown, whose FIN would look like a proper end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())
        self.close_connection = True

    def _drip(self, fault: Fault) -> None:
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not fault.cleared.wait(0.2):
            self.wfile.write(b"z")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--xet", type=Path, help="folder of hf_xet's local:// storage")
    xet = parser.parse_args().xet
    Handler.hub = Hub(str(xet.resolve()) if xet else None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.buffer.read()


class HubServer:
    """The server as tests hold it; it ends with the process that started it."""

    def __init__(self, xet: Path | None = None):
        options = ["--xet", str(xet)] if xet else []
        command = [sys.executable, __file__, *options]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def fault(self, match: str, kind: str, **settings: Any) -> None:
        """See `Fault`."""
        self._ask("fault", {"match": match, "kind": kind, **settings})

    def clear(self) -> None:
        self._ask("clear", {})

    def reset(self) -> None:
        self._ask("reset", {})

    def state(self) -> dict[str, Any]:
        return json.loads(self._ask("state"))

    def file(self, repo: str, rev: str, path: str) -> bytes:
        return self._ask("file?" + urlencode({"repo": repo, "rev": rev, "path": path}))

    def commit(self, repo: str, rev: str, files: dict[str, str]) -> str:
        """Commit texts as somebody on the website would; returns the commit's oid."""
        asked = {"repo": repo, "rev": rev, "files": files}
        return json.loads(self._ask("commit", asked))["commitOid"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def _ask(self, what: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(f"{self.url}/_control/{what}", data, timeout=30) as answer:
            return answer.read()


if __name__ == "__main__":
    main()
