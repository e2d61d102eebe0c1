"""Secrets stay where they belong: in the task (faults 45 and 46, failures 40, 65, 67 and 68)."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from tests.audit import secrets_in
from tests.rawserver import Peer, RawServer
from tests.rig import SAFETY, Rig, until

WAIT = "while [ ! -e $HOME/go ]; do sleep 0.05; done"
KEY = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEF\nAASCBKcwggSjAgEAAoIBAQC7\n-----END PRIVATE KEY-----\n"
AWKWARD = 'p"a\\ss/w+rd & <more> ü'
MCP_TOKEN = "mcp-token-5f2c9d"
SERVERS = {"docs": {"url": "https://mcp.invalid", "headers": {"Authorization": f"Bearer {MCP_TOKEN}"}}}


def forms(secret: str) -> list[str]:
    """How a secret may show up besides as it is; the lines of one that has several."""
    raw = secret.encode()
    found = [base64.b64encode(raw).decode(), urllib.parse.quote(secret), json.dumps(secret)[1:-1]]
    return [*found, base64.urlsafe_b64encode(raw).decode().rstrip("="), *secret.splitlines()]


def arguments(rig: Rig) -> str:
    """The arguments of every process of every unit, as `ps` shows them."""
    found = []
    for pid in rig.unit_processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended meanwhile
            found.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace"))
    return "\n".join(found)


@pytest.mark.parametrize("mcp_config", ["inline", "file"])
def test_at_debug_level_and_while_it_runs_nothing_outside_the_task_shows_a_secret(rig: Rig, mcp_config: str) -> None:
    """Fault 46, failures 65 and 67: MCP servers in arguments are the one exception, unless they go by file."""
    rig.config["log_level"] = "debug"
    rig.config["backend"]["direct"].update(mcp_config=mcp_config, setup_command="true", teardown_command="true")
    rig.own_files.add("mcp.json")
    rig.in_arguments |= {MCP_TOKEN} if mcp_config == "inline" else set()
    worker = rig.start()
    task = rig.submit(
        f"echo up > $HOME/up; {WAIT}; exit 1",
        env_vars={"DEPLOY_KEY": KEY, "ODD.NAME": AWKWARD},
        snapshot={"mcp_servers": SERVERS},
    )
    rig.secrets += [KEY, AWKWARD, MCP_TOKEN, *forms(KEY), *forms(AWKWARD)]
    until((rig.place / "up").exists, "the agent")
    shown = arguments(rig)
    assert "agent\0run" in shown
    for secret in rig.secrets:
        assert (secret in shown) == (secret == MCP_TOKEN and mcp_config == "inline"), secret
    files = list(rig.instance_dirs()[0].glob("units/*/mcp.json"))
    assert [path.stat().st_mode & 0o777 for path in files] == ([0o600] if mcp_config == "file" else [])
    rig.audit_secrets()  # the database, the unit's directory, the log, the workspace
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    for told in (
        r"dialling \S+ straight, without a proxy",
        r"answers at 127.0.0.1 after",
        rf"task {task.task_id}\S*: prepared as unit \S+ in",
        r"starting \S+ in \S+ with .*DEPLOY_KEY, .*HOME",
        r"the backend says of its end: ExitFacts\(code=1",
        r"its report, which may leave now",
        r"its traces are removed",
        r"the server has read its report",
    ):
        assert re.search(f"DEBUG .*{told}", worker.log), (told, worker.log)
    rig.own_files.clear()
    rig.audit()


ELSEWHERE = {"url-token-1a2b", "query-token-3c4d", "pass-token-5e6f", "arg-token-7a8b"}
OTHER_SERVERS = {
    "web": {"url": "https://me:pass-token-5e6f@mcp.invalid/s/url-token-1a2b/sse?key=query-token-3c4d"},
    "local": {"command": "npx", "args": ["-y", "thing", "--token=arg-token-7a8b"]},
}


@pytest.mark.parametrize("task_output", ["file", "log"])
def test_tokens_in_urls_and_arguments_of_mcp_servers_are_masked_too(rig: Rig, task_output: str) -> None:
    rig.config["task_output"] = task_output
    rig.own_files |= {"tokens", "output.log"}
    (rig.place / "tokens").write_text("".join(f"<{token}>\n" for token in sorted(ELSEWHERE)))
    worker = rig.start()
    task = rig.submit("cat $HOME/tokens; exit 1", snapshot={"mcp_servers": OTHER_SERVERS})
    rig.plane.wait_acknowledged(task)
    rig.secrets += ELSEWHERE
    rig.in_arguments |= ELSEWHERE
    assert task.terminal.message.count("<***>") == len(ELSEWHERE)
    assert not [token for token in ELSEWHERE if token in task.terminal.message]
    assert worker.stop() == 0
    rig.own_files.clear()
    (rig.place / "tokens").unlink()
    rig.audit()  # the log and the kept copy


PRINT = """
printf '%s\\n' "$DEPLOY_KEY"
printf '%s' "$DEPLOY_KEY" | base64 -w0; echo
printf 'user:%s' "$AWKWARD" | base64 -w0; echo
printf 'and %s and\\n' "$AWKWARD"
cat $HOME/forms
"""


@pytest.mark.parametrize("restart", [False, True])
def test_no_form_of_a_secret_reaches_the_report_the_log_or_the_kept_copy(rig: Rig, restart: bool) -> None:
    """Fault 45; after a restart they are known from the running agent itself."""
    encoded = [form for secret in (KEY, AWKWARD) for form in forms(secret)]
    (rig.place / "forms").write_text("".join(f"<{form}>\n" for form in encoded))
    rig.own_files |= {"forms", "output.log"}
    worker = rig.start()
    task = rig.submit(f"echo up > $HOME/up; {WAIT}; {PRINT} exit 1", env_vars={"DEPLOY_KEY": KEY, "AWKWARD": AWKWARD})
    rig.secrets += [KEY, AWKWARD, *encoded, base64.b64encode(f"user:{AWKWARD}".encode()).decode()[8:-4]]
    until((rig.place / "up").exists, "the agent")
    if restart:
        worker.kill()
        worker = rig.start()
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert "***" in task.terminal.message
    assert not [secret for secret in rig.secrets if secret in task.terminal.message]
    assert worker.stop() == 0
    (copy,) = rig.instance_dirs()[0].glob("logs/*")
    assert "and *** and\n" in copy.read_text()
    rig.own_files.remove("output.log")
    rig.audit()


OWN = {"proxy": "pr0xy-pass-31", "header": "0tel-header-32", "file": "wk-file-key-33", "docker": "c0nfigured-34"}


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_of_the_worker_itself_is_shown_by_a_task_that_prints_it(rig: Rig, form: str) -> None:
    """All that the worker has: whoever finds them prints them in pieces, wrapped, and encoded twice over."""
    key_file = rig.place / "key"
    key_file.write_text(rig.plane.key)
    del rig.env["WARP_API_KEY"]
    rig.env |= {
        "http_proxy": f"http://me:{OWN['proxy']}@127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{OWN['header']}",
    }
    rig.config |= {"log_format": form, "task_output": "log", "api_key_file": str(key_file)}
    rig.config["backend"]["direct"]["environment"] = [{"name": "CONFIGURED", "value": OWN["docker"]}]
    rig.own_files |= {"key", "config.yaml", "printed", "output.log"}
    worker = rig.start()
    printed = "".join(f"<{form}>\n<{form[:7]}\n{form[7:]}>\n" for value in OWN.values() for form in forms(value)[:2])
    (rig.place / "printed").write_text(printed)
    task = rig.submit(f"echo up > $HOME/up; {WAIT}; while read -r l; do echo $l; done < $HOME/printed; exit 1")
    until((rig.place / "up").exists, "the agent")
    rig.secrets += OWN.values()
    rig.plane.key = OWN["file"]
    key_file.write_text(OWN["file"])
    rig.plane.cut()
    rig.plane.wait_connected(SAFETY, after=1)
    (rig.place / "go").touch()
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    assert task.terminal.message.count("<***>") >= len(OWN)
    shown = task.terminal.message + worker.log + "".join(one.read_text() for one in rig.state_dir.glob("*/logs/*"))
    unwrapped = shown.encode().replace(b"\n", b"")
    assert secrets_in(unwrapped, OWN.values()) == []
    assert "| <***>" in worker.log
    rig.own_files.remove("output.log")
    rig.audit()


def test_a_server_that_repeats_the_key_tells_nobody_but_the_worker(rig: Rig) -> None:
    """Its answer stands in `status`, in the database and behind HTTP, which the log's own masking does not reach."""

    def script(peer: Peer) -> None:
        peer.read_head()
        repeated = peer.header("Authorization").encode()
        text = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\nno such key: %s"
        peer.send(text % (len(repeated) + 13, repeated))

    with RawServer(script) as server:
        worker = rig.start("--web-socket-url", server.url, connected=False)
        worker.wait_log("no such key")
        until(lambda: "no such key" in rig.run_command("status", "--state-dir", str(rig.state_dir)).stdout, "the fact")
        said = rig.run_command("status", "--state-dir", str(rig.state_dir), "--explain").stdout
        assert "***" in said
        assert rig.plane.key not in said
        worker.kill()
        rig.audit()


def lines(worker_log: str) -> list[dict[str, Any]]:
    """The records of a log in JSON; what stands before the first is the start's."""
    return [json.loads(line) for line in worker_log.splitlines()]


def test_each_line_of_the_log_has_its_date_its_level_and_its_task(rig: Rig) -> None:
    """Failure 68."""
    rig.config["log_format"] = "json"
    worker = rig.start()
    task = rig.submit("exit 1")
    rig.plane.wait_acknowledged(task)
    assert worker.stop() == 0
    records = lines(worker.log)
    assert all({"time", "level", "message"} <= set(record) for record in records)
    assert all(record["time"][4] == record["time"][7] == "-" for record in records)
    about = [record["level"] for record in records if task.task_id in record["message"]]
    assert {"info", "warning"} <= set(about)
    fields = [record for record in records if record.get("task") == task.task_id]
    assert [record["message"] for record in fields if task.task_id in record["message"]]
    assert {record.get("execution") for record in fields} == {task.execution_id or None}
    (connection,) = {record["connection"] for record in records if "connection" in record}
    assert f"(connection {connection})" in worker.log
    rig.audit()
