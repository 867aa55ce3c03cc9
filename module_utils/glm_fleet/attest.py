# SPDX-License-Identifier: Apache-2.0
"""Attestation: may this node take traffic?

It trusts what runs, not what lies on the disk: the journal of this very start, the files
that the server has mapped, the record of the start gate, and answers of the model.
"""

from __future__ import annotations

import http.client
import json
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Protocol

from .artifact import exclusive, write_atomically
from .errors import FleetError
from .gate import RECORD
from .runner import Runner

_RELEASE_IN_MAPS = re.compile(r"/releases/([^/\s]+)/lib/")
EVIDENCE = Path("/run/glm-fleet/attested.json")
# The last word of a start: the web server's own line, or vLLM's where that one is not logged.
_READY = re.compile(r"Application startup complete|Starting vLLM server on")
_RECENT_LINES = 500
# Of a start that was attested, for a check every few minutes.
_CHECKED_LINES = 5000
# The frames of a traceback and their carets, which say less than the error below them.
_FRAME = re.compile(r"\]\s{2,}\S|\^\^\^|Traceback \(most recent")
_LONG_PROMPT_TOKENS = 2304  # above 2048, where engines died that had passed a short test
_ANSWER_TOKENS = 24

# What an operator sees while a node loads: the last of these that the journal holds.
_PHASES: tuple[tuple[str, str], ...] = (
    (r"non-default args", "reading the model's configuration"),
    (r"Resolved architecture", "preparing the engine"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model", "loading the model"),
    (r"Completed \| (\d+/\d+)", "loading shard {0}"),
    (r"Loading weights took ([\d.]+)", "weights loaded in {0} s"),
    (r"Dynamo bytecode transform time", "compiling"),
    (r"Compiling a graph", "compiling"),
    (r"KV cache size: ([\d,]+) tokens", "KV cache of {0} tokens"),
    (r"Capturing CUDA graphs", "capturing CUDA graphs"),
    (r"init engine .* took ([\d.]+)", "engine ready after {0} s"),
    (r"Waiting for application startup", "opening the port"),
    (_READY.pattern, "ready"),
)


@dataclass(frozen=True)
class Signature:
    """A crash that people reported or we saw: how it looks, the way out, and whether a lower
    mode of CUDA graphs is that way."""

    pattern: str
    remedy: str
    graphs: bool = False


_SIGNATURES = (
    Signature(
        r"an illegal instruction was encountered",
        "CUDA graphs of this mode do not work here: set serving_cuda_graphs to piecewise, "
        "then to eager",
        graphs=True,
    ),
    Signature(
        r"operation not permitted when stream is capturing",
        "CUDA graph capture fails on this driver: set serving_cuda_graphs to piecewise, "
        "then to eager",
        graphs=True,
    ),
    Signature(
        r"CUDA error.*802|system not yet initialized",
        "the fabric manager is missing or of another version than the driver: install and start "
        "the nvidia-fabricmanager package of the driver's version",
    ),
    Signature(
        r"out of memory|OutOfMemoryError",
        "the GPUs are too full: lower serving_gpu_memory_utilization or serving_max_model_len",
    ),
    Signature(
        r"No available memory for the cache blocks",
        "nothing is left for the KV cache: lower serving_max_model_len",
    ),
    Signature(
        r"is larger than the maximum number of tokens that can be stored in KV cache",
        "the context does not fit into the KV cache: lower serving_max_model_len",
    ),
    Signature(
        r"No package metadata was found for vllm",
        "the wheel of this release is not called vllm: build the release again",
    ),
    Signature(
        r"Timed out waiting for engine|did not start in time|Engine core proc .* timed out",
        "the engine took longer than VLLM_ENGINE_READY_TIMEOUT_S: raise it in "
        "serving_environment, or find out why the weights load slowly",
    ),
    Signature(
        r"vllm serve: error: |unrecognized arguments",
        "this release of vLLM does not know a flag: look at serving_extra_arguments",
    ),
    Signature(
        r"(Xid .*: 74|SXid.* 24007|NCCL error|ncclUnhandledCudaError)",
        "the GPUs lost each other: look at `nvidia-smi nvlink -s` and the driver's version",
    ),
    Signature(
        r"start gate: An earlier",
        "an earlier engine still holds the GPUs: see the line of the start gate",
    ),
    # The frame around every crash of a start: only when nothing better is known.
    Signature(
        r"Engine core initialization failed",
        "the engine died while it started: the first error above it in the journal says why",
    ),
)


class Http(Protocol):
    """What a probe needs of HTTP: status and lines of the body, as they arrive."""

    def __call__(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, Iterator[str]]: ...


@dataclass(frozen=True)
class Check:
    """One point of the attestation: its name, outcome and the value that decided."""

    name: str
    passed: bool
    detail: str


def read_api_key(environment_file: Path) -> str:
    """Return the key that clients have to send, '' if there is none."""
    try:
        text = environment_file.read_text()
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "VLLM_API_KEY":
            return "".join(shlex.split(value))
    return ""


def local_http(
    port: int, *, address: str = "127.0.0.1", api_key: str = "", timeout_s: float = 300.0
) -> Http:
    """Return a client of the server on this node. A connection that fails is status 0.

    ``address`` is the one that the server is bound to.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, address)  # noqa: S104

    def ask(path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Iterator[str]]:
        request = urllib.request.Request(
            f"http://{host}:{port}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"},
        )
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        try:
            answer = urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            return error.code, iter([text])
        except (OSError, http.client.HTTPException) as error:
            return 0, iter([f"{type(error).__name__}: {error}"])
        return int(answer.status), _lines(answer)

    return ask


def _lines(answer: Any) -> Iterator[str]:
    with answer:
        try:
            for line in answer:
                yield line.decode(errors="replace").rstrip("\n")
        except (OSError, http.client.HTTPException) as error:
            # The caller sees a stream that ended early, which is what happened.
            yield f"error: the stream broke off: {type(error).__name__}"


def unit_state(runner: Runner, unit: str) -> dict[str, Any]:
    """Return active_state, sub_state, n_restarts, main_pid, invocation_id and result."""
    names = {
        "ActiveState": "active_state",
        "SubState": "sub_state",
        "NRestarts": "n_restarts",
        "MainPID": "main_pid",
        "InvocationID": "invocation_id",
        "Result": "result",
        "ActiveEnterTimestamp": "started_at",
    }
    answer = runner(["systemctl", "show", unit, *(f"--property={key}" for key in names)])
    state: dict[str, Any] = dict.fromkeys(names.values(), "")
    for line in answer.stdout.splitlines():
        key, _, value = line.partition("=")
        if key in names:
            state[names[key]] = value
    for key in ("n_restarts", "main_pid"):
        state[key] = int(state[key]) if str(state[key]).isdigit() else 0
    return state


def journal(runner: Runner, invocation: str, most: int | None = None) -> list[str]:
    """Return the (last ``most``) messages of one start of the unit, oldest first."""
    if not invocation:
        return []
    answer = runner(
        [
            "journalctl",
            "--no-pager",
            "--output=cat",
            *([f"--lines={most}"] if most else []),
            f"_SYSTEMD_INVOCATION_ID={invocation}",
            "+",
            f"INVOCATION_ID={invocation}",
        ],
        check=False,
    )
    return answer.stdout.splitlines()


def last_words(runner: Runner, unit: str, most: int = 300) -> list[str]:
    """Return the unit's last messages over all its starts, oldest first.

    A start that died was followed by the next one, so the journal of one start is not enough.
    """
    answer = runner(
        ["journalctl", "--no-pager", "--output=cat", f"--unit={unit}", f"--lines={most}"],
        check=False,
    )
    return answer.stdout.splitlines()


def phase(lines: Sequence[str]) -> str:
    """Say how far a start has come, from its journal."""
    for line in reversed(lines):
        for pattern, text in reversed(_PHASES):
            found = re.search(pattern, line)
            if found:
                return text.format(*found.groups())
    return "importing vLLM"


def _known_crash(lines: Sequence[str]) -> tuple[Signature, str] | None:
    for signature in _SIGNATURES:
        # From the end: the error itself stands below the line of code that raised it.
        for line in reversed(lines):
            if re.search(signature.pattern, line):
                return signature, line
    return None


def diagnose(lines: Sequence[str]) -> str:
    """Name the known crash that the journal shows, with its remedy; '' if none is known."""
    known = _known_crash(lines)
    return f"{known[1].strip()[-160:]}: {known[0].remedy}" if known else ""


def lower_graphs_help(lines: Sequence[str]) -> bool:
    """Tell whether the journal shows a crash that a lower mode of CUDA graphs avoids."""
    known = _known_crash(lines)
    return known is not None and known[0].graphs


def relevant_lines(lines: Sequence[str], most: int = 12) -> list[str]:
    """Pick the lines a person would look for: errors first, else the end of the journal."""
    errors = [
        line
        for line in lines
        if re.search(r"\bERROR\b|Error:|error:|start gate", line) and not _FRAME.search(line)
    ]
    picked = errors[-most:] if errors else list(lines[-most:])
    return [line[-300:] for line in picked]


def read_evidence(path: Path, invocation: str) -> dict[str, str]:
    """Return {pattern: line} that an earlier attestation of this very start found."""
    known = read_record(path)
    if not invocation or known.pop("invocation", "") != invocation:
        return {}
    return known


def check_journal(
    lines: Sequence[str],
    required: Sequence[str],
    forbidden: Sequence[str],
    known: Mapping[str, str] | None = None,
) -> list[Check]:
    """Check that each required pattern is in the journal of this start and no forbidden one.

    ``known`` holds lines that were there when the start was attested: the journal of a busy
    server loses its first lines to rotation while the server goes on.
    """
    checks = []
    for pattern in required:
        hit = next((line for line in lines if re.search(pattern, line)), "")
        hit = hit or (known or {}).get(pattern, "")
        checks.append(Check(f"journal has {pattern}", bool(hit), hit[-200:] or "no such line"))
    for pattern in forbidden:
        hit = next((line for line in lines if re.search(pattern, line)), "")
        checks.append(
            Check(f"journal has no {pattern}", not hit, hit[-200:] or "no such line, as wanted")
        )
    return checks


def running_release(main_pid: int, proc: Path = Path("/proc")) -> str:
    """Return the release whose libraries a process has mapped, '' if that cannot be seen.

    The kernel names files without symbolic links: this is the release that runs.
    """
    try:
        text = (proc / str(main_pid) / "maps").read_text()
    except OSError:
        return ""
    found = _RELEASE_IN_MAPS.search(text)
    return found.group(1) if found else ""


def read_record(path: Path = RECORD) -> dict[str, str]:
    """Return what the start gate wrote down, {} if there is nothing."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_policy(path: Path) -> dict[str, Any]:
    """Return what the attestation of this node expects.

    Shape: {address, port, served_model_name, required, forbidden}.
    """
    try:
        policy = json.loads(path.read_text())
        return {
            "address": str(policy.get("address") or "127.0.0.1"),
            "port": int(policy["port"]),
            "served_model_name": str(policy["served_model_name"]),
            "required": list(policy["required"]),
            "forbidden": list(policy["forbidden"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(
            "This node has no attestation policy",
            expected=f"port, served_model_name, required and forbidden as JSON in {path}",
            found=f"{type(error).__name__}: {error}",
            remedy="run site.yml: the node is not set up to serve",
        ) from error


def read_running(runner: Runner, unit: str, record: Path = RECORD) -> dict[str, Any]:
    """Say what runs: {active, invocation, record, unit}."""
    state = unit_state(runner, unit)
    return {
        "active": state["active_state"] == "active",
        "invocation": state["invocation_id"],
        "record": read_record(record),
        "unit": state,
    }


def parse_metrics(text: str) -> dict[str, float]:
    """Sum the samples of each metric over its labels; buckets are left out."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or "_bucket" in line:
            continue
        name, _, rest = line.partition("{")
        value = rest.rpartition("}")[2] if rest else line.partition(" ")[2]
        name = name.partition(" ")[0]
        try:
            totals[name] = totals.get(name, 0.0) + float(value.split()[0])
        except (ValueError, IndexError):
            continue
    return totals


def read_metrics(http: Http) -> dict[str, float]:
    """Return the server's metrics, {} when it does not answer."""
    status, lines = http("/metrics")
    return parse_metrics("\n".join(lines)) if status == 200 else {}


@dataclass(frozen=True)
class Answer:
    """One completion: its text, tokens, seconds to the first token and in all."""

    text: str
    tokens: int
    prompt_tokens: int
    first_token_s: float
    total_s: float
    problem: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole time of the request.

        Not over the time after the first token: a busy client reads a short answer in one
        go, and would measure itself.
        """
        return self.tokens / self.total_s if self.total_s > 0 else 0.0


def complete(
    http: Http,
    model: str,
    prompt: str | Sequence[int],
    *,
    tokens: int = _ANSWER_TOKENS,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Ask for a greedy completion and measure it as a client sees it."""
    start = clock()
    first = 0.0
    text, used, prompt_used, ended = "", 0, 0, False
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, lines = http("/v1/completions", body)
    if status != 200:
        return Answer("", 0, 0, 0.0, 0.0, f"HTTP {status}: {''.join(lines)[:200]}")
    for line in lines:
        if not line.startswith("data: "):
            if line.startswith("error"):
                return Answer(text, used, 0, first, clock() - start, line[:200])
            continue
        if line == "data: [DONE]":
            ended = True
            break
        try:
            event = json.loads(line[len("data: ") :])
        except ValueError:
            return Answer(text, used, 0, first, clock() - start, f"not JSON: {line[:100]}")
        if "error" in event:
            return Answer(text, used, 0, first, clock() - start, str(event["error"])[:200])
        for choice in event.get("choices", []):
            if not first:
                first = clock() - start
            text += choice.get("text", "")
        usage = event.get("usage") or {}
        used = int(usage.get("completion_tokens") or used)
        prompt_used = int(usage.get("prompt_tokens") or prompt_used)
    problem = "" if ended else "the stream ended before its end"
    return Answer(text, used, prompt_used, first, clock() - start, problem)


def served_model(http: Http, model: str) -> tuple[Check, int]:
    """Check that ``/v1/models`` names the model; return its longest context in tokens too."""
    status, lines = http("/v1/models")
    text = "\n".join(lines)
    if status != 200:
        return Check("model is served", False, f"HTTP {status}: {text[:120]}"), 0
    try:
        entries = json.loads(text)["data"]
    except (ValueError, KeyError, TypeError):
        return Check("model is served", False, f"something else answers: {text[:120]}"), 0
    names = [str(each.get("id")) for each in entries]
    length = max((int(each.get("max_model_len") or 0) for each in entries), default=0)
    return Check("model is served", model in names, ", ".join(names) or "none"), length


def run_canary(
    http: Http, model: str, context: int, *, thorough: bool
) -> tuple[list[Check], dict[str, Any]]:
    """Ask the model itself; return the checks and the figures of the first answer.

    A short prompt always. With ``thorough``: the same again (a shared prefix, and the greedy
    answer repeats itself), and twice a prompt above 2048 tokens where the context allows.
    """
    prompt = "The capital of France is Paris. The capital of Japan is"
    before = read_metrics(http)
    first = complete(http, model, prompt)
    checks = [_answered("canary answers", first)]
    if thorough and not first.problem:
        again = complete(http, model, prompt)
        checks.append(_answered("same prefix again", again))
        checks.append(
            Check("greedy answer repeats", again.text == first.text, repr(again.text[:60]))
        )
        if context >= _LONG_PROMPT_TOKENS + _ANSWER_TOKENS:
            # Token ids, so that the length is exact with any tokenizer.
            ids = [10 + each % 97 for each in range(_LONG_PROMPT_TOKENS)]
            for name in ("prompt above 2048 tokens", "the same long prompt again"):
                checks.append(_answered(name, complete(http, model, ids)))
    after = read_metrics(http)
    name = "vllm:generation_tokens_total"
    advanced = after.get(name, 0.0) - before.get(name, 0.0)
    checks.append(Check("tokens advance in the metrics", advanced > 0, f"{advanced:g} tokens"))
    # The first answer may have been compiled in; the last short one is what clients see.
    measured = again if thorough and not first.problem else first
    figures = {
        "tokens_per_second": round(measured.tokens_per_second, 2),
        "time_to_first_token_s": round(measured.first_token_s, 4),
        "completion_tokens": measured.tokens,
        "text": measured.text,
    }
    return checks, figures


def _answered(name: str, answer: Answer) -> Check:
    if answer.problem:
        return Check(name, False, answer.problem)
    detail = (
        f"{answer.prompt_tokens} + {answer.tokens} tokens in {answer.total_s:.2f} s, "
        f"first after {answer.first_token_s:.2f} s"
    )
    return Check(name, answer.tokens > 0, detail)


@dataclass(frozen=True)
class Wanted:
    """What the attestation expects of a node; empty ids mean: whatever runs."""

    unit: str
    model_name: str
    release: str
    model: str
    required: Sequence[str]
    forbidden: Sequence[str]


def attest(
    runner: Runner,
    http: Http,
    wanted: Wanted,
    *,
    thorough: bool,
    record_path: Path = RECORD,
    evidence_path: Path = EVIDENCE,
    proc: Path = Path("/proc"),
) -> dict[str, Any]:
    """Check everything and return the attestation.

    A thorough one that passes leaves the lines of the journal that prove it in
    ``evidence_path``, for later checks of the same start. Two of them wait for each other:
    beside other requests a greedy answer need not repeat itself.

    Shape: {passed, checks: [{name, passed, detail}], release_id, model_id, invocation_id,
    started_at, unit, canary, metrics, diagnosis, step_down, journal}.
    """
    if thorough:
        evidence_path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(evidence_path.with_name("attest.lock")):
            return _attest(runner, http, wanted, True, record_path, evidence_path, proc)
    return _attest(runner, http, wanted, False, record_path, evidence_path, proc)


def _attest(
    runner: Runner,
    http: Http,
    wanted: Wanted,
    thorough: bool,
    record_path: Path,
    evidence_path: Path,
    proc: Path,
) -> dict[str, Any]:
    running = read_running(runner, wanted.unit, record_path)
    unit, record = running["unit"], running["record"]
    known = read_evidence(evidence_path, running["invocation"])
    # What was proven needs no second look at months of requests: only at what came since.
    proven = not thorough and set(wanted.required) <= set(known)
    lines = journal(runner, running["invocation"], _CHECKED_LINES if proven else None)
    checks = [
        Check("unit is active", running["active"], f"{unit['active_state']} {unit['result']}")
    ]
    canary: dict[str, Any] = {}
    proof: list[Check] = []
    metrics: dict[str, float] = {}
    release = running_release(unit["main_pid"], proc)
    recorded = record.get("invocation") == running["invocation"]
    model_id = record.get("model", "") if recorded else ""
    if running["active"]:
        checks.append(
            Check(
                "release that runs",
                bool(release) and release == (wanted.release or record.get("release")),
                f"{release or 'unknown'}, wanted {wanted.release or record.get('release')}",
            )
        )
        checks.append(
            Check(
                "model that runs",
                bool(model_id) and model_id == (wanted.model or model_id),
                f"{model_id or 'unknown'}, wanted {wanted.model or 'any'}",
            )
        )
        proof = check_journal(lines, wanted.required, wanted.forbidden, known)
        checks += proof
        served, context = served_model(http, wanted.model_name)
        checks.append(served)
        if served.passed:
            more, canary = run_canary(http, wanted.model_name, context, thorough=thorough)
            checks += more
        metrics = {
            key: value
            for key, value in read_metrics(http).items()
            if key in ("vllm:num_requests_running", "vllm:num_requests_waiting",
                       "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total")
        }  # fmt: skip
    passed = all(check.passed for check in checks)
    if passed and thorough:
        evidence = dict(zip(wanted.required, (check.detail for check in proof)))
        write_atomically(
            evidence_path, json.dumps({**evidence, "invocation": running["invocation"]})
        )
    return {
        "passed": passed,
        "checks": [asdict(check) for check in checks],
        "release_id": release,
        "model_id": model_id,
        "invocation_id": running["invocation"],
        "started_at": unit["started_at"],
        "unit": unit,
        "canary": canary,
        "metrics": metrics,
        "diagnosis": "" if passed else diagnose(lines),
        "step_down": not passed and lower_graphs_help(lines),
        "journal": [] if passed else relevant_lines(lines),
    }


def watch(
    runner: Runner,
    http: Http,
    unit: str,
    *,
    seconds: float,
    evidence_path: Path = EVIDENCE,
    proc: Path = Path("/proc"),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Look at a starting node for up to ``seconds``.

    Returns {ready, failed, phase, progress}: ``ready`` when the journal says so and
    ``/health`` answers; ``failed`` says why a start is over; ``progress`` changes as long as
    anything moves (its phase, new kinds of journal lines, bytes read by the service).
    """
    end = clock() + seconds
    while True:
        state = unit_state(runner, unit)
        lines = journal(runner, state["invocation_id"], _RECENT_LINES)
        # A hung engine repeats itself every minute: only what was not said before is progress.
        said = len({re.sub(r"\d+", "", line) for line in lines})
        result: dict[str, Any] = {
            "ready": False,
            "failed": "",
            "phase": phase(lines),
            "progress": f"{phase(lines)}, {said} different lines, "
            f"{_bytes_read(state['main_pid'], proc)} bytes",
            "invocation_id": state["invocation_id"],
        }
        if state["active_state"] not in ("active", "activating"):
            result["failed"] = f"the unit is {state['active_state']} ({state['result']})"
            return result
        # Before the restarts are counted: a node that died once, weeks ago, is ready now.
        if _came_up(runner, state["invocation_id"], lines, evidence_path) and (
            http("/health")[0] == 200
        ):
            result["ready"] = True
            return result
        if state["n_restarts"] or state["sub_state"] == "auto-restart":
            result["failed"] = f"the service died ({state['n_restarts']} restarts so far)"
            return result
        if clock() >= end:
            return result
        sleep(1.0)


def _came_up(runner: Runner, invocation: str, lines: Sequence[str], evidence_path: Path) -> bool:
    """Tell whether the journal of a start says, or said, that the server is up.

    ``lines`` are its last ones. A server that has answered for a while has pushed its own first
    words out of them, and at last out of the journal.
    """
    if any(_READY.search(line) for line in lines):
        return True
    if len(lines) < _RECENT_LINES:
        return False
    if read_evidence(evidence_path, invocation):
        return True
    return any(_READY.search(line) for line in journal(runner, invocation))


def _bytes_read(main_pid: int, proc: Path) -> int:
    """Bytes that a process and its descendants have read from storage, in steps of 64 MiB."""
    parents: dict[int, int] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    total = 0
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, main_pid):
            ancestor = parents.get(ancestor, 0)
        if ancestor:
            try:
                text = (proc / str(pid) / "io").read_text()
            except OSError:
                continue
            total += sum(
                int(line.partition(":")[2])
                for line in text.splitlines()
                if line.startswith("rchar")
            )
    return total // (64 << 20) * (64 << 20)


def failed_start(watched: Mapping[str, Any], lines: Sequence[str], reason: str) -> FleetError:
    """Make the error for a start that did not come up, with a diagnosis where one is known."""
    known = diagnose(lines)
    return FleetError(
        "The node did not come up",
        expected="the server to be ready",
        found=f"{reason}; last seen: {watched.get('phase', '')}",
        remedy=known or "read `journalctl -u glm-serving` on the node",
        details={
            "journal": relevant_lines(lines),
            "diagnosis": known,
            "step_down": lower_graphs_help(lines),
        },
    )
