# SPDX-License-Identifier: Apache-2.0
"""How fast a node could decode if nothing but its memory took time.

For each step a GPU reads its share of the weights that the step needs, and the cache of every
sequence. Of a mixture of experts a step needs those that its tokens are sent to: of E experts, a
of which each token takes, n tokens that choose evenly leave E x (1 - a/E)^n untouched. Dividing
these bytes by the bandwidth of the GPU's memory gives a time that no step can be below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..core.decode import Count
from ..core.errors import FleetError, from_os_error
from ..model.fit import Config, Plan, Tensor, fit, indexed_layers, read_config, read_header, weigh

_EXPERT = re.compile(r"\.experts\.\d+\.")
# Of the table of embeddings a step reads a row for each token.
_EMBEDDING = re.compile(r"(^|\.)embed_tokens\.")
_LENGTH = 8
_LARGEST_HEADER = 64 * 2**20
_ANY = Plan(tensor_parallel=1, gpu_bytes=0, utilisation=1.0, context=0, release="")


@dataclass(frozen=True)
class Shape:
    """The bytes of a model that decoding reads, for all GPUs together unless it says otherwise.

    ``sharded`` are divided among the GPUs, ``replicated`` are read by each. Of the ``experts``
    (bytes, ``routed`` in number on each layer) a token takes ``chosen``. A token of the cache has
    ``token`` bytes, ``key`` of them in keys of the indexer, and attention reads the rest of at
    most ``attended`` tokens (0: all).
    """

    sharded: Count
    replicated: Count
    experts: Count
    routed: Count
    chosen: Count
    token: Count
    key: Count
    attended: Count


def read_shape(folder: Path) -> Shape:
    """Return the shape of a model on this disk, from config.json and the headers of its shards.

    Raises `FleetError` for files that cannot be used.
    """
    try:
        text = (folder / "config.json").read_bytes()
        headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
    except OSError as error:
        raise from_os_error(error) from error
    config = read_config(text, f"{folder}/config.json")
    experts: list[dict[str, Tensor]] = []
    rest: list[dict[str, Tensor]] = []
    for header in headers:
        experts.append({name: each for name, each in header.items() if _EXPERT.search(name)})
        rest.append(
            {
                name: each
                for name, each in header.items()
                if not _EXPERT.search(name) and not _EMBEDDING.search(name)
            }
        )
    sizes, routed = weigh("", "", config, rest), weigh("", "", config, experts)
    indexed = indexed_layers(config, "")
    unindexed: Config = {**config, "index_topk": 0}
    without = fit({**sizes, "config": unindexed}, _ANY).token
    token = fit(sizes, _ANY).token
    return Shape(
        sharded=sizes["sharded"],
        replicated=sizes["replicated"]
        + sum(sizes["indexers"].get(str(layer), 0) for layer in indexed),
        experts=routed["sharded"] + routed["replicated"],
        routed=config.get("n_routed_experts") or 0,
        chosen=config.get("num_experts_per_tok") or 0,
        token=token,
        key=token - without,
        attended=config.get("index_topk", 0),
    )


def limit(
    shape: Shape, *, streams: int, context: float, gpus: int, bytes_per_second: float
) -> float:
    """Return the tokens a second of all streams together that memory alone allows.

    ``context`` is the mean length of a sequence in tokens, ``bytes_per_second`` the bandwidth of
    one of the ``gpus`` that share the model.
    """
    touched = 1.0
    if shape.routed and shape.chosen:
        touched = 1 - (1 - min(shape.chosen / shape.routed, 1.0)) ** streams
    weights = (shape.sharded + shape.experts * touched) / gpus + shape.replicated
    read = min(context, shape.attended) if shape.attended else context
    # The cache of MLA is the same on every GPU.
    cache = streams * (read * (shape.token - shape.key) + context * shape.key)
    return streams / ((weights + cache) / bytes_per_second)


def _header(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH), "little")
        if not 0 < length <= _LARGEST_HEADER:
            raise FleetError(
                "A shard of the model is damaged",
                expected=f"the length of its header at the beginning of {path}",
                found=f"{length} bytes",
            )
        return read_header(stream.read(length), f"The header of {path}")
