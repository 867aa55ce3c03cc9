# SPDX-License-Identifier: Apache-2.0
"""A small random Qwen2 model, made on the spot, in two revisions, and shards of noise.

The weights are noise, yet greedy output is readable: only tokens that are words have a row in
lm_head, and the end token has none, so an answer always runs to its length limit.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import struct
import tempfile
from array import array
from pathlib import Path
from typing import Any

from .settings import CACHE, MODEL_REPOSITORY, SHARDS_REPOSITORY
from .system import say

HIDDEN = 256
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
INTERMEDIATE = 704
VOCABULARY = 1024
SHARDS = 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEEDS = ("tiny-glm first", "tiny-glm second")  # the last one is main
NOISE_SHARDS = 12
NOISE_SHARD_BYTES = 24 * 1024 * 1024


WORDS = tuple(
    """
    the of and to in that is was for it with as his on be at by had not are but from or have an
    they which one you were her all she there would their we him been has when who will more no
    if out so said what up its about into than them can only other new some could time these
    two may then do first any my now such like our over man me even most made after also did
    many before must through back years where much your way well down should because each just
    those people how too little state good very make world still own see men work long here get
    both between life being under never day same another know while last might us great old
    year off come since against go came right used take three node gateway token model cache
    shard kernel tensor release fleet river stone light water garden window morning winter
    summer silver quiet bright slow quick open closed early late green blue red small large
    north south east west road bridge house door table paper letter number story music voice
    hand heart mind cloud rain snow wind fire earth mountain forest ocean island harbor city
    village market school engine wheel signal thread
    """.split()  # noqa: SIM905 (as a list it is three pages)
)
PUNCTUATION = (".", ",", "!", "?", ":", ";")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    table = {value: chr(value) for value in plain}
    table.update({value: chr(256 + position) for position, value in enumerate(others)})
    return [table[value] for value in range(256)]


def merges() -> list[tuple[str, str]]:
    """The merges that make each word, with its leading space, one token: letter by letter."""
    space = byte_symbols()[0x20]
    pairs: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end, letter in enumerate(word):
            pairs[space + word[:end], letter] = None
    return list(pairs)


def vocabulary() -> dict[str, int]:
    """Token -> id: 256 bytes, what the merges make, fillers, special tokens last."""
    tokens = byte_symbols() + [left + right for left, right in merges()]
    room = VOCABULARY - len(SPECIAL) - len(tokens)
    if room < 0:
        raise ValueError(f"the words need {-room} tokens more than the vocabulary has")
    tokens += [f"<|unused_{number}|>" for number in range(room)]
    return {token: number for number, token in enumerate([*tokens, *SPECIAL])}


def spoken_ids() -> list[int]:
    """Ids of the tokens that the model can say: words and punctuation."""
    ids = vocabulary()
    space = byte_symbols()[0x20]
    return sorted([ids[space + word] for word in WORDS] + [ids[mark] for mark in PUNCTUATION])


def tokenizer() -> dict[str, Any]:
    ids = vocabulary()
    added = [token for token in ids if token.startswith("<|")]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ids[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in added
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": True},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for token, number in ids.items() if token not in added},
            "merges": [list(pair) for pair in merges()],
        },
    }


def text_files() -> dict[str, bytes]:
    ids = vocabulary()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": False,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    card = (
        "# tiny-glm\n\nA random model with two layers, made by the lab. It says words, not sense.\n"
    )
    contents: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config,
    }
    files = {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in contents.items()
    }
    return {**files, "README.md": card.encode()}


def shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    kv = KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            found[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            found[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        found[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{prefix}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{prefix}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        found[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def bfloat16(value: float) -> int:
    """The bits of a value in bfloat16, truncated."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits >> 16


def noise(seed: str, count: int, deviation: float) -> bytes:
    """Deterministic bfloat16 noise: 256 quantiles of a normal distribution, picked by a hash."""
    normal = statistics.NormalDist(0.0, deviation)
    table = [bfloat16(normal.inv_cdf((step + 0.5) / 256)) for step in range(256)]
    values = array("H", map(table.__getitem__, hashlib.shake_128(seed.encode()).digest(count)))
    return values.tobytes()


