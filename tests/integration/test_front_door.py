# SPDX-License-Identifier: Apache-2.0
"""What gets through the front door: HAProxy itself under the role's own configuration."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.core.errors import FleetError
from glm_fleet.gateway import clients
from glm_fleet.gateway.clients import Key, add, digest, revoke, rotate
from glm_fleet.gateway.haproxy import describe

from tests.gateway import BEARER, KEY, NOW, ROLE, Gateway, Node, eventually

ROOT = ROLE.parents[1]

# Every route of vLLM's application, which tests/release reads from its releases, and what the
# framework below it adds.
ROUTES = (ROOT / "tests/unit/fixtures/vllm-routes.txt").read_text().splitlines()
FRAMEWORK = ["/openapi.json", "/redoc", "/docs/oauth2-redirect", "/static/x", "/metrics/"]
ALLOWED = yaml.safe_load((ROLE / "defaults/main.yml").read_text())["gateway_paths"]

# Other spellings of paths, allowed and not: each is what it is, byte by byte.
SPELLINGS = """
/ // * /V1/MODELS /v1/Models /v1/models/ //v1/models /v1//models /v1/./models /./v1/models
/v1/x/../models /v1/models/../../invocations /v1/chat/completions/../../../invocations
/v1/models/%2e%2e/%2e%2e/invocations /%69nvocations /%2finvocations /v1/models%2f..%2f..%2fmetrics
/v1/models;a=1 /v1/models;/../../metrics /v1/%6dodels /v1/models%00 /v1/models%20 /v1%2fmodels
/v1/models%3f /v1\\models /v1/models\\..\\..\\metrics /v1/models/..;/metrics /v1/models%0d%0a
""".split()  # noqa: SIM905


@pytest.fixture
def nodes() -> Iterator[dict[str, Node]]:
    made = {"gpu01": Node()}
    yield made
    made["gpu01"].close()


@pytest.fixture
def gateway(tmp_path: Path, nodes: dict[str, Node]) -> Iterator[Gateway]:
    made = Gateway(tmp_path, nodes, gateway_body_max_bytes=100_000, gateway_body_timeout_s=2)
    made.start()
    made.set("gpu01", "ready")
    yield made
    made.stop()


def error_of(text: str) -> dict[str, Any]:
    """Return the error of an answer, which must have the shape of OpenAI's."""
    error: dict[str, Any] = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- one way in ------------------------------------------------------------------------


def test_only_the_listed_paths_reach_a_node(gateway: Gateway, nodes: dict[str, Node]) -> None:
    paths = {route.split(" ")[1].replace("{response_id}", "resp_1") for route in ROUTES}
    assert set(ALLOWED) <= set(ROUTES)
    for path in [*sorted(paths), *FRAMEWORK, *SPELLINGS]:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            if f"{method} {path}" in ALLOWED:
                continue
            for headers in ({}, BEARER):
                line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                sent = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                answer = gateway.raw(f"{line}{sent}\r\n".encode())
                status = int(answer.split(b" ")[1])
                assert status in (400, 404), (method, path, answer)
    assert nodes["gpu01"].seen == []


def test_a_listed_path_takes_its_own_method_alone(gateway: Gateway) -> None:
    status, _, text = gateway.ask_door("POST", "/v1/models", BEARER, b"{}")
    assert (status, error_of(text)["code"]) == (404, "unknown_url")
    assert gateway.ask_door("GET", "/v1/chat/completions", BEARER)[0] == 404
    assert gateway.ask_door("get", "/v1/models", BEARER)[0] in (400, 404)
    assert gateway.ask_door("POST", "/v1/chat/completions", BEARER, b"{}")[0] == 200


def test_a_node_gets_the_path_alone(gateway: Gateway, nodes: dict[str, Node]) -> None:
    """An absolute address names a host and a query string that no node has to understand."""
    key = f"Authorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    for target in ("/v1/models?key=secret", "http://a/v1/models?x", "http://a/v1/models"):
        assert b" 200 " in gateway.raw(f"GET {target} HTTP/1.1\r\nHost: a\r\n{key}".encode())[:20]
    assert {each.line for each in nodes["gpu01"].seen} == {"GET /v1/models HTTP/1.1"}
    for target in (
        "http://a/metrics",
        "http:///metrics",
        "http://a/v1/models/../../metrics",
        "http://u:p@a/",
    ):
        answer = gateway.raw(f"GET {target} HTTP/1.1\r\nHost: a\r\n{key}".encode())
        assert int(answer.split(b" ")[1]) in (400, 404)
    assert "secret" not in gateway.log.read_text()


