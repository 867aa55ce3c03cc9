# SPDX-License-Identifier: Apache-2.0
"""What the acceptance of a node runs on its GPUs, under the release's own Python.

Three trials, each a process a GPU, so that a kernel that ends the CUDA context ends nothing else:
``kernels`` (the release's kernels against plain float32), ``load`` (products that must be the same
bit by bit, memory, bandwidth), ``together`` (all-reduce). torch is imported once, before the
processes part. On the device "cpu" everything runs the same way, small, with Triton's interpreter
and gloo.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from . import cases, modules

_OPERANDS = 4
_TIMED = 40
_LARGE_SUM = 1000
_PR_SET_PDEATHSIG = 1


def run(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run a trial on every GPU at once: for each {answer}, or {said} that came in its place.

    ``each`` holds a task for each GPU, with what it sees of them (``visible``); the rest of
    ``task`` is the same for all. Who has no answer after ``limit_s`` seconds is ended.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'")
    if task["trial"] != "kernels" or importlib.util.find_spec("triton"):
        importlib.import_module("torch")
    deadline = time.monotonic() + task["limit_s"]
    children = [_Child({**task, **each}) for each in task["each"]]
    return [child.outcome(deadline) for child in children]


class _Child:
    """A process of this one that runs a trial; it ends with this one."""

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as the child lives
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115
        self._limit_s = task["limit_s"]
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self._work(task)
                status = 0
            except BaseException:  # noqa: BLE001 - the process ends here in any case
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)

    def _work(self, task: Mapping[str, Any]) -> None:
        # Whoever ends the parent, for taking too long, ends a process that may hang on a GPU.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(self._said.fileno(), 1)
        os.dup2(self._said.fileno(), 2)
        os.environ["CUDA_VISIBLE_DEVICES"] = task["visible"]
        answer = _TRIALS[task["trial"]](task)
        self._answer.write(json.dumps(answer).encode())
        self._answer.flush()

    def outcome(self, deadline: float) -> dict[str, Any]:
        """Wait for the end, and return what came of it."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return {"said": f"no answer within {self._limit_s:.0f} s; {self._words()}"}
            time.sleep(0.05)
        if status == 0:
            self._answer.seek(0)
            return {"answer": json.loads(self._answer.read())}
        if os.WIFSIGNALED(status):
            return {"said": f"ended by {signal.Signals(os.WTERMSIG(status)).name}; {self._words()}"}
        return {"said": self._words()}

    def _words(self) -> str:
        """Return the end of what it said: an exception's own line, where there is one."""
        self._said.seek(0)
        text = self._said.read()[-4000:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-3:])[-500:] or "it said nothing"


def _torch(device: str) -> Any:
    torch = importlib.import_module("torch")
    torch.set_float32_matmul_precision("highest")
    if device == "cpu":
        torch.set_num_threads(1)
    return torch


def _wait(torch: Any, device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# -- the release's kernels -----------------------------------------------------------------
def kernels(task: Mapping[str, Any]) -> dict[str, Any]:
    """Run every case with every seed: {rows}, or {missing} when there is no Triton."""
    device = task["device"]
    if importlib.util.find_spec("triton") is None:
        return {"rows": [], "missing": "Triton"}
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    torch = _torch(device)
    capability = (8, 0) if device == "cpu" else torch.cuda.get_device_capability(0)
    modules.prepare(Path(task["tree"]), [each["module"] for each in task["cases"]], capability)
    half = torch.bfloat16
    if device == "cpu":
        from . import interpret

        interpret.first_configuration()
        half = torch.float32
    rows = []
    for case in task["cases"]:
        for seed in range(task["seeds"]):
            begun = time.monotonic()
            row: dict[str, Any] = {"case": case["name"], "seed": seed}
            try:
                row.update(cases.run(torch, case, device=device, half=half, seed=seed))
            except Exception as error:  # noqa: BLE001 - a kernel may raise anything
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append({**row, "seconds": round(time.monotonic() - begun, 3)})
    return {"rows": rows}


# -- the same product again and again, and the memory -------------------------------------
def load(task: Mapping[str, Any]) -> dict[str, Any]:
    """Multiply, and compare every product with the first of its operands bit by bit.

    ``digests`` name the first products, so that GPUs can be compared; ``differences`` counts
    values that another time were others. ``begun`` and ``ended`` (seconds since 1970) bound the
    time under load.
    """
    device, size = task["device"], task["size"]
    torch = _torch(device)
    torch.manual_seed(1)
    left = torch.randn(size, size).to(torch.bfloat16).to(device)
    right = torch.randn(size, size).to(torch.bfloat16).to(device)
    rights = [torch.roll(right, 577 * place, 0) for place in range(_OPERANDS)]
    firsts = [left @ each for each in rights]
    digests = [_digest(torch, each) for each in firsts]
    product = torch.empty_like(firsts[0])
    differences = torch.zeros((), dtype=torch.int64, device=device)
    _wait(torch, device)
    begun = time.time()
    for step in range(task["products"]):
        torch.mm(left, rights[step % _OPERANDS], out=product)
        same = product.view(torch.int16) != firsts[step % _OPERANDS].view(torch.int16)
        differences += same.sum()
    _wait(torch, device)
    started = time.monotonic()
    for step in range(_TIMED):
        torch.mm(left, rights[step % _OPERANDS], out=product)
    _wait(torch, device)
    seconds = time.monotonic() - started
    ended = time.time()
    del firsts, rights, right, left, product
    return {
        "begun": begun,
        "ended": ended,
        "digests": digests,
        "differences": int(differences),
        "tflops": 2e-12 * size**3 * _TIMED / seconds,
        "gbytes_per_second": bandwidth(torch, device, task["copied_bytes"]),
        **memory(torch, device, task["tested_bytes"]),
    }


def _digest(torch: Any, values: Any) -> str:
    content = values.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(content).cast("B")).hexdigest()[:16]


