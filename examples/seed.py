"""The first program: a model by name, a text by beam search. `python examples/seed.py [MODEL]`."""

import sys

from llmasos import LLM

model = LLM.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
text = model.generate(prompt="The world is a beautiful place.", max_length=100, num_beams=5)
print(text)
