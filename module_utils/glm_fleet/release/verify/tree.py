# SPDX-License-Identifier: Apache-2.0
"""Is a merged tree what the pull request meant? One named check per question.

The checks read the result and the four versions that it came from; they do not ask the
code that resolved the conflicts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ...core.check import Check
from ..conflict import Merge
from ..corrections import blob_id
from .backend import backend_checks
from .lines import foreign_changes, missing_lines, without_joins
from .model import FileVersions, SourceExpectations, make_check
from .names import missing_imports, undefined_names


def verify_tree(
    tree: Path,
    *,
    changed: Sequence[str],
    before: Mapping[str, str | None],
    versions: Sequence[FileVersions],
    expectations: SourceExpectations,
    merge: Merge,
    decided: Collection[str] = (),
    corrected: Mapping[str, str] | None = None,
) -> list[Check]:
    """Run every check on the result in ``tree``.

    ``changed`` are the paths that differ from the ref and ``before`` their text there;
    ``merge`` is git's three-way merge of (base, before, head). In the conflicts of the files
    in ``decided`` a person may have given up lines of the release, but not made up others.
    ``versions`` are those before the corrections; ``corrected`` has the blob that each
    corrected file must be.
    """
    corrected = corrected or {}
    plain = [without_joins(file, expectations, decided=file.path in decided) for file in versions]
    python = {
        path: (tree / path).read_bytes().decode(errors="replace")
        for path in changed
        if path.endswith(".py") and (tree / path).is_file()
    }
    checks = [
        make_check("only_python_tests_docs", _foreign_files(changed, expectations)),
        make_check("every_changed_file_compiles", _not_python(python)),
        make_check("no_undefined_names", undefined_names(python, before)),
        make_check("vllm_imports_exist", missing_imports(tree, python, before, expectations)),
        make_check("every_added_line_present", missing_lines(plain, expectations)),
        make_check(
            "nothing_else_changed", foreign_changes(plain, changed, merge, decided, corrected)
        ),
    ]
    if corrected:
        checks.append(make_check("corrected_as_pinned", _wrongly_corrected(tree, corrected)))
    if expectations.backend:
        checks += backend_checks(tree, before, expectations)
    return checks


def _foreign_files(changed: Sequence[str], expect: SourceExpectations) -> list[str]:
    return [
        f"{path} is neither Python nor a test nor documentation"
        for path in changed
        if not path.endswith((".py", ".md")) and not path.startswith(expect.allowed_folders)
    ]


def _wrongly_corrected(tree: Path, corrected: Mapping[str, str]) -> list[str]:
    found = {path: (tree / path) for path in corrected}
    return [
        f"{path} is not the text {corrected[path]}"
        for path, file in found.items()
        if not file.is_file() or blob_id(file.read_bytes(), corrected[path]) != corrected[path]
    ]


def _not_python(python: Mapping[str, str]) -> list[str]:
    problems = []
    for path, text in python.items():
        try:
            compile(text, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            problems.append(f"{path}: {error}")
    return problems
