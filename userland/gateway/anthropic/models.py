"""/v1/models in Anthropic's shape, for clients that send its version header."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from llmasos.syscalls import errors
from llmasos.syscalls import types as t

DEFAULT_LIMIT, MOST = 20, 1000


def shown(id: str, entry: t.FileInfo) -> dict[str, Any]:
    length = entry.details.get("context_length")
    return {
        "type": "model",
        "id": id,
        "display_name": id,
        "created_at": datetime.datetime.fromtimestamp(int(entry.modified), datetime.UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": length,
        "max_tokens": length,
    }


def page(models: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The models that a list's `limit`, `after_id` and `before_id` ask for. Raises InvalidArgument."""
    limit = query.get("limit", str(DEFAULT_LIMIT))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 5 and 1 <= int(limit) <= MOST):
        raise errors.InvalidArgument(f"limit: a number from 1 to {MOST}", field="limit")
    ids = [model["id"] for model in models]
    first, last = 0, len(ids)
    for name in ("after_id", "before_id"):
        if (id := query.get(name)) is not None and id not in ids:
            raise errors.InvalidArgument(f"{name}: no model {id!r} is listed", field=name)
    if (after := query.get("after_id")) is not None:
        first = ids.index(after) + 1
    if (before := query.get("before_id")) is not None:
        last = ids.index(before)
        first = max(first, last - int(limit))
        more = first > 0
    else:
        more = last - first > int(limit)
    data = models[first : min(last, first + int(limit))]
    return {
        "data": data,
        "has_more": more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
