"""A collector that is away costs one line when it goes and one when it is back, whatever the SDK has to say meanwhile.

The SDK logs up to four lines for each failed export. Here they become the reason in the one warning; each stays to be
seen at level debug.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
import time
from typing import Any, Callable, NamedTuple

from oz_worker.redact import without_credentials
from oz_worker.timing import format_duration

logger = logging.getLogger(__name__)

LONGEST_REASON = 200
LATE_SECONDS = 5.0
"""So long after its time limit an export is given up: limits of libraries are for each byte, not for the whole."""
_PLAIN = (
    (re.compile(r"timed out|DEADLINE_EXCEEDED|Deadline Exceeded"), "no answer in time"),
    (re.compile(r"Remote end closed connection"), "it closed the connection without an answer"),
    (re.compile(r"\[Errno -?\d+\] ([^'\")\]]+)|Error\(\d+, '([^']+)"), ""),
    (re.compile(r"(certificate verify failed(?:: [^(']+)?)"), ""),
    (re.compile(r"Failed to connect to remote host: (.+)"), ""),
    (re.compile(r"[Ee]rror details: (.+)"), ""),
)
"""What there is to understand in a library's message, the plainest first: in our words, else in what it found."""
_PATH = re.compile(r" with url: \S+")
_CURES = (
    ("Hostname|not valid for", "correct OTEL_EXPORTER_OTLP_ENDPOINT to a name that its certificate is for"),
    ("certificate verify failed|CERTIFICATE_VERIFY_FAILED", "set OTEL_EXPORTER_OTLP_CERTIFICATE to its authority"),
    (r"^40[13]\b|UNAUTHENTICATED|PERMISSION_DENIED", "correct OTEL_EXPORTER_OTLP_HEADERS"),
    (r"^40[45]\b|UNIMPLEMENTED", "correct OTEL_EXPORTER_OTLP_ENDPOINT or _PROTOCOL, or give the collector a pipeline"),
    ("", "start the collector, or correct OTEL_EXPORTER_OTLP_ENDPOINT"),
)
"""By what stands in the message; the last one fits all."""


class Outage:
    """Whether one signal's collector takes what it is sent. `watching` is for one exporting thread, the rest for any.

    *limit*: seconds in which an export should be over. The lock guards everything below it, so that what ends just now
    is not told of as late; it is never held while anything is exported.
    """

    def __init__(self, what: str, where: str, limit: float) -> None:
        self._what = what
        self._where = where
        self._limit = limit
        self._lock = threading.Lock()
        self._begun: float | None = None  # this export
        self._since: float | None = None  # this outage
        self._stumbled = False  # an attempt of this export has failed, and the SDK may try again
        self._partly = False  # the last delivery was taken in part
        self._leaving = False
        self._ending: Callable[[], None] | None = None  # what `leave` was told, until it is done
        self._silent = False

    def watching(self, export: Callable[..., Any]) -> Callable[..., Any]:
        """*export* of an SDK's exporter, such that its failures are noticed. Its result passes through."""

        @functools.wraps(export)
        def watched(*arguments: Any, **options: Any) -> Any:
            SPOKEN.begin(self._stumble)
            with self._lock:
                self._begun, self._stumbled = time.monotonic(), False
            try:
                result = export(*arguments, **options)
            except Exception as error:
                said = SPOKEN.end()
                with self._lock:
                    self._failed(said.why or f"{type(error).__name__}: {error}")
                raise
            said = SPOKEN.end()
            with self._lock:
                if result.name == "SUCCESS":
                    self._succeeded(said.partly)
                else:
                    self._failed(said.why)
            return result

        return watched

    def look(self) -> None:
        """Called now and then: an export that does not end (an answer that comes byte by byte) is an outage too."""
        with self._lock:
            if self._begun is not None and time.monotonic() - self._begun > self._limit + LATE_SECONDS:
                self._failed("timed out")

    def leave(self, give_up: Callable[[], None]) -> None:
        """The worker leaves: each export gets one attempt, and none where the last one failed. *give_up* ends it."""
        with self._lock:
            self._leaving, self._ending = True, give_up
            hopeless = self._since is not None or self._stumbled
        if hopeless:
            self._give_up()

    def say_nothing_more(self) -> None:
        """Nobody waits any more: what is cut off now is no outage."""
        self._silent = True

    def _stumble(self) -> None:
        with self._lock:
            self._stumbled = True
        self._give_up()

    def _give_up(self) -> None:
        """At most once, and not with the lock: the exporter has a word to say about it."""
        with self._lock:
            give_up, self._ending = self._ending, None
        if give_up is not None:
            give_up()

    def _failed(self, message: str) -> None:
        """Requires holding the lock."""
        self._begun = None
        if self._since is None and not self._silent:
            self._since = time.monotonic()
            cure = next(cure for pattern, cure in _CURES if re.search(pattern, message))
            logger.warning(
                "%s cannot be delivered to %s (%s). The worker %s; %s, or set OTEL_%s_EXPORTER to none",
                *(self._what, self._where, plain(message)),
                "leaves without" if self._leaving else "goes on without and keeps trying",
                *(cure, self._what.upper()),
            )

    def _succeeded(self, partly: str) -> None:
        """Requires holding the lock."""
        self._begun, self._stumbled = None, False
        if self._since is not None:
            away = format_duration(float(round(time.monotonic() - self._since)))
            self._since = None
            logger.info("%s are delivered to %s again, after %s", self._what, self._where, away)
        if partly and not self._partly:
            logger.warning(
                "%s are delivered to %s, which does not take all of them (%s). The worker goes on; correct what the"
                " collector says, or its limits",
                *(self._what, self._where, plain(partly)),
            )
        elif self._partly and not partly:
            logger.info("%s takes all %s again", self._where, self._what)
        self._partly = bool(partly)


