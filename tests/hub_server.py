"""A Hugging Face Hub on the loopback interface, for tests: the Hub's HTTP protocol over repositories kept in memory.

The real `huggingface_hub` client talks to it through HF_ENDPOINT. Large files go to and come from an object store that
listens on a port of its own, as on the real Hub, so that a test can see that no token ever reaches it. Faults are
queued with `LoopbackHub.fail` and are used up in order by the first requests that match.

It knows nothing of timm_gencnn.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = ('.safetensors', '.parquet', '.bin', '.npz')
LICENSES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'cc0-1.0', 'other', 'unknown')
PIPELINE_TAGS = ('image-classification', 'image-feature-extraction', 'unconditional-image-generation')


@dataclass(frozen=True)
class Blob:
    """A file's content, with the identity the Hub gives it: SHA-256 in the object store, git's SHA-1 otherwise."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Branches point to commits; a commit is a map from path to file."""

    kind: str
    name: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        self.messages.append(message)
        state = json.dumps([len(self.messages), message, {path: blob.oid for path, blob in sorted(files.items())}])
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = 'main') -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.commits[self.branches[revision]].items()}


@dataclass
class Fault:
    """What happens to the next requests that match.

    `kind` is one of: 'status' (answer with `status`), 'page' (the same, as a web page), 'slow' (wait `seconds` first),
    'cut request' (close the connection in the middle of the request's body), 'cut response' (close it in the middle of
    the answer's body), 'lose answer' (do the work, close before answering), 'truncate' (serve half of the file as if it
    were all), 'corrupt' (serve wrong bytes of the right length), 'etag' (a wrong ETag).
    """

    method: str
    path: str
    kind: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class HttpError(Exception):
    """An answer other than success, in the Hub's own form."""

    def __init__(self, status: int, message: str, code: str = '', headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.body = {'error': message}
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **(headers or {})}


class LoopbackHub:
    """The server: `endpoint` goes into HF_ENDPOINT, `users` maps tokens to names, `repos` is what was published."""

    def __init__(self, users: dict[str, str]) -> None:
        self.users = users
        self.multipart_size = 1 << 20
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, bool]] = []  # method, path, came with a token to the object store
        self.lock = threading.Lock()
        self._hub, self._store = _listen(self, HubHandler), _listen(self, StoreHandler)
        self.endpoint = f'http://127.0.0.1:{self._hub.server_port}'
        self.store = f'http://127.0.0.1:{self._store.server_port}'

    def fail(self, method: str, path: str, kind: str, **kwargs: Any) -> None:
        """Queue a fault for requests whose method is `method` and whose path holds the pattern `path`."""
        self.faults.append(Fault(method, path, kind, **kwargs))

    def repo(self, name: str, kind: str = 'model') -> Repo:
        return self.repos[kind, name]

    def new_repo(self, name: str, kind: str = 'model', private: bool = False) -> Repo:
        """Make a repository as the Hub does, with one commit that says which files are large."""
        repo = self.repos[kind, name] = Repo(kind, name, private)
        rules = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES)
        repo.commit('main', {'.gitattributes': Blob(rules.encode(), lfs=False)}, 'initial commit')
        return repo

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
        return None

    def close(self) -> None:
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()