def test_clients_do_not_speak_for_the_gateway(gateway: Gateway, nodes: dict[str, Node]) -> None:
    sent = {
        **BEARER,
        "X-API-Key": "another",
        "X-Forwarded-For": "192.0.2.1",
        "X-FORWARDED-HOST": "x",
        "x-forwarded-proto": "https",
        "X_Forwarded_For": "192.0.2.1",
        "X_Glm_Fleet_Node": "x",
        "Forwarded": "for=192.0.2.1",
        "X-Real-IP": "192.0.2.1",
        "X-Glm-Fleet-Node": "gpu09",
        "Upgrade": "h2c",
        "Connection": "Upgrade, HTTP2-Settings",
        "HTTP2-Settings": "AAMAAABkAAQAAP__",
        "X-Request-Id": "kept",
    }
    assert gateway.ask_door("GET", "/v1/models", sent)[0] == 200
    got = nodes["gpu01"].seen[0].headers
    assert got["x-forwarded-for"] == "127.0.0.1"
    assert set(got) <= {"host", "accept-encoding", "x-forwarded-for", "x-request-id", "connection"}
    assert got["x-request-id"] == "kept"


SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: smuggled\r\n\r\n"
POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
)


MALFORMED = [
    b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
    b"Content-Length: 0, 44\r\n\r\n",
    b"Content-Length: +0\r\n\r\n",
    b"Content-Length: -1\r\n\r\n",
    b"Content-Length: 0x0\r\n\r\n",
    b"Content-Length:\r\n\r\n",
    b"Content-Length : 0\r\n\r\n",
    b"Content-Length\x0b: 0\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: identity\r\nContent-Length: 0\r\n\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"X: y\nTransfer-Encoding: chunked\n\n0\r\n\r\n",
    b"X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"\x00Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b": empty\r\nContent-Length: 0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0;a=\n\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n-0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
    b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n",
]


