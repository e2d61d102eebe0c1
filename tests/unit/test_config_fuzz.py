"""Whatever the file and the flags hold: settings come out, or ConfigurationError; nothing else, and nothing empty."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oz_worker.config import flags, schema
from oz_worker.config.load import load
from oz_worker.config.show import show
from oz_worker.errors import ConfigurationError

ENVIRON = {"WARP_API_KEY": "wk-test", "HOME": "/root"}
QUIET = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
KEYS = sorted({*schema.TOP, *schema.BACKENDS, "backend", "link", "exit_after", "api_key", "<<", "name", "value"} | {
    key for section in (*schema.BACKENDS.values(), *schema.GROUPS.values()) for key in section
})  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["10s", "-1s", "1e999h", "64MiB", "yes", "/", "a:/b", "~", "~x/y", "ws://[", "wss://h:0", "9" * 400]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=5)
    ),
    max_leaves=20,
)
LINES = st.lists(
    st.sampled_from(
        ["a: ", "- ", "  ", "\t", "&a ", "*a", "<<: ", "{", "}", "[", "]", "? ", "!!int ", "!x ", "|", ">", "'"]
    )
    | st.sampled_from(
        ["\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "worker_id: w\n", "backend:\n", "# x\n", "\x85"]
    )
    | st.text(max_size=4),
    max_size=40,
).map("".join)


def attempt(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "c.yaml"
        file.write_bytes(data)
        try:
            show(load(argparse.Namespace(config_file=str(file)), ENVIRON))
            problems: tuple[str, ...] = ("none",)
        except ConfigurationError as error:
            problems = error.problems
        assert problems
        assert all(line.strip() for line in problems)


@QUIET
@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_a_sentence(data: bytes) -> None:
    attempt(data)


@QUIET
@given(LINES)
def test_any_yaml_is_a_configuration_or_a_sentence(text: str) -> None:
    attempt(text.encode("utf-8", "surrogatepass"))


@QUIET
@given(
    st.dictionaries(st.sampled_from(sorted(schema.TOP)), VALUES, max_size=4),
    st.sampled_from([*schema.BACKENDS, ""]),
    VALUES,
)
def test_any_values_are_a_configuration_or_a_sentence(top: dict[str, object], backend: str, section: object) -> None:
    document = {"worker_id": "w", **top, **({"backend": {backend: section}} if backend else {"backend": section})}
    attempt(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))


@QUIET
@given(
    st.sampled_from(sorted(schema.BACKENDS)),
    st.data(),
)
def test_any_value_of_a_known_key_is_taken_or_told(backend: str, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(schema.BACKENDS[backend])))
    document = {"worker_id": "w", "backend": {backend: {key: data.draw(VALUES)}}}
    attempt(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))


@QUIET
@given(st.lists(st.sampled_from([name for flag in flags.RUN for name in flag.names]) | st.text(max_size=8), max_size=6))
def test_any_flags_are_a_configuration_or_a_sentence(words: list[str]) -> None:
    if {"-h", "--help"} & {word.split("=")[0] for word in words} or any(word.startswith("-h") for word in words):
        return  # prints help and leaves
    try:
        load(flags.parse(["run", *words]), ENVIRON)
        problems: tuple[str, ...] = ("none",)
    except ConfigurationError as error:
        problems = error.problems
    assert problems
