# SPDX-License-Identifier: Apache-2.0
"""The source compiler on a small repository with the conflict that the real one has."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import run_program
from glm_fleet.release.compiler import Compiler, Patched
from glm_fleet.release.git import PullRequest, Repository, without_secret
from glm_fleet.release.merge import Resolver
from glm_fleet.release.recorded import read_resolution
from glm_fleet.release.verify.model import SourceExpectations

EXPECT = SourceExpectations()
KERNELS = "vllm/v1/attention/ops/mqa_logits_triton.py"
BACKEND = "vllm/v1/attention/backends/mla/triton_mla_sparse.py"
STUB = "csrc/fp4/entry.cu"
PULL_REF = "refs/pull/38476/head"

INDEXER = '''\
"""The indexer."""

from vllm.deep_gemm import (
    mqa_logits,
    paged_mqa_logits,
    has_deep_gemm,
)
from vllm.platforms import current_platform, logger, ops


def sparse_attn_indexer(q, k, has_prefill, has_decode):
    k = k.view()
    if has_prefill:
        q_slice = q
@PREFILL@
        num_rows = logits.shape[0]
        ops.top_k(logits, num_rows)

    if has_decode:
        q_padded = q
@DECODE@
        num_rows = logits.shape[0]
        ops.top_k_decode(logits, num_rows)
    return k


class SparseAttnIndexer:
    def __init__(self):
        self.k_cache = 1
        if current_platform.is_cuda() and not has_deep_gemm():
            raise RuntimeError(
                "@MESSAGE@"
            )

        self.ready = True
'''
PLAIN = """\
        logits = @NAME@(
            q,
            k,
            clean=False,
        )"""
XPU = """\
        if current_platform.is_xpu():
            if q is None:
                raise RuntimeError("no Q")
            logits = ops.xpu_@NAME@(q, k)
        else:
            logits = @NAME@(
                q,
                k,
                clean=False,
            )"""
TRITON = """\
        if use_deep_gemm:
            logits = @NAME@(
                q,
                k,
                clean=False,
            )
        else:
            logits = @NAME@_triton(q, k)"""
REGISTRY = """\
class AttentionBackendEnum:
    TRITON_MLA = "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend"
"""
CUDA = """\
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def _get_backend_priorities(use_mla, device_capability):
    if use_mla:
        if device_capability.major == 10:
            return [
                AttentionBackendEnum.TRITON_MLA,
            ]
        else:
            return [
                AttentionBackendEnum.TRITON_MLA,
            ]
    return []
"""


def indexer(block: str, message: str) -> str:
    text = INDEXER.replace("@PREFILL@", block.replace("@NAME@", "mqa_logits"))
    return text.replace("@DECODE@", block.replace("@NAME@", "paged_mqa_logits")).replace(
        "@MESSAGE@", message
    )


def with_pull_request(text: str) -> str:
    """Edit the indexer of the base as the pull request does."""
    for name in ("mqa_logits", "paged_mqa_logits"):
        text = text.replace(PLAIN.replace("@NAME@", name), TRITON.replace("@NAME@", name))
    start, end = text.index("        if current_platform.is_cuda()"), text.index("\n        self.r")
    warning = """\
        if current_platform.is_cuda() and not is_deep_gemm_supported():
            logger.warning_once(
                "DeepGEMM not supported; using Triton fallback."
            )
