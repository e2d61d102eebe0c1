"""What the variables ask for: what cannot be had costs one line, names no secret, and the worker runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from oz_worker.checks import host
from oz_worker.known import in_environment
from oz_worker.observe import otlp_target
from oz_worker.observe.otlp_target import Target, Unusable
from oz_worker.settings import Settings
from tests.conftest import Certificates
from tests.otlp.receiver import Receiver
from tests.rig import Rig, Worker, until

BASE = "OTEL_EXPORTER_OTLP_"
SECRET = "hush-hush-0815"


def read(signal: str = "metrics", **variables: str) -> Target:
    return otlp_target.read(signal, {BASE + name: value for name, value in variables.items()})


def test_the_endpoint_by_the_rules_of_the_specification() -> None:
    assert read().endpoint == "http://localhost:4318/v1/metrics"
    assert read("traces", ENDPOINT="https://c.example/otlp/").endpoint == "https://c.example/otlp/v1/traces"
    assert read(ENDPOINT="http://x", METRICS_ENDPOINT="http://c.example:4318").endpoint == "http://c.example:4318/"
    assert read("traces", ENDPOINT="http://c:1", METRICS_ENDPOINT="http://d:2").endpoint == "http://c:1/v1/traces"
    assert read(ENDPOINT="http://[::1]:4318").endpoint == "http://[::1]:4318/v1/metrics"
    assert read(ENDPOINT="   ", PROTOCOL="").protocol == "http/protobuf"
    for endpoint, insecure, expected in (
        ("", "", ("localhost:4317", False)),
        ("https://c.example:4317", "true", ("c.example:4317", True)),
        ("http://c.example:4317", "false", ("c.example:4317", False)),
        ("c.example:4317", "", ("c.example:4317", True)),
        ("c.example:4317", "true", ("c.example:4317", False)),
    ):
        found = read(PROTOCOL="grpc", ENDPOINT=endpoint, INSECURE=insecure)
        assert (found.endpoint, found.secure) == expected, endpoint


def test_secrets_are_taken_out_of_what_is_shown() -> None:
    found = read(ENDPOINT=f"http://me:{SECRET}@c.example:4318/x?key={SECRET}", HEADERS=f"a={SECRET}")
    assert found.endpoint == f"http://c.example:4318/x/v1/metrics?key={SECRET}"
    assert dict(found.headers)["authorization"].reveal().startswith("Basic ")
    assert SECRET not in found.shown
    assert SECRET not in repr(found.headers)
    told = {"HEADERS": f"authorization=Bearer%20{SECRET},b", "TRACES_ENDPOINT": f"http://me:other@c:1/{SECRET}"}
    assert set(in_environment({BASE + name: value for name, value in told.items()})) >= {SECRET, "other"}


def test_numbers_and_words_that_mean_nothing_leave_the_default() -> None:
    assert (read(TIMEOUT="2500").timeout, read(METRICS_TIMEOUT="500", TIMEOUT="9").timeout) == (2.5, 0.5)
    odd = read(TIMEOUT="soon", COMPRESSION="zip")
    assert (odd.timeout, odd.compressed, len(odd.warnings)) == (10.0, "", 2)
    assert (read(COMPRESSION="none").compressed, read(COMPRESSION="GZIP").compressed) == ("", "gzip")
    assert len(read(PROTOCOL="grpc", COMPRESSION="deflate").warnings) == 1


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'"),
        ({"ENDPOINT": f"collector:{SECRET}"}, "OTEL_EXPORTER_OTLP_ENDPOINT is not a collector's address"),
        ({"METRICS_ENDPOINT": "ftp://c:1"}, "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is 'ftp://c:1', which is not a"),
        ({"ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4318', which is not a"),
        ({"ENDPOINT": "http://collector:99999"}, "write it like http://collector.example:4318"),
        ({"ENDPOINT": f"http://{SECRET}@"}, "is not a collector's address"),
        ({"ENDPOINT": "http://col lector:1"}, "is not a collector's address"),
        ({"ENDPOINT": "http://collector..example:1"}, "which is not a collector's address"),
        ({"ENDPOINT": "http://[::1]x:1"}, "is not a collector's address"),
        ({"ENDPOINT": "collector:x", "PROTOCOL": "grpc"}, "write it like collector.example:4317"),
        ({"HEADERS": f"a=1,{SECRET}"}, "OTEL_EXPORTER_OTLP_HEADERS: entry 2 is no header"),
        ({"METRICS_HEADERS": f"a b={SECRET}"}, "OTEL_EXPORTER_OTLP_METRICS_HEADERS: entry 1 is no header"),
        ({"HEADERS": f"a={SECRET}%0d%0ab: c"}, "OTEL_EXPORTER_OTLP_HEADERS: entry 1 is no header"),
        ({"CERTIFICATE": "/nowhere/ca.pem"}, "OTEL_EXPORTER_OTLP_CERTIFICATE: /nowhere/ca.pem cannot be read"),
        ({"CERTIFICATE": "/dev/null"}, "OTEL_EXPORTER_OTLP_CERTIFICATE: /dev/null holds nothing usable"),
        ({"CLIENT_CERTIFICATE": "/dev/null"}, "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: /dev/null holds nothing"),
        ({"CLIENT_KEY": "/dev/null"}, "OTEL_EXPORTER_OTLP_CLIENT_KEY is set and"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_without_its_value(variables: dict[str, str], sentence: str) -> None:
    with pytest.raises(Unusable) as caught:
        read(**{"ENDPOINT": "https://collector.example", **variables})
    assert sentence in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_client_certificate_without_its_key_is_no_pair(certificates: Certificates, tmp_path: Path) -> None:
    leaf = certificates.ca.issue_cert("worker.example")
    pem, key = tmp_path / "client.pem", tmp_path / "client.key"
    leaf.cert_chain_pems[0].write_to_path(str(pem))
    leaf.private_key_pem.write_to_path(str(key))
    found = read(ENDPOINT="https://c", CLIENT_CERTIFICATE=str(pem), CLIENT_KEY=str(key)).certificates
    assert found == ("", str(pem), str(key))
    with pytest.raises(Unusable, match="the key does not fit"):
        read(ENDPOINT="https://c", CLIENT_CERTIFICATE=str(pem))


def warnings(worker: Worker) -> list[str]:
    return [line.split(" WARNING ")[1] for line in worker.log.splitlines() if " WARNING " in line]


def test_bad_settings_cost_a_line_each_and_the_worker_works(rig: Rig) -> None:
    """One where both signals or two exporters have it from the same variable; `check` says the same sentences."""
    expected = (
        "OTEL_METRICS_EXPORTER names 'oltp', which this worker does not know; use a comma list of ",
        "OTEL_SDK_DISABLED is 'yes'; set it to true or false. false is used",
        "OTEL_RESOURCE_ATTRIBUTES is not used: part 1 has no equals sign; write ",
        "OTEL_METRIC_EXPORT_INTERVAL is '-5'; set it to a whole number of milliseconds from 1 on. 60000 is used",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE is 'sideways'; set it to one of cumulative, ",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS: entry 2 is no header; write ",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT is 'soon'; set it to a whole number of milliseconds from 1 on. 10000 is",
        "OTEL_EXPORTER_OTLP_COMPRESSION is 'zip', which grpc does not have; set it to gzip. none is used",
        "OTEL_EXPORTER_OTLP_INSECURE is 'maybe'; set it to true or false. false is used",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE is 9999999; set it to no more than OTEL_BSP_MAX_QUEUE_SIZE. 2048 is used",
        "OTEL_BSP_SCHEDULE_DELAY is '0'; set it to a whole number of milliseconds from 1 on. 5000 is used",
        "OTEL_SPAN_EVENT_COUNT_LIMIT is 'many'; set it to a whole number from 0 on. 128 is used",
        "OTEL_TRACES_SAMPLER is 'dice'; set it to one of parentbased_always_on, ",
        "OTEL_EXPORTER_PROMETHEUS_PORT is 'http', which is no port up to 65535; set it to one, such as ",
    )
    rig.secrets.append(SECRET)
    rig.config["log_level"] = "debug"
    rig.env |= {
        "OTEL_METRICS_EXPORTER": ",otlp,,prometheus,oltp,oltp,console,otlp",
        "OTEL_EXPORTER_PROMETHEUS_PORT": "http",
        "OTEL_TRACES_EXPORTER": "otlp",
        f"{BASE}METRICS_HEADERS": f"x={SECRET},{SECRET}",
        f"{BASE}METRICS_TEMPORALITY_PREFERENCE": "sideways",
        f"{BASE}TRACES_PROTOCOL": "grpc",
        f"{BASE}TRACES_ENDPOINT": "localhost:4317",
        f"{BASE}TRACES_TIMEOUT": "soon",
        f"{BASE}COMPRESSION": "zip",
        f"{BASE}INSECURE": "maybe",
        "OTEL_SDK_DISABLED": "yes",
        "OTEL_RESOURCE_ATTRIBUTES": "team",
        "OTEL_METRIC_EXPORT_INTERVAL": "-5",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "9999999",
        "OTEL_BSP_SCHEDULE_DELAY": "0",
        "OTEL_SPAN_EVENT_COUNT_LIMIT": "many",
        "OTEL_TRACES_SAMPLER": "dice",
        "OTEL_TRACES_SAMPLER_ARG": "unheard",
    }
    asked = {name: text for name, text in rig.env.items() if name.startswith("OTEL_")}
    plain = {name: text for name, text in asked.items() if not name.endswith("_HEADERS")}
    told = "env | grep ^OTEL_ | grep -v _HEADERS= | sort >"
    rig.config["backend"]["direct"] |= {"inherit_environment": [*plain], "setup_command": f"{told} {rig.place}/hook"}
    worker = rig.start()
    until(lambda: len(warnings(worker)) >= len(expected), "the warnings")
    rig.plane.wait_acknowledged(rig.submit(f"{told} {rig.place}/agent"))
    for who in ("hook", "agent"):  # they get what was set, and not what is read in its place
        assert (rig.place / who).read_text().splitlines() == sorted(f"{n}={text}" for n, text in plain.items()), who
    probes = host.probes(Settings(worker_id="w"), asked)
    judged = "; ".join(probe.run().said for probe in probes if probe.name in ("extras", "ports"))
    assert worker.stop() == 0
    said = [line for line in warnings(worker) if "cannot be delivered" not in line]  # nobody is at localhost:4317
    for sentence in expected:
        assert sum(line.startswith(sentence) for line in said) == 1, (sentence, said)
        assert sentence in judged
    assert len(said) == len(expected), said
    assert SECRET not in judged
    rig.audit()


def without(rig: Rig, package: str) -> None:
    """A worker that finds an empty package of that name first, which is the same as none."""
    place = rig.place / "missing" / package
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise ImportError" if package == "grpc" else "")
    rig.env["PYTHONPATH"] = f"{rig.place / 'missing'}{os.pathsep}{rig.env['PYTHONPATH']}"


@pytest.mark.parametrize("asked", [True, False])
def test_without_the_extra_only_who_asked_is_told(rig: Rig, asked: bool) -> None:
    without(rig, "opentelemetry")
    rig.config["log_level"] = "debug"
    rig.env |= {"OTEL_METRICS_EXPORTER": "otlp" if asked else "", "OTEL_TRACES_EXPORTER": "console" if asked else ""}
    worker = rig.start()
    worker.wait_log("OTEL_METRICS_EXPORTER")
    if asked:
        worker.wait_log("OTEL_TRACES_EXPORTER")
    rig.plane.wait_acknowledged(rig.submit("exit 0"))
    assert worker.stop() == 0
    assert [line.count("pip install 'oz-worker[otel]'") for line in warnings(worker)] == ([1, 1] if asked else [])
    assert len([line for line in worker.log.splitlines() if "OTEL_" in line]) == (2 if asked else 1)
    rig.audit()


@pytest.mark.parametrize(
    ("missing", "protocol", "extra"), [("grpc", "grpc", "otel-grpc"), ("opentelemetry/exporter", "", "otel")]
)
def test_with_half_of_what_is_needed_the_line_names_the_extra(
    rig: Rig, missing: str, protocol: str, extra: str
) -> None:
    without(rig, missing)
    rig.env |= {"OTEL_METRICS_EXPORTER": "otlp", f"{BASE}PROTOCOL": protocol}
    worker = rig.start()
    worker.wait_log(rf"pip install 'oz-worker\[{extra}\]'")
    assert worker.stop() == 0
    assert len(warnings(worker)) == 1
    rig.audit()


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for(rig: Rig, http_receiver: Receiver) -> None:
    rig.env["PYTHONPROFILEIMPORTTIME"] = "1"
    for environ, imported in (
        ({"OTEL_METRICS_EXPORTER": "none"}, False),
        ({"OTEL_METRICS_EXPORTER": "console,prometheus", "OTEL_EXPORTER_PROMETHEUS_PORT": "0"}, False),
        ({**http_receiver.environ("traces metrics"), "OTEL_SDK_DISABLED": "true"}, False),
        (http_receiver.environ("traces"), True),
    ):
        rig.log.unlink(missing_ok=True)
        worker = rig.start(env=environ)
        rig.plane.wait_acknowledged(rig.submit("exit 0"))
        assert worker.stop() == 0
        packages = set(re.findall(r"^import time: .*\| +([a-z]\w*)", worker.log, re.MULTILINE))
        assert "oz_worker" in packages
        assert ("opentelemetry" in packages) == imported, environ
        assert "grpc" not in packages
    assert len(http_receiver.spans()) == 1
    rig.audit()
