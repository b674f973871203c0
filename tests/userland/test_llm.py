"""LLM and Process against a fake kernel whose pseudo model says what a test tells it to."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.llm import LLM
from llmasos.userland.tokenizer import Tokenizer


@pytest.fixture
def client(kernel: Any) -> Iterator[Client]:
    with Client(kernel.address, timeout_s=3) as made:
        yield made


@pytest.fixture
def llm(kernel: Any, client: Client) -> LLM:
    made = LLM.from_pretrained("tiny", client=client)
    says(kernel, made.tokenizer, " there<|im_end|>")
    return made


def says(kernel: Any, tokenizer: Tokenizer, text: str) -> None:
    """Makes the pseudo model answer everything with `text`."""
    ids = tokenizer._trusting.encode(text, add_special_tokens=False).ids
    kernel.script = lambda tokens, call: list(ids)


def prompts(llm: LLM, kernel: Any) -> list[str]:
    """What the kernel was given to infer, as text."""
    return [
        llm.tokenizer.decode(t.unpack_tokens(call.tokens), special=True)
        for call in kernel.calls
        if isinstance(call, table.Infer)
    ]


def test_generate_returns_the_prompt_and_the_answer_as_a_str(llm: LLM, kernel: Any) -> None:
    done = llm.generate("Hello", max_new_tokens=20)
    assert done == "Hello there"
    assert (done.text, done.finish, done.tokens[-1]) == (" there", t.Finish.STOP, 258)
    assert (done.prompt_tokens, done.logprobs, done.score) == (5, None, None)
    assert llm.generate("Hello", return_full_text=False) == " there"
    assert llm.generate("Hello", max_length=8).text == " th"
    assert kernel.processes == {}


def test_the_shape_of_the_result_follows_the_arguments(llm: LLM) -> None:
    assert llm.generate(["A", "B"]) == ["A there", "B there"]
    assert llm.generate("A", do_sample=True, num_return_sequences=2) == ["A there"] * 2
    assert llm.generate(["A", "B"], do_sample=True, num_return_sequences=2) == [
        ["A there"] * 2,
        ["B there"] * 2,
    ]
    assert llm.generate("A", num_return_sequences=1) == "A there"
    assert llm.generate([]) == []


def test_mistakes_never_reach_the_kernel(llm: LLM, kernel: Any) -> None:
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        llm.generate("A", temprature=3)  # type: ignore[call-overload]
    for call in (llm.stream, llm.chat, llm.astream):
        with pytest.raises(TypeError, match="no option"):
            call("A", nonsense=1)
    for nothing, what in ((None, "NoneType"), (5, "int"), ([None], "NoneType"), (b"A", "bytes")):
        for call in (llm.generate, llm.embed):
            with pytest.raises(errors.InvalidArgument, match=f"a text is a str.*, not {what}"):
                call(nothing)  # type: ignore[arg-type]
    for nothing, what in ((None, "NoneType"), (["A"], "list"), (["A", "B"], "list")):
        for read in (llm.stream, llm.astream, llm.logprobs):
            with pytest.raises(errors.InvalidArgument, match=f"a text is a str, not {what}"):
                read(nothing)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="messages are a list"):
        llm.chat(None)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="not valid Unicode"):
        llm.embed("\ud800")
    with pytest.raises(errors.InvalidArgument, match="num_return_sequences"):
        llm.generate("A", num_return_sequences=2)
    with pytest.raises(errors.InvalidArgument, match="BOS token"):
        LLM(llm.client, "x", _without_bos(llm.tokenizer), context_length=9).generate("")
    assert "infer" not in kernel.names()


def _without_bos(tokenizer: Tokenizer) -> Tokenizer:
    made = Tokenizer.__new__(Tokenizer)
    made.__dict__ = {**tokenizer.__dict__, "bos_id": None}
    return made


def test_an_empty_prompt_begins_with_bos(llm: LLM, kernel: Any) -> None:
    assert llm.generate("") == " there"
    assert prompts(llm, kernel) == ["<|endoftext|>"]


def test_samples_are_forks_of_one_process(llm: LLM, kernel: Any) -> None:
    kernel.script = lambda tokens, call: [call.sampling.seed]
    done = llm.generate("Hello", do_sample=True, num_return_sequences=3, seed=70, return_full_text=False)
    assert [one.tokens for one in done] == [[70], [71], [72]]
    assert [one.prompt_tokens for one in done] == [5, 5, 5]
    names = kernel.names()
    assert (names.count("spawn_model"), names.count("fork"), names.count("infer")) == (1, 1, 4)
    assert prompts(llm, kernel) == ["Hell", "o", "o", "o"]
    assert kernel.processes == {}


def test_a_failing_sample_leaves_no_process(llm: LLM, kernel: Any) -> None:
    kernel.failing = {"fork": errors.TooManyProcesses("no more")}
    with pytest.raises(errors.TooManyProcesses):
        llm.generate("Hello", do_sample=True, num_return_sequences=3)
    assert kernel.processes == {}


def test_max_time_is_a_deadline_of_the_kernel(llm: LLM, kernel: Any) -> None:
    llm.generate("A", max_time=1.5)
    with llm.stream("A", max_time=0.25) as stream:
        list(stream)
    llm.generate(["A", "B"])
    calls = [call for call in kernel.calls if isinstance(call, table.Infer)]
    assert [call.deadline_ms for call in calls] == [1500, 250, None, None]
    with pytest.raises(errors.InvalidArgument, match="max_time"):
        llm.generate("A", max_time=0)


def test_beams_are_the_kernels_work(llm: LLM, kernel: Any) -> None:
    a, b = (llm.tokenizer.encode(text) for text in (" one", " two"))
    kernel.beams = [t.Sequence([*a, 258], -0.1, t.Finish.STOP), t.Sequence(b, -0.2, t.Finish.LENGTH)]
    done = llm.generate("A", num_beams=4, num_return_sequences=2, early_stopping=True, no_repeat_ngram_size=2)
    assert done == ["A one", "A two"]
    assert [one.score for one in done] == [-0.1, -0.2]
    assert [one.finish for one in done] == [t.Finish.STOP, t.Finish.LENGTH]
    (call,) = [call for call in kernel.calls if isinstance(call, table.Infer)]
    assert call.beams == t.Beams(4, 2, 1.0, "true")
    assert call.sampling.no_repeat_ngram_size == 2
    with llm.stream("A", num_beams=4) as stream:
        assert "".join(stream) == " one"


def test_a_stop_string_ends_the_answer_and_the_generation(llm: LLM, kernel: Any) -> None:
    says(kernel, llm.tokenizer, " yes. User: and so on" * 20)
    done = llm.generate("A", stop=["\n", "User:"], return_full_text=False)
    assert (done, done.finish) == (" yes. ", t.Finish.STOP)
    assert llm.generate(["A", "B"], stop="User:") == ["A yes. ", "B yes. "]
    assert kernel.streams == {}


def test_stream_yields_text_as_it_is_certain(llm: LLM, kernel: Any) -> None:
    says(kernel, llm.tokenizer, "né<|im_end|>")
    with llm.stream("A") as pieces:
        assert list(pieces) == ["n", "é"]
    assert pieces.text == pieces.completion == "né"
    assert pieces.reply.finish is t.Finish.STOP


def test_leaving_a_stream_early_cancels_it(llm: LLM, kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}
    with llm.stream("A") as pieces:
        next(pieces)
    assert pieces.completion.finish is t.Finish.CANCELLED
    assert kernel.processes == {}


def test_chat_uses_the_template(llm: LLM, kernel: Any) -> None:
    assert llm.chat("Hi") == " there"
    assert prompts(llm, kernel) == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
    with llm.chat([{"role": "user", "content": "Hi"}], stream=True) as pieces:
        assert "".join(pieces) == " there"


def test_chat_tells_calls_of_tools_from_words(kernel: Any, client: Client) -> None:
    kernel.context_length = 4096
    llm = LLM.from_pretrained("tiny", client=client)
    call = '<tool_call>\n{"name": "clock", "arguments": {"zone": "Ulm"}}\n</tool_call>'
    says(kernel, llm.tokenizer, f"Let me look.\n{call}<|im_end|>")
    zone = {"type": "object", "properties": {"zone": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "clock", "parameters": zone}}]
    done = llm.chat("What time is it?", tools=tools)
    assert (done, done.called) == ("Let me look.", True)
    assert [(one.name, one.arguments) for one in done.tool_calls] == [("clock", '{"zone": "Ulm"}')]
    grammar = kernel.calls[-1].sampling.grammar
    assert grammar.kind is t.GrammarKind.LARK
    assert "# Tools" in prompts(llm, kernel)[0]
    with llm.chat("Hi", tools=tools, stream=True) as pieces:
        assert list("".join(pieces)) == list("Let me look.")
    assert pieces.completion.tool_calls[0].name == "clock"

    async def main() -> None:
        result = {"role": "tool", "tool_call_id": done.tool_calls[0].id, "content": "noon"}
        asked = [{"role": "user", "content": "What time is it?"}, done.message, result]
        again = await llm.achat(asked, tools=tools, tool_choice="none")
        assert (again.text, again.tool_calls, again.called) == (f"Let me look.\n{call}", [], False)

    asyncio.run(main())
    assert kernel.calls[-1].sampling.grammar is None
    last = prompts(llm, kernel)[-1]
    assert f"assistant\nLet me look.\n{call}<|im_end|>\n<|im_start|>user\n<tool_response>\nnoon" in last
    assert llm.chat("Hi", tools=tools, stop=["zone", "\n"]).called  # these are no words
    stopped = llm.chat("Hi", tools=tools, stop="look")
    assert (stopped.text, stopped.finish, stopped.tool_calls) == ("Let me ", t.Finish.STOP, [])
    cut = llm.chat("Hi", tools=tools, max_new_tokens=60)
    assert (cut.finish, cut.called, cut.tool_calls[0].arguments) == (t.Finish.LENGTH, False, '{"zo')


def test_logprobs(llm: LLM, kernel: Any) -> None:
    kernel.score = lambda tokens: [math.nan, *(-float(i) for i in range(1, len(tokens)))]
    scores = llm.logprobs("abc")
    assert [text for text, _ in scores] == ["a", "b", "c"]
    assert math.isnan(scores[0][1])
    assert [value for _, value in scores[1:]] == [-1.0, -2.0]
    done = llm.generate("A", logprobs=1, max_new_tokens=2)
    assert done.logprobs is not None
    assert done.logprobs[0] == (" ", done.tokens[0], -0.5, [(" ", -0.5)])
    assert len(done.logprobs) == 2


def test_ctrl_c_cancels_in_the_kernel(llm: LLM, kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}

    def interrupt() -> None:
        while not kernel.streams:
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate("Hello")
    assert kernel.cancelled
    assert kernel.processes == {}


def test_async_twins(llm: LLM, kernel: Any) -> None:
    async def main() -> None:
        assert await asyncio.gather(llm.agenerate("A"), llm.achat("Hi")) == ["A there", " there"]
        assert await llm.agenerate(["A", "B"]) == ["A there", "B there"]
        assert "".join([piece async for piece in llm.astream("A", stop="re")]) == " the"
        assert await llm.agenerate("A", do_sample=True, num_return_sequences=2) == ["A there"] * 2
        kernel.endless = {"tiny:latest"}
        task = asyncio.create_task(llm.agenerate("A"))
        while not kernel.streams:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert kernel.processes == {}


def test_a_process_keeps_its_context(llm: LLM, kernel: Any) -> None:
    with llm.process("Hello") as process:
        assert process.text == "Hello"
        assert process.generate(",", max_new_tokens=6) == " there"
        assert process.text == "Hello, there"
        process.truncate(5)
        process.append("!")
        assert process.text == "Hello!"
        assert process.nice(5).nice == 5
        assert process.info().context == 6
        assert "".join(process.stream("?")) == " there"
    assert kernel.processes == {}


def test_forks_go_on_by_themselves(llm: LLM, kernel: Any) -> None:
    first, *others = llm.fork("Hello", 3)
    others[0].append(" you")
    assert [process.text for process in (first, *others)] == ["Hello", "Hello you", "Hello"]
    for process in (first, *others):
        process.kill("KILL")
        assert process.wait().exit_code == 0
        process.close()  # a second end does nothing
    assert kernel.processes == {}


def test_a_stop_string_leaves_nothing_behind_it_in_the_context(llm: LLM, kernel: Any) -> None:
    says(kernel, llm.tokenizer, " yes. User: and so on")
    with llm.process("A") as process:
        assert process.generate(stop="User:") == " yes. "
        assert process.text == "A yes. User:"


def test_chat_of_a_process_tells_the_kernel_the_whole_context(llm: LLM, kernel: Any) -> None:
    with llm.process() as process:
        history = [{"role": "user", "content": "Hi"}]
        with process.chat(history) as pieces:
            answer = "".join(pieces)
        history += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
        with process.chat(history) as pieces:
            list(pieces)
        last = kernel.calls[-1]  # nothing has to be looked at, nor cut off, before
        assert (type(last), last.pid, last.whole) == (table.Infer, process.pid, True)
        assert kernel.names()[-2:] == ["infer", "infer"]
        assert process.text == "user\nHi\nassistant\n there\nuser\nAnd?\nassistant\n there"
        with process.chat("Other") as pieces:
            list(pieces)
        assert process.text == "user\nOther\nassistant\n there"


def test_from_pretrained_pulls_what_is_missing(client: Client, kernel: Any, bytes_model: Any) -> None:
    kernel.pulls["new:latest"] = bytes_model
    for _ in range(2):
        LLM.from_pretrained("new", client=client)
    assert kernel.names().count("pull") == 1
    with pytest.raises(errors.PullFailed):
        LLM.from_pretrained("absent", client=client)
    with pytest.raises(errors.InvalidArgument, match="realtime"):
        LLM.from_pretrained("tiny", client=client, sched_class="soon")


def test_its_repr_says_what_it_is(llm: LLM) -> None:
    text = repr(llm)
    for fact in ("tiny:latest", "context 512", "vocabulary 259", "chat", "interactive"):
        assert fact in text


def test_closing_leaves_a_lent_client_open(client: Client) -> None:
    with LLM.from_pretrained("tiny", client=client):
        pass
    assert client.ps() == []