"""
    text = text[:start] + warning + text[end:]
    text = text.replace("    has_deep_gemm,\n", "    is_deep_gemm_supported,\n")
    text = text.replace(
        "\n\n\ndef sparse",
        "\nfrom vllm.v1.attention.ops.mqa_logits_triton import (\n"
        "    mqa_logits_triton,\n    paged_mqa_logits_triton,\n)\n\n\ndef sparse",
    )
    return text.replace(
        "    k = k.view()\n", "    k = k.view()\n    use_deep_gemm = is_deep_gemm_supported()\n"
    )


BASE_FILES = {
    EXPECT.indexer: indexer(PLAIN, "DeepGEMM to be installed"),
    EXPECT.registry: REGISTRY,
    EXPECT.priorities: CUDA,
    "vllm/__init__.py": "",
    "vllm/deep_gemm.py": "mqa_logits = paged_mqa_logits = has_deep_gemm = None\n"
    "def is_deep_gemm_supported():\n    return False\n",
    "vllm/platforms/__init__.py": "current_platform = logger = ops = None\n",
    STUB: "int a;\n",
    "docs/backends.md": "one\n",
}
MAIN_FILES = {EXPECT.indexer: indexer(XPU, "DeepGEMM support here")}
ENTRY = f'    {EXPECT.backend} = "{BACKEND[:-3].replace("/", ".")}.SparseBackend"\n'
PULL_FILES = {
    EXPECT.indexer: with_pull_request(BASE_FILES[EXPECT.indexer]),
    EXPECT.registry: REGISTRY + ENTRY,
    EXPECT.priorities: (
        f"AttentionBackendEnum.{EXPECT.backend},\n            ]\n    return".join(
            CUDA.rsplit("]\n    return", 1)
        ).replace("            Att", "                Att")
    ),
    BACKEND: "class SparseBackend:\n    pass\n",
    KERNELS: "def mqa_logits_triton(q, k):\n    return q\n\n\n"
    "def paged_mqa_logits_triton(q, k):\n    return k\n",
    "tests/test_sparse.py": "def test_it():\n    pass\n",
    STUB: "int a;\nint b;\n",
    "docs/backends.md": "one\ntwo\n",
}


@dataclass
class Upstream:
    """A bare repository with main, a tag and a pull request."""

    path: Path
    head: str
    main: str
    work: Path

    def git(self, *args: str) -> str:
        return git(self.work, *args)

    def commit(self, files: dict[str, str]) -> str:
        for name, text in files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "change")
        return self.git("rev-parse", "HEAD")

    def pull(self, files: dict[str, str], start: str = "main~1") -> PullRequest:
        """Move the pull request to one commit on ``start``."""
        self.git("checkout", "--quiet", "--detach", start)
        head = self.commit(files)
        self.git("push", "--quiet", "--force", str(self.path), "HEAD:refs/pull/38476/head")
        return PullRequest(38476, head, ("csrc",))


def git(folder: Path, *args: str) -> str:
    environment = {
        "GIT_CONFIG_GLOBAL": "/dev/null",
        **{f"GIT_{who}_NAME": "t" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "t@t" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")},
    }
    return run_program(["git", *args], cwd=str(folder), env=environment).stdout.strip()


@pytest.fixture(scope="session")
def first_upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    folder = tmp_path_factory.mktemp("upstream")
    work, path = folder / "work", folder / "up.git"
    work.mkdir()
    git(work, "init", "--quiet", "--initial-branch=main")
    git(work, "init", "--quiet", "--bare", str(path))
    made = Upstream(path, "", "", work)
    made.commit(BASE_FILES)
    made.main = made.commit(MAIN_FILES)
    git(work, "tag", "--annotate", "--message", "v1", "v1")
    git(work, "push", "--quiet", str(path), "main", "v1")
    made.head = made.pull(PULL_FILES).head
    return made


@pytest.fixture
def upstream(first_upstream: Upstream, tmp_path: Path) -> Upstream:
    """One that a test may change."""
    work, path = tmp_path / "work", tmp_path / "up.git"
    shutil.copytree(first_upstream.work, work)
    shutil.copytree(first_upstream.path, path)
    return replace(first_upstream, path=path, work=work)


def repository(upstream: Upstream, tmp_path: Path) -> Repository:
    return Repository(str(upstream.path), tmp_path / "cache", run_program)


def build(
    upstream: Upstream, tmp_path: Path, pull: PullRequest | None = None, ref: str = "main"
) -> Patched:
    repo = repository(upstream, tmp_path)
    pulls = [pull or PullRequest(38476, upstream.head, ("csrc",))]
    resolved = repo.resolve(ref, pulls)
    repo.fetch(resolved, pulls)
    compiler = Compiler(repo, Resolver(), EXPECT)
    return compiler.build(resolved, pulls, dest=tmp_path / "patch")


def test_the_conflict_has_the_shape_of_the_real_one(upstream: Upstream) -> None:
    upstream.git("checkout", "--quiet", "--detach", "main")
    picked = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "cherry-pick", upstream.head],
        cwd=upstream.work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert picked.returncode == 1
    assert upstream.git("diff", "--name-only", "--diff-filter=U") == EXPECT.indexer
    assert (upstream.work / EXPECT.indexer).read_text().count("<<<<<<<") == 5


def test_three_way_dispatch(upstream: Upstream, tmp_path: Path) -> None:
    patched = build(upstream, tmp_path)
    text = (tmp_path / "patch" / EXPECT.indexer).read_text()
    for name in ("mqa_logits", "paged_mqa_logits"):
        joined = XPU.replace("        else:\n", "        elif use_deep_gemm:\n") + (
            "\n        else:\n            logits = @NAME@_triton(q, k)"
        )
        assert joined.replace("@NAME@", name) in text
    assert [join.rule for join in patched.joins] == [
        "dispatch-join",
        "dispatch-join",
        "warn-instead-of-error",
    ]
    assert all(check.passed for check in patched.checks)
    assert patched.dropped == (STUB,)
    assert STUB not in patched.changed
    assert not list((tmp_path / "cache").glob("*.scratch"))


def test_same_inputs_give_the_same_commit(upstream: Upstream, tmp_path: Path) -> None:
    first = build(upstream, tmp_path / "a")
    assert build(upstream, tmp_path / "b", ref="v1").commit == first.commit


def test_without_a_conflict(upstream: Upstream, tmp_path: Path) -> None:
    git(upstream.work, "push", "--quiet", str(upstream.path), "main~1:refs/heads/old")
    patched = build(upstream, tmp_path, ref="old")
    assert patched.joins == ()
    assert (tmp_path / "patch" / EXPECT.indexer).read_text() == PULL_FILES[EXPECT.indexer]


def test_several_commits(upstream: Upstream, tmp_path: Path) -> None:
    more = upstream.pull({"docs/more.md": "more\n"}, start=upstream.head)
    patched = build(upstream, tmp_path, more)
    assert len(patched.commits) == 2
    assert "docs/more.md" in patched.changed


def test_a_pull_request_makes_no_links(upstream: Upstream, tmp_path: Path) -> None:
    """Not even one that a later commit takes away: what writes in between would follow it."""
    upstream.git("checkout", "--quiet", "--detach", upstream.head)
    link = upstream.work / "vllm/secrets.py"
    link.symlink_to("/etc/passwd")
    made = upstream.commit({})
    link.unlink()
    gone = upstream.commit({})
    for head in (made, gone):
        upstream.git(
            "push", "--quiet", "--force", str(upstream.path), f"{head}:refs/pull/38476/head"
        )
        with pytest.raises(FleetError, match="makes a link of a file") as caught:
            build(upstream, tmp_path / head, PullRequest(38476, head, ("csrc",)))
        assert "vllm/secrets.py" in caught.value.found
    dropped = PullRequest(38476, gone, ("csrc", "vllm/secrets.py"))
    assert "vllm/secrets.py" not in build(upstream, tmp_path / "dropped", dropped).changed


def merged_branch(upstream: Upstream) -> PullRequest:
    """Merge main into the pull request, which resolves its conflicts there."""
    upstream.git("checkout", "--quiet", "--detach", upstream.head)
    upstream.git("merge", "--quiet", "--strategy=ours", "--no-edit", "main")
    upstream.git("checkout", "--quiet", "main", "--", EXPECT.indexer)
    text = (upstream.work / EXPECT.indexer).read_text()
    head = upstream.commit(
        {EXPECT.indexer: with_pull_request(text).replace("k.view()", "k.copy()")}
    )
    upstream.git("push", "--quiet", "--force", str(upstream.path), "HEAD:refs/pull/38476/head")
    return PullRequest(38476, head, ("csrc",))


def test_merge_commits_need_a_word(upstream: Upstream, tmp_path: Path) -> None:
    pull = merged_branch(upstream)
    with pytest.raises(FleetError, match="contains merge commits") as caught:
        build(upstream, tmp_path, pull)
    assert "squash: true" in caught.value.remedy


def test_a_squashed_pull_request_is_one_commit(upstream: Upstream, tmp_path: Path) -> None:
    more = upstream.pull({"docs/more.md": "more\n"}, start=upstream.head)
    first = build(upstream, tmp_path / "a", replace(more, squash=True))
    assert len(first.commits) == 1
    assert "docs/more.md" in first.changed
    assert build(upstream, tmp_path / "b", replace(more, squash=True)).commit == first.commit


def test_mirror_and_bundle(upstream: Upstream, tmp_path: Path) -> None:
    bundle = tmp_path / "vllm.bundle"
    git(upstream.path, "bundle", "create", "--quiet", str(bundle), "main", "v1", PULL_REF)
    pulls = [PullRequest(38476, upstream.head, ("csrc",))]
    commits = set()
    for number, mirror in enumerate((f"file://{upstream.path}", str(upstream.path), str(bundle))):
        repo = Repository("https://x.invalid/x", tmp_path / str(number), run_program, mirror=mirror)
        resolved = repo.resolve("v1", pulls)
        assert resolved.url == "https://x.invalid/x"
        repo.fetch(resolved, pulls)
        made = Compiler(repo, Resolver(), EXPECT).build(resolved, pulls, dest=tmp_path / "patch")
        commits.add(made.commit)
    assert len(commits) == 1


def test_a_bundle_without_the_pull_request(upstream: Upstream, tmp_path: Path) -> None:
    bundle = tmp_path / "vllm.bundle"
    git(upstream.path, "bundle", "create", "--quiet", str(bundle), "main")
    repo = Repository(str(upstream.path), tmp_path, run_program, mirror=str(bundle))
    with pytest.raises(FleetError, match="has no pull request 38476"):
        repo.resolve("main", [PullRequest(38476, upstream.head)])


def test_a_bundle_that_needs_other_commits(upstream: Upstream, tmp_path: Path) -> None:
    bundle = tmp_path / "vllm.bundle"
    git(upstream.path, "bundle", "create", "--quiet", str(bundle), "main~1..main")
    repo = Repository(str(upstream.path), tmp_path / "c", run_program, mirror=str(bundle))
    with pytest.raises(FleetError, match="cannot be read") as caught:
        repo.fetch(repo.resolve("main", []), [])
    assert "fatal" not in str(caught.value)


UNKNOWN = PULL_FILES[EXPECT.indexer].replace("if use_deep_gemm:", "if use_deep_gemm and q:")


def record(upstream: Upstream, tmp_path: Path, pull: PullRequest, text: str) -> Path:
    """Record ``text`` as a person's resolution of the indexer."""
    upstream.git("checkout", "--quiet", "--detach", "main")
    (upstream.work / EXPECT.indexer).write_text(text)
    patch = upstream.git("diff", "--full-index", "main", "--", EXPECT.indexer)
    upstream.git("checkout", "--quiet", "--force", "main")
    file = tmp_path / "resolution.patch"
    file.write_text(f"Ref: {upstream.main}\nHead: {pull.head}\n\n{patch}\n")
    return file


