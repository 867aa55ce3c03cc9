# SPDX-License-Identifier: Apache-2.0
"""A rehearsal: does a release start and answer on these GPUs, before anybody waits for weights?

A rehearsal runs the unit of a deployment, with its command line and its environment, on random
weights in a few layers of the real shapes. Whatever kills a start or the first requests is there:
libraries, kernels, compilation, CUDA graphs, NCCL. Only what needs the real weights is not.

Here is what a rehearsal consists of. `rehearsal_run` does it, `rehearsals` tells how it ended.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..core.decode import parse
from ..core.errors import FleetError
from .command import unit_words
from .deployment import UNIT, Deployment

REHEARSAL_UNIT = "glm-rehearsal.service"

# What a server reads of a model beside its weights. Their index is left out with them.
_READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_INDEX = ".index.json"
_LARGEST = 64 * 1024 * 1024


def is_small_file(path: str, size: int) -> bool:
    """Tell whether a file of a model is needed to start without its weights."""
    name = PurePosixPath(path).name
    return name.endswith(_READ) and not name.endswith(_INDEX) and size <= _LARGEST


# Names of entries with one item a layer: of a list, or of a word with a letter a layer.
_PER_LAYER = re.compile(r"layer|_types$|_pattern$")
_LEAST_LAYERS = 2


@dataclass(frozen=True)
class Cut:
    """A config.json with fewer layers: its text, the layers that it keeps, and those there were."""

    text: str
    layers: int
    of: int


def _number(config: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value >= 0 else otherwise


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    """Tell a layer of experts from a dense one, as DeepSeek's and GLM's configurations say it."""
    every = max(1, _number(config, "moe_layer_freq", 1))
    return layer >= _number(config, "first_k_dense_replace", 0) and layer % every == 0


def _has_indexer(config: Mapping[str, Any], layer: int) -> bool:
    """Tell a layer that selects tokens from one that takes over the selection before it."""
    every = max(1, _number(config, "index_topk_freq", 1))
    begin = _number(config, "index_skip_topk_offset", 2)
    return max(layer - begin + 1, 0) % every == 0


# What a configuration says of a layer by a rule, and not by a list.
_RULES = (_is_sparse, _has_indexer)


def cut_config(text: str, layers: int = 0) -> Cut:
    """Return a model's config.json with its first layers only.

    ``layers`` is how many to keep. 0 keeps as few as hold each kind of layer: of GLM-5.2 the
    first 7 of 78 (dense and with experts, each with and without an indexer, as far as there are
    such). Entries with an item a layer are cut with them. Raises `FleetError`.
    """
    whole = parse(dict[str, Any], text, what="The configuration of a model")
    # A model that also sees has the layers of its text in an entry of their own.
    inner = whole.get("text_config")
    config = inner if isinstance(inner, dict) and "num_hidden_layers" in inner else whole
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 10_000:
        raise FleetError(
            "The model cannot be rehearsed",
            expected="num_hidden_layers, a number from 1, in its config.json",
            found=repr(count)[:80],
            remedy="set serve_rehearsal to never for this model",
        )
    lists = {
        name: value
        for name, value in config.items()
        if isinstance(value, (list, str)) and len(value) == count and _PER_LAYER.search(name)
    }
    if not layers:
        kinds = [
            (*(json.dumps(each[layer]) for each in lists.values()),
             *(rule(config, layer) for rule in _RULES))
            for layer in range(count)
        ]  # fmt: skip
        layers = 1 + max(kinds.index(kind) for kind in set(kinds))
    keep = min(count, max(layers, _LEAST_LAYERS))
    config.update({name: value[:keep] for name, value in lists.items()})
    config["num_hidden_layers"] = keep
    return Cut(json.dumps(whole, indent=1) + "\n", keep, count)


def _lines(unit: str) -> list[str]:
    """Return the lines of a unit, each with what it continues on."""
    return unit.replace("\\\n", " ").splitlines()


def exec_words(unit: str) -> list[str]:
    """Return the words of ``ExecStart=`` as the program gets them; raises `FleetError`."""
    found = [line.partition("=")[2] for line in _lines(unit) if line.startswith("ExecStart=")]
    try:
        words = [each.replace("%%", "%").replace("$$", "$") for each in shlex.split(found[-1])]
        if words[1] == "serve" and len(words) > 2:
            return words
    except (IndexError, ValueError):
        pass
    raise FleetError(
        "The unit of a deployment cannot be read",
        expected="ExecStart=…/bin/vllm serve MODEL with its options",
        found=(found or ["no such line"])[-1][:120],
        remedy="run site.yml, which stages it again",
    )


def rehearsal_command(words: Sequence[str], *, program: Path, model: Path, port: int) -> list[str]:
    """Return the command line of a rehearsal: the real one, for random weights, on this host.

    ``words`` are those of the real one, ``program`` is vLLM of the release, ``model`` the folder
    with the cut configuration.
    """
    ours = {"--host": "127.0.0.1", "--port": str(port), "--load-format": "dummy"}
    kept: list[str] = []
    drop = False
    for word in words[3:]:
        if drop:
            drop = False
        elif word.partition("=")[0] in ours:
            drop = "=" not in word
        else:
            kept.append(word)
    added = [part for pair in ours.items() for part in pair]
    return [str(program), "serve", str(model), *kept, *added]


# Lines of the unit that are another's: of the pre-start check and its record, of restarts, of boot.
_DROPPED = (
    "ExecStartPre", "Restart", "RestartSec", "StartLimitIntervalSec", "StartLimitBurst",
)  # fmt: skip


def rehearsal_unit(unit: str, drop_in: str, words: Sequence[str], environment: Path) -> str:
    """Return the text of the unit of a rehearsal: the real one's, with what protects it.

    ``drop_in`` is the drop-in of the real unit, ``words`` the command line and ``environment``
    the environment file. It is never enabled, never restarted, and gives way to the real one.
    """
    ours = {
        "Description": "Description=glm-fleet: rehearsal of a release with random weights",
        "EnvironmentFile": f"EnvironmentFile={environment}",
        "ExecStart": f"ExecStart={unit_words(words)}",
        "TimeoutStopSec": "TimeoutStopSec=60",
    }
    lines: list[str] = []
    section = ""
    for line in [*_lines(unit), *_lines(drop_in)]:
        name = line.partition("=")[0].strip()
        if line.startswith("["):
            section = line.strip()
        if section == "[Install]" or name in _DROPPED or line.startswith("#"):
            continue
        lines.append(ours.get(name, line))
        if line.strip() == "[Unit]":
            # A start of the real engine, by whomever, ends the rehearsal before.
            lines += [f"Conflicts={UNIT}", f"After={UNIT}"]
    return "\n".join(lines) + "\n"


_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")


def command_digest(deployment: Deployment, config: str) -> str:
    """Return what names a command line, with all that it runs in, but no secret."""
    hashed = hashlib.sha256()
    shown = [
        line if not _SECRET.search(line.partition("=")[0]) else line.partition("=")[0]
        for line in deployment.environment.splitlines()
    ]
    for part in (deployment.unit, "\n".join(shown), config):
        hashed.update(part.encode() + b"\0")
    return hashed.hexdigest()[:16]
