"""Fine-tuning jobs through OpenAI's client: a real model is trained, served, stopped, killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import transformers
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.aio import AsyncClient
from llmasos.userland.client import Client
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.openai import fine_tuning

from ..boot.tiny import counting, write_tiny
from .conftest import Gateway, daemon, serve, soon
from .test_batches import kernel_pid

TINY = transformers.LlamaConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of a daemon with a model that learns: carol may train, alice may not."""
    files = tmp_path_factory.mktemp("tiny")
    write_tiny(files, TINY)
    (files / "chat_template.jinja").write_text(TEMPLATE)
    with daemon("cpu"):
        with Client() as client:
            client.call(table.Pull(model="tiny", source=f"file:{files}"), timeout_s=60)
        known = ApiKeys(folder())
        made = {name: known.make(name, name, t.TENANT_RIGHTS) for name in ("alice",)}
        rights = (*t.TENANT_RIGHTS, t.Capability.TRAIN)
        yield made | {name: known.make(name, name, rights) for name in ("carol", "dora")}


@pytest.fixture(scope="module")
def trainer(keys: dict[str, str]) -> Iterator[Gateway]:
    yield from serve(keys)


@pytest.fixture
def ai(trainer: Gateway) -> Iterator[openai.OpenAI]:
    with client(trainer) as made:
        yield made


@pytest.fixture
def machine(keys: dict[str, str]) -> Iterator[Client]:
    """The administrator's view."""
    with Client() as made:
        yield made


def client(gateway: Gateway, tenant: str = "carol") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys[tenant], max_retries=0)


def upload(ai: openai.OpenAI, text: str) -> str:
    return ai.files.create(file=("data.jsonl", text.encode()), purpose="fine-tune").id


def said(count: int) -> str:
    """Conversations in which the assistant counts on."""
    rows = []
    for n in range(count):
        words = [f"w{3 + (7 * n + i) % 500}" for i in range(8)]
        asked, answer = " ".join(words[:4]), " ".join(words[4:])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}))
    return "\n".join(rows)


def begin(ai: openai.OpenAI, text: str, **options: Any) -> str:
    return ai.fine_tuning.jobs.create(model="tiny", training_file=upload(ai, text), **options).id


def has(ai: openai.OpenAI, id: str, *status: str, patience_s: float = 300) -> Any:
    soon(lambda: ai.fine_tuning.jobs.retrieve(id).status in status, patience_s)
    return ai.fine_tuning.jobs.retrieve(id)


def steps(ai: openai.OpenAI, id: str) -> list[int]:
    """Those that were told, in order."""
    told = [event for event in ai.fine_tuning.jobs.list_events(id, limit=100) if event.type == "metrics"]
    return [event.data["step"] for event in told if "train_loss" in event.data][::-1]  # type: ignore[index,operator]


def datasets() -> list[str]:
    """Carol's."""
    with Client(tenant="carol") as made:
        return [entry.path for entry in made.ls("/datasets")]


def long(ai: openai.OpenAI) -> str:
    return begin(ai, counting(50), hyperparameters={"n_epochs": 1000, "batch_size": 4})


def test_a_model_is_trained_and_served_at_once(ai: openai.OpenAI, trainer: Gateway) -> None:
    chosen = {"n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 50}
    made = ai.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(ai, said(60)),
        validation_file=upload(ai, said(4) + "\n"),
        suffix="my counting!",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": chosen}},  # type: ignore[typeddict-item]
        metadata={"of": "me"},
    )
    assert (made.status, made.fine_tuned_model, made.seed) == ("validating_files", None, 7)
    assert made.hyperparameters.to_dict() == chosen
    job = has(ai, made.id, *fine_tuning.ENDED)
    assert (job.status, job.error, job.metadata) == ("succeeded", None, {"of": "me"})
    assert job.fine_tuned_model == f"tiny+my-counting-{made.id[-8:]}"
    assert job.trained_tokens > 60 * 4
    assert job.finished_at >= job.created_at
    assert steps(ai, made.id) == list(range(1, 31))  # 4 epochs of 60 rows, 8 a step
    (checkpoint,) = ai.fine_tuning.jobs.checkpoints.list(made.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.step_number == 30
    assert checkpoint.metrics.valid_loss is not None
    lines = ai.files.content(job.result_files[0]).text.splitlines()
    assert lines[0] == "step,train_loss,valid_loss"
    losses = [float(line.split(",")[1]) for line in lines[1:] if line.split(",")[1]]
    assert len(losses) == 30
    assert losses[-1] < losses[0]
    assert [float(line.split(",")[2]) for line in lines[1:] if line.split(",")[2]][-1] == pytest.approx(
        checkpoint.metrics.valid_loss, rel=1e-4
    )
    told = [event.id for event in ai.fine_tuning.jobs.list_events(made.id, limit=100)]
    assert len(set(told)) == len(told) > 30
    assert [event.id for event in ai.fine_tuning.jobs.list_events(made.id, limit=7)] == told  # all pages
    first = ai.fine_tuning.jobs.list_events(made.id, limit=2)
    assert first.has_more
    assert first.data[0].message.startswith("The model")
    for nonsense in ("x", "ftevent-1-999", told[0] + "0"):
        with pytest.raises(openai.NotFoundError):
            ai.fine_tuning.jobs.list_events(made.id, after=nonsense)
    question = [{"role": "user", "content": "w10 w11 w12 w13"}]

    def answer(model: str) -> str | None:
        asked = {"model": model, "messages": question, "max_tokens": 4, "temperature": 0}
        return ai.chat.completions.create(**asked).choices[0].message.content  # type: ignore[call-overload,no-any-return]

    assert answer(job.fine_tuned_model) != answer("tiny")
    assert job.fine_tuned_model in [model.id for model in ai.models.list()]
    assert made.id in [one.id for one in ai.fine_tuning.jobs.list()]
    with client(trainer, "dora") as dora:
        assert job.fine_tuned_model not in [model.id for model in dora.models.list()]
        for call in (
            dora.fine_tuning.jobs.retrieve,
            dora.fine_tuning.jobs.cancel,
            dora.fine_tuning.jobs.pause,
            dora.fine_tuning.jobs.list_events,
            dora.fine_tuning.jobs.checkpoints.list,
        ):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        assert not dora.fine_tuning.jobs.list().data


def test_data_that_is_no_good_says_where(ai: openai.OpenAI) -> None:
    job = has(ai, begin(ai, said(3) + '\n{"messages": 5}\n'), *fine_tuning.ENDED)
    assert job.status == "failed"
    assert job.error.param == "training_file"
    assert "line 4" in job.error.message
    assert ai.fine_tuning.jobs.list_events(job.id, limit=1).data[0].level == "error"
    soon(lambda: not [path for path in datasets() if job.id in path], 60)


def test_what_cannot_be_a_job_is_refused(ai: openai.OpenAI, trainer: Gateway) -> None:
    file = upload(ai, said(3))
    wrong = ai.files.create(file=("x", b"x"), purpose="user_data").id
    jobs = ai.fine_tuning.jobs
    for options, error in (
        ({"model": "nobody"}, openai.NotFoundError),
        ({"training_file": "file-none"}, openai.NotFoundError),
        ({"training_file": wrong}, openai.BadRequestError),
        ({"validation_file": wrong}, openai.BadRequestError),
        ({"method": {"type": "dpo"}}, openai.BadRequestError),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, openai.BadRequestError),
        ({"hyperparameters": {"n_epochs": 0}}, openai.BadRequestError),
    ):
        with pytest.raises(error):
            jobs.create(**{"model": "tiny", "training_file": file, **options})
    with client(trainer, "alice") as alice, pytest.raises(openai.PermissionDeniedError, match="train"):
        alice.fine_tuning.jobs.create(model="tiny", training_file="file-none")