def resolved_by_hand(text: str) -> str:
    main = MAIN_FILES[EXPECT.indexer]
    for name in ("mqa_logits", "paged_mqa_logits"):
        joined = XPU.replace("        else:\n", "        elif use_deep_gemm:\n") + (
            "\n        else:\n            logits = @NAME@_triton(q, k)"
        )
        text = text.replace(TRITON.replace("@NAME@", name), joined.replace("@NAME@", name))
    assert text != main
    return text


def build_recorded(upstream: Upstream, tmp_path: Path, pull: PullRequest, file: Path) -> Patched:
    repo = repository(upstream, tmp_path)
    resolved = repo.resolve("main", [pull])
    repo.fetch(resolved, [pull])
    compiler = Compiler(repo, Resolver(), EXPECT, (read_resolution(file),))
    return compiler.build(resolved, [pull], dest=tmp_path / "patch")


@pytest.fixture
def odd(upstream: Upstream) -> PullRequest:
    """A pull request with a conflict that no rule takes: a line both sides changed."""
    text = PULL_FILES[EXPECT.indexer].replace("self.ready = True", "self.ready = False")
    main = MAIN_FILES[EXPECT.indexer].replace("self.ready = True", "self.ready = 1")
    upstream.git("checkout", "--quiet", "main")
    upstream.main = upstream.commit({EXPECT.indexer: main})
    upstream.git("push", "--quiet", str(upstream.path), "main")
    return upstream.pull({**PULL_FILES, EXPECT.indexer: text}, start="main~2")


