"""How often typed decisions are right, and what their probabilities are worth: zero-shot, on labelled texts.

    python tests/bench/decisions.py [--model smollm2]

Ways to put a question (letters, listed options, a chat template, plain text, behind answered examples), each
with plain likelihoods, their means a token, and calibrated against a text that says nothing: the share of
right answers, the mean negative log-probability of the right one (nats) at temperature 1 and at the best one,
that one, and milliseconds a text. `decide` is what LLM.decide does. A JSON line each.

The way of `decide` was chosen among some thirty by what is printed for the first three tasks, so their
figures flatter it. The tasks held out are of texts by somebody else that nothing was chosen by: these count.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPERATURES = (0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
LETTERS = "ABCDEFGHIJ"

SENTIMENT = [
    ("The battery lasts for days and the screen is gorgeous.", "positive"),
    ("I have never laughed so much in a cinema.", "positive"),
    ("The staff went out of their way to help us.", "positive"),
    ("Best purchase I have made this year.", "positive"),
    ("A warm, clever and moving novel.", "positive"),
    ("The soup was delicious and came quickly.", "positive"),
    ("My daughter loves this toy and plays with it every day.", "positive"),
    ("Setup took two minutes and everything just worked.", "positive"),
    ("The view from our room was breathtaking.", "positive"),
    ("Fantastic sound for such a small speaker.", "positive"),
    ("I would recommend this hotel to all my friends.", "positive"),
    ("The actors are superb and the story never drags.", "positive"),
    ("Comfortable shoes, I could walk in them all day.", "positive"),
    ("They answered my question within minutes, great service.", "positive"),
    ("What a beautiful concert, we enjoyed every second.", "positive"),
    ("The update made the app faster and easier to use.", "positive"),
    ("Fresh bread, friendly people, fair prices.", "positive"),
    ("This vacuum cleaner is quiet and powerful.", "positive"),
    ("Not bad at all, I was pleasantly surprised.", "positive"),
    ("The course taught me more than I had hoped for.", "positive"),
    ("It broke after two days and nobody answers my mails.", "negative"),
    ("A boring film with wooden dialogue.", "negative"),
    ("The room smelled of smoke and the bed was dirty.", "negative"),
    ("Complete waste of money.", "negative"),
    ("The waiter was rude and the food was cold.", "negative"),
    ("The app crashes every time I open it.", "negative"),
    ("I returned the jacket because the zip was broken.", "negative"),
    ("We waited three hours and then the flight was cancelled.", "negative"),
    ("The plot makes no sense and the ending is awful.", "negative"),
    ("The keys stick and the touchpad hardly works.", "negative"),
    ("Do not buy this, it is a scam.", "negative"),
    ("The music was so loud that we left after ten minutes.", "negative"),
    ("My phone gets hot and the battery dies by noon.", "negative"),
    ("The instructions are useless and parts were missing.", "negative"),
    ("I regret reading this book, it was painfully slow.", "negative"),
    ("Their support hung up on me twice.", "negative"),
    ("The coffee tasted burnt and cost a fortune.", "negative"),
    ("This update ruined a perfectly good program.", "negative"),
    ("The tent leaked on the first rainy night.", "negative"),
    ("I am deeply disappointed by the poor quality.", "negative"),
]
TOPICS = [
    ("The striker scored twice in the final minutes of the match.", "sports"),
    ("She won the marathon in a new course record.", "sports"),
    ("The coach praised his goalkeeper after the penalty shootout.", "sports"),
    ("Rain delayed the third set of the tennis final.", "sports"),
    ("The team signed a new quarterback for next season.", "sports"),
    ("He broke the world record in the 200 metre freestyle.", "sports"),
    ("The cyclists face three mountain stages this week.", "sports"),
    ("Fans celebrated the club's first league title in thirty years.", "sports"),
    ("Shares of the car maker fell after weak quarterly earnings.", "business"),
    ("The central bank raised interest rates by a quarter point.", "business"),
    ("The two banks agreed on a merger worth nine billion dollars.", "business"),
    ("Retail sales rose in December as inflation slowed.", "business"),
    ("The start-up plans to go public next spring.", "business"),
    ("Oil prices dropped to their lowest level since March.", "business"),
    ("The airline will cut two thousand jobs to reduce costs.", "business"),
    ("Investors moved their money from stocks into bonds.", "business"),
    ("Astronomers found water vapour on a distant planet.", "science"),
    ("The new particle was seen by two detectors independently.", "science"),
    ("Biologists sequenced the genome of an ancient mammoth.", "science"),
    ("Researchers measured how fast the ice sheet melts.", "science"),
    ("The experiment shows how proteins fold inside cells.", "science"),
    ("A fossil from China changes what we know about early birds.", "science"),
    ("Chemists made a catalyst that works at room temperature.", "science"),
    ("The telescope photographed two merging galaxies.", "science"),
    ("Parliament passed the bill by a majority of three votes.", "politics"),
    ("The president met opposition leaders before the election.", "politics"),
    ("Voters go to the polls on Sunday to elect a new mayor.", "politics"),
    ("The minister resigned after the corruption inquiry.", "politics"),
    ("The senate rejected the nominee for the supreme court.", "politics"),
    ("Both parties accuse each other of blocking the reform.", "politics"),
    ("The prime minister announced a snap election.", "politics"),
    ("Diplomats signed a treaty after long negotiations between the governments.", "politics"),
]
PREDICATES = [
    ("I was charged twice and want my money back.", "The customer asks for a refund.", True),
    ("Please refund the second payment.", "The customer asks for a refund.", True),
    ("I would like to return the lamp and get a refund.", "The customer asks for a refund.", True),
    ("Thanks, the parcel arrived today.", "The customer asks for a refund.", False),
    ("When do you open on Saturday?", "The customer asks for a refund.", False),
    ("How do I reset my password?", "The customer asks for a refund.", False),
    ("The train leaves at nine in the evening.", "The text mentions a time of day.", True),
    ("We meet at half past three.", "The text mentions a time of day.", True),
    ("She likes green apples.", "The text mentions a time of day.", False),
    ("The house has two floors and a garden.", "The text mentions a time of day.", False),
    ("My dog Rex ate my homework.", "The text is about an animal.", True),
    ("A cat slept on the warm roof.", "The text is about an animal.", True),
    ("The horse jumped over the fence.", "The text is about an animal.", True),
    ("The printer is out of paper.", "The text is about an animal.", False),
    ("Mix flour, butter and sugar.", "The text is about an animal.", False),
    ("The motor needs new oil.", "The text is about an animal.", False),
    ("WIN a FREE phone now, click here!!!", "The message is spam.", True),
    ("You have been selected for a $1000 gift card, claim now!", "The message is spam.", True),
    ("Can you send me the slides of yesterday's meeting?", "The message is spam.", False),
    ("Dinner at mine tomorrow? Anna is coming too.", "The message is spam.", False),
]
SENTIMENT_HELD_OUT = [
    ("What a wonderful film, I loved every minute!", "positive"),
    ("I would buy this again, it works perfectly.", "positive"),
    ("Best concert of my life.", "positive"),
    ("The staff was kind and the room was clean.", "positive"),
    ("Absolutely delicious, we will come back.", "positive"),
    ("Fast delivery and great quality.", "positive"),
    ("The food was cold and the waiter was rude.", "negative"),
    ("It broke after two days and nobody answered my mails.", "negative"),
    ("A boring waste of time.", "negative"),
    ("I regret this purchase.", "negative"),
    ("Terrible sound and the battery dies quickly.", "negative"),
    ("The plot makes no sense and the acting is awful.", "negative"),
]
TOPICS_HELD_OUT = [
    ("The striker scored twice in the final.", "sports"),
    ("The team won the championship after extra time.", "sports"),
    ("The tennis player retired after twenty years.", "sports"),
    ("The central bank raised interest rates again.", "business"),
    ("Shares of the car maker fell by ten percent.", "business"),
    ("The company reported record profits this quarter.", "business"),
    ("Scientists found water on a distant planet.", "science"),
    ("A new vaccine protects mice from the virus.", "science"),
    ("Researchers mapped the genome of the whale.", "science"),
    ("The parliament voted on the new election law.", "politics"),
    ("The president met the opposition leader.", "politics"),
    ("Senators debated the budget until midnight.", "politics"),
]

LABELS = {"sentiment": ["positive", "negative"], "topic": ["sports", "business", "science", "politics"]}
QUESTIONS = {"sentiment": "What is the sentiment of the text?", "topic": "What is the topic of the text?"}

Row = tuple[str, str, list[str], int]  # text, question, labels, place of the right one
Way = Callable[[str, str, list[str]], tuple[str, list[str]]]  # a prompt and what may follow it


def sets() -> dict[str, list[Row]]:
    def labelled(kind: str, texts: list[tuple[str, str]]) -> list[Row]:
        return [(text, QUESTIONS[kind], LABELS[kind], LABELS[kind].index(label)) for text, label in texts]

    return {
        "sentiment": labelled("sentiment", SENTIMENT),
        "topic": labelled("topic", TOPICS),
        "predicate": [
            (text, statement, ["yes", "no"], 0 if true else 1) for text, statement, true in PREDICATES
        ],
        "sentiment, held out": labelled("sentiment", SENTIMENT_HELD_OUT),
        "topic, held out": labelled("topic", TOPICS_HELD_OUT),
    }


def ways() -> dict[str, tuple[bool, Way]]:
    """By name: whether it is said in a chat, and how."""
    from llmasos.userland.decisions import EXAMPLES

    def letters(text: str, question: str, labels: list[str]) -> tuple[str, list[str]]:
        used = LETTERS[: len(labels)]
        listed = "\n".join(f"{letter}. {label}" for letter, label in zip(used, labels, strict=True))
        asked = f"Answer with the letter of the option that fits best (A to {used[-1]}) only."
        return f"{text}\n\n{question}\n{listed}\n{asked}", list(used)

    def listed(text: str, question: str, labels: list[str]) -> tuple[str, list[str]]:
        options = "\n".join(f"- {label}" for label in labels)
        return f"{text}\n\n{question}\n{options}\nAnswer with the option that fits best only.", labels

    def bare(text: str, question: str, labels: list[str]) -> tuple[str, list[str]]:
        return f"{text}\n\n{question}", labels

    def plain(text: str, question: str, labels: list[str]) -> tuple[str, list[str]]:
        return f"Text: {text}\nQuestion: {question}\nAnswer:", [f" {label}" for label in labels]

    def plain_listed(text: str, question: str, labels: list[str]) -> tuple[str, list[str]]:
        prompt, options = plain(text, f"{question} ({', '.join(labels)})", labels)
        return prompt, options

    def examples(text: str, question: str, labels: list[str]) -> tuple[str, list[str]]:
        prompt, options = plain(text, question, labels)
        return EXAMPLES + prompt, options

    return {
        "chat, letters": (True, letters),
        "chat, listed": (True, listed),
        "chat": (True, bare),
        "plain, listed": (False, plain_listed),
        "plain": (False, plain),
        "plain, examples": (False, examples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default="", help="Only those with this in their names.")
    parser.add_argument("--home", type=Path, default=Path("~/.cache/llmasos-bench/gateway/real").expanduser())
    arguments = parser.parse_args()
    import daemon

    arguments.home.mkdir(parents=True, exist_ok=True)
    with daemon.running(arguments.home):
        from llmasos.userland.llm import LLM

        llm = LLM.from_pretrained(arguments.model)
        for task, rows in sets().items():
            if arguments.tasks not in task:
                continue
            for name, (chat, way) in ways().items():
                of_ways(llm, task, rows, name, chat, way)
            of_decide(llm, task, rows)


def of_ways(llm: Any, task: str, rows: list[Row], name: str, chat: bool, way: Way) -> None:
    from llmasos.userland.decisions import NOTHING

    found: dict[str, list[list[float]]] = {"plain": [], "per token": [], "calibrated": []}
    for text, question, labels, _ in rows:
        said = [way(one, question, labels) for one in (text, NOTHING)]
        prompts = [[{"role": "user", "content": one}] if chat else one for one, _ in said]
        options = said[0][1]
        found["plain"].append(list(llm.score(prompts[0], options).probabilities))
        found["per token"].append(list(llm.score(prompts[0], options, per_token=True).probabilities))
        fair = llm.score(prompts[0], options, against=[prompts[1]])
        found["calibrated"].append(list(fair.probabilities))
    for kind, probabilities in found.items():
        tell({"task": task, "way": name, "kind": kind}, rows, probabilities)


def of_decide(llm: Any, task: str, rows: list[Row]) -> None:
    from llmasos.userland.decisions import Option, Question

    begun = time.perf_counter()
    found: list[list[float]] = [[] for _ in rows]
    for question in dict.fromkeys(row[1] for row in rows):
        places = [place for place, row in enumerate(rows) if row[1] == question]
        asked = Question(question, tuple(Option(label) for label in rows[places[0]][2]))
        made = llm.decide_all([rows[place][0] for place in places], asked)
        for place, (one,) in zip(places, made, strict=True):
            found[place] = list(one.probabilities)
    spent = 1e3 * (time.perf_counter() - begun) / len(rows)
    tell({"task": task, "way": "decide", "ms_a_text": round(spent, 1)}, rows, found)


def tell(facts: dict[str, Any], rows: list[Row], probabilities: list[list[float]]) -> None:
    """Prints the figures."""
    right = [row[3] for row in rows]
    hits = sum(one.index(max(one)) == place for one, place in zip(probabilities, right, strict=True))

    def nats(temperature: float) -> float:
        total = 0.0
        for one, place in zip(probabilities, right, strict=True):
            powers = [max(share, 1e-30) ** (1 / temperature) for share in one]
            total -= math.log(max(powers[place] / sum(powers), 1e-12))
        return round(total / len(rows), 3)

    best = min(TEMPERATURES, key=nats)
    figures = {
        "right": round(hits / len(rows), 3),
        "nats": nats(1.0),
        "best": nats(best),
        "temperature": best,
    }
    print(json.dumps({**facts, **figures}), flush=True)


if __name__ == "__main__":
    main()
