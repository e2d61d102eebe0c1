"""What the dashboard asks and an alert sees of a worker that runs, through a Prometheus that scrapes it."""

from __future__ import annotations

import re

from tests.monitoring.test_alerts import ALERTS, GROUP
from tests.monitoring.test_dashboard import expressions
from tests.prometheus import Prometheus
from tests.rig import WORKER_ID, Rig

IDENTITY = next(rule["expr"] for rule in GROUP["rules"] if rule.get("record") == "oz_worker:identity")


def test_a_running_worker_fills_the_dashboard_and_one_without_a_server_sets_off_the_alert(rig: Rig) -> None:
    rig.config["max_concurrent_tasks"] = 2
    del rig.config["state_dir"]  # as with the shipped unit and a file that does not name it
    systemd = {"STATE_DIRECTORY": f"{rig.state_dir}:{rig.workspaces}"}
    worker = rig.start(env=systemd | {"OTEL_METRICS_EXPORTER": "prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "0"})
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    target = re.findall(r"http://(\S+)/metrics", worker.wait_log(r"metrics are served on \S+"))[0]
    with Prometheus(rig.place / "prometheus", target) as prometheus:
        prometheus.wait_for('oz_worker_tasks_completed_total{result="succeeded"}', 1)
        asked = [query for _title, query in expressions() if 'worker_id=~".*"' in query]
        empty = [query for query in asked if not prometheus.query(query)]
        # What asks for a rate needs two scrapes and an increase; this worker has done one thing and pulled nothing.
        assert asked
        assert [query for query in empty if not re.search(r"\[\w+\]", query)] == []
        named = {("worker_id", WORKER_ID), ("backend", "direct")}
        disconnected = ALERTS["OzWorkerDisconnected"]["expr"].replace("oz_worker:identity", f"({IDENTITY})")
        assert prometheus.query(disconnected) == {}
        rig.plane.down()
        prometheus.wait_for(f"count({disconnected})", 1)
        assert prometheus.query(disconnected) == {frozenset(named): 0}
    command = re.search(
        r"python -m oz_worker (status [^`]*)`", ALERTS["OzWorkerDisconnected"]["annotations"]["description"]
    )
    assert command is not None
    words = command[1].replace("FILE", str(rig.place / "config.yaml")).split()
    assert rig.run_command(*words).returncode == 3
    cure = re.findall("write `(state_dir: .*)` into the file", worker.log)[0]
    with (rig.place / "config.yaml").open("a") as file:
        file.write(f"{cure}\n")
    assert "link: disconnected for " in rig.run_command(*words).stdout
    worker.kill()
    rig.audit()