def test_what_follows_a_malformed_request_is_no_other_request(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    """Whatever HAProxy makes of the first, the second is judged by itself or not at all."""
    for head in MALFORMED:
        answer = gateway.raw(POST + head + SMUGGLED, timeout=0.3)
        assert answer.count(b"HTTP/1.1 200") <= 1, (head, answer)
        for each in nodes["gpu01"].seen:
            assert each.line == "POST /v1/completions HTTP/1.1", head
            assert not {"content-length", "transfer-encoding"} <= set(each.headers), head


def test_http_2_needs_tls(gateway: Gateway) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    assert not gateway.raw(preface, timeout=1).startswith(b"\x00")


# -- bodies ----------------------------------------------------------------------------


def test_a_large_body_is_refused_and_one_below_it_arrives(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    url = "/v1/completions"
    status, _, text = gateway.ask_door("POST", url, BEARER, b"x" * 100_001)
    assert (status, error_of(text)["code"]) == (413, "request_too_large")
    many = b"".join(b"ffff\r\n%s\r\n" % (b"x" * 0xFFFF) for _ in range(3)) + b"0\r\n\r\n"
    chunked = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert gateway.raw(chunked + many).split(b" ")[1] == b"413"
    assert nodes["gpu01"].seen == []
    assert gateway.ask_door("POST", url, BEARER, b"x" * 100_000)[0] == 200
    small = b"c350\r\n%s\r\nc350\r\n%s\r\n0\r\n\r\n" % ((b"x" * 50_000,) * 2)
    assert gateway.raw(chunked + small).split(b" ")[1] == b"200"
    assert [each.body for each in nodes["gpu01"].seen] == [100_000, 100_000]


def test_a_slow_body_costs_no_node_anything(gateway: Gateway, nodes: dict[str, Node]) -> None:
    """One that trickles is cut off, and until then no node has heard of it."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
        connection.sendall(POST + b"Content-Length: 90000\r\n\r\n" + b"x" * 80_000)
        begun = time.monotonic()
        for _ in range(5):
            time.sleep(0.2)
            connection.sendall(b"x")
        assert gateway.haproxy.sessions("glm_nodes", "gpu01") == 0
        answer = connection.recv(65536)
    assert 1.5 < time.monotonic() - begun < 4
    assert answer.startswith(b"HTTP/1.1 408")
    assert error_of(answer.partition(b"\r\n\r\n")[2].decode())["message"]
    assert nodes["gpu01"].seen == []


# -- who asks --------------------------------------------------------------------------


def test_a_key_is_asked_for(gateway: Gateway, nodes: dict[str, Node]) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-API-Key": ""},
        {"X-API-Key": digest(KEY)},
        {"Authorization": f"Bearer {digest(KEY).upper()}"},
    ):
        status, answer, text = gateway.ask_door("GET", "/v1/models", headers)
        assert (status, error_of(text)["code"]) == (401, "invalid_api_key"), headers
        assert answer["www-authenticate"] == "Bearer"
    assert nodes["gpu01"].seen == []
    assert gateway.get(headers={"x-api-key": KEY}) == (200, "gpu01")
    assert gateway.get(headers={"authorization": f"bearer {KEY}"}) == (200, "gpu01")
    # No key is kept, and what is kept is root's alone.
    for path in (gateway.folder / "maps").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert KEY not in path.read_text()
    assert digest(KEY).upper() not in (gateway.folder / "haproxy.cfg").read_text()


def test_the_gateways_own_key_opens_it(gateway: Gateway) -> None:
    own = gateway.store.own_key.read_text()
    assert gateway.get(headers={"Authorization": f"Bearer {own}"}) == (200, "gpu01")


def test_without_clients_nobody_is_let_in(gateway: Gateway) -> None:
    gateway.clients = revoke(gateway.clients, "tests")
    gateway.keep()
    assert gateway.get()[0] == 401
    gateway.reload("second")
    assert gateway.get()[0] == 401


def test_none_has_to_be_written(tmp_path: Path, nodes: dict[str, Node]) -> None:
    made = Gateway(tmp_path, nodes, gateway_authentication="none")
    made.start()
    try:
        made.set("gpu01", "ready")
        assert made.get(headers={}) == (200, "gpu01")
        assert made.get(path="/metrics", headers={})[0] == 404
    finally:
        made.stop()


def test_nodes_get_their_credential_and_no_clients_key(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    gateway.get()
    gateway.keep("what nodes ask for"[:4] + ";\\x")
    gateway.get()
    seen = [each.headers.get("authorization") for each in nodes["gpu01"].seen]
    assert seen == [None, "Bearer what;\\x"]
    gateway.stop()
    gateway.start("second")
    gateway.get()
    assert nodes["gpu01"].seen[-1].headers["authorization"] == "Bearer what;\\x"


def test_clients_come_and_go_without_a_reload(gateway: Gateway) -> None:
    """Others' requests go on meanwhile, and a revoked key is refused at once, also later."""
    other = {"Authorization": "Bearer other"}
    failed: list[int] = []
    end = threading.Event()

    def ask_all_the_time() -> None:
        while not end.is_set():
            status = gateway.get()[0]
            failed.extend([status] if status != 200 else [])

    asking = threading.Thread(target=ask_all_the_time)
    asking.start()
    try:
        assert gateway.get(headers=other)[0] == 401
        gateway.clients = add(gateway.clients, "other", Key("1", digest("other")), {}, NOW)
        begun = time.monotonic()
        gateway.keep()
        assert gateway.get(headers=other)[0] == 200
        assert time.monotonic() - begun < 1
        new = Key("2", digest("new"))
        gateway.clients = rotate(gateway.clients, "other", new, "2999-01-01", NOW)
        gateway.keep()
        assert gateway.get(headers=other)[0] == 200
        assert gateway.get(headers={"Authorization": "Bearer new"})[0] == 200
        gateway.clients = revoke(gateway.clients, "other", "1")
        begun = time.monotonic()
        gateway.keep()
        assert gateway.get(headers=other)[0] == 401
        assert time.monotonic() - begun < 1
        assert gateway.get(headers={"Authorization": "Bearer new"})[0] == 200
    finally:
        end.set()
        asking.join(10)
    assert failed == []
    gateway.reload("second")
    assert gateway.get(headers=other)[0] == 401
    assert gateway.get(headers={"Authorization": "Bearer new"})[0] == 200
    gateway.stop()
    gateway.start("third")
    assert gateway.get(headers=other)[0] == 401
    assert gateway.get(headers={"Authorization": "Bearer new"})[0] == 200


def test_a_key_revoked_is_refused_by_a_worker_from_before_a_reload(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    """Its connections stay open as long as its streams last."""
    gateway.reload("second")
    stream = threading.Thread(target=lambda: gateway.get("/stream"))
    stream.start()
    eventually(lambda: gateway.haproxy.sessions("glm_nodes", "gpu01") == 1)
    gateway.reload("third")
    gateway.clients = revoke(gateway.clients, "tests")
    gateway.keep()
    workers = gateway.ask_master("show proc")
    old = workers.split("# old workers")[1].split()[0]
    assert digest(KEY).upper() not in gateway.ask_master(
        f"@!{old} show map {gateway.folder / 'maps/keys.map'}"
    )
    nodes["gpu01"].release.set()
    stream.join(10)


def test_many_clients_are_taken_at_once(gateway: Gateway) -> None:
    keys = tuple(Key(str(number), digest(f"key {number}")) for number in range(2500))
    gateway.clients = gateway.clients.with_client(clients.Client("many", keys))
    gateway.keep()
    for number in (0, 499, 500, 2499):
        assert gateway.get(headers={"Authorization": f"Bearer key {number}"})[0] == 200


# -- what each may do ------------------------------------------------------------------


def with_limits(gateway: Gateway, expires: str = "", **limits: Any) -> dict[str, str]:
    """Add client `limited`; return its header."""
    key = Key("1", digest("limited"), expires=expires)
    gateway.clients = add(gateway.clients, "limited", key, limits, NOW)
    gateway.keep()
    return {"Authorization": "Bearer limited"}


def test_a_key_ends_when_it_was_told_to(gateway: Gateway) -> None:
    soon = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 3))
    headers = with_limits(gateway, expires=soon)
    assert gateway.get(headers=headers)[0] == 200
    eventually(lambda: gateway.get(headers=headers)[0] == 401)
    assert error_of(gateway.ask_door("GET", "/v1/models", headers)[2])["code"] == "expired_api_key"


def test_a_client_keeps_to_its_paths(gateway: Gateway) -> None:
    headers = with_limits(gateway, paths=["GET /v1/models"])
    assert gateway.get(headers=headers)[0] == 200
    status, _, text = gateway.ask_door("POST", "/v1/completions", headers, b"{}")
    assert (status, error_of(text)["code"]) == (403, "path_not_allowed")
    assert gateway.ask_door("POST", "/invocations", headers, b"{}")[0] == 404


def test_a_client_that_asks_too_often_is_told_when_to_come_back(gateway: Gateway) -> None:
    headers = with_limits(gateway, requests_a_minute=6)
    answers = [gateway.ask_door("GET", "/v1/models", headers) for _ in range(60)]
    assert [status for status, _, _ in answers[:6]] == [200] * 6
    assert {status for status, _, _ in answers[6:]} == {429}
    assert answers[-1][1]["retry-after"] == "11"
    assert error_of(answers[-1][2])["code"] == "rate_limit_exceeded"
    assert gateway.get()[0] == 200


def test_refused_requests_do_not_count(gateway: Gateway) -> None:
    """A client at many times its rate is served at its rate, not shut out."""
    headers = with_limits(gateway, requests_a_minute=120)
    begun, served = time.monotonic(), 0
    while time.monotonic() - begun < 8:
        served += gateway.get(headers=headers)[0] == 200
    # The first 120 at once; then again as the window of a minute moves on.
    assert 118 <= served <= 150
    assert gateway.get()[0] == 200


def test_a_client_has_only_so_many_requests_at_once(
    gateway: Gateway, nodes: dict[str, Node]
) -> None:
    headers = with_limits(gateway, requests_at_once=2)
    streams = [threading.Thread(target=gateway.get, args=("/stream", headers)) for _ in range(2)]
    for each in streams:
        each.start()
    eventually(lambda: gateway.haproxy.sessions("glm_nodes", "gpu01") == 2)
    status, answer, text = gateway.ask_door("GET", "/v1/models", headers)
    assert (status, error_of(text)["type"], answer["retry-after"]) == (429, "rate_limit_error", "1")
    assert gateway.get()[0] == 200
    nodes["gpu01"].release.set()
    for each in streams:
        each.join(10)
    assert gateway.get(headers=headers)[0] == 200


# -- what is said and kept -------------------------------------------------------------


def test_what_each_client_did_is_counted(gateway: Gateway) -> None:
    headers = with_limits(gateway, requests_a_minute=2)
    for _ in range(5):
        gateway.get(headers=headers)
    gateway.ask_door("POST", "/v1/completions", BEARER, b"x" * 10_000)
    assert gateway.get(headers={**BEARER, "X-Fail": "1"})[0] == 500
    limited, tests = gateway.haproxy.clients()
    assert (limited.name, limited.requests, limited.refused, limited.failed) == ("limited", 2, 3, 0)
    assert (tests.name, tests.requests, tests.refused, tests.failed) == ("tests", 2, 0, 1)
    assert tests.bytes_in > 10_000
    assert tests.at_once == limited.at_once == 0
    assert [each["name"] for each in describe(gateway.haproxy)["clients"]] == ["limited", "tests"]


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 30}}, (7, 30)),
        ({"usage": {"input_tokens": 7, "output_tokens": 30}}, (7, 30)),
        ({"usage": {"prompt_tokens": 7, "total_tokens": 7}}, (7, 0)),
        ({"usage": None}, (0, 0)),
        ({"usage": {"prompt_tokens": "many"}}, (0, 0)),
        ({"data": "x" * 3_000_000, "usage": {"prompt_tokens": 7}}, (0, 0)),
    ],
)
def test_tokens_are_counted_where_the_answer_tells_them(
    gateway: Gateway, nodes: dict[str, Node], answer: dict[str, Any], tokens: tuple[int, int]
) -> None:
    nodes["gpu01"].answer = json.dumps(answer).encode()
    for _ in range(2):
        status, _, text = gateway.ask_door("POST", "/v1/completions", BEARER, b"{}")
        assert (status, text) == (200, nodes["gpu01"].answer.decode())
    (tests,) = gateway.haproxy.clients()
    assert (tests.tokens_in, tests.tokens_out) == (2 * tokens[0], 2 * tokens[1])
    eventually(lambda: gateway.log.read_text().count('"tokens_in"') >= 2)
    line = next(x for x in gateway.log.read_text().splitlines() if x.startswith("{"))
    said = json.loads(line)
    assert said["tokens_in"] in ((str(tokens[0]),) if tokens[0] else ("-", "0"))


