# SPDX-License-Identifier: Apache-2.0
"""The crashes of a start that are known: the words each prints, and the way out.

Which one explains a journal is decided in `diagnosis`; here is what there is to know. Where the
words come from stands with each: vLLM's own were looked up in the sources of 0.20.2, 0.23.0,
0.27.1, 0.30.0 and 0.33.0. A sample of every one, with its public source, is in
tests/unit/fixtures/vllm-logs/signatures.yml.

This file may be longer than others: it is one list, its order decides, and a list in two files has
no order that one can see.
"""

from __future__ import annotations

from dataclasses import dataclass

# Which of several explains the others. A broken board explains whatever else went wrong;
# an effect, such as NCCL's error on the other ranks, explains nothing where a cause is known;
# a frame only says that there was a crash.
HARDWARE, CAUSE, EFFECT, FRAME = range(4)

EVERY = "0.20.2 to 0.33.0"


@dataclass(frozen=True)
class Signature:
    """A crash that people reported or we saw: how it looks and the way out.

    ``pattern`` is searched in one line without vLLM's prefix; ``remedy`` may name its groups.
    ``within`` is searched in the code of the same process' tracebacks, where the words alone do
    not tell one cause from another.
    ``graphs`` tells whether a lower mode of CUDA graphs is the way out; ``origin`` who prints
    the words and which releases have them.
    """

    name: str
    pattern: str
    remedy: str
    rank: int = CAUSE
    graphs: bool = False
    within: str = ""
    origin: str = f"vLLM {EVERY}"


_TORCH = f"torch of vLLM {EVERY}"
_TRITON = f"Triton of vLLM {EVERY}"
_NCCL = f"NCCL of vLLM {EVERY}"
_PYTHON = "Python"
_SHM = "/dev/shm"  # noqa: S108  # named, not used
_SYSTEM = "systemd or the kernel"

