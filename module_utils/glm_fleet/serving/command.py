# SPDX-License-Identifier: Apache-2.0
"""What a node serves: the command line of vLLM, its environment, and what differs."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from .graphs import MODES, resolve

# The flags that settings of a node become.
FLAGS = {
    "--host": "bind_address",
    "--port": "port",
    "--served-model-name": "model_name",
    "--tensor-parallel-size": "tensor_parallel_size",
    "--attention-backend": "attention_backend",
    "--dtype": "dtype",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--max-model-len": "max_model_len",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--max-num-seqs": "max_num_seqs",
    "--tool-call-parser": "tool_call_parser",
    "--reasoning-parser": "reasoning_parser",
    "--chat-template": "chat_template",
    "--speculative-config": "speculative",
    "--shutdown-timeout": "shutdown_timeout",
}
# Flags that follow from settings without having their value.
_FOLLOWING = ("--enable-auto-tool-choice", "--enforce-eager", "--compilation-config")
OWN_FLAGS = frozenset((*FLAGS, *_FOLLOWING))
# Where vLLM defines the options of `vllm serve`, below its package.
_PARSERS = ("engine/arg_utils.py", "entrypoints/openai/cli_args.py")
_OPTION = re.compile(r"--[a-z][a-z0-9-]+")


def parser_options(release: Path) -> list[str]:
    """Return the options that the parser of a release has, [] where that cannot be told.

    ``release`` is its environment. They are read from its source, as the literals that it gives
    to argparse: starting `vllm serve --help` takes half a minute.
    """
    found: set[str] = set()
    for package in release.glob("lib/python3*/site-packages/vllm"):
        for name in _PARSERS:
            try:
                tree = ast.parse((package / name).read_text())
            except (OSError, ValueError, SyntaxError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and _OPTION.fullmatch(str(node.value)):
                    found.add(str(node.value))
    return sorted(found)


def serve_command(settings: Mapping[str, Any]) -> list[str]:
    """Return the arguments of ``vllm`` for the settings of a node.

    ``settings`` are the variables of the role serving without their prefix. A value that
    is empty or None leaves the choice to vLLM. Raises `FleetError` for a mode of CUDA
    graphs that nobody knows.
    """
    graphs = MODES[resolve(str(settings["cuda_graphs"]), [])]
    command = ["serve", str(settings["model_path"])]
    for flag, name in FLAGS.items():
        value = settings[name]
        if value not in (None, "", {}):
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
