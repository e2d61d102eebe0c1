"""No known secret survives redaction, however the text is cut or spelled."""

from __future__ import annotations

import base64
import json
import random
import re
import urllib.parse
from typing import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oz_worker.backends.environ import secret_values
from oz_worker.redact import MASK, RedactedStream, Redactor, Secret, held_in

LETTERS = "abcXYZ019+/= \"\\<>&~%'é漢\n"
value = st.one_of(st.text(LETTERS, min_size=6, max_size=60), st.text(LETTERS, min_size=200, max_size=700))
secrets = st.lists(value, min_size=1, max_size=3)
filler = st.text(alphabet="abcXYZ 123\n", max_size=40)
patient = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def lower_hex(quoted: str) -> str:
    """The same with small letters in its escapes."""
    return re.sub("%..", lambda code: code[0].lower(), quoted)


def encoder(safe: str, *, small: bool, plus: bool) -> Callable[[str], bytes]:
    """One of the ways to quote in a URL."""

    def encode(value: str) -> bytes:
        quoted = (urllib.parse.quote_plus if plus else urllib.parse.quote)(value, safe=safe)
        return (lower_hex(quoted) if small else quoted).encode()

    return encode


ENCODE_URI = ";,/?:@&=+$!*'()#"
WHOLE: list[Callable[[str], bytes]] = [
    str.encode,
    lambda value: repr(value)[1:-1].encode(),
    lambda value: json.dumps(value)[1:-1].encode(),
    lambda value: json.dumps(value, ensure_ascii=False)[1:-1].encode(),
    lambda value: json.dumps(value)[1:-1].replace("/", "\\/").encode(),
    lambda value: base64.b64encode(value.encode()),
    lambda value: base64.b64encode(value.encode()).rstrip(b"="),
    lambda value: base64.urlsafe_b64encode(value.encode()),
    lambda value: base64.urlsafe_b64encode(value.encode()).rstrip(b"="),
    lambda value: value.encode().hex().encode(),
    lambda value: value.encode().hex().upper().encode(),
    lambda value: json.dumps(json.dumps(value)[1:-1])[1:-1].encode(),
    lambda value: json.dumps(json.dumps(value, ensure_ascii=False)[1:-1], ensure_ascii=False)[1:-1].encode(),
    lambda value: repr(json.dumps(value))[2:-2].encode(),
    lambda value: urllib.parse.quote(json.dumps(value)[1:-1], safe="").encode(),
    lambda value: base64.b64encode(json.dumps(value)[1:-1].encode()).rstrip(b"="),
    lambda value: urllib.parse.quote(base64.b64encode(value.encode()).rstrip(b"="), safe="").encode(),
    lambda value: urllib.parse.quote(urllib.parse.quote_plus(value)).encode(),
    lambda value: urllib.parse.quote(urllib.parse.quote(value, safe=ENCODE_URI), safe=ENCODE_URI).encode(),
    *(encoder(safe, small=small, plus=plus) for safe in ("", "/") for small in (False, True) for plus in (False, True)),
]
"""How a value is spelled by programs: all of it must go."""


def mixed(data: st.DataObject, text: bytes) -> bytes:
    """The hex digits of its escapes in small letters and capitals, each as it comes."""

    chance = random.Random(data.draw(st.integers(0, 1000)))

    def either(code: re.Match[bytes]) -> bytes:
        return bytes(chance.choice([one, one ^ 32]) if chr(one).isalpha() else one for one in code[1])

    return re.sub(rb"((?<=%)[0-9a-fA-F]{2}|(?<=\\u)[0-9a-fA-F]{4})", either, text)


def wrapped(data: st.DataObject, text: bytes) -> bytes:
    """*text* with line breaks at any places, and how a terminal or `base64` ends its lines."""
    for place in sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)), reverse=True):
        text = text[:place] + data.draw(st.sampled_from([b"\n", b"\r\n"])) + text[place:]
    return text


