"""The program LLMasOS began with: a model by its name, one call, Hugging Face's words.

python examples/seed.py [MODEL]
"""

import sys

from llmasos import LLM

model = sys.argv[1] if len(sys.argv) > 1 else "gpt2"
llm = LLM.from_pretrained(model)
outputs = llm.generate(
    "Once upon a time",
    max_length=50,
    num_beams=5,
    num_return_sequences=3,
    no_repeat_ngram_size=2,
    early_stopping=True,
)
for output in outputs:
    print(output)