def test_a_recorded_resolution_is_taken(
    upstream: Upstream, tmp_path: Path, odd: PullRequest
) -> None:
    with pytest.raises(FleetError, match="no rule knows"):
        build(upstream, tmp_path, odd)
    text = resolved_by_hand(PULL_FILES[EXPECT.indexer]).replace("ready = True", "ready = False")
    file = record(upstream, tmp_path, odd, text)
    patched = build_recorded(upstream, tmp_path, odd, file)
    assert [join.rule for join in patched.joins] == ["recorded-resolution"]
    assert (tmp_path / "patch" / EXPECT.indexer).read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("ready = False", "ready = 5", "nothing_else_changed"),
        ("elif use_deep_gemm", "elif not use_deep_gemm", "prefill_dispatch"),
        ("k = k.view()", "k = k.copy()", "nothing_else_changed"),
    ],
)
def test_a_wrong_recorded_resolution_is_caught(
    upstream: Upstream, tmp_path: Path, odd: PullRequest, old: str, new: str, check: str
) -> None:
    text = resolved_by_hand(PULL_FILES[EXPECT.indexer]).replace("ready = True", "ready = False")
    file = record(upstream, tmp_path, odd, text.replace(old, new))
    with pytest.raises(FleetError, match=check):
        build_recorded(upstream, tmp_path, odd, file)