def streamed(redactor: Redactor, raw: bytes, data: st.DataObject) -> bytes:
    """What a stream shows of *raw* that comes in pieces of any size."""
    stream = RedactedStream(redactor)
    shown, position = b"", 0
    most = data.draw(st.sampled_from([3, 30, 1000]))
    while position < len(raw):
        size = data.draw(st.integers(1, most))
        shown += stream.feed(raw[position : position + size])
        position += size
    return shown + stream.flush()


def bare(text: bytes) -> bytes:
    """Without line breaks."""
    return text.translate(None, b"\r\n")


@given(secrets, st.data())
@patient
def test_no_spelling_of_a_secret_survives_wherever_it_is_split(values: list[str], data: st.DataObject) -> None:
    values = [value.strip() for value in values]
    redactor = Redactor(values)
    text, hidden = b"", []
    for value in values:
        form = mixed(data, data.draw(st.sampled_from(WHOLE))(value))
        text += data.draw(filler).encode() + wrapped(data, form)
        if len(value) >= 6 and len(bare(value.encode())) >= 6:
            hidden.append(bare(form))
    text += data.draw(filler).encode()
    as_text = redactor(text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    for shown in (streamed(redactor, text, data), redactor.masked(text), as_text):
        assert [form for form in hidden if form in bare(shown)] == []


@given(st.text("abcXYZ019+/=é:", min_size=8, max_size=60), st.text("vw", max_size=9), st.data())
@patient
def test_of_basic_authentication_nothing_of_the_password_remains(value: str, user: str, data: st.DataObject) -> None:
    """Also where the header stands in a URL; at each end a character may have bits of the password and of others."""
    header = base64.b64encode(f"{user}:{value}".encode()).decode()
    for form in (header, header.rstrip("=").translate(str.maketrans("+/", "-_")), urllib.parse.quote(header, safe="")):
        shown = streamed(Redactor([value]), b"Authorization: Basic " + form.encode(), data)
        rest = re.split(rb"\*+", urllib.parse.unquote_to_bytes(bare(shown).removeprefix(b"Authorization: Basic ")))
        assert len(rest) == 2, shown
        assert len(rest[0]) <= (8 * len(user) + 8 + 5) // 6, shown
        assert len(rest[1].rstrip(b"=")) <= 1, shown


@given(st.binary(max_size=5), st.text(alphabet=LETTERS, min_size=8, max_size=60), st.binary(max_size=5), st.data())
@patient
def test_of_base64_of_a_longer_text_nothing_of_the_secret_remains(
    before: bytes, value: str, after: bytes, data: st.DataObject
) -> None:
    """Whatever can be read back from what is shown has at most a byte of it at each end."""
    value = value.strip().replace("\n", "n").ljust(8, "x")
    encoded = base64.b64encode(before + value.encode() + after)
    shown = streamed(Redactor([value]), data.draw(st.sampled_from([encoded, encoded.translate(SAFE)])), data)
    first, masks, last = shown.partition(MASK.encode())
    assert masks
    assert len(first) <= (8 * len(before) + 5) // 6 + 1
    assert len(last.rstrip(b"=")) <= (8 * len(after) + 5) // 6 + 1


SAFE = bytes.maketrans(b"+/", b"-_")


@given(secrets, st.binary(max_size=3000), st.data())
@patient
def test_what_holds_no_secret_passes_byte_for_byte(values: list[str], raw: bytes, data: st.DataObject) -> None:
    redactor = Redactor(["sEcReT" + value for value in values])
    assert streamed(redactor, raw, data) == raw
    assert redactor.masked(raw) is raw


@given(secrets, st.data())
@patient
def test_pieces_show_the_same_as_the_whole(values: list[str], data: st.DataObject) -> None:
    """But for secrets torn apart by a line break within their first characters, whose beginning is out already."""
    redactor = Redactor(values)
    text = "".join(data.draw(filler) + data.draw(st.sampled_from([value, value[:-1]])) for value in values)
    raw = bare(text.encode())
    assert streamed(redactor, raw, data) == redactor.masked(raw)


@given(secrets, st.data())
@patient
def test_what_is_left_of_a_secret_where_output_was_cut_off_in_front_is_masked(
    values: list[str], data: st.DataObject
) -> None:
    value = bare(values[0].strip().encode())
    redactor = Redactor([value.decode()])
    if len(value.decode().strip()) < 12:
        return
    begin = data.draw(st.integers(1, len(value) - 7))
    stream = RedactedStream(redactor, torn=True)
    shown = stream.feed(value[begin:] + b" and more") + stream.flush()
    assert shown.startswith(b"***"), shown
    assert shown.endswith(b" and more")


def test_a_live_redactor_forgets_what_was_removed_and_only_that() -> None:
    redactor = Redactor(["for-ever-1"])
    for number in range(1500):  # enough to build its table anew
        redactor.add([f"token-{number:06}", "shared-token"])
        redactor.remove([f"token-{number:06}"])
    assert redactor("token-000007 token-001499 for-ever-1 shared-token") == "token-000007 token-001499 *** ***"
    for _ in range(1500):
        redactor.remove(["shared-token"])
    assert redactor("shared-token for-ever-1") == "shared-token ***"


def test_a_flood_of_a_secret_is_one_mask_and_holds_nothing_back_but_its_end() -> None:
    """What made the time quadratic: secrets that touch each other without an end."""
    stream = RedactedStream(Redactor(["flooding-secret"]))
    shown = [stream.feed(b"flooding-secret" * 5000) for _ in range(40)]
    assert b"".join(shown) == b"***"
    assert stream.feed(b" then\n" + b"\n" * 100_000)[:7] == b" then\n\n"
    assert stream.feed(b"x flooding-s\n") == b"x "
    assert stream.feed(b"\n" * 5000)[:12] == b"flooding-s\n\n"
    assert stream.feed(b"a line that ends with f\n") == b"a line that ends with f\n"
    assert stream.feed(b"looding-secret\n") == b"***\n"


def test_of_a_flood_of_one_byte_nothing_is_found_twice() -> None:
    """Secrets that repeat a byte are found at every place of it: 16 KiB took 22 s with 500 of them."""
    redactor = Redactor("-" * size for size in range(6, 60))
    flood = b"-" * 100_000
    assert len(redactor._found(flood)) <= 2 * len(flood)
    assert redactor.masked(b"a " + flood + b" z") == b"a *** z"


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
    document = {"gadget": {"type": "streamable-http", "command": "python3", "url": "https://h/Server/messages"}}
    document["gadget"]["args"] = "Docker"
    text = "gadget: python3 server got messages over streamable-http from a docker server"
    assert Redactor(held_in(document))(text) == text


@pytest.mark.parametrize("name", ["NODE_ENV", "HOST", "X"])
def test_a_variable_that_says_production_blanks_out_nothing_and_a_password_that_does_is_masked(name: str) -> None:
    """Of the worker, of a task, of an MCP server alike; what only looks like a word is a secret."""
    for word in ("production", "verbose", "Disabled"):
        assert secret_values({name: word}) == held_in({"s": {"env": {name: word}}}) == ()
        telling = ("DB_PASSWORD", "ApiToken", "PGPASS", "LOGIN", "pin")
        assert secret_values(dict.fromkeys(telling, word)) == (word,) * len(telling)
        assert [held_in({"s": {"env": {one: word}}}) for one in telling] == [(word,)] * len(telling)
        assert word in held_in({"s": {"args": ["--password", word]}})
    for other in ("productions", "hunter22", "production-db", "localhost:1"):
        assert secret_values({name: other}) == (other,)
    assert Redactor(secret_values({name: "production", "DB_PASSWORD": "production"}))("in production") == "in ***"
