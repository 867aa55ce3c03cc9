# SPDX-License-Identifier: Apache-2.0
"""What a node serves: the command line of vLLM, its environment, and what differs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import FleetError
from .graphs import MODES, resolve


def serve_command(settings: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``vllm`` for the settings of a node.

    ``settings`` are the variables of the role serving without their prefix. A value that
    is empty or None leaves the choice to vLLM. Raises `FleetError` for a mode of CUDA
    graphs that nobody knows.
    """
    graphs = MODES[resolve(str(settings["cuda_graphs"]), [])]
    options: list[tuple[str, Any]] = [
        ("--host", settings["bind_address"]),
        ("--port", settings["port"]),
        ("--served-model-name", settings["model_name"]),
        ("--tensor-parallel-size", settings["tensor_parallel_size"]),
        ("--attention-backend", settings["attention_backend"]),
        ("--dtype", settings["dtype"]),
        ("--kv-cache-dtype", settings["kv_cache_dtype"]),
        ("--max-model-len", settings["max_model_len"]),
        ("--gpu-memory-utilization", settings["gpu_memory_utilization"]),
        ("--max-num-seqs", settings["max_num_seqs"]),
        ("--tool-call-parser", settings["tool_call_parser"]),
        ("--reasoning-parser", settings["reasoning_parser"]),
        ("--chat-template", settings["chat_template"]),
        ("--shutdown-timeout", settings["shutdown_timeout"]),
    ]
    command = ["serve", str(settings["model_path"])]
    for flag, value in options:
        if value not in (None, ""):
            command += [flag, str(value)]
    if settings["tool_call_parser"]:
        command.append("--enable-auto-tool-choice")
    if not graphs.vllm:
        command.append("--enforce-eager")
    else:
        config = {"cudagraph_mode": graphs.vllm}
        command += ["--compilation-config", json.dumps(config, separators=(",", ":"))]
    return command + [str(each) for each in settings["extra_arguments"]]


def unit_words(words: Sequence[str]) -> str:
    """Quote words for ``ExecStart=`` of a systemd unit, one a line.

    systemd expands % and $ itself, and knows double quotes with backslash escapes.
    """
    quoted = []
    for word in words:
        text = word.replace("%", "%%").replace("$", "$$")
        if not text or any(char in text for char in " \t'\"\\;"):
            text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        quoted.append(text)
    lines: list[str] = []
    for text in quoted:
        # A flag opens a line, its value follows on the same one.
        if text.startswith("-") or not lines or not lines[-1].startswith("-"):
            lines.append(text)
        else:
            lines[-1] += f" {text}"
    return " \\\n  ".join(lines)


def environment_file(variables: Mapping[str, Any]) -> str:
    """Return the lines of a systemd ``EnvironmentFile``, sorted; None leaves a variable out."""
    lines = []
    for name, value in sorted(variables.items()):
        if value is None or value == "":
            continue
        text = str(value)
        if "\n" in text:
            raise FleetError(
                "An environment variable cannot be written",
                expected=f"one line in {name}",
                found="a line break",
            )
        lines.append(f"{name}={shlex.quote(text)}")
    return "\n".join(lines) + "\n"


def differences(running: Mapping[str, Any], wanted: Mapping[str, str]) -> list[str]:
    """Say what a restart would change: [] when the node runs what it should.

    ``running`` is what `attest.read_running` gives; ``wanted`` has
    release, model, unit_sha256 and environment_sha256.
    """
    if not running.get("active"):
        return ["the service does not run"]
    record = running.get("record") or {}
    if not record or record.get("invocation") != running.get("invocation"):
        return ["nothing proves what runs"]
    words = {
        "release": "release {0} -> {1}",
        "model": "model {0} -> {1}",
        "unit_sha256": "the unit or its command line",
        "environment_sha256": "the environment",
    }
    return [
        text.format(record.get(key) or "none", wanted[key])
        for key, text in words.items()
        if wanted.get(key) and record.get(key) != wanted[key]
    ]
