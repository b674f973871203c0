"""What request bodies share: unknown options are refused by name, known ones that are not done too, and how
an answer is placed among others."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

Token = Annotated[int, Field(ge=0, lt=2**31)]

TIERS = {
    "auto": t.SchedClass.INTERACTIVE,
    "default": t.SchedClass.INTERACTIVE,
    "priority": t.SchedClass.INTERACTIVE,
    "flex": t.SchedClass.BATCH,
    "scale": t.SchedClass.INTERACTIVE,
    "batch": t.SchedClass.BATCH,
    "standard_only": t.SchedClass.INTERACTIVE,
}
"""OpenAI's and Anthropic's service tiers, by the scheduling class that serves them."""


MOST_FIELDS = 1024
"""Of an object that has names of fields."""


def _fail_fast(schema: Any) -> None:
    """Lists and dictionaries end with their first error: a body may be all errors, and each takes more than a
    kilobyte."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        schema = schema.values()
    elif not isinstance(schema, (list, tuple)):
        return
    for inner in schema:
        _fail_fast(inner)


class Body(BaseModel):
    """A request's body. `NOT_DONE`: options that this server knows and does not do, each with the values that
    ask for nothing; `null` always does."""

    model_config = ConfigDict(extra="forbid", strict=False)

    NOT_DONE: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > MOST_FIELDS:
            raise PydanticCustomError(
                "too_many", "An object has more than {most} fields", {"most": MOST_FIELDS}
            )
        kept = dict(values)
        for name, idle in cls.NOT_DONE.items():
            if name in kept and (kept.pop(name) not in (None, *idle)):
                raise PydanticCustomError(
                    "unsupported", "Unsupported parameter: {param} is not supported here", {"param": name}
                )
        return kept


class Hinted(Body):
    """What clients tell of themselves. It changes nothing: equal beginnings are shared anyway."""

    user: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)


class Placed(Body):
    """Extensions: how the answer stands among others, and in which process it is made."""

    service_tier: str | None = Field(None, description=f"One of {', '.join(TIERS)}: the scheduling class.")
    priority: int | Literal["realtime", "interactive", "batch", "idle"] | None = Field(
        None, description="A scheduling class, or a nice value: the lower, the earlier (-20 to 19)."
    )
    deadline_ms: int | None = Field(None, ge=1, lt=2**31, description="The answer ends then, as it is.")
    pid: int | Literal["new"] | None = Field(
        None,
        description="The process that holds the conversation: only what is new of the prompt is computed. "
        '"new": one that stays after the answer.',
    )
    fork_of: int | None = Field(None, ge=1, description="A process whose copy goes on; the copy stays.")
    adapter: str | None = Field(None, max_length=128, description="Of the model, as training made it.")

    def place(self) -> tuple[t.SchedClass, int]:
        """Scheduling class and nice value. Raises InvalidArgument."""
        sched_class, nice = t.SchedClass.INTERACTIVE, 0
        if self.service_tier is not None:
            if self.service_tier not in TIERS:
                known = ", ".join(TIERS)
                raise errors.InvalidArgument(
                    f"no service tier {self.service_tier!r}", hint=f"one of {known}", field="service_tier"
                )
            sched_class = TIERS[self.service_tier]
        if isinstance(self.priority, str):
            sched_class = t.SchedClass(self.priority)
        elif self.priority is not None:
            nice = max(-20, min(19, self.priority))
        return sched_class, nice

    def model_name(self, model: str) -> str:
        return f"{model}+{self.adapter}" if self.adapter else model
