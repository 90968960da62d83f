"""All that a folder of the GPU lane holds in one archive of bounded size."""

import tarfile
from pathlib import Path

NAME, MOST_BYTES = "evidence.tar.gz", 15 * 2**20
"""A little below what one file may have that comes back from a lent machine."""


def pack(folder: Path) -> str:
    """Write FOLDER/evidence.tar.gz; the largest files are left out where it would be too large. Says what it holds."""
    path, left_out = folder / NAME, list[Path]()
    files = sorted((file for file in folder.rglob("*") if file.is_file() and file != path),
                   key=lambda file: (file.stat().st_size, file))
    while True:
        with tarfile.open(path, "w:gz") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder).as_posix(), recursive=False)
        if path.stat().st_size <= MOST_BYTES or len(files) == 1:
            break
        left_out.append(files.pop())
    words = f", without {', '.join(file.relative_to(folder).as_posix() for file in left_out)}" if left_out else ""
    return f"{path}: {len(files)} files, {path.stat().st_size / 2**20:.2f} MiB{words}"
