"""What a model will need in memory, worked out before its weights are read, and what there is.

The work is rehearsed on the meta device, where tensors have shapes but no numbers: what the rehearsal holds at once is
what the work will hold. Workspaces of libraries are not seen by it; SPARE stands for them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helios_core.errors import CheckpointError, OutOfMemory

SPARE = 1 << 30  # bytes on a GPU: workspaces, fragments. Not measured
GB = 1e9
GROUP = Path("/sys/fs/cgroup")  # of this container


def check_room(part: str, device: torch.device, needs: dict[str, int]) -> None:
    """Raises CheckpointError if `needs`, in bytes by purpose, do not fit into what `device` has free."""
    free = free_bytes(device)
    needs = {purpose: size for purpose, size in needs.items() if size}
    if device.type == "cuda":
        needs["spare"] = SPARE
    if free is not None and sum(needs.values()) > free:
        listed = ", ".join(f"{purpose} {size / GB:.1f}" for purpose, size in needs.items())
        needed = sum(needs.values()) / GB
        raise CheckpointError(
            f"the {part} needs {needed:.1f} GB on {device} ({listed}), where {free / GB:.1f} GB are free: "
            f"{needed - free / GB:.1f} GB are missing"
        )


@contextmanager
def shortage_told(part: str) -> Iterator[None]:
    """Raises OutOfMemory for each of the ways in which torch and Python say that there is no room."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{part}: {str(error) or 'no memory is left'}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words on a CPU
            raise
        raise OutOfMemory(f"{part}: {error}") from error


def free_bytes(device: torch.device) -> int | None:
    """What can still be taken of a device's memory: of a GPU's, or of what this machine and this container may have.

    None where that cannot be told.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used, parts = (_lines(GROUP / f"memory.{name}") for name in ("max", "current", "stat"))
    if limit and used and limit[0] != "max":
        cached = sum(int(part.split()[1]) for part in parts if part.startswith(("active_file ", "inactive_file ")))
        found.append(int(limit[0]) - int(used[0]) + cached)  # files in memory make room
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    return path.read_text().split("\n") if path.is_file() else []


def tensor_bytes(tensors: Iterable[tuple[str, Tensor]], dtype_of: Callable[[str], torch.dtype]) -> int:
    """Of named tensors, each as `dtype_of(name)`."""
    sizes = [tensor.numel() * dtype_of(name).itemsize for name, tensor in tensors]
    return sum(sizes)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that `work`, on the meta device, holds at once of what it makes itself."""
    held = _Held()
    with torch.inference_mode(), _FusedAttention(), held:
        work()
    return held.peak


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU computes it, without the table of all pairs that the meta device would make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _Held(TorchDispatchMode):
    """Counts the bytes of storages as long as a tensor lies in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: Counter[int] = Counter()  # by storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.tensors:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.tensors[key] += 1
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key]
            self.now -= size
