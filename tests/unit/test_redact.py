"""No known secret survives redaction, however the text is cut or spelled."""

from __future__ import annotations

import base64
import json
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oz_worker.redact import MASK, RedactedStream, Redactor, Secret, held_in

secrets = st.lists(st.text(alphabet='abcXYZ+/= "\\<é\n', min_size=6, max_size=24), min_size=1, max_size=4)
filler = st.text(alphabet="abcXYZ 123\n", max_size=40)


@given(secrets, st.data())
@settings(max_examples=150, deadline=None)
def test_a_secret_split_anywhere_never_appears(values: list[str], data: st.DataObject) -> None:
    text = "".join(data.draw(filler) + value for value in values) + data.draw(filler)
    stream = RedactedStream(Redactor(values))
    raw, shown, position = text.encode(), b"", 0
    while position < len(raw):
        size = data.draw(st.integers(1, 30))
        shown += stream.feed(raw[position : position + size])
        position += size
    shown += stream.flush()
    for value in values:
        if len(value.strip().replace("\n", "")) >= 6:
            assert value.encode() not in shown


@given(st.text(alphabet='abcdXYZ+/=é"\\&', min_size=8, max_size=40))
@settings(max_examples=150, deadline=None)
def test_the_usual_spellings_are_masked(value: str) -> None:
    redact = Redactor([value])
    raw = value.encode()
    for spelled in (
        value,
        urllib.parse.quote(value, safe=""),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
    ):
        assert spelled not in redact(f"a {spelled} b")
    for prefix in (b"", b"x", b"xy"):
        encoded = base64.b64encode(prefix + raw + b"tail").decode()
        assert MASK in redact(encoded)


def test_overlapping_secrets_are_masked_as_one() -> None:
    assert Redactor(["abcdefgh", "efghijkl"])("--abcdefghijkl--") == f"--{MASK}--"


def test_a_secret_that_begins_with_another_is_masked_whole() -> None:
    assert Redactor(["token-1", "token-1-longer"])("x token-1-longer y") == f"x {MASK} y"


def test_every_line_of_a_key_is_masked() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n"
    shown = Redactor([key])("  MIIEvQIBADANBgkq\r\n  hkiG9w0BAQEFAASC")
    assert "MIIE" not in shown
    assert "hkiG" not in shown


def test_short_values_do_not_blank_out_ordinary_text() -> None:
    assert Redactor(["true", "1", "main"])("true is 1 on main") == "true is 1 on main"


def test_a_secret_shows_only_when_asked() -> None:
    secret = Secret("wk-very-secret")
    assert "wk-" not in f"{secret} {secret!r} {[secret]} {'%s' % secret}"  # noqa: UP031
    assert secret.reveal() == "wk-very-secret"


TOKEN = "t0ken-77aa"
PLACES = [
    TOKEN,
    f"Bearer {TOKEN}",
    f"--token={TOKEN}",
    f"X-Api-Key:{TOKEN}",
    f"a=1; session={TOKEN}; b=2",
    f"npx -y remote --header 'Authorization: Bearer {TOKEN}'",
    f"https://host/mcp/{TOKEN}/sse",
    f"https://host/?a=b&key={TOKEN}&c=d",
    f"https://host/?{TOKEN}",
    f"https://host/#access={TOKEN}",
    f"https://{TOKEN}@host/",
    f"https://user:{TOKEN}@host/",
    f"https://{TOKEN}:x-oauth-basic@[::1",
    f"--dsn=postgres://user:{TOKEN}@host/base",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_token_anywhere_in_the_configuration_of_a_server_is_masked_when_it_is_shown_alone(place: str) -> None:
    document = {"server": {"command": "python3", "args": ["-y", {"deep": [place]}], "timeout": 30, "on": None}}
    assert Redactor(held_in(document))(f"got {TOKEN} there") == f"got {MASK} there"


def test_an_encoded_token_of_a_url_is_masked_in_both_spellings() -> None:
    redact = Redactor(held_in({"url": "https://host/?key=a%2Bb%3Dcd"}))
    assert redact("a%2Bb%3Dcd or a+b=cd") == f"{MASK} or {MASK}"


def test_names_and_well_known_words_of_a_configuration_are_not_masked() -> None:
    document = {"gadget": {"type": "streamable-http", "command": "python3", "url": "https://h/server/messages"}}
    text = "gadget: python3 server got messages over streamable-http"
    assert Redactor(held_in(document))(text) == text
