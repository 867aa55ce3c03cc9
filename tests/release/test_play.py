# SPDX-License-Identifier: Apache-2.0
"""playbooks/release.yml as an operator runs it, with the stand-in on the source of 0.23.0.

The base wheel holds the Python of that release and nothing else, so that a build is quick.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from . import standin
from .conftest import Upstream

pytestmark = pytest.mark.release

ROOT = Path(__file__).resolve().parents[2]
_CHANGED = re.compile(r"^(?:controller|localhost)\s+: .*changed=(\d+)", re.MULTILINE)


def make_wheel(upstream: Upstream, version: str, folder: Path) -> Path:
    """Pack the Python files of a release as its wheel."""
    packed = subprocess.run(
        ["git", "--git-dir", str(upstream.path), "archive", "--format=zip", f"v{version}", "vllm"],
        capture_output=True,
        check=True,
    ).stdout
    path = folder / f"vllm-{version}-py3-none-any.whl"
    rows = []
    info = f"vllm-{version}.dist-info"
    with zipfile.ZipFile(io.BytesIO(packed)) as source, zipfile.ZipFile(path, "w") as wheel:
        files = {each: source.read(each) for each in source.namelist() if not each.endswith("/")}
        files[f"{info}/METADATA"] = (
            f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}\n".encode()
        )
        files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            rows.append([name, f"sha256={digest.decode()}", str(len(content))])
            wheel.writestr(name, content)
        record = io.StringIO()
        csv.writer(record, lineterminator="\n").writerows([*rows, [f"{info}/RECORD", "", ""]])
        wheel.writestr(f"{info}/RECORD", record.getvalue())
    return path


@dataclass
class Builder:
    """A release root, and the playbook run against it."""

    folder: Path
    variables: dict[str, Any]
    prefix: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def command(self, *options: str, **variables: Any) -> list[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        inventory = self.folder / "hosts.yml"
        hosts = {"gpu_nodes": {"hosts": {"gpu01": None}}, "gateways": {"hosts": {"gw01": None}}}
        inventory.write_text(yaml.safe_dump({"all": {"children": hosts}}))
        values = {**self.variables, "release_root": str(self.root), **variables}
        return [
            *self.prefix,
            *("ansible-playbook", "-i", str(inventory), "-e", json.dumps(values)),
            *("playbooks/release.yml", *options),
        ]

    def start(self, *options: str, **variables: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*options, **variables),
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str, **variables: Any) -> tuple[int, str]:
        process = self.start(*options, **variables)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    def good(self, *options: str, **variables: Any) -> str:
        rc, output = self.run(*options, **variables)
        assert rc == 0, output[-4000:]
        return output

    def releases(self) -> dict[str, Any]:
        """Published release id -> manifest."""
        return {
            path.parent.name: json.loads(path.read_text())
            for path in self.root.glob("artifacts/release/*/manifest.json")
        }

    def remains(self) -> list[str]:
        """What only an unfinished build leaves; locks, and what was hashed, stay."""
        patterns = ("builds/*", "git/*.scratch", "artifacts/.staging/*/*")
        found = [path for pattern in patterns for path in self.root.glob(pattern)]
        return [str(path) for path in found if path.suffix not in (".lock", ".proven")]


@pytest.fixture(scope="module")
def wheels(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    return {version: make_wheel(upstream, version, folder) for version in ("0.22.1", "0.23.0")}


@pytest.fixture(scope="module")
def variables(upstream: Upstream, wheels: dict[str, Path]) -> dict[str, Any]:
    return {
        "release_repository": f"file://{upstream.path}",
        "release_ref": "v0.23.0",
        "release_pull_requests": [{"number": 38476, "head": upstream.head, "drop": ["csrc"]}],
        "release_base_wheel": str(wheels["0.23.0"]),
        "release_constraints": [],
        "release_expected_torch": "",
        "release_expected_triton": "",
    }


@pytest.fixture(scope="module")
def built(variables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Builder:
    builder = Builder(tmp_path_factory.mktemp("builder"), variables)
    builder.good()
    return builder


def test_check_mode_says_what_would_be_built(tmp_path: Path, variables: dict[str, Any]) -> None:
    builder = Builder(tmp_path, variables)
    output = builder.good("--check")
    assert "would_build: 0.23.0+pr38476.g" in output
    assert "sha:" in output
    assert not builder.root.exists()


def test_the_manifest_tells_everything(built: Builder, upstream: Upstream) -> None:
    ((identifier, manifest),) = built.releases().items()
    assert identifier.startswith("vllm-0.23.0-pr38476-")
    told = manifest["provenance"]
    assert told["inputs"]["source"]["sha"] == upstream.git("rev-parse", "v0.23.0")
    assert told["inputs"]["source"]["pull_requests"][0]["head"] == upstream.head
    assert [each["rule"] for each in told["conflicts"]] == ["dispatch-join"] * 2
    assert len(told["checks"]) == 12
    assert all(check["passed"] for check in told["checks"])
    assert told["dropped_files"] == ["csrc/libtorch_stable/quantization/fp4/nvfp4_quant_entry.cu"]
    assert told["against_source"]["excepted"] == 0
    assert built.remains() == []


def test_the_same_inputs_build_nothing(built: Builder) -> None:
    before = built.releases()
    output = built.good()
    assert set(_CHANGED.findall(output)) == {"0"}
    assert "Cherry-pick" not in output
    assert built.releases() == before


def test_another_builder_makes_the_same_release(
    built: Builder, tmp_path: Path, variables: dict[str, Any]
) -> None:
    """And a build that is killed in the middle does not stand in the way."""
    builder = Builder(tmp_path, variables)
    process = builder.start()
    assert process.stdout is not None
    for line in process.stdout:
        if "Lock the dependencies" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert builder.releases() == {}
    builder.good()
    assert builder.releases() == built.releases()
    assert builder.remains() == []


def refusal(builder: Builder, **variables: Any) -> str:
    """Run with bad input; return the one message, and see that nothing is left."""
    before = builder.releases()
    rc, output = builder.run(**variables)
    assert rc == 2, output[-3000:]
    assert output.count("fatal: [") == 1
    assert "Traceback" not in output
    assert "fatal: bad" not in output
    assert builder.releases() == before
    assert builder.remains() == []
    return re.sub(r"\s+", " ", output[output.index("fatal: [") :])


PULL = {"number": 38476, "drop": ["csrc"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"release_ref": "v9.9.9"}, "has no ref v9.9.9"),
        (
            {"release_pull_requests": [{**PULL, "number": 1, "head": "1" * 40}]},
            "has no pull request 1",
        ),
        ({"release_pull_requests": [{**PULL, "head": "1" * 40}]}, "has moved since"),
        ({"release_pull_requests": [{**PULL, "head": "3740c02"}]}, "is not pinned"),
        ({"release_repository": "file:///nowhere/vllm.git"}, "cannot be read"),
        ({"release_base_wheel": "/nowhere/vllm-0.23.0-py3-none-any.whl"}, "cannot be read"),
        ({"release_base_wheel": "", "release_driver": "535.1"}, "too old for every CUDA build"),
        ({"release_ref": "v0.33.0"}, "2 files conflict"),
        ({"release_resolutions": ["/nowhere/x.patch"]}, "is not a recorded resolution"),
        ({"release_constraints": ["no-such-package-of-anybody==1"]}, "cannot be resolved"),
        ({"release_expected_torch": "2.11.0"}, "other versions than the release expects"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(built: Builder, changes: dict[str, Any], message: str) -> None:
    assert message in refusal(built, **changes)


def test_a_moved_head_names_both(built: Builder, upstream: Upstream) -> None:
    said = refusal(built, release_pull_requests=[{**PULL, "head": "1" * 40}])
    assert f"Expected: head {'1' * 40}" in said
    assert f"to accept it, set head: {upstream.head}" in said


def test_the_wheel_of_another_release(built: Builder, wheels: dict[str, Path]) -> None:
    said = refusal(built, release_base_wheel=str(wheels["0.22.1"]))
    assert "was not made of this source" in said


def test_a_shallow_mirror(built: Builder, upstream: Upstream, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror.git"
    subprocess.run(["git", "init", "--quiet", "--bare", str(mirror)], check=True)
    refs = ["v0.24.0", "refs/pull/38476/head"]
    fetch = ["git", "--git-dir", str(mirror), "fetch", "--quiet", "--depth=1"]
    specs = [f"+refs/tags/{refs[0]}:refs/tags/{refs[0]}", f"+{refs[1]}:{refs[1]}"]
    subprocess.run([*fetch, f"file://{upstream.path}", *specs], check=True)
    said = refusal(
        Builder(tmp_path / "builder", built.variables),
        release_mirror=f"file://{mirror}",
        release_ref="v0.24.0",
    )
    assert "is itself shallow" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("megabytes", [4, 20, 50])
def test_a_full_disk(tmp_path: Path, variables: dict[str, Any], megabytes: int) -> None:
    """4 MB are not enough for the clone, 20 MB for the worktree, 50 MB for the downloads."""
    (tmp_path / "root").mkdir()
    # In a mount namespace of its own, which ends with the run.
    script = f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" && "$@"; rc=$?; find "$0"; exit $rc'
    prefix = ["unshare", "--mount", "sh", "-c", script, str(tmp_path / "root")]
    rc, output = Builder(tmp_path, variables, prefix).run()
    assert rc == 2, output[-3000:]
    assert "The disk is full" in output
    assert output.count("fatal: [") == 1
    assert "manifest.json" not in output
    assert not re.search(r"\.(scratch|part)$", output, re.MULTILINE)


def branch(upstream: Upstream, name: str, start: str, files: dict[str, str], folder: Path) -> str:
    """Commit files onto ``start`` as a branch; return the commit."""
    tree = folder / f"tree-{name.replace('/', '-')}"
    upstream.git("worktree", "add", "--quiet", "--detach", str(tree), start)
    try:
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
        for words in (["add", "--all"], ["commit", "--quiet", "--message", "later"]):
            subprocess.run([*git, *words], cwd=tree, check=True)
        made = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=tree, check=True, capture_output=True, text=True
        ).stdout.strip()
    finally:
        upstream.git("worktree", "remove", "--force", str(tree))
    upstream.git("update-ref", name, made)
    return made


@pytest.fixture
def index(
    upstream: Upstream, wheels: dict[str, Path], tmp_path: Path
) -> Iterator[tuple[str, Path]]:
    """A small index of wheels by commit, with that of 0.23.0: (URL, folder)."""
    folder = tmp_path / "index"
    commit = folder / upstream.git("rev-parse", "v0.23.0") / "cu130" / "vllm"
    commit.mkdir(parents=True)
    shutil.copy(wheels["0.23.0"], folder)
    row = {
        "package_name": "vllm",
        "platform_tag": "any",
        "path": f"../../../{wheels['0.23.0'].name}",
    }
    (commit / "metadata.json").write_text(json.dumps([row]))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_commit_of_main_on_the_wheel_of_its_ancestor(
    upstream: Upstream, index: tuple[str, Path], variables: dict[str, Any], tmp_path: Path
) -> None:
    """What changed since the wheel was made comes from the source; no fleet waits for an index."""
    later = {"vllm/later.py": "later = 1\n", "vllm/logger.py": "changed = 1\n"}
    main = branch(upstream, "refs/heads/main", "v0.23.0", later, tmp_path)
    auto = {
        "release_ref": "main",
        "release_base_wheel": "auto",
        "release_driver": "580.1",
        "release_wheel_index": index[0],
    }
    builder = Builder(tmp_path / "builder", {**variables, **auto})
    builder.good("--check")
    assert not builder.root.exists()
    builder.good()
    ((_, manifest),) = builder.releases().items()
    told = manifest["provenance"]
    assert told["version"].startswith(f"0.23.0+at.g{main[:7]}.pr38476.g")
    assert told["inputs"]["source"]["sha"] == main
    (wheel,) = builder.root.glob("artifacts/release/*/wheels/vllm-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert packed.read("vllm/later.py") == b"later = 1\n"
        assert packed.read("vllm/logger.py") == b"changed = 1\n"
        assert b"elif use_deep_gemm" in packed.read(
            "vllm/model_executor/layers/sparse_attn_indexer.py"
        )
    assert set(_CHANGED.findall(builder.good())) == {"0"}

    compiled = branch(upstream, "refs/heads/main", main, {"csrc/x.cu": "// new\n"}, tmp_path)
    said = refusal(builder)
    assert f"no published wheel to put the commit {compiled[:12]} on" in said
    assert "none for 1 commit(s), and before those csrc/x.cu was changed" in said


def test_a_pull_requests_own_branch_as_the_ref(
    upstream: Upstream, index: tuple[str, Path], variables: dict[str, Any], tmp_path: Path
) -> None:
    first = Builder(tmp_path / "first", variables)
    first.good()
    (wheel,) = first.root.glob("artifacts/release/*/wheels/vllm-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        files = {
            name: packed.read(name).decode()
            for name in packed.namelist()
            if name in standin.EDITS or name in standin.NEW_FILES
        }
    head = branch(upstream, "refs/pull/7/head", "v0.23.0", files, tmp_path)
    builder = Builder(
        tmp_path / "builder",
        {
            **variables,
            "release_ref": "refs/pull/7/head",
            "release_pull_requests": [],
            "release_base_wheel": "auto",
            "release_driver": "580.1",
            "release_wheel_index": index[0],
        },
    )
    builder.good()
    ((_, manifest),) = builder.releases().items()
    assert manifest["provenance"]["version"] == f"0.23.0+at.g{head[:7]}"
    assert all(check["passed"] for check in manifest["provenance"]["checks"])
    (made,) = builder.root.glob("artifacts/release/*/wheels/vllm-*.whl")
    with zipfile.ZipFile(made) as packed:
        assert {name: packed.read(name).decode() for name in files} == files


def test_old_releases_are_retired(built: Builder) -> None:
    ((first, _),) = built.releases().items()
    built.good(release_variant="b")
    assert len(built.releases()) == 2
    built.good(release_variant="c", release_keep=1)
    assert len(built.releases()) == 1
    assert first not in built.releases()


@pytest.fixture(autouse=True)
def no_worktree_is_left(built: Builder) -> Iterator[None]:
    yield
    assert not list(built.root.glob("git/*.scratch"))