def test_a_job_is_paused_goes_on_and_is_cancelled(ai: openai.OpenAI, machine: Client) -> None:
    id = long(ai)
    pid = has(ai, id, "running").to_dict()["pid"]
    assert ai.fine_tuning.jobs.pause(id).status == "paused"
    soon(lambda: machine.call(table.StatProcess(pid)).state is t.State.STOPPED)
    with pytest.raises(openai.ConflictError):
        ai.fine_tuning.jobs.pause(id)
    assert ai.fine_tuning.jobs.resume(id).status == "running"
    assert [path for path in datasets() if id in path]
    before = len(steps(ai, id))
    soon(lambda: len(steps(ai, id)) > before, 120)
    assert ai.fine_tuning.jobs.cancel(id).status == "cancelled"
    soon(lambda: pid not in [row.pid for row in machine.ps()], 120)
    soon(lambda: not [path for path in datasets() if id in path], 60)
    job = ai.fine_tuning.jobs.retrieve(id)
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
    with pytest.raises(openai.ConflictError):
        ai.fine_tuning.jobs.cancel(id)


def test_a_run_that_is_killed_from_elsewhere_has_ended(ai: openai.OpenAI, machine: Client) -> None:
    id = long(ai)
    pid = has(ai, id, "queued", "running").to_dict()["pid"]

    async def story() -> None:
        async with AsyncClient() as aio:
            caller: Any = SimpleNamespace(aio=aio)
            assert await fine_tuning._pid_of(caller, id) == pid  # how a gateway finds it
            assert await fine_tuning._pid_of(caller, "nobody") is None

    asyncio.run(story())
    machine.kill(pid)
    assert has(ai, id, *fine_tuning.ENDED).status == "cancelled"


def test_gateway_and_kernel_may_end_meanwhile(keys: dict[str, str], machine: Client) -> None:
    first = serve(keys)
    with client(next(first), "dora") as ai:
        id = begin(ai, counting(40), hyperparameters={"n_epochs": 10, "batch_size": 4})
        pid = has(ai, id, "running", *fine_tuning.ENDED).to_dict()["pid"]
    assert next(first, None) is None
    os.kill(kernel_pid(), signal.SIGKILL)
    second = serve(keys)
    with client(next(second), "dora") as ai:
        job = has(ai, id, *fine_tuning.ENDED)
        assert (job.status, job.to_dict()["pid"]) == ("succeeded", pid)
        assert steps(ai, id) == list(range(1, 101))  # each once
    assert next(second, None) is None


def test_everything_is_there_for_asyncio_too(trainer: Gateway) -> None:
    async def story() -> None:
        async with openai.AsyncOpenAI(base_url=f"{trainer.url}/v1", api_key=trainer.keys["dora"]) as ai:
            file = await ai.files.create(file=("d.jsonl", said(4).encode()), purpose="fine-tune")
            made = await ai.fine_tuning.jobs.create(model="tiny", training_file=file.id)
            assert (await ai.fine_tuning.jobs.retrieve(made.id)).model == "tiny"
            assert (await ai.fine_tuning.jobs.cancel(made.id)).status == "cancelled"

    asyncio.run(story())
