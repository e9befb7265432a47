"""The files that hold a store's weights: each opened once, and read at offsets that were checked.

Paths stay inside their folder. In an index over original shards every place must be that of a tensor in the shard's own
header. What a record or tensor is, and whether its bytes are the right ones, is the business of `experts.store`, which
uses this. Safe for several threads.
"""

from __future__ import annotations

import bisect
import os
import threading
from pathlib import Path

from torch import Tensor

from experts.errors import StoreDamaged
from experts.file_reads import fill, fill_blocks, reopen_direct
from extraction.errors import ExtractionError
from extraction.files import open_inside
from extraction.safetensors_file import CODES, TensorHeader, read_header


class WeightFiles:
    """Open files of one folder."""

    def __init__(self, root: Path, *, is_indexed: bool) -> None:
        """is_indexed: whether they are a checkpoint's own shards."""
        self._root, self._is_indexed = root, is_indexed
        self._descriptors: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        """Descriptors for reads past the page cache; None where the file system refuses them."""
        self._headers: dict[str, list[TensorHeader]] = {}
        """Tensors of open original shards, by offset."""
        self._lock = threading.Lock()

    def holds(self, file: str, offset: int, nbytes: int) -> bool:
        """Whether the file goes on to the end of that place. Raises StoreDamaged where it cannot be opened."""
        return offset + nbytes <= os.fstat(self._descriptor(file)).st_size

    def check_indexed(self, file: str, offset: int, nbytes: int, dtype: str) -> None:
        """An original shard may have been replaced by another since it was indexed; to be asked after `holds`.

        dtype: of a manifest. Raises StoreDamaged.
        """
        if not self._is_indexed:
            return
        tensor = self._tensor_at(file, offset, nbytes)
        if tensor is None or tensor.code != CODES[dtype]:
            raise StoreDamaged(
                file,
                f"has no {dtype} tensor of {nbytes} bytes at offset {offset}: it is not what was indexed",
            )

    def read_into(self, file: str, offset: int, raw: Tensor) -> bool:
        """Fill `raw` from the file. False when the file ends before. Raises StoreDamaged."""
        try:
            return fill(self._descriptor(file), offset, raw.numpy().data)
        except OSError as error:
            raise StoreDamaged(file, f"cannot be read at offset {offset}: {error.strerror}") from error

    def read_blocks(self, file: str, start: int, nbytes: int, window: Tensor) -> bool:
        """The same past the page cache (`fill_blocks`). False where that cannot be done. Raises StoreDamaged."""
        descriptor = self._direct_descriptor(file)
        if descriptor is None:
            return False
        try:
            return fill_blocks(descriptor, start, nbytes, window)
        except OSError as error:
            raise StoreDamaged(file, f"cannot be read at offset {start}: {error.strerror}") from error

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            for direct in self._direct.values():
                if direct is not None:
                    os.close(direct)
            self._descriptors.clear()
            self._direct.clear()
            self._headers.clear()

    def _tensor_at(self, file: str, offset: int, nbytes: int) -> TensorHeader | None:
        """The tensor that these bytes are, or the stack of equal matrices (three dimensions) that they are one of."""
        tensors = self._headers[file]
        index = bisect.bisect_right(tensors, offset, key=lambda tensor: tensor.offset) - 1
        while index >= 0 and not tensors[index].nbytes:
            index -= 1
        if index < 0:
            return None
        tensor = tensors[index]
        skipped = offset - tensor.offset
        if (skipped, nbytes) == (0, tensor.nbytes):
            return tensor
        is_stack = len(tensor.shape) == 3 and not skipped % nbytes and not tensor.nbytes % nbytes
        return tensor if is_stack and skipped + nbytes <= tensor.nbytes else None

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = self._open(file)
                except ExtractionError as error:
                    raise StoreDamaged(str(self._root), str(error)) from error
            return self._descriptors[file]

    def _direct_descriptor(self, file: str) -> int | None:
        descriptor = self._descriptor(file)
        with self._lock:
            if file not in self._direct:
                self._direct[file] = reopen_direct(descriptor)
            return self._direct[file]

    def _open(self, file: str) -> int:
        descriptor = open_inside(self._root, file)
        if self._is_indexed:
            try:
                header = read_header(descriptor, file)
            except ExtractionError:
                os.close(descriptor)
                raise
            self._headers[file] = sorted(header.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
        return descriptor
