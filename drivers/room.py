"""How many KV blocks a device has room for."""

from __future__ import annotations

from collections.abc import Iterable

from llmasos.syscalls import errors

from .base import BLOCK_TOKENS, Loaded


def kv_blocks(
    device: str,
    context_length: int,
    block_bytes: int,
    free: int,
    fraction: float,
    most_tokens: int,
    holders: str,
) -> int:
    """KV blocks that fit into `fraction` of the `free` bytes: at most `most_tokens` tokens or one context,
    whichever is more. Raises NeverFits below one context; `holders` tells who has the rest of the memory."""
    context = -(-context_length // BLOCK_TOKENS)
    usable = int(free * fraction)
    blocks = min(usable // block_bytes, max(context, most_tokens // BLOCK_TOKENS))
    if blocks < context:
        raise errors.NeverFits(
            f"one context of {context_length} tokens needs {size_text(context * block_bytes)} of KV, "
            f"{size_text(usable)} may be used ({fraction:.0%} of {size_text(free)} free on {device}); "
            f"{holders}",
            hint="unload other models, use a smaller kv_dtype, or give KV a larger share of the memory",
            needed=context * block_bytes,
            free=usable,
        )
    return blocks


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def holders(resident: Iterable[tuple[Loaded, int]]) -> str:
    """Who holds a device's memory, for people: the models on it, each with its count of sequences."""
    held = [
        f"model {loaded.handle}: weights {size_text(loaded.weights_bytes)}, "
        f"KV {size_text(loaded.blocks * loaded.block_bytes)}, {sequences} sequences"
        for loaded, sequences in resident
    ]
    return "; ".join(held) if held else "no other model is loaded"