@contextmanager
def running_hub(users: dict[str, str]) -> Iterator[LoopbackHub]:
    """Serve until the block ends."""
    hub = LoopbackHub(users)
    try:
        yield hub
    finally:
        hub.close()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away, which is what faults make it do."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _listen(hub: LoopbackHub, handler: type[Handler]) -> Server:
    server = Server(('127.0.0.1', 0), type(handler.__name__, (handler,), {'hub': hub}))
    threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    """Reads a request, applies the fault that is due, finds the route and sends the answer."""

    hub: LoopbackHub
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    routes: tuple[tuple[str, str, str], ...] = ()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.fault = self.hub.take_fault(self.command, path)
        kind = self.fault.kind if self.fault else ''
        with self.hub.lock:
            self.hub.requests.append((self.command, path, 'Authorization' in self.headers))
        if kind == 'cut request':
            self.rfile.read(min(int(self.headers.get('Content-Length', 0)) // 2, 65536))
            return self.cut()
        self.body = self.read_body()
        if self.fault and kind == 'page':
            return self.send(self.fault.status, b'<html>Down for maintenance</html>', {'Content-Type': 'text/html'})
        try:
            if self.fault and kind == 'slow':
                time.sleep(self.fault.seconds)
            if self.fault and kind == 'status':
                raise HttpError(self.fault.status, f'injected {self.fault.status}', headers=self.fault.headers)
            for method, pattern, name in self.routes:
                match = re.fullmatch(pattern, url.path)
                if match and method == self.command.replace('HEAD', 'GET'):
                    groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    getattr(self, name)(**groups)
                    break
            else:
                raise HttpError(404, f'no route for {self.command} {path}')
        except HttpError as error:
            self.send(error.status, error.body, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def json(self) -> Any:
        return json.loads(self.body or b'{}')

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def send(self, status: int, body: Any = b'', headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = self.fault.kind if self.fault else ''
        if kind == 'lose answer':
            return self.cut()
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content[: len(content) // 2] if kind == 'cut response' else content)
        if kind == 'cut response':
            self.wfile.flush()
            self.cut()

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        """Serve a file, or the part of it that a Range header asks for."""
        kind = self.fault.kind if self.fault else ''
        if kind == 'truncate':
            content = content[: len(content) // 2]
        if kind == 'corrupt':
            content = bytes(255 - byte for byte in content)
        span = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not span:
            return self.send(200, content, {'Accept-Ranges': 'bytes', **headers})
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        headers = {'Content-Range': f'bytes {first}-{last}/{len(content)}', **headers}
        self.send(206, content[first : last + 1], headers)


class StoreHandler(Handler):
    """The object store: content under its SHA-256, whole or in parts."""

    routes = (
        ('GET', r'/objects/(?P<oid>\w+)', 'download'),
        ('PUT', r'/objects/(?P<oid>\w+)', 'upload'),
        ('PUT', r'/objects/(?P<oid>\w+)/(?P<part>\d+)', 'upload_part'),
    )

    def download(self, oid: str) -> None:
        self.send_file(self.hub.objects[oid], {'ETag': f'"{oid}"'})

    def upload(self, oid: str) -> None:
        self.hub.objects[oid] = self.body
        self.send(200)

    def upload_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.body
        self.send(200, headers={'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'})


class HubHandler(Handler):
    """The Hub itself."""

    api = r'/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)'
    raw = r'/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+?)'
    routes = (
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', r'/api/repos/create', 'create_repo'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('GET', api, 'info'),
        ('GET', api + r'/revision/(?P<revision>[^/]+)', 'info'),
        ('GET', api + r'/refs', 'refs'),
        ('GET', api + r'/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?', 'tree'),
        ('POST', api + r'/paths-info/(?P<revision>[^/]+)', 'paths_info'),
        ('POST', api + r'/branch/(?P<branch>[^/]+)', 'create_branch'),
        ('POST', api + r'/preupload/(?P<revision>[^/]+)', 'preupload'),
        ('POST', api + r'/commit/(?P<revision>[^/]+)', 'commit'),
        ('POST', raw + r'\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('POST', r'/lfs/verify', 'lfs_verify'),
        ('POST', r'/lfs/complete/(?P<oid>\w+)', 'lfs_complete'),
        ('GET', raw + r'/resolve/(?P<revision>[^/]+)/(?P<path>.+)', 'resolve'),
    )

    @property
    def user(self) -> str | None:
        header = self.headers.get('Authorization')
        if header is None:
            return None
        token = header.removeprefix('Bearer ')
        if token not in self.hub.users:
            raise HttpError(401, 'Invalid credentials in Authorization header')
        return self.hub.users[token]

    def find(self, kind: str, name: str, write: bool = False) -> Repo:
        user, repo = self.user, self.hub.repos.get((kind, name))
        if repo is None or (repo.private and user != name.split('/')[0]):
            raise HttpError(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if write and user != name.split('/')[0]:
            raise HttpError(403 if user else 401, f"You don't have the rights to write to {name}")
        return repo

    def revision(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise HttpError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha

    def whoami(self) -> None:
        if self.user is None:
            raise HttpError(401, 'Invalid username or password.')
        self.send(200, {'name': self.user, 'type': 'user', 'orgs': []})

    def create_repo(self) -> None:
        ask = self.json()
        kind, name = ask.get('type') or 'model', f'{ask["organization"] or self.user}/{ask["name"]}'
        if self.user is None:
            raise HttpError(401, 'Invalid username or password.')
        if self.user != name.split('/')[0]:
            raise HttpError(403, f"You don't have the rights to create a {kind} under the namespace {name}")
        url = f'{self.hub.endpoint}/{"datasets/" if kind == "dataset" else ""}{name}'
        if (kind, name) in self.hub.repos:
            self.send(409, {'error': f'You already created this {kind} repo', 'url': url})
            return
        self.hub.new_repo(name, kind, private=ask.get('visibility') == 'private')
        self.send(200, {'url': url, 'id': name})

    def validate_yaml(self) -> None:
        ask = self.json()
        errors = card_errors(ask['content'], ask['repoType'])
        self.send(400 if errors else 200, {'errors': [{'message': error} for error in errors], 'warnings': []})

    def info(self, kind: str, name: str, revision: str = 'main') -> None:
        repo = self.find(kind, name)
        sha = self.revision(repo, revision)
        siblings = [{'rfilename': path} for path in sorted(repo.commits[sha])]
        self.send(200, {'id': name, 'sha': sha, 'private': repo.private, 'siblings': siblings, 'tags': []})

    def refs(self, kind: str, name: str) -> None:
        branches = self.find(kind, name).branches.items()
        refs = [{'name': b, 'ref': f'refs/heads/{b}', 'targetCommit': sha} for b, sha in branches]
        self.send(200, {'branches': refs, 'tags': [], 'converts': []})

    def tree(self, kind: str, name: str, revision: str, path: str = '') -> None:
        repo = self.find(kind, name)
        files = repo.commits[self.revision(repo, revision)]
        entries, base = {}, f'{path}/' if path else ''
        for file in sorted(f for f in files if f.startswith(base)):
            parts = file[len(base) :].split('/')
            for depth in range(1, len(parts)):
                folder = base + '/'.join(parts[:depth])
                entries[folder] = {'type': 'directory', 'path': folder, 'oid': '0' * 40, 'size': 0}
            entries[file] = file_entry(file, files[file])
        if path and not entries:
            raise HttpError(404, f'{path} does not exist', 'EntryNotFound')
        recursive = self.query.get('recursive', ['false'])[0].lower() == 'true'
        self.send(200, [e for p, e in entries.items() if recursive or '/' not in p[len(base) :]])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        files = repo.commits[self.revision(repo, revision)]
        wanted = parse_qs(self.body.decode()).get('paths', [])
        self.send(200, [file_entry(path, files[path]) for path in wanted if path in files])

    def create_branch(self, kind: str, name: str, branch: str) -> None:
        repo = self.find(kind, name, write=True)
        if branch in repo.branches:
            raise HttpError(409, 'Reference already exists')
        repo.branches[branch] = self.revision(repo, self.json().get('startingPoint', 'main'))
        self.send(200, {})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name, write='create_pr' not in self.query)
        files = repo.commits[self.revision(repo, revision)]
        answer = []
        for file in self.json()['files']:
            path = file['path']
            mode = 'lfs' if path.endswith(LFS_SUFFIXES) or file['size'] > 10 << 20 else 'regular'
            oid = files[path].oid if path in files else None
            answer.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        self.send(200, {'files': answer})

    def lfs_batch(self, name: str, kind: str = 'model') -> None:
        self.find(kind, name)
        objects, transfer = [], 'basic'
        for item in self.json()['objects']:
            oid, size, part = item['oid'], item['size'], self.hub.multipart_size
            upload: dict[str, Any] = {'href': f'{self.hub.store}/objects/{oid}'}
            if size > part:
                transfer = 'multipart'
                header = {str(i + 1): f'{self.hub.store}/objects/{oid}/{i + 1}' for i in range(-(-size // part))}
                upload = {
                    'href': f'{self.hub.endpoint}/lfs/complete/{oid}',
                    'header': {'chunk_size': str(part), **header},
                }
            actions = {'upload': upload, 'verify': {'href': f'{self.hub.endpoint}/lfs/verify'}}
            known = {} if oid in self.hub.objects else {'actions': actions}
            objects.append({'oid': oid, 'size': size, **known})
        self.send(200, {'transfer': transfer, 'objects': objects})

    def lfs_verify(self) -> None:
        oid = self.json()['oid']
        if hashlib.sha256(self.hub.objects.get(oid, b'')).hexdigest() != oid:
            self.hub.objects.pop(oid, None)
            raise HttpError(400, f'object {oid} was not uploaded whole')
        self.send(200, {})

    def lfs_complete(self, oid: str) -> None:
        numbers = [part['partNumber'] for part in self.json()['parts']]
        self.hub.objects[oid] = b''.join(self.hub.parts.pop((oid, n)) for n in numbers)
        self.send(200, {})

    def commit(self, kind: str, name: str, revision: str) -> None:
        create_pr = 'create_pr' in self.query
        repo = self.find(kind, name, write=not create_pr)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.hub.lock:
            head = self.revision(repo, revision)
            parent = header['value'].get('parentCommit', head)
            if parent != head and not create_pr:
                raise HttpError(412, 'A commit has happened since. Please refresh and try again.')
            files = dict(repo.commits[parent])
            for operation in operations:
                self.apply(operation['key'], operation['value'], files)
            number = sum(branch.startswith('refs/pr/') for branch in repo.branches) + 1
            branch = f'refs/pr/{number}' if create_pr else revision
            sha = repo.commit(branch, files, header['value']['summary'])
        answer = {'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.endpoint}/{name}/commit/{sha}'}
        if create_pr:
            answer['pullRequestUrl'] = f'{self.hub.endpoint}/{name}/discussions/{number}'
        self.send(200, answer)

    def apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value['path']
        if path.startswith('/') or '..' in path.split('/'):
            raise HttpError(400, f'invalid path {path}')
        if key == 'file':
            files[path] = Blob(base64.b64decode(value['content']), lfs=False)
        elif key == 'lfsFile':
            if value['oid'] not in self.hub.objects:
                raise HttpError(400, f'LFS object {value["oid"]} of {path} was never uploaded')
            files[path] = Blob(self.hub.objects[value['oid']], lfs=True)
        elif key == 'deletedFile':
            if path not in files:
                raise HttpError(404, "A file with this name doesn't exist", 'EntryNotFound')
            del files[path]
        else:
            raise HttpError(400, f'unknown operation {key}')

    def resolve(self, name: str, revision: str, path: str, kind: str = 'model') -> None:
        repo = self.find(kind, name)
        sha = self.revision(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise HttpError(404, f'{path} does not exist', 'EntryNotFound', {'X-Repo-Commit': sha})
        etag = '"' + ('0' * len(blob.oid) if self.fault and self.fault.kind == 'etag' else blob.oid) + '"'
        headers = {'X-Repo-Commit': sha}
        if not blob.lfs:
            return self.send_file(blob.content, {'ETag': etag, **headers})
        headers |= {'X-Linked-ETag': etag, 'X-Linked-Size': str(len(blob.content))}
        self.send(302, headers={'Location': f'{self.hub.store}/objects/{blob.oid}', **headers})


def file_entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {'type': 'file', 'path': path, 'oid': blob.oid, 'size': len(blob.content)}
    if blob.lfs:
        entry['oid'] = hashlib.sha1(blob.oid.encode()).hexdigest()
        entry['lfs'] = {'oid': blob.oid, 'size': len(blob.content), 'pointerSize': 134}
    return entry


def card_errors(content: str, kind: str) -> list[str]:
    """What the Hub would say about the metadata block of a README."""
    block = re.match(r'\s*---\n(.*?)\n---[ \t]*(?:\n|$)', content, re.DOTALL)
    if not block:
        return ['empty or missing yaml metadata in repo card']
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f'YAML Metadata Error: {error}']
    if not isinstance(data, dict):
        return ['"metadata" must be an object']
    errors = []
    if 'license' in data and data['license'] not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    if 'pipeline_tag' in data and data['pipeline_tag'] not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of {PIPELINE_TAGS}')
    for key in ('tags', 'datasets', 'metrics'):
        if not all(isinstance(v, str) for v in data.get(key, [])):
            errors.append(f'"{key}" must be an array of strings')
    for name in data.get('datasets', []):
        if not re.fullmatch(r'([\w.-]+/)?[\w.-]+', str(name)):
            errors.append(f'"datasets" must hold names of datasets, not {name!r}')
    for widget in data.get('widget', []):
        if not isinstance(widget.get('output', {}).get('url'), str):
            errors.append('"widget[].output.url" must be a string')
    for entry in data.get('model-index', []):
        for result in entry.get('results', []):
            if not ({'task', 'dataset', 'metrics'} <= set(result) and {'type', 'name'} <= set(result['dataset'])):
                errors.append('"model-index[].results[]" must have task, dataset (type, name) and metrics')
            elif any(not isinstance(m.get('value'), int | float) for m in result['metrics']):
                errors.append('"model-index[].results[].metrics[].value" is required')
    return errors if kind == 'model' else []
