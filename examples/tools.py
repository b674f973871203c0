"""A small model uses tools: `python examples/tools.py ["a question"]`.

The grammar holds the model to calls that exist, with arguments that match; which one it wants, and whether,
is the model's own choice. Boots the user's daemon unless it runs already.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from llmasos import LLM

QUESTION = "What is 17 times 23, and what is the weather in Paris?"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 40},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
            },
        },
    },
]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiply": lambda a, b: a * b,
    "get_weather": lambda city, unit: {"city": city, "temperature": 21 if unit == "celsius" else 70},
}


def main() -> int:
    messages: list[dict[str, Any]] = [{"role": "user", "content": " ".join(sys.argv[1:]) or QUESTION}]
    with LLM.from_pretrained("smollm2") as llm:
        wants = llm.chat(messages, tools=TOOLS, tool_choice="required")
        messages.append(wants.message)
        for call in wants.tool_calls:
            result = FUNCTIONS[call.name](**json.loads(call.arguments))
            print(f"{call.name}({call.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
        print(llm.chat(messages, max_new_tokens=60))
    return 0


if __name__ == "__main__":
    sys.exit(main())
