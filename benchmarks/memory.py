"""The memory of a process. Imports nothing heavy, so that a watcher stays light. Linux only."""

from pathlib import Path


def memory_of(process: int | str, *fields: str) -> tuple[int, ...]:
    """Bytes that Linux counts for a process, by its number or "self"; zeros where it has ended.

    VmRSS is its resident memory, VmHWM the peak of VmRSS so far, and RssAnon the part of VmRSS that is not a mapped
    file.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    found = dict(line.split(":", 1) for line in lines)
    return tuple(int(found.get(field, "0").split()[0]) * 1024 for field in fields)