def plain(message: str) -> str:
    """The part of an exporter's message that says why, without what may let somebody in."""
    text = " ".join(_public(message).split())
    for pattern, words in _PLAIN:
        if found := pattern.search(text):
            text = words or next(filter(None, found.groups()))
            break
    return text[:LONGEST_REASON].rstrip(" .'\"") or "no reason given"


def _public(message: str) -> str:
    """Without what may let somebody in: urllib3 names the path with its query, too."""
    return _PATH.sub("", without_credentials(message))


class Said(NamedTuple):
    """What was heard of one export."""

    why: str  # it failed
    partly: str  # it succeeded in part


class Spoken(logging.Handler):
    """Takes the place of the root handler for what the SDK logs. Safe from any thread.

    While the SDK is being set up its warnings are about the operator's settings and are passed on; what comes
    afterwards is about deliveries and is kept, by thread, for `Outage`.
    """

    def __init__(self) -> None:
        super().__init__()
        # By thread, single operations only: what is known of the export since `begin`, and who wants to know at once.
        self._heard: dict[int, str] = {}
        self._partly: dict[int, str] = {}
        self._stumbled: dict[int, Callable[[], None]] = {}
        self._setting_up: set[int] = set()  # threads; single operations on both only

    def install(self) -> None:
        """Take over the SDK's loggers. Repeats change nothing."""
        for name in ("opentelemetry", "grpc"):
            taken = logging.getLogger(name)
            taken.propagate = False
            if self not in taken.handlers:
                taken.addHandler(self)
        logging.getLogger("urllib3").setLevel(logging.INFO)  # at debug it names whole URLs, queries included

    def setting_up(self, yes: bool) -> None:
        """Whether the calling thread reads settings or delivers."""
        (self._setting_up.add if yes else self._setting_up.discard)(threading.get_ident())

    def begin(self, stumbled: Callable[[], None]) -> None:
        """The calling thread begins an export. *stumbled* is called on it when an attempt has failed."""
        thread = threading.get_ident()
        self._heard.pop(thread, None)
        self._partly.pop(thread, None)
        self._stumbled[thread] = stumbled

    def end(self) -> Said:
        """The calling thread's export is over; what was heard of it."""
        thread = threading.get_ident()
        self._stumbled.pop(thread, None)
        return Said(self._heard.pop(thread, ""), self._partly.pop(thread, ""))

    def hear(self, text: str) -> None:
        """What went wrong with the calling thread's export, from who knows best."""
        self._heard[threading.get_ident()] = text

    def hear_partly(self, refused: int, message: str) -> None:
        """What the collector answered to the calling thread: so many were *refused*, and why; also 0 with an advice."""
        if refused or message:
            self._partly[threading.get_ident()] = f"{refused} refused: {message or 'no reason given'}"

    def handle(self, record: logging.LogRecord) -> bool:
        """Without a handler's lock, under which an exporter would be closed while other threads' records wait."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it or pass it on."""
        try:
            text = _public(record.getMessage())
        except Exception:  # a format string of a foreign library
            text = str(record.msg)
        if record.name in ("opentelemetry.util.re", "opentelemetry.sdk.resources"):
            return  # they quote what was set, which may be a secret, and `otlp_target` and `resource` said it before
        if threading.get_ident() in self._setting_up and record.levelno >= logging.WARNING:
            logger.warning("OpenTelemetry: %s", text)
            return
        logger.debug("OpenTelemetry: %s", text)
        if record.levelno < logging.WARNING:
            return  # what it does about it, which comes before the reason
        self._heard.setdefault(threading.get_ident(), text)
        if stumbled := self._stumbled.get(threading.get_ident()):
            stumbled()


SPOKEN = Spoken()
