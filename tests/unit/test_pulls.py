"""What engines say when a pull fails, from Docker 20.10 to 29 and Podman, and what people are told."""

from __future__ import annotations

import pytest

from oz_worker.containers import Engine
from oz_worker.engine_words import EngineDown
from oz_worker.pulls import Pull, Why, failure, shown, why
from oz_worker.redact import without_credentials

DOCKER = Engine("docker", "docker", environment={}, instance="i", timeout=1)
PODMAN = Engine("podman", "podman", environment={}, instance="i", timeout=1)
D = "Error response from daemon: "
P = "Error: initializing source docker://r.test/t/a:1: "
HUB = "registry.example"

SAID = [
    (DOCKER, D + "manifest for r.test:5000/t/a:nope not found: manifest unknown: manifest unknown", Why.MISSING),
    (DOCKER, D + 'failed to resolve reference "docker.io/l/x:1": docker.io/l/x:1: not found', Why.MISSING),
    (DOCKER, D + "manifest for r.test/t/a:429 not found: manifest unknown", Why.MISSING),
    (PODMAN, P + "reading manifest nope in r.test/t/a: manifest unknown: manifest unknown", Why.MISSING),
    (PODMAN, "Error: parsing image configuration: Error fetching blob: invalid status code from registry 404 (Not "
     "Found)", Why.MISSING),
    (DOCKER, D + 'Head "http://127.0.0.1:5/v2/t/a/manifests/1": no basic auth credentials', Why.DENIED),
    (DOCKER, D + "pull access denied for x, repository does not exist or may require 'docker login': denied: requested "
     "access to the resource is denied", Why.DENIED),
    (DOCKER, D + 'failed to resolve reference "docker.io/a/b:1": pull access denied, repository does not exist or may '
     "require authorization: server message: insufficient_scope: authorization failed", Why.DENIED),
    (DOCKER, D + 'failed to resolve reference "r.test/a:1": unexpected status from HEAD request to https://r.test/v2: '
     "403 Forbidden", Why.DENIED),
    (DOCKER, D + "unauthorized: authentication required", Why.UNAUTHORIZED),
    (DOCKER, D + 'Get "https://r.test/v2/": unauthorized: incorrect username or password', Why.UNAUTHORIZED),
    (DOCKER, D + 'failed to resolve reference "r.test/a:1": failed to authorize: failed to fetch oauth token: '
     "unexpected status from POST request to https://r.test/token: 401 Unauthorized", Why.UNAUTHORIZED),
    (PODMAN, "Error: parsing image configuration: unable to retrieve auth token: invalid username/password: unknown",
     Why.UNAUTHORIZED),
    (DOCKER, D + "toomanyrequests: You have reached your pull rate limit.", Why.LIMITED),
    (DOCKER, "failed to copy: httpReadSeeker: failed open: unexpected status code "
     f"https://{HUB}/v2/library/x/manifests/sha256:de: 429 Too Many Requests", Why.LIMITED),
    (DOCKER, "no matching manifest for linux/s390x in the manifest list entries", Why.PLATFORM),
    (DOCKER, D + "no matching manifest for linux/arm64/v8 in the manifest list entries: no match for platform in "
     "manifest: not found", Why.PLATFORM),
    (PODMAN, P + 'choosing an image from manifest list docker://r.test/t/a:1: no image found in manifest list for '
     'architecture "s390x", variant "", OS "linux"', Why.PLATFORM),
    (DOCKER, D + 'Get "https://reg.test:5443/v2/": x509: certificate signed by unknown authority', Why.CERTIFICATE),
    (DOCKER, D + 'failed to do request: Head "https://r/v2/": tls: failed to verify certificate: x509: certificate has '
     "expired", Why.CERTIFICATE),
    (DOCKER, D + 'Get "https://r.test:5000/v2/": http: server gave HTTP response to HTTPS client', Why.PLAIN),
    (DOCKER, "error getting credentials - err: exec: \"docker-credential-x\": executable file not found in $PATH",
     Why.HELPER),
    (DOCKER, D + 'Get "https://nowhere.invalid/v2/": dial tcp: lookup nowhere.invalid on 9.9.9.9:53: no such host',
     Why.UNREACHABLE),
    (DOCKER, D + 'Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused', Why.UNREACHABLE),
    (DOCKER, D + f'Get "https://{HUB}/v2/": net/http: TLS handshake timeout', Why.UNREACHABLE),
    (DOCKER, D + f'Get "https://{HUB}/v2/": net/http: request canceled while waiting for connection (Client.Timeout '
     "exceeded while awaiting headers)", Why.UNREACHABLE),
    (DOCKER, D + f'Get "https://{HUB}/v2/": context deadline exceeded', Why.UNREACHABLE),
    (DOCKER, D + f'Head "https://{HUB}/v2/denied/manifests/1": EOF', Why.UNREACHABLE),
    (DOCKER, D + "received unexpected HTTP status: 503 Service Unavailable", Why.UNREACHABLE),
    (DOCKER, "error pulling image configuration: download failed after attempts=6: received unexpected HTTP status: "
     "500 Internal Server Error", Why.UNREACHABLE),
    (PODMAN, "Error: parsing image configuration: Error fetching blob: invalid status code from registry 500 (Internal "
     "Server Error)", Why.UNREACHABLE),
    (PODMAN, "Error: writing blob: storing blob to file \"/var/tmp/storage1/1\": happened during read: unexpected EOF",
     Why.BROKEN_OFF),
    (DOCKER, D + 'failed to copy: read tcp 10.0.0.1:4->10.0.0.2:443: read: connection reset by peer', Why.UNREACHABLE),
    (DOCKER, "unexpected EOF", Why.BROKEN_OFF),
    (DOCKER, "read tcp 10.0.0.1:4->10.0.0.2:443: read: connection reset by peer", Why.BROKEN_OFF),
    (DOCKER, "error pulling image configuration: context canceled", Why.BROKEN_OFF),
    (DOCKER, "failed to register layer: write /usr/lib/x: no space left on device", Why.FULL),
    (PODMAN, "Error: writing blob: adding layer with blob \"sha256:ab\": ApplyLayer: write /x: no space left on device",
     Why.FULL),
    (DOCKER, "invalid reference format: repository name (library/BAD) must be lowercase", Why.NAME),
    (PODMAN, 'Error: short-name "nopath" did not resolve to an alias and no unqualified-search registries are defined',
     Why.NAME),
    (PODMAN, "Error: open /var/lib/containers/storage: permission denied", Why.OTHER),
    (DOCKER, D + "unknown: on purpose", Why.OTHER),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "said", "expected"), SAID)