def bandwidth(torch: Any, device: str, count: int) -> float:
    """Copy ``count`` bytes within the memory; return 10^9 bytes a second, read and written."""
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    _wait(torch, device)
    started, copies = time.monotonic(), 20
    for _ in range(copies):
        target.copy_(source)
    _wait(torch, device)
    return float(2e-9 * count * copies / (time.monotonic() - started))


def memory(torch: Any, device: str, count: int) -> dict[str, int]:
    """Write numbers to nearly all of the memory, and their complements, and read them again.

    ``count`` bytes at most; 0 is all that is free but for a tenth. Returns {memory_tested_bytes,
    memory_wrong}: values of 8 bytes that came back as others.
    """
    chunk = 2**27 if device != "cpu" else 2**16
    if device != "cpu":
        torch.cuda.empty_cache()
        count = count or int(torch.cuda.mem_get_info()[0] * 0.9)
    numbers = torch.arange(chunk, dtype=torch.int64, device=device)
    held: list[Any] = []
    wrong = 0
    # Two chunks stay free for what the comparison takes.
    for place in range(max(1, count // (8 * chunk) - 3)):
        held.append(numbers + place * chunk)
    for place, each in enumerate(held):
        wrong += int((each != numbers + place * chunk).sum())
        each.bitwise_not_()
    for place, each in enumerate(held):
        wrong += int((each.bitwise_not_() != numbers + place * chunk).sum())
    return {"memory_tested_bytes": len(held) * chunk * 8, "memory_wrong": wrong}


# -- all GPUs together ---------------------------------------------------------------------
def together(task: Mapping[str, Any]) -> dict[str, Any]:
    """Add up over all GPUs: {wrong, bus_gbytes_per_second, microseconds}; rank 0 adds peers.

    ``peers`` are the pairs of GPUs that reach each other's memory.
    """
    device, rank, world = task["device"], task["rank"], task["world"]
    torch = _torch(device)
    distributed = importlib.import_module("torch.distributed")
    if device != "cpu":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"tcp://127.0.0.1:{task['port']}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=task["patience_s"]),
    )
    # Whole numbers that float32 holds exactly: the sum is right, or it is wrong.
    numbers = torch.arange(task["summed"], device=device) % _LARGE_SUM
    values = (numbers * (rank + 1)).float()
    distributed.all_reduce(values)
    wrong = int((values != (numbers * (world * (world + 1) // 2)).float()).sum())

    def seconds_each(count: int, times: int) -> float:
        data = torch.ones(max(1, count // 2), dtype=torch.bfloat16, device=device)
        for _ in range(3):
            distributed.all_reduce(data)
            data.fill_(1)
        _wait(torch, device)
        started = time.monotonic()
        for _ in range(times):
            distributed.all_reduce(data)
        _wait(torch, device)
        return (time.monotonic() - started) / times

    large = seconds_each(task["bytes"], task["times"])
    # As much as one step of 32 sequences sums in a layer: hidden size 6144.
    small = seconds_each(32 * 6144 * 2, 5 * task["times"])
    found: dict[str, Any] = {
        "wrong": wrong,
        "of": task["summed"],
        "bus_gbytes_per_second": 2e-9 * (world - 1) / world * task["bytes"] / large,
        "microseconds": small * 1e6,
    }
    if rank == 0 and device != "cpu":
        found["peers"] = [
            [first, second]
            for first in range(world)
            for second in range(first + 1, world)
            if torch.cuda.can_device_access_peer(first, second)
        ]
    distributed.barrier()
    distributed.destroy_process_group()
    return found


_TRIALS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "kernels": kernels,
    "load": load,
    "together": together,
}