def test_no_node_ready_is_said_as_the_api_does(gateway: Gateway) -> None:
    gateway.set("gpu01", "drain")
    status, answer, text = gateway.ask_door("GET", "/v1/models", BEARER)
    assert (status, error_of(text)["type"]) == (503, "service_unavailable")
    assert int(answer["retry-after"]) > 0


def test_the_log_names_client_model_and_path_and_no_secret(gateway: Gateway) -> None:
    body = b'{"model": "glm \\"5.2\\"", "prompt": "the secret prompt"}'
    gateway.ask_door("POST", "/v1/completions?token=secret", BEARER, body)
    gateway.ask_door("POST", "/secret/%22", {}, b"")
    eventually(lambda: gateway.log.read_text().count('{"client"') >= 2)
    lines = [json.loads(x) for x in gateway.log.read_text().splitlines() if x.startswith("{")]
    first = next(each for each in lines if each["client"] == "tests")
    assert (first["model"], first["path"], first["node"]) == (
        'glm "5.2"',
        "/v1/completions",
        "gpu01",
    )
    assert (first["status"], first["method"], first["key"]) == (200, "POST", "1")
    text = gateway.log.read_text()
    assert "the secret prompt" not in text
    assert "token=" not in text
    assert KEY not in text


def test_a_gateway_that_is_open_is_not_closed_by_an_empty_variable(
    gateway: Gateway, tmp_path: Path
) -> None:
    """An upgrade of a fleet without keys must not lock its clients out."""
    nobody = clients.Clients()
    gateway.store.refuse_lockout(nobody, gateway.ask)  # it asks for keys already
    assert not gateway.store.asks_nobody(gateway.ask)
    (tmp_path / "open").mkdir()
    other = Gateway(tmp_path / "open", {})
    other.variables = {"gateway_authentication": "none"}
    other.start()
    try:
        with pytest.raises(FleetError, match="gateway_authentication: none"):
            other.store.refuse_lockout(nobody, other.ask)
        other.store.refuse_lockout(other.clients, other.ask)
        # So a weak key of it that nodes ask for stays.
        assert other.store.asks_nobody(other.ask)
    finally:
        other.stop()
    other.store.refuse_lockout(nobody, other.ask)  # nothing runs: a first installation