def test_words_have_a_class(engine: Engine, said: str, expected: Why) -> None:
    assert why(engine, said) is expected


@pytest.mark.parametrize(
    "said",
    [
        "Cannot connect to the Docker daemon at unix:///x.sock. Is the docker daemon running?",
        'error during connect: Post "http://%2Fx/v1.41/images/create?fromImage=a&tag=1": EOF',
        "failed to connect to the docker API at unix:///var/run/docker.sock; check if the path is correct",
        "permission denied while trying to connect to the Docker daemon socket",
        D + "connection error: desc = transport: dial unix /run/containerd/containerd.sock: no such file",
    ],
)
def test_an_engine_out_of_reach_is_no_failure_of_the_image(said: str) -> None:
    with pytest.raises(EngineDown):
        why(DOCKER, said)


def test_every_class_is_one_sentence_with_a_cure_and_without_passwords() -> None:
    said = 'Get "https://alice:s3cret@r.test/v2/?X-Signature=abc123": EOF'
    for engine in (DOCKER, PODMAN):
        for reason in Why:
            wanted = Pull("alice:s3cret@r.test:5000/t/a:1", "", "linux/amd64", 1, 1)
            sentence = str(failure(engine, wanted, reason, said))
            assert sentence.startswith(f"image ***@r.test:5000/t/a:1: {reason.value}; ")
            assert not any(word in sentence for word in ("s3cret", "alice", "abc123", "{", "\n"))
    denied = str(failure(DOCKER, Pull("r.test:5000/t/a:1", "", "", 1, 1), Why.DENIED, "denied"))
    assert "`docker login r.test:5000` as the user who runs the worker, or point DOCKER_CONFIG" in denied
    assert "`docker login`" in str(failure(DOCKER, Pull("team/a", "", "", 1, 1), Why.DENIED, "denied"))
    assert "`podman login`" in str(failure(PODMAN, Pull("a", "", "", 1, 1), Why.UNAUTHORIZED, "no"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://u:p@h/x", "https://***@h/x"),
        ("http://u:p@a@h/x", "http://***@h/x"),
        ("http://u:p/q@h/x", "http://***@h/x"),
        ("u:p/q@h/x", "***@h/x"),
        ("no such image: http:/u:pw@127.0.0.1/x", "no such image: ***@127.0.0.1/x"),
        ("r.test:5000/t/a:1@sha256:" + "a" * 64, "r.test:5000/t/a:1@sha256:" + "a" * 64),
        ("docker://r.test:5000/t/a@sha256:" + "a" * 64, "docker://r.test:5000/t/a@sha256:" + "a" * 64),
        ("https://cdn.test/blob?sig=1&x=2 failed", "https://cdn.test/blob?*** failed"),
        ("127.0.0.1:5000/t/a:1 not found", "127.0.0.1:5000/t/a:1 not found"),
        ("mail a@b.c", "mail a@b.c"),
    ],
)
def test_credentials_leave_urls_and_nothing_else_does(text: str, expected: str) -> None:
    assert without_credentials(text) == expected


def test_a_name_that_is_none_is_shown_safely() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown("") == "''"
    assert len(shown("a" * 100_000)) == 300