def tensor(seed: str, name: str, shape: tuple[int, ...]) -> bytes:
    count = 1
    for size in shape:
        count *= size
    if name.endswith("norm.weight"):
        return struct.pack("<H", bfloat16(1.0)) * count
    if name == "lm_head.weight":
        row_bytes = HIDDEN * 2
        spoken = set(spoken_ids())
        rows = noise(f"{seed}/{name}", count, 0.2)
        return b"".join(
            rows[row * row_bytes : (row + 1) * row_bytes] if row in spoken else bytes(row_bytes)
            for row in range(VOCABULARY)
        )
    deviation = 1.0 if name == "model.embed_tokens.weight" else 0.12
    return noise(f"{seed}/{name}", count, deviation)


def safetensors(tensors: dict[str, tuple[tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file: header length, JSON header padded to 8 bytes, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values())


def weight_files(seed: str) -> dict[str, bytes]:
    """The shards and their index."""
    everything = {name: (shape, tensor(seed, name, shape)) for name, shape in shapes().items()}
    total = sum(len(data) for _, data in everything.values())
    shards: list[dict[str, tuple[tuple[int, ...], bytes]]] = [{} for _ in range(SHARDS)]
    filled = 0
    for name, entry in everything.items():
        shards[min(SHARDS - 1, filled * SHARDS // total)][name] = entry
        filled += len(entry[1])
    names = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, shard in zip(names, shards) for name in sorted(shard)},
    }
    files = {file: safetensors(shard) for file, shard in zip(names, shards)}
    files["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    return files


def commit_id(files: dict[str, bytes]) -> str:
    """A 40-digit commit id that follows from the content."""
    digest = hashlib.sha1(b"glm-fleet lab\0", usedforsecurity=False)
    for name in sorted(files):
        digest.update(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return digest.hexdigest()


def write_repository(folder: Path) -> list[str]:
    """Write the model's repository as hub.py serves it; returns the revisions, main last."""
    revisions = []
    for seed in SEEDS:
        files = {**text_files(), **weight_files(seed)}
        revision = commit_id(files)
        target = folder / "revisions" / revision
        target.mkdir(parents=True)
        for name, content in files.items():
            (target / name).write_bytes(content)
        revisions.append(revision)
    (folder / "refs.json").write_text(json.dumps({"main": revisions[-1]}) + "\n")
    return revisions


def write_shards(folder: Path) -> str:
    """Write a repository of noise with the shape of a big model; returns its commit."""
    names = [
        f"model-{number:05d}-of-{NOISE_SHARDS:05d}.safetensors"
        for number in range(1, NOISE_SHARDS + 1)
    ]
    index = {"metadata": {}, "weight_map": {f"noise.{name}": name for name in names}}
    small = {
        "config.json": b"{}\n",
        "README.md": b"# shards\n\nNoise in twelve shards, to be moved and not to be served.\n",
        "model.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode(),
    }
    revision = commit_id({**small, **{name: name.encode() for name in names}})
    target = folder / "revisions" / revision
    target.mkdir(parents=True)
    for name, content in small.items():
        (target / name).write_bytes(content)
    for name in names:
        noise_source = random.Random(name)  # noqa: S311 (the same bytes each time are wanted)
        (target / name).write_bytes(noise_source.randbytes(NOISE_SHARD_BYTES))
    (folder / "refs.json").write_text(json.dumps({"main": revision}) + "\n")
    return revision


def key() -> str:
    """Changes with this module, so that a changed recipe is built anew."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


HUB_FOLDER = CACHE / f"hub-{key()}"


def build() -> Path:
    """Make the hub's folder unless it exists."""
    if not HUB_FOLDER.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".build-hub-", dir=CACHE))
        work.chmod(0o755)
        write_repository(work / MODEL_REPOSITORY)
        write_shards(work / SHARDS_REPOSITORY)
        work.rename(HUB_FOLDER)
        say(f"models {MODEL_REPOSITORY} and {SHARDS_REPOSITORY} are written")
    return HUB_FOLDER


def main_revision() -> str:
    """The commit that the hub's main branch points at."""
    refs = json.loads((HUB_FOLDER / MODEL_REPOSITORY / "refs.json").read_text())
    return str(refs["main"])
