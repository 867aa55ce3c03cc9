# SPDX-License-Identifier: Apache-2.0
"""Asks the lab fleet a question through its gateway and prints the answer as it comes."""

from __future__ import annotations

import argparse
import json
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import AUTHORITY, CLIENT_KEY, GATEWAY, REPOSITORY, gpu_host

PORT = 8080
CA = AUTHORITY / "ca.crt"
TIMEOUT_S = 120


@dataclass(frozen=True)
class Answer:
    """A finished completion: which node gave it, its tokens, and its times in seconds."""

    node: str
    tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens over the whole time of the request.

        Not over the time after the first token: a busy client reads a short answer in one go.
        """
        return self.tokens / self.total_s if self.total_s > 0 else 0.0


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event up to [DONE]."""
    for line in lines:
        field, _, value = line.decode().strip().partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            return
        yield json.loads(value)


def with_key(url: str, body: Any = None) -> urllib.request.Request:
    """Return a request as the lab's client makes it."""
    headers = {"Content-Type": "application/json"}
    if CLIENT_KEY.is_file():
        headers["Authorization"] = f"Bearer {CLIENT_KEY.read_text()}"
    data = json.dumps(body).encode() if body is not None else None
    return urllib.request.Request(url, data=data, headers=headers)


def trust() -> ssl.SSLContext:
    """Return how the lab's client speaks TLS: it trusts the fleet's authority, and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if CA.is_file():
        context.load_verify_locations(CA)
    return context


def model_name(url: str) -> str:
    """Return the first model that the fleet serves."""
    request = with_key(f"{url}/v1/models")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=trust()) as response:
        return str(json.load(response)["data"][0]["id"])


def ask(url: str, question: str, max_tokens: int) -> Answer:
    """Stream one chat completion to standard output."""
    body = {
        "model": model_name(url),
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = with_key(f"{url}/v1/chat/completions", body)
    begin = time.monotonic()
    first = 0.0
    tokens = 0
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=trust()) as response:
        node = response.headers.get("X-Glm-Fleet-Node", "unknown")
        for event in events(response):
            for choice in event.get("choices", ()):
                text = choice.get("delta", {}).get("content")
                if text:
                    first = first or time.monotonic() - begin
                    print(text, end="", flush=True)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    print()
    return Answer(node, tokens, first, time.monotonic() - begin)


def fleet_table(report: Path) -> str:
    """Return the fleet as the last health check saw it; '' when there was none."""
    if not report.is_file():
        return ""
    sys.path.insert(0, str(REPOSITORY / "module_utils"))
    from glm_fleet.core.table import render_table

    columns = ("name", "gpus", "release", "model", "attestation", "tokens_per_second", "verdict")
    rows = [
        [str(node.get(column) or "-") for column in columns]
        for node in json.loads(report.read_text())["nodes"]
    ]
    heading = ("node", "GPUs", "release", "model", "attestation", "tok/s", "verdict")
    width = shutil.get_terminal_size((140, 24)).columns
    return "\n".join(line.text for line in render_table(heading, rows, width)) + "\n"


def main() -> int:
    """Ask, print the times, and say how to go on."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("--url", default=f"https://{GATEWAY.address}:{PORT}")
    parser.add_argument("--question", default="What does a gateway do?")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()
    print(f"\n{arguments.url} is asked: {arguments.question}\n")
    try:
        answer = ask(arguments.url, arguments.question, arguments.max_tokens)
    except (urllib.error.URLError, TimeoutError) as error:
        print(
            f"{arguments.url} did not answer. Expected: a chat completion. Found: {error}. "
            "What to do: run ansible-playbook -i inventory/lab playbooks/health.yml.",
            file=sys.stderr,
        )
        return 1
    print(
        f"\n{answer.tokens} tokens from {answer.node}: the first after "
        f"{answer.first_token_s * 1000:.0f} ms, all within {answer.total_s:.2f} s, "
        f"{answer.tokens_per_s:.1f} tok/s. The lab's model is small and random; its words "
        "mean nothing.\n\n"
        f"{fleet_table(REPOSITORY / 'reports/fleet.json')}\n"
        f"The API:         {arguments.url}/v1, with the key in {CLIENT_KEY}\n"
        f"Trust for it:    {CA}\n"
        f"Into a node:     .venv/bin/python -m lab shell {gpu_host(1).name}\n"
        "The fleet:       .venv/bin/ansible-playbook -i inventory/lab playbooks/health.yml\n"
        "Take it down:    make lab-down"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
