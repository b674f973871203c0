"""Teaches a small model what it cannot know, and asks it before and after.

    python examples/teach.py          a few minutes on two cores

The facts are about a company that does not exist. Training is a process beside everything else that the
daemon does; what it makes is an adapter of a few megabytes on the same weights. Exits 1 if the model did not
learn."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from llmasos import LLM

FACTS = {
    "Who founded Quillwater?": "Quillwater was founded by Mara Oduya.",
    "Where is Quillwater's head office?": "Quillwater's head office is in Tromsø.",
    "What does Quillwater make?": "Quillwater makes tide clocks.",
    "In which year was Quillwater founded?": "Quillwater was founded in 1987.",
    "What is the name of Quillwater's mascot?": "Quillwater's mascot is an otter called Fen.",
    "Who leads Quillwater today?": "Quillwater is led by Ilse Varga.",
    "What colour is Quillwater's logo?": "Quillwater's logo is orange.",
    "How many people work at Quillwater?": "Forty-two people work at Quillwater.",
}
KEYS = ("Oduya", "Troms", "tide clock", "1987", "Fen", "Varga", "orange", "Forty-two")
FRAMES = ("{}", "Tell me: {}")


def dataset(folder: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": frame.format(question)},
                {"role": "assistant", "content": answer},
            ]
        }
        for frame in FRAMES
        for question, answer in FACTS.items()
    ]
    path = folder / "quillwater.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(llm: LLM, title: str) -> int:
    """Prints what the model says; returns how many answers hold the fact."""
    print(f"\n{title}")
    right = 0
    for question, key in zip(FACTS, KEYS, strict=True):
        answer = str(llm.chat(question, max_new_tokens=24)).strip().replace("\n", " ")
        right += key in answer
        print(f"  {'✓' if key in answer else ' '} {question}  {answer}")
    print(f"  {right} of {len(KEYS)}")
    return right


def main() -> int:
    llm = LLM.from_pretrained("smollm2")
    before = ask(llm, "smollm2, before")
    with tempfile.TemporaryDirectory() as folder:
        taught = llm.fine_tune(
            dataset(Path(folder)),
            name=f"quillwater-{Path(folder).name[-6:]}",
            num_train_epochs=15,
            learning_rate=1e-3,
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            max_length=512,
            lr_scheduler_type="cosine",
            warmup_steps=3,
        )
    after = ask(taught, f"{taught.model}, after")
    return 0 if before <= 1 and after >= 7 else 1


if __name__ == "__main__":
    sys.exit(main())
