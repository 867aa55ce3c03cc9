# SPDX-License-Identifier: Apache-2.0
"""Why a start died: the words that releases really print, and which of several errors explains."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.serving.diagnosis import diagnose, find_crash, lower_graphs_help, relevant_lines
from glm_fleet.serving.signatures import SIGNATURES

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = FIXTURES / "cases"
LOGS = FIXTURES / "vllm-logs"
SAMPLES: list[dict[str, Any]] = yaml.safe_load((LOGS / "signatures.yml").read_text())
GOOD = (LOGS / "h200-0.23.0-pr38476-piecewise-ok.log").read_text().splitlines()

FRAME = (
    "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {}"
)
OUT_OF_MEMORY = (
    "(EngineCore pid=316) ERROR 12-10 11:33:24 [core.py:1240] torch.OutOfMemoryError: CUDA out of "
    "memory. Tried to allocate 80.00 MiB."
)
NCCL = (
    "(Worker_TP{0} pid=41{0}) ERROR 12-10 11:33:24 [multiproc_executor.py:800] "
    "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, unhandled cuda error"
)
ECC = (
    "(Worker_TP3 pid=413) ERROR 12-10 11:33:25 [multiproc_executor.py:800] torch.AcceleratorError: "
    "CUDA error: uncorrectable ECC error encountered"
)
MISSING = (
    "(APIServer pid={0}) FileNotFoundError: [Errno 2] No such file or directory: "
    "'/srv/glm-fleet/model/config.json'"
)


def case(name: str) -> list[str]:
    return (CASES / name / "journal.txt").read_text().splitlines()


def journal(sample: dict[str, Any]) -> list[str]:
    """The line, and before it the code in a traceback where the words alone do not decide."""
    return [each for each in (sample.get("code"), sample["line"]) if each]


def found(lines: list[str]) -> str:
    crash = find_crash(lines)
    return crash.signature.name if crash else ""


def test_every_signature_has_a_real_line() -> None:
    assert {each["name"] for each in SAMPLES} == {each.name for each in SIGNATURES}
    assert max(Counter(each.name for each in SIGNATURES).values()) == 1
    assert all(each["source"] for each in SAMPLES)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda each: each["name"])
def test_a_real_line_is_read_by_its_signature(sample: dict[str, Any]) -> None:
    lines = [*journal(sample), FRAME if sample["name"] != "frame" else "Shutting down"]
    assert found(lines) == sample["name"]
    text = diagnose(lines)
    assert sample.get("says", "") in text
    assert not re.search(r"\{[a-z]+\}", text), "a figure that was not filled in"


def test_a_healthy_start_that_warns_is_no_crash() -> None:
    warning = (
        "(Worker_TP0 pid=410) WARNING 12-10 11:33:24 [worker.py:1] Free memory on device (70/79 "
        "GiB) on startup. Desired GPU memory utilization is (0.9, 71.24 GiB). CUDA out of memory"
    )
    assert diagnose([*GOOD, warning]) == ""


def test_the_context_that_does_not_fit_comes_with_vllms_estimate() -> None:
    text = diagnose(case("02-kv-too-small-v1"))
    assert (
        "the context does not fit into the KV cache: lower serving_max_model_len to 99776" in text
    )


def test_memory_that_others_hold_is_named_with_gpu_and_figures() -> None:
    text = diagnose(case("03-free-memory-on-device"))
    assert "cuda:0 59.32 of 79.15 GiB free, 71.24 GiB wanted" in text
    assert "nvidia-smi" in text
    assert "serving_gpu_memory_utilization" in text


def test_nccl_is_told_by_its_real_cause() -> None:
    text = diagnose(case("04-nccl-shm"))
    assert "is full or too small: look at `df -h /dev/shm`" in text
    assert "nvlink" not in text


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_broken_board_explains_what_the_other_ranks_say(order: tuple[int, ...]) -> None:
    lines = [NCCL.format(0), ECC, NCCL.format(5)]
    text = diagnose([*(lines[each] for each in order), FRAME])
    assert "ECC" in text
    assert "rank 3" in text


def test_of_causes_the_first_counts() -> None:
    second = MISSING.format(316).replace("APIServer", "EngineCore")
    assert found([OUT_OF_MEMORY, second, FRAME]) == "GPU out of memory"
    assert found([second, OUT_OF_MEMORY, FRAME]) == "file missing"


@pytest.mark.parametrize(
    "between",
    [
        ["glm-serving.service: Scheduled restart job, restart counter is at 1."],
        ["Started glm-serving.service - glm-fleet: glm-5.2 on this node."],
        ["(APIServer pid=1) INFO 12-10 11:33:24 [utils.py:299] non-default args: {'port': 8000}"],
        ["(APIServer pid=1) INFO 12-10 11:33:24 [utils.py:299] something of the next start"],
    ],
)
def test_the_last_start_is_told_and_not_an_earlier_one(between: list[str]) -> None:
    assert found([OUT_OF_MEMORY, FRAME, *between, MISSING.format(1), FRAME]) == "file missing"


def test_a_start_is_known_by_the_number_of_its_processes() -> None:
    later = MISSING.format(99).replace("APIServer", "EngineCore")
    assert found([OUT_OF_MEMORY, FRAME, later, FRAME]) == "file missing"


def test_a_start_that_has_no_error_yet_does_not_hide_the_one_that_died() -> None:
    lines = [OUT_OF_MEMORY, FRAME, "Started glm-serving.service - x.", *GOOD[:30]]
    assert found(lines) == "GPU out of memory"


def test_what_a_process_survived_is_no_cause() -> None:
    survived = (
        "(Worker_TP0 pid=410) ImportError: cannot import name 'routing' from 'triton_kernels'"
    )
    went_on = (
        "(Worker_TP0 pid=410) INFO 12-10 11:33:24 [loader.py:1] Loading weights took 9.1 seconds"
    )
    assert found([survived, went_on, OUT_OF_MEMORY, FRAME]) == "GPU out of memory"
    up = "(APIServer pid=1) INFO:     Application startup complete."
    assert found([survived, up]) == ""


def test_code_of_a_traceback_is_not_what_was_said() -> None:
    frames = [
        '(EngineCore pid=316) ERROR 12-10 11:33:24 [core.py:1]   File "x.py", line 1, in f',
        '(EngineCore pid=316) ERROR 12-10 11:33:24 [core.py:1]     raise E("CUDA out of memory")',
        "(EngineCore pid=316)     raise ValueError('No available memory for the cache blocks')",
    ]
    assert found([*frames, MISSING.format(1), FRAME]) == "file missing"
    assert not set(frames) & set(relevant_lines([*frames, MISSING.format(1), FRAME]))


def test_what_torch_prints_for_a_rank_is_read_like_the_rest() -> None:
    lines = [
        '[rank5]:   File "/opt/x.py", line 3, in f',
        "[rank5]:     raise RuntimeError('CUDA out of memory')",
        "[rank5]: torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    ]
    text = diagnose([*lines, FRAME])
    assert text.startswith("torch.AcceleratorError: CUDA error: uncorrectable ECC error")
    assert "(rank 5)" in text


def test_an_unknown_crash_is_told_by_its_first_error() -> None:
    unknown = "(EngineCore pid=316) ERROR 12-10 11:33:24 [core.py:1] pkg.OddError: teapot"
    text = diagnose([unknown, NCCL.format(1), FRAME])
    assert text.startswith("pkg.OddError: teapot: no crash that is known here")
    assert diagnose(["all is well"]) == ""


def test_colours_and_the_journals_own_prefix_are_looked_through() -> None:
    coloured = f"\x1b[1;36m(Worker_TP3 pid=413)\x1b[0;0m {ECC.partition(') ')[2]}"
    assert diagnose([coloured]) == diagnose([ECC])
    assert diagnose([f"Dec 10 11:33:24 gpu01 vllm[413]: {ECC}"]) == diagnose([ECC])


def test_a_long_line_is_shortened_and_its_figures_are_not_lost() -> None:
    text = diagnose(case("02-kv-too-small-v1"))
    assert len(text) < 420
    assert "99776" in text


def test_only_crashes_of_graphs_step_down() -> None:
    graphs = {each.name for each in SIGNATURES if each.graphs}
    stepping = {each["name"] for each in SAMPLES if lower_graphs_help([*journal(each), FRAME])}
    assert stepping == graphs
    assert graphs == {
        "crash in the capture of CUDA graphs",
        "illegal instruction",
        "capture refused",
    }


@pytest.mark.parametrize(
    "log",
    [
        "h100-0.23.0-pr38476-full-graphs-illegal-access.log",
        "h200-0.23.0-pr38476-full-graphs-crash.log",
    ],
)
def test_the_store_past_the_row_is_told_by_where_it_crashes(log: str) -> None:
    lines = (LOGS / log).read_text().splitlines()
    assert found(lines) == "crash in the capture of CUDA graphs"
    assert lower_graphs_help(lines)
    assert "logits-past-the-row" in diagnose(lines)
    # The same words without the capture: a lower mode of graphs is no way out.
    served = [line for line in lines if "capture" not in line and "illegal" in line]
    assert found(served) == "illegal access" if "access" in log else "illegal instruction"


def test_the_lines_to_look_at_are_the_first_and_last_errors_of_the_last_start() -> None:
    many = [NCCL.format(each % 8) for each in range(30)]
    picked = relevant_lines(
        [OUT_OF_MEMORY, FRAME, "Started glm-serving.service.", ECC, *many, FRAME]
    )
    assert len(picked) == 12
    assert picked[0] == ECC
    assert picked[-1] == FRAME
