"""Numbers for people: sizes, counts, ages and rates."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes in decimal units, as model stores write them: 92.1 MB."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number: int) -> str:
    """A large count in three digits: 135M, 1.2B."""
    if number < 1000:
        return str(number)
    value = float(number)
    for unit in ("K", "M", "B"):
        value /= 1000
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 10 else f"{value:.1f}{unit}"
    return f"{value / 1000:.1f}T"


def age(seconds: float) -> str:
    """A span in its largest unit: 12s, 5m, 3h, 2d."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def ago(seconds: float) -> str:
    """How long ago in words: "3 minutes ago"."""
    for length, unit in (
        (86400 * 30, "month"),
        (86400 * 7, "week"),
        (86400, "day"),
        (3600, "hour"),
        (60, "minute"),
    ):
        if seconds >= length:
            return f"{number(int(seconds // length), unit)} ago"
    return "just now"


def number(count: int, noun: str) -> str:
    """A count with its noun: "1 process", "3 processes"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def rate(per_second: float) -> str:
    """Tokens a second; nothing for a process that does not run."""
    return f"{per_second:.1f}" if per_second >= 0.05 else "-"