def test_a_resolution_for_another_head_is_not_taken(
    upstream: Upstream, tmp_path: Path, odd: PullRequest
) -> None:
    text = resolved_by_hand(PULL_FILES[EXPECT.indexer])
    file = record(upstream, tmp_path, PullRequest(1, "0" * 40), text)
    with pytest.raises(FleetError, match="no rule knows"):
        build_recorded(upstream, tmp_path, odd, file)


def test_a_resolution_of_another_text_does_not_fit(
    upstream: Upstream, tmp_path: Path, odd: PullRequest
) -> None:
    file = record(upstream, tmp_path, odd, resolved_by_hand(PULL_FILES[EXPECT.indexer]))
    blob = file.read_text().split("index ")[1][:40]
    file.write_text(file.read_text().replace(blob, "1" * 40))
    with pytest.raises(FleetError, match="does not fit"):
        build_recorded(upstream, tmp_path, odd, file)


def test_a_resolution_that_is_not_needed(upstream: Upstream, tmp_path: Path) -> None:
    pull = PullRequest(38476, upstream.head, ("csrc",))
    text = resolved_by_hand(PULL_FILES[EXPECT.indexer])
    file = record(upstream, tmp_path, pull, text)
    file.write_text(file.read_text().replace(EXPECT.indexer, EXPECT.registry))
    with pytest.raises(FleetError, match="does not conflict"):
        build_recorded(upstream, tmp_path, pull, file)


