"""Names of files and folders that every system takes, Windows with its reserved ones included."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath

_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"}
_RESERVED |= {f"{device}{number}" for device in ("com", "lpt") for number in "0123456789\u00b9\u00b2\u00b3"}
_FORBIDDEN = set('<>:"/\\|?*') | {chr(code) for code in range(32)}

LONGEST = 100
"""Characters of a name: Windows takes 260 for a whole path, temporary names included."""


def name_fault(name: str) -> str | None:
    """What keeps ``name`` from being a file's name on some system, in words; ``None`` if nothing does."""
    if not name:
        return "is empty"
    if name.partition(".")[0].rstrip(" ").casefold() in _RESERVED:
        return "is a device on Windows"
    if name[-1] in ". " or name[0] == " ":
        return "begins with a space or ends with a space or dot"
    if _FORBIDDEN & set(name):
        return f"contains {sorted(_FORBIDDEN & set(name))[0]!r}"
    return f"has more than {LONGEST} characters" if len(name) > LONGEST else None


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, whichever system reads it."""
    return all(
        bool(path.parts) and not path.is_absolute() and not path.drive and not path.root and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )
