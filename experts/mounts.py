"""Whether a folder lies on a disk of another machine. Used by `experts.near_store`."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

MOUNTS = Path("/proc/self/mounts")
NETWORK_KINDS = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "9p",
            "afs",
            "ceph",
            "lustre",
            "gpfs",
            "beegfs",
            "orangefs",
        ),
        *(
            "glusterfs",
            "fuse.glusterfs",
            "fuse.sshfs",
            "fuse.s3fs",
            "fuse.gcsfuse",
            "fuse.rclone",
            "fuse.juicefs",
        ),
    }
)


def is_on_network(folder: Path, mounts: Path = MOUNTS) -> bool:
    """By the kind of the file system that the folder is on; False where nothing tells."""
    try:
        return network_kind(str(folder.resolve()), mounts.read_text(errors="replace")) is not None
    except OSError:
        return False


def network_kind(folder: str, mounts: str) -> str | None:
    """folder: absolute, without links. mounts: as in `/proc/self/mounts`, where later lines hide earlier ones."""
    path, kind, depth = PurePosixPath(folder), "", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        place = PurePosixPath(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[1]))
        if path.is_relative_to(place) and len(place.parts) >= depth:
            kind, depth = fields[2], len(place.parts)
    return kind if kind in NETWORK_KINDS else None