@pytest.mark.parametrize(
    "text", ["", "diff --git a/x b/x\n", "Ref: 1\nHead: 2\ndiff --git a/x b/x\n"]
)
def test_what_is_not_a_resolution(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.patch").write_text(text)
    with pytest.raises(FleetError, match="not a recorded resolution"):
        read_resolution(tmp_path / "x.patch")


def test_all_conflicting_files_are_in_one_report(upstream: Upstream, tmp_path: Path) -> None:
    upstream.git("checkout", "--quiet", "main")
    upstream.commit({"docs/backends.md": "three\n"})
    upstream.git("push", "--quiet", str(upstream.path), "main")
    pull = upstream.pull({**PULL_FILES, EXPECT.indexer: UNKNOWN}, start="main~2")
    with pytest.raises(FleetError, match="2 files conflict") as caught:
        build(upstream, tmp_path, pull)
    paths = {each["path"] for each in caught.value.details["conflicts"]}
    assert paths == {EXPECT.indexer, "docs/backends.md"}


def test_unknown_conflict_leaves_nothing(upstream: Upstream, tmp_path: Path) -> None:
    text = PULL_FILES[EXPECT.indexer].replace("if use_deep_gemm:", "if use_deep_gemm and q:")
    pull = upstream.pull({**PULL_FILES, EXPECT.indexer: text})
    with pytest.raises(FleetError, match="no rule knows") as caught:
        build(upstream, tmp_path, pull)
    assert caught.value.details["conflicts"][0]["path"] == EXPECT.indexer
    assert not list((tmp_path / "cache").glob("*.scratch"))
    assert not (tmp_path / "patch").exists()


def test_what_a_killed_build_left_does_not_count(upstream: Upstream, tmp_path: Path) -> None:
    repo = repository(upstream, tmp_path)
    resolved = repo.resolve("main", [])
    repo.fetch(resolved, [])
    left = repo.git_dir.with_suffix(".scratch") / "tree"
    repo.git("worktree", "add", "--quiet", "--detach", str(left), resolved.sha)
    (left / EXPECT.indexer).write_text("half written")
    assert build(upstream, tmp_path).joins
    assert not left.exists()


def test_moved_head(upstream: Upstream, tmp_path: Path) -> None:
    old = upstream.head
    new = upstream.pull({"docs/more.md": "more\n"}, start=old).head
    with pytest.raises(FleetError, match="has moved") as caught:
        build(upstream, tmp_path)
    assert caught.value.details == {"pinned": old, "found": new}
    assert f"head: {new}" in caught.value.remedy


@pytest.mark.parametrize(
    ("ref", "number", "message"),
    [
        ("v9", 38476, "has no ref v9"),
        ("main", 7, "has no pull request 7"),
    ],
)
def test_unknown_names(
    upstream: Upstream, tmp_path: Path, ref: str, number: int, message: str
) -> None:
    with pytest.raises(FleetError, match=message) as caught:
        repository(upstream, tmp_path).resolve(ref, [PullRequest(number, upstream.head)])
    assert "fatal" not in str(caught.value)


def test_unreachable_repository(tmp_path: Path) -> None:
    repo = Repository(str(tmp_path / "none"), tmp_path, run_program)
    with pytest.raises(FleetError, match="cannot be read"):
        repo.resolve("main", [])
    assert without_secret("https://me:secret@host/x.git") == "https://host/x.git"


def test_resolving_writes_nothing(upstream: Upstream, tmp_path: Path) -> None:
    repository(upstream, tmp_path).resolve("main", [PullRequest(38476, upstream.head)])
    assert not (tmp_path / "cache").exists()


def test_full_commit_as_ref(upstream: Upstream, tmp_path: Path) -> None:
    assert build(upstream, tmp_path, ref=upstream.main).checks


def test_shallow_clone_is_completed(upstream: Upstream, tmp_path: Path) -> None:
    repo = repository(upstream, tmp_path)
    git(tmp_path, "init", "--quiet", "--bare", str(repo.git_dir))
    url = f"file://{upstream.path}"
    git(repo.git_dir, "fetch", "--quiet", "--depth=1", url, "main", "refs/pull/38476/head")
    assert build(upstream, tmp_path).joins


def test_shallow_mirror_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror.git"
    git(tmp_path, "init", "--quiet", "--bare", str(mirror))
    url = f"file://{upstream.path}"
    refs = ["main:main", "refs/pull/38476/head:refs/pull/38476/head"]
    git(mirror, "fetch", "--quiet", "--depth=1", url, *refs)
    upstream.path = mirror
    with pytest.raises(FleetError, match="shallow"):
        build(upstream, tmp_path)


def test_operators_configuration_does_not_count(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text(
        "[merge]\n conflictStyle = diff3\n[commit]\n gpgSign = 1\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(upstream, tmp_path).joins


def rebased(upstream: Upstream, tmp_path: Path) -> PullRequest:
    """The pull request as its author would put it onto main."""
    build(upstream, tmp_path / "first")
    folder = tmp_path / "first/patch"
    files = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return upstream.pull(files, start="main")


def test_a_rebased_pull_request_is_accepted(upstream: Upstream, tmp_path: Path) -> None:
    """It brings the three-way choice itself, onto this release and onto the next one."""
    pull = rebased(upstream, tmp_path)
    assert build(upstream, tmp_path / "second", pull).joins == ()
    git(upstream.work, "checkout", "--quiet", "main")
    later = upstream.commit({"vllm/later.py": "x = 1\n"})
    git(upstream.work, "push", "--quiet", str(upstream.path), f"{later}:refs/heads/later")
    assert build(upstream, tmp_path / "third", pull, ref="later").joins == ()


SET_FIRST = (
    "            logits = ops.xpu_mqa_logits(q, k)\n",
    "            logits = ops.xpu_mqa_logits(q, k)\n            rows = q\n",
)


def test_every_branch_sets_what_is_used_after_the_choice(
    upstream: Upstream, tmp_path: Path
) -> None:
    files = dict(MAIN_FILES)
    text = files[EXPECT.indexer].replace(*SET_FIRST)
    text = text.replace("                clean=False,\n            )\n        num_rows",
                        "                clean=False,\n            )\n            rows = k\n"
                        "        num_rows", 1)  # fmt: skip
    text = text.replace("ops.top_k(logits, num_rows)", "ops.top_k(logits, num_rows, rows)")
    git(upstream.work, "checkout", "--quiet", "main")
    upstream.main = upstream.commit({EXPECT.indexer: text})
    git(upstream.work, "push", "--quiet", str(upstream.path), "HEAD:refs/heads/main")
    wrong = text
    for name in ("mqa_logits", "paged_mqa_logits"):
        head = f"        else:\n            logits = {name}("
        assert head in wrong
        first, rest = wrong.split(head, 1)
        body, after = rest.split("        num_rows", 1)
        wrong = (
            f"{first}        elif use_deep_gemm:\n            logits = {name}({body}"
            f"        else:\n            logits = {name}_triton(q, k)\n        num_rows{after}"
        )
    missing = with_names(wrong)
    pulled = upstream.pull({**PULL_FILES, EXPECT.indexer: missing}, start="main")
    with pytest.raises(FleetError, match="prefill_dispatch") as caught:
        build(upstream, tmp_path, pulled)
    assert "after the choice rows is used, which the branch 'else' does not set" in str(
        caught.value
    )


def with_names(text: str) -> str:
    """Give the indexer what the pull request adds besides the choice."""
    start, end = text.index("        if current_platform.is_cuda()"), text.index("\n        self.r")
    text = (
        text[:start] + "        if current_platform.is_cuda() and not is_deep_gemm_supported():\n"
        "            logger.warning_once(\n"
        '                "DeepGEMM not supported; using Triton fallback."\n'
        "            )\n" + text[end:]
    )
    text = text.replace("    has_deep_gemm,\n", "    is_deep_gemm_supported,\n")
    text = text.replace(
        "\n\n\ndef sparse",
        "\nfrom vllm.v1.attention.ops.mqa_logits_triton import (\n"
        "    mqa_logits_triton,\n    paged_mqa_logits_triton,\n)\n\n\ndef sparse",
    )
    return text.replace(
        "    k = k.view()\n", "    k = k.view()\n    use_deep_gemm = is_deep_gemm_supported()\n"
    )
