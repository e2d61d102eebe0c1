"""A real registry on loopback: open or with a password, plain or with TLS, several over one folder of images."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import trustme

from tests.engines.client import PATH, PATIENCE, Client, EngineError, find_program
from tests.engines.images import load_image

USER = "alice"
_TRIES = 3
"""A free port may be taken by somebody else before the registry has it."""


class Registry:
    """A registry that runs until `close`, or until the process that made it ends. Any thread may use it.

    *password* is USER's; "" lets everybody in. With a *certificate* it serves HTTPS under *name*, on ::1, because
    engines check no certificate on 127.x: give the engine the name and the authority (`Engine(hosts=..., certs=...)`).
    *data* is the folder of another registry whose images it shares.
    """

    def __init__(
        self,
        place: Path,
        *,
        password: str = "",
        certificate: trustme.LeafCert | None = None,
        name: str = "reg.test",
        data: Path | None = None,
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.data = data or place / "data"
        self.password = password
        self._tls = certificate is not None
        if password:
            command = [find_program("htpasswd"), "-iBn", USER]
            made = subprocess.run(command, input=password, capture_output=True, text=True, check=True)
            (place / "htpasswd").write_text(made.stdout)
        if certificate:
            certificate.private_key_pem.write_to_path(str(place / "key.pem"))
            certificate.cert_chain_pems[0].write_to_path(str(place / "cert.pem"))
        for _ in range(_TRIES):
            self.port = _free_port(self._bind)
            self.address = f"{name if certificate else '127.0.0.1'}:{self.port}"
            self._process = self._start()
            if self._listens():
                return
            self.close()
        raise EngineError(f"docker-registry does not start; it said:\n{self.log}")

    @property
    def _bind(self) -> str:
        return "::1" if self._tls else "127.0.0.1"

    @property
    def log(self) -> str:
        """What it has written."""
        return (self.place / "registry.log").read_text(encoding="utf-8", errors="replace")

    def _start(self) -> subprocess.Popen[bytes]:
        web: dict[str, Any] = {"addr": f"[{self._bind}]:{self.port}" if self._tls else f"{self._bind}:{self.port}"}
        web["secret"] = "uploads"
        if self._tls:
            web["tls"] = {"certificate": str(self.place / "cert.pem"), "key": str(self.place / "key.pem")}
        config: dict[str, Any] = {"version": 0.1, "log": {"level": "warn"}, "http": web}
        config["storage"] = {"filesystem": {"rootdirectory": str(self.data)}, "delete": {"enabled": True}}
        if self.password:
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(self.place / "htpasswd")}}
        path = self.place / "registry.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        # setpriv: the registry dies with us, even when we are killed.
        command = ["setpriv", "--pdeathsig", "KILL", find_program("docker-registry"), "serve", str(path)]
        with (self.place / "registry.log").open("ab") as log:
            return subprocess.Popen(
                command, env={"PATH": PATH}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _listens(self) -> bool:
        limit = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < limit:
            try:
                socket.create_connection((self._bind, self.port), PATIENCE).close()
            except OSError:
                time.sleep(0.01)
            else:
                return True
        return False

    def reference(self, repository: str) -> str:
        """How an engine names the image `repository:tag` of this registry."""
        return f"{self.address}/{repository}"

    def log_in(self, client: Client, password: str = "") -> None:
        """Let *client* know the password, or another one in its place. Raises EngineError when it is refused."""
        secret = (password or self.password).encode()
        client.cli("login", "--username", USER, "--password-stdin", self.address, stdin=secret)

    def publish(self, client: Client, repository: str, **image: Any) -> str:
        """Make an image as `load_image` does, push it, forget it locally, and return its reference.

        Layers that another image of the engine has too are not pulled again: give it files of its own.
        """
        reference = load_image(client, self.reference(repository), **image)
        client.cli("push", reference)
        client.cli("rmi", reference)
        return reference

    def close(self) -> None:
        """End it; the images stay in `data`. May be called twice."""
        self._process.kill()
        self._process.wait(PATIENCE)


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as line:
        line.bind((address, 0))
        return int(line.getsockname()[1])