# For one line the first that fits counts: the special ones stand before the general ones.
SIGNATURES = (
    Signature(
        "uncorrectable ECC error",
        r"uncorrectable ECC error|cudaErrorECCUncorrectable",
        "the memory of this GPU has an error that ECC cannot correct: drain the node, reset the "
        "GPU or reboot, and have the board replaced if the error comes back",
        HARDWARE,
        origin=_TORCH,
    ),
    Signature(
        "GPU lost",
        r"GPU is lost|fallen off the bus|Unable to determine the device handle for GPU",
        "a GPU fell off the bus: reboot the node (dmesg names the GPU); have the board looked at "
        "if it happens again",
        HARDWARE,
        origin=_SYSTEM,
    ),
    Signature(
        "NVLink fault",
        r"NVRM: Xid .*: 74\b|SXid .*: (?:24007|\d+, Fatal)|[Uu]ncorrectable NVLink error",
        "the GPUs lost each other over NVLink: look at `nvidia-smi nvlink -s` and the driver's "
        "version, then reset the GPUs or reboot",
        HARDWARE,
        origin=_SYSTEM,
    ),
    Signature(
        "fabric manager",
        r"CUDA error.*\b802\b|Error 802|[Ss]ystem not yet initialized",
        "the fabric manager does not run, or is of another version than the driver: install and "
        "start the nvidia-fabricmanager package of the driver's version",
        HARDWARE,
        origin=_TORCH,
    ),
    Signature(
        "driver changed under the module",
        r"Error 803|unsupported display driver / cuda driver combination"
        r"|Driver/library version mismatch",
        "the driver's libraries and the kernel module that is loaded are of two versions: the "
        "driver was updated while it was in use, so drain the node and reboot it, and hold the "
        "driver's packages; if it stays, remove a cuda-compat library from LD_LIBRARY_PATH",
        HARDWARE,
        origin=_TORCH,
    ),
    Signature(
        "compatibility library",
        r"Error 804|forward compatibility was attempted on non supported HW",
        "a cuda-compat library that this GPU cannot use is found before the driver's own: remove "
        "it from LD_LIBRARY_PATH and from /etc/ld.so.conf.d",
        HARDWARE,
        origin=_TORCH,
    ),
    Signature(
        "driver too old",
        r"NVIDIA driver on your system is too old|driver version is insufficient for CUDA runtime",
        "the NVIDIA driver is older than the CUDA of this release: install a newer driver (580 "
        "for CUDA 13), or build the release for the driver with release_driver",
        HARDWARE,
        origin=_TORCH,
    ),
    Signature(
        "GPUs missing",
        r"World size \((?P<size>\d+)\) is larger than the number of available GPUs "
        r"\((?P<gpus>\d+)\)",
        "vLLM sees {gpus} GPUs and is to use {size}: look for a GPU that fell off the bus "
        "(nvidia-smi, dmesg), or correct serving_tensor_parallel_size",
    ),
    Signature(
        "GPU number missing",
        r"invalid device ordinal",
        "a GPU that vLLM is to use is not there: compare nvidia-smi with "
        "serving_tensor_parallel_size, and look in dmesg for a GPU that fell off the bus",
        origin=_TORCH,
    ),
    Signature(
        "no GPU",
        r"Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device is detected"
        r"|Failed to infer device type|NVMLError_(?:LibraryNotFound|DriverNotLoaded)",
        "vLLM finds no GPU: run nvidia-smi on the node, and repair the driver if it does not "
        "answer",
    ),
    Signature(
        "GPU taken",
        r"device\(s\) is/are busy or unavailable",
        "another process holds a GPU for itself alone: end it (nvidia-smi names it), or set the "
        "compute mode back with `nvidia-smi -c DEFAULT`",
        origin=_TORCH,
    ),
    Signature(
        "GPU of another generation",
        r"no kernel image is available for execution|fp8e4nv not supported in this architecture"
        r"|ptxas fatal",
        "this release has no code for GPUs of this generation: choose another release, or take "
        "the node out of gpu_nodes",
        origin=_TRITON,
    ),
    # Seen with the pinned pull request: a kernel of the indexer stores past its row, and the rows
    # of the capture are the narrowest of all. Corrected, the same model starts (H100, 0.23.0).
    Signature(
        "crash in the capture of CUDA graphs",
        r"an illegal (?:instruction|memory access) was encountered|misaligned address",
        "a kernel of this release crashes while CUDA graphs are captured. If the release has the "
        "fault logits-past-the-row (manifest.json names its corrections), build it with "
        "release_patches as they are by default; until then serving_cuda_graphs: piecewise",
        graphs=True,
        within=r", in (?:profile_cudagraph_memory|_warmup_and_capture|capture_model)$",
        origin=_TORCH,
    ),
    Signature(
        "illegal instruction",
        r"an illegal instruction was encountered",
        "CUDA graphs of this mode do not work here: set serving_cuda_graphs to piecewise, then to "
        "eager",
        graphs=True,
        origin=_TORCH,
    ),
    Signature(
        "capture refused",
        r"operation not permitted when stream is capturing"
        r"|operation failed due to a previous error during capture",
        "CUDA graph capture fails on this driver: set serving_cuda_graphs to piecewise, then to "
        "eager",
        graphs=True,
        origin=_TORCH,
    ),
    Signature(
        "context beyond the KV cache, with an estimate",
        r"larger than the available KV cache memory.*"
        r"estimated maximum model length is (?P<most>\d+)",
        "the context does not fit into the KV cache: lower serving_max_model_len to {most} or "
        "less, or raise serving_gpu_memory_utilization",
    ),
    Signature(
        "context beyond the KV cache",
        r"larger than the available KV cache memory",
        "the context does not fit into the KV cache: lower serving_max_model_len, or raise "
        "serving_gpu_memory_utilization",
    ),
    Signature(
        "no KV cache",
        r"No available memory for the cache blocks",
        "the weights leave no memory for the KV cache: raise serving_gpu_memory_utilization, or "
        "use more or bigger GPUs",
    ),
    Signature(
        "GPU memory in use",
        r"Free memory on device (?P<gpu>(?:\S+ )?)\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\).*"
        r"is less than desired GPU memory utilization \((?P<share>[\d.]+), (?P<want>[\d.]+) GiB\)",
        "something else holds GPU memory ({gpu}{free} of {total} GiB free, {want} GiB wanted): "
        "end what nvidia-smi names there, or lower serving_gpu_memory_utilization",
    ),
    Signature(
        "GPU memory in use, other words",
        r"is less than desired GPU memory utilization",
        "something else holds GPU memory: end what nvidia-smi names there, or lower "
        "serving_gpu_memory_utilization",
    ),
    Signature(
        "GPU memory changed",
        r"Error in memory profiling",
        "another process took or gave back GPU memory while vLLM measured it: end what nvidia-smi "
        "names there, then start again",
    ),
    Signature(
        "host out of memory",
        r"killed by the OOM killer|[Oo]ut of memory: Killed process|result 'oom-kill'|oom-kill:"
        r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory|^MemoryError|Cannot "
        r"allocate memory",
        "the memory of the host (not of a GPU) ran out, and the kernel ended the engine: end what "
        "else uses it (`ps -e --sort=-rss`), or give the host more",
        origin=_SYSTEM,
    ),
    Signature(
        f"{_SHM} full",
        rf"{_SHM}.*No space left|Insufficient space in {_SHM}|(?:extend|memory segment) {_SHM}"
        r"|shared memory.*No space left|unable to allocate shared memory|\bBus error\b"
        r"|code=(?:killed|dumped), status=7/BUS|exit code: -7\)",
        f"{_SHM} is full or too small: look at `df -h {_SHM}`, remove what crashed programs left "
        "there (nccl-*, psm_*, torch_*), or mount it bigger",
        origin=f"{_NCCL}; vLLM 0.27.1 to 0.33.0",
    ),
    Signature(
        "disk full, with a path",
        r"No space left on device: '(?P<path>[^']+)'",
        "the disk that holds {path} is full: see `df -h`, remove old artifacts or logs; the "
        "engine's caches are in /var/cache/glm-fleet",
        origin=_PYTHON,
    ),
    Signature(
        "disk full",
        r"No space left on device|Errno 28|Disk quota exceeded",
        "a disk is full: see `df -h`, remove old artifacts or logs; the engine's caches are in "
        "/var/cache/glm-fleet",
        origin=_PYTHON,
    ),
    Signature(
        "GPU out of memory",
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory"
        r"|Cuda failure.*'out of memory'|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPUs are too full: lower serving_gpu_memory_utilization, serving_max_num_seqs or "
        "serving_max_model_len, and see in nvidia-smi whether something else runs there",
        origin=_TORCH,
    ),
    Signature(
        "Python's headers missing",
        r"Python\.h: No such file or directory",
        "Triton compiles a helper at the first start and needs the headers of Python: install the "
        "development package of the node's Python (python3-dev, or python3-devel)",
        origin=_TRITON,
    ),
    Signature(
        "compiler missing",
        r"Failed to find C compiler|No such file or directory: '(?:gcc|cc|clang)'"
        r"|unable to execute '(?:gcc|cc)'|cannot execute .?cc1",
        "Triton compiles a helper at the first start and needs a C compiler: install gcc",
        origin=_TRITON,
    ),
    Signature(
        "C++ compiler missing",
        r"InvalidCxxCompiler|No working C\+\+ compiler found",
        "torch compiles for the processor, at the start or at the first request that needs it, and "
        "finds no C++ compiler: install g++",
        origin=_TORCH,
    ),
    Signature(
        "libcuda not found by the linker",
        r"cannot find -lcuda|libcuda\.so cannot found|libcuda\.so(?:\.1)?: cannot open shared",
        "the driver's libcuda.so.1 is not where the linker looks: repair the driver's "
        "installation, then run ldconfig",
        origin=_TRITON,
    ),
    Signature(
        "CUDA compiler missing",
        r"Could not find nvcc|nvcc: not found|[Nn]inja is required|No such file or directory: "
        r"'(?:ninja|nvcc|[^']*/nvcc)'",
        "a library wants to compile CUDA code, which nodes cannot: leave "
        "VLLM_USE_FLASHINFER_SAMPLER=0 in serving_environment, and look at the lines above for "
        "the library",
        origin="FlashInfer, torch",
    ),
    Signature(
        "port taken",
        r"[Aa]ddress already in use|EADDRINUSE|Errno 98\b",
        "another process listens on the port: `ss -ltnp` names it; end it, or change serving_port",
        origin=_PYTHON,
    ),
    Signature(
        "address not here",
        r"Cannot assign requested address|Errno 99\b",
        "the node has no such address: correct serving_bind_address",
        origin=_PYTHON,
    ),
    Signature(
        "kernel too big for the GPU",
        r"OutOfResources: out of resource: (?P<what>[\w ]+), Required: (?P<need>\d+), "
        r"Hardware limit: (?P<limit>\d+)",
        "a Triton kernel of this release needs {need} of {what} and the GPU has {limit}: choose a "
        "release whose kernels fit these GPUs",
        origin=_TRITON,
    ),
    Signature(
        "weights damaged",
        r"SafetensorError|Error while deserializing header|MetadataIncompleteBuffer|HeaderTooLarge"
        r"|invalid load key|UnpicklingError",
        "a file of the weights is damaged: `playbooks/health.yml -e health_deep=true` names it "
        "and site.yml fetches it again",
        origin="safetensors",
    ),
    Signature(
        "weights missing",
        r"Cannot find any (?:safetensors )?model weights|No model weights found",
        "the folder of the model has no weights: run site.yml, which fetches what is missing",
    ),
    Signature(
        "weights of another model",
        r"weights were not initialized from checkpoint",
        "the weights do not fit this release of vLLM: compare release_ref with what the makers of "
        "the weights ask for",
    ),
    Signature(
        "asymmetric weights",
        r"Only symmetric quantization is supported for MoE",
        "this release cannot run asymmetric INT4 weights: choose 0.23.0 or newer as release_ref",
        origin="vLLM 0.20.2 to 0.22.1",
    ),
    Signature(
        "model unknown",
        r"Model architectures .* (?:are not supported for now|failed to be inspected)"
        r"|Transformers does not recognize this architecture",
        "this release does not know the model: choose a newer release_ref, or a newer "
        "transformers in release_constraints (5.9 for GLM-5.2)",
    ),
    Signature(
        "model sought on the hub",
        r"couldn't connect to 'https?://|LocalEntryNotFoundError|is not a valid model identifier"
        r"|does not appear to have a file named|HFValidationError|Can't load the configuration",
        "vLLM looks for the model on the hub, because its folder on the node is missing or "
        "incomplete: run site.yml",
        origin="transformers, huggingface_hub",
    ),
    Signature(
        "release without a name",
        r"No package metadata was found for vllm",
        "the wheel of this release is not called vllm: build the release again",
        origin=_PYTHON,
    ),
    Signature(
        "module missing",
        r"^(?:ModuleNotFoundError|ImportError): ",
        "the environment of this release is incomplete or damaged: run site.yml, which checks it "
        "and builds it again from its wheels",
        origin=_PYTHON,
    ),
    Signature(
        "file missing",
        r"FileNotFoundError: .*No such file or directory: '(?P<path>[^']+)'",
        "{path} is missing: run site.yml, which puts back what belongs to the release or the "
        "model; anything else has to be put back by hand",
        origin=_PYTHON,
    ),
    Signature(
        "not permitted",
        r"PermissionError: .*Permission denied: '(?P<path>[^']+)'",
        "the service may not use {path}: it runs as serving_user and writes only below "
        "serving_cache",
        origin=_PYTHON,
    ),
    Signature(
        "context beyond the model",
        r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived "
        r"max_model_len \([^=]*=(?P<most>[\d.]+)",
        "the model knows a context of {most} tokens: lower serving_max_model_len from {asked}",
    ),
    Signature(
        "batch below the context",
        r"max_num_batched_tokens \((?P<batch>\d+)\) (?:is smaller than max_model_len "
        r"\((?P<context>\d+)\)|must be greater)",
        "a batch of {batch} tokens is too small: raise --max-num-batched-tokens in "
        "serving_extra_arguments, or lower serving_max_model_len or serving_max_num_seqs",
    ),
    Signature(
        "tensor parallel size",
        r"attention heads.* must be divisible by tensor parallel size",
        "the model cannot be split over so many GPUs: correct serving_tensor_parallel_size",
    ),
    Signature(
        "attention backend",
        r"No valid attention backend found|backend \S+ is not valid for this configuration",
        "no attention backend takes this model with these settings: its reasons are in the line; "
        "compare serving_attention_backend, serving_dtype and serving_kv_cache_dtype",
    ),
    Signature(
        "flag unknown",
        r"vllm serve: error: |unrecognized arguments",
        "this release of vLLM does not know a flag: look at serving_extra_arguments",
    ),
    Signature(
        "setting refused",
        r"^\s*Value error, (?P<what>.+?)(?: \[type=|$)",
        "vLLM refuses a setting: compare the serving_ variables and serving_extra_arguments with "
        "what it says",
    ),
    Signature(
        "start took too long",
        r"Timed out waiting for engine|Engine core proc .* timed out",
        "the engine took longer than VLLM_ENGINE_READY_TIMEOUT_S: raise it in "
        "serving_environment, or find out why the weights load slowly",
    ),
    Signature(
        "GPUs wait for each other",
        r"[Ww]atchdog caught collective operation timeout",
        "the GPUs waited for each other in vain: look at `nvidia-smi nvlink -s`, `nvidia-smi topo "
        "-m` and dmesg",
        origin=_TORCH,
    ),
    Signature(
        "start gate",
        r"start gate: An earlier",
        "an earlier engine still holds the GPUs: see the line of the start gate",
        origin="glm-fleet",
    ),
    Signature(
        "illegal access",
        r"an illegal memory access was encountered|misaligned address",
        "a kernel of this release reached outside its memory: see dmesg for Xid 13 or 31, start "
        "with serving_cuda_graphs: eager to see whether graphs are to blame, and report the kernel",
        origin=_TORCH,
    ),
    Signature(
        "kernel failed",
        r"unspecified launch failure|device-side assert triggered|CUDA error: unknown error"
        r"|the launch timed out",
        "a kernel failed on the GPU: see dmesg for an Xid of that time, which says whether the "
        "board or the program is to blame",
        EFFECT,
        origin=_TORCH,
    ),
    Signature(
        "killed",
        r"died unexpectedly \(exit code: -9\)|code=killed, status=9/KILL",
        "a process of the engine was killed: by the kernel when memory ran out (dmesg | grep -i "
        "'killed process'), or by the watch (/var/lib/glm-fleet/incidents)",
        EFFECT,
        origin="vLLM 0.27.1 to 0.33.0, systemd",
    ),
    Signature(
        "NCCL's warning",
        r"NCCL WARN ",
        "NCCL could not set up what it needs, as this line says: compare with `nvidia-smi topo "
        "-m` and `nvidia-smi nvlink -s`",
        EFFECT,
        origin=_NCCL,
    ),
    Signature(
        "NCCL's error",
        r"NCCL error|nccl(?:System|Internal|Remote|UnhandledCuda)Error"
        r"|unhandled (?:cuda|system) error",
        "the GPUs lost each other: look at `nvidia-smi nvlink -s` and the driver's version, and "
        "set NCCL_DEBUG=WARN in serving_environment to see NCCL's own cause",
        EFFECT,
        origin=_NCCL,
    ),
    # The frames around every crash of a start: only when nothing better is known.
    Signature(
        "frame",
        r"Engine core initialization failed|WorkerProc initialization failed|EngineDeadError"
        r"|died unexpectedly",
        "the engine died while it started: the first error above it in the journal says why",
        FRAME,
    ),
)
