"""Client of a Whimbrel service.

`whimbrel.rest` is generated from the service's OpenAPI document: a module for each operation
(`whimbrel.rest.api.vms.boot_vm`) and a class for each body (`whimbrel.rest.models`). This module
adds what the document does not say: how to connect, a refusal as an exception, and streams.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import httpx

from .rest import Client
from .rest.api.migrations import get_migration
from .rest.models import Event, FieldProblem, MigrationInfo, MigrationPhase, Problem
from .rest.types import Response, Unset

__all__ = ["EventsMissed", "Refused", "answer", "connect", "follow_events", "follow_migration"]

T = TypeVar("T")

# The service sends a comment every 15 s on an idle event stream: after more, the peer is gone.
EVENT_SILENCE_S = 60.0

OVER = (MigrationPhase.COMPLETED, MigrationPhase.CANCELED, MigrationPhase.FAILED)


class Refused(Exception):
    """A request that the service refused, with its problem body (RFC 9457)."""

    status: int
    """HTTP status."""
    code: str
    """Stable name of the reason, for programs: `wrong-state`, `no-such-vm`, ..."""
    detail: str
    """Explanation for people."""
    errors: list[FieldProblem]
    """Problems of single fields of the request's body."""

    def __init__(self, problem: Problem) -> None:
        self.status, self.code, self.detail = problem.status, problem.code, problem.detail
        self.errors = [] if isinstance(problem.errors, Unset) else problem.errors
        fields = "".join(f"\n  {e.pointer}: {e.detail} ({e.code})" for e in self.errors)
        super().__init__(f"{self.detail} ({self.code}){fields}")


class EventsMissed(Exception):
    """The service no longer keeps some events after the number that `follow_events` was given."""

    oldest: int
    """Number of the oldest event that is kept."""

    def __init__(self, oldest: int) -> None:
        self.oldest = oldest
        super().__init__(f"the oldest event that the service keeps is number {oldest}")


def connect(address: str, *, token: str | None = None, timeout_s: float = 60.0) -> Client:
    """Returns a client of the service at `address`: `unix:/run/whimbrel.sock` or
    `http://127.0.0.1:8080`. Over TCP the service asks for the `token` of its `--api-token-file`.

    The client works with the blocking functions of each operation (`sync_detailed`) and with the
    others (`asyncio_detailed`). It connects at the first request.
    """
    path = address.removeprefix("unix:") if address.startswith("unix:") else None
    # Over a unix socket the host only fills the header that HTTP/1.1 demands.
    base_url = address if path is None else "http://localhost"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    # Cloud Hypervisor's face does not declare every status. Without `raise_on_unexpected_status`
    # the others would look like a success without a body.
    client = Client(base_url=base_url, raise_on_unexpected_status=True)
    # `trust_env` is off: a proxy of the environment cannot reach the service's loopback address.
    client.set_httpx_client(
        httpx.Client(
            base_url=base_url,
            headers=headers,
            timeout=timeout_s,
            transport=httpx.HTTPTransport(uds=path),
            trust_env=False,
        )
    )
    return client.set_async_httpx_client(
        httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=timeout_s,
            transport=httpx.AsyncHTTPTransport(uds=path),
            trust_env=False,
        )
    )


def answer(response: Response[T | Problem]) -> T:
    """Returns the body of a successful response, `None` where it has none.

    Raises `Refused` for every other response.
    """
    if isinstance(response.parsed, Problem):
        raise Refused(response.parsed)
    return cast(T, response.parsed)


def follow_migration(client: Client, id: str, *, every_s: float = 0.1) -> Iterator[MigrationInfo]:
    """Yields the progress of a migration until it is over; the last one yielded is its outcome.

    A migration in doubt (`MigrationPhase.IN_DOUBT`) is not over: an operator decides, so the
    iteration continues until then.
    """
    while True:
        info = answer(get_migration.sync_detailed(id, client=client))
        yield info
        if info.phase in OVER:
            return
        time.sleep(every_s)


def follow_events(
    client: Client, *, after: int | None = None, vm: str | None = None
) -> Iterator[Event]:
    """Yields events of the service as they happen, until the service ends.

    `after` resumes behind the event of that number; 0 begins with the oldest that is kept, and
    `None` with the next. `vm` selects the events of one VM.

    Raises `EventsMissed` if events behind `after` are no longer kept.
    """
    parameters = {"after": after, "vm": vm}
    query = {name: value for name, value in parameters.items() if value is not None}
    with client.get_httpx_client().stream(
        "GET", "/api/v1/events", params=query, timeout=httpx.Timeout(60.0, read=EVENT_SILENCE_S)
    ) as response:
        if response.status_code != httpx.codes.OK:
            raise Refused(Problem.from_dict(json.loads(response.read())))
        for name, data in _server_sent_events(response.iter_lines()):
            if name == "missed":
                raise EventsMissed(data["oldest"])
            yield Event.from_dict(data)


def _server_sent_events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Splits a stream of server-sent events into their names and their data, which is JSON."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line == "":
            if "data" in fields:
                yield fields.get("event", "message"), json.loads(fields["data"])
            fields = {}
        elif name != "":  # otherwise a comment
            fields[name] = value.removeprefix(" ")
