"""Whether one machine is fit to be a node: from facts to findings, each with its mend. Pure."""

from __future__ import annotations

from cluster.findings import Finding, failure, ok, warning
from cluster.machine_facts import MachineFacts
from experts.native_products import VARIABLE
from experts.store_source import STORE_CACHE_VARIABLE

MIB, GIB = 1 << 20, 1 << 30
WANTED_FILES = 65536
"""Ray holds a descriptor for each worker and connection."""
LEAST_FILES = 1024
LEAST_MEMORY_BYTES = GIB
"""Free: an idle node's Ray and one expert actor take most of it."""
WANTED_MEMORY_BYTES = 4 * GIB
WANTED_SHARED_BYTES = 256 * MIB
"""For Ray's object store; without, it lies on a disk."""
WANTED_DISK_BYTES = 10 * GIB


def check_machine(facts: MachineFacts, where: str, store_bytes: int | None = None) -> list[Finding]:
    """store_bytes: of the store to be served, where it is known."""
    return [
        check_open_files(facts, where),
        check_memory(facts, where),
        check_shared_memory(facts, where),
        check_store_cache(facts, where, store_bytes),
        check_products(facts, where),
        describe_devices(facts, where),
    ]


def check_open_files(facts: MachineFacts, where: str) -> Finding:
    what = f"a process may open {facts.open_files} files"
    if facts.open_files >= WANTED_FILES:
        return ok(where, what)
    mend = f"ulimit -n {WANTED_FILES} before Ray starts (sage-moe join does it)"
    if facts.open_files_most < WANTED_FILES:
        mend = f"as root: add '* - nofile {WANTED_FILES}' to /etc/security/limits.conf and log in again"
    level = failure if facts.open_files < LEAST_FILES else warning
    return level(where, f"{what}, Ray wants {WANTED_FILES}", mend)


def check_memory(facts: MachineFacts, where: str) -> Finding:
    memory = facts.memory
    what = f"{_gib(memory.available_bytes)} of {_gib(memory.total_bytes)} memory are free"
    if memory.total_bytes < facts.machine_bytes:
        what += f" (a container's limit; the machine has {_gib(facts.machine_bytes)})"
    mend = "end what else runs there, or raise the container's memory limit"
    if memory.available_bytes < LEAST_MEMORY_BYTES:
        return failure(where, what, mend)
    return ok(where, what) if memory.available_bytes >= WANTED_MEMORY_BYTES else warning(where, what, mend)


def check_shared_memory(facts: MachineFacts, where: str) -> Finding:
    free = facts.shared_free_bytes
    what = "there is no /dev/shm" if free is None else f"{_gib(free)} of /dev/shm are free"
    if free is not None and free >= WANTED_SHARED_BYTES:
        return ok(where, what)
    return warning(where, what, "docker run --shm-size=1g, or as root: mount -o remount,size=1G /dev/shm")


def check_store_cache(facts: MachineFacts, where: str, store_bytes: int | None) -> Finding:
    what = f"{_gib(facts.cache_free_bytes)} of disk are free for experts in {facts.cache_folder}"
    mend = f"sage-moe join HEAD --store-cache DIR on a larger disk (or {STORE_CACHE_VARIABLE}=DIR before Ray starts)"
    if not facts.is_cache_writable:
        return warning(where, f"{facts.cache_folder} cannot be written", mend)
    wanted = store_bytes if store_bytes is not None else WANTED_DISK_BYTES
    if facts.cache_free_bytes < wanted:
        reason = f"the store has {_gib(store_bytes)}" if store_bytes is not None else "which is little"
        return warning(where, f"{what}, {reason}", mend)
    return ok(where, what)


def check_products(facts: MachineFacts, where: str) -> Finding:
    """Which matrix products experts and backbone are computed by (experts/native)."""
    if facts.products_problem:
        return failure(where, facts.products_problem, f"set {VARIABLE} to one of them, or not at all")
    if facts.products:
        return ok(where, f"matrix products are our own, level {facts.products}")
    mend = f"install a C compiler, then sage-moe again (and do not set {VARIABLE})"
    return warning(where, "matrix products are PyTorch's, slower for few rows", mend)


def describe_devices(facts: MachineFacts, where: str) -> Finding:
    gpus = ", ".join(f"{gpu.name} ({_gib(gpu.memory_bytes)})" for gpu in facts.gpus)
    cores = "1 core" if facts.num_cores == 1 else f"{facts.num_cores} cores"
    return ok(where, f"{cores}, {gpus or 'no GPU'}")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
