"""How often typed decisions are right, and what their probabilities are worth: zero-shot, on labelled texts.

    python tests/bench/decisions.py [--model smollm2]

Prompts with and without the options in them, in a chat template or not, with and without calibration: right
answers, mean negative log-probability of the right one (nats), milliseconds a text. A JSON line each.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

SENTIMENT = {
    "positive": """What a wonderful film, I loved every minute!
I would buy this again, it works perfectly.
Best concert of my life.
The staff was kind and the room was clean.
Absolutely delicious, we will come back.
Fast delivery and great quality.""",
    "negative": """The food was cold and the waiter was rude.
It broke after two days and nobody answered my mails.
A boring waste of time.
I regret this purchase.
Terrible sound and the battery dies quickly.
The plot makes no sense and the acting is awful.""",
}
TOPIC = {
    "sports": """The striker scored twice in the final.
The team won the championship after extra time.
The tennis player retired after twenty years.""",
    "business": """The central bank raised interest rates again.
Shares of the car maker fell by ten percent.
The company reported record profits this quarter.""",
    "science": """Scientists found water on a distant planet.
A new vaccine protects mice from the virus.
Researchers mapped the genome of the whale.""",
    "politics": """The parliament voted on the new election law.
The president met the opposition leader.
Senators debated the budget until midnight.""",
}
TASKS = {
    "sentiment": (SENTIMENT, "What is the sentiment of the text?"),
    "topic": (TOPIC, "What is the topic of the text?"),
    "topic, question left out": (TOPIC, None),
}

Prompt = Callable[[str, str, list[str]], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path("~/.cache/llmasos-bench/gateway/real").expanduser())
    arguments = parser.parse_args()
    import daemon

    arguments.home.mkdir(parents=True, exist_ok=True)
    with daemon.running(arguments.home):
        from llmasos.userland.llm import CLASSIFY, LLM

        llm = LLM.from_pretrained(arguments.model)
        for prompt in prompts(llm):
            for task, (texts, question) in TASKS.items():
                for calibrate in (False, True):
                    tell(llm, prompt, task, texts, question or CLASSIFY, calibrate)


def prompts(llm) -> dict[str, Prompt]:
    from llmasos.userland.chat import encode_chat

    def chat(listed: bool) -> Prompt:
        def made(text: str, question: str, labels: list[str]) -> list[list[int]]:
            options = (
                "\nAnswer with one of:\n" + "\n".join(f"- {label}" for label in labels) if listed else ""
            )
            head = encode_chat(llm.tokenizer, f"{text}\n\n{question}{options}", model=llm.model)
            return [[*head, *llm.tokenizer.encode(label, start=False)] for label in labels]

        return made

    def plain(listed: bool) -> Prompt:
        def made(text: str, question: str, labels: list[str]) -> list[list[int]]:
            options = f" ({', '.join(labels)})" if listed else ""
            asked = f"Text: {text}\nQuestion: {question}{options}\nAnswer:"
            return [llm.tokenizer.encode(f"{asked} {label}") for label in labels]

        return made

    return {
        "chat, listed": chat(True),
        "chat": chat(False),
        "plain, listed": plain(True),
        "plain": plain(False),
    }


def tell(llm, prompt: str, task: str, texts: dict[str, str], question: str, calibrate: bool) -> None:
    from llmasos.userland.decisions import NOTHING, scored, softmax
    from llmasos.userland.flow import drive

    make, labels = prompts(llm)[prompt], list(texts)
    right = count = 0
    nats = 0.0
    begun = time.perf_counter()
    for label, lines in texts.items():
        for text in lines.splitlines():
            logprobs = drive(llm.client, scored(llm, make(text, question, labels))).logprobs
            if calibrate:
                blank = drive(llm.client, scored(llm, make(NOTHING, question, labels))).logprobs
                logprobs = [one - without for one, without in zip(logprobs, blank, strict=True)]
            probabilities = softmax(logprobs)
            right += labels[probabilities.index(max(probabilities))] == label
            nats -= math.log(max(1e-12, probabilities[labels.index(label)]))
            count += 1
    figures = {
        "prompt": prompt,
        "task": task,
        "calibrated": calibrate,
        "right": f"{right}/{count}",
        "nats": round(nats / count, 3),
        "ms_a_text": round(1e3 * (time.perf_counter() - begun) / count),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
