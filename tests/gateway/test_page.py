"""The console in a real browser, headless. Without Chromium or Chrome on the machine these are skipped."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import transformers
from llmasos.syscalls import table, training
from llmasos.syscalls import types as t
from llmasos.userland.client import Client

from ..boot.tiny import counting, write_tiny
from .conftest import Gateway, serve, soon

sync_api = pytest.importorskip("playwright.sync_api")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

PROGRAMS = ("chromium", "google-chrome", "chromium-browser", "chrome")
PATIENCE_MS = 20_000
AGE = 11
"""The column of ages."""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with sync_api.sync_playwright() as playwright:
        if program is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("there is no browser: `playwright install chromium`, or a package of the system")
        # Chromium's own sandbox does not work for root, as whom containers run.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Browser, gateway: Gateway) -> Iterator[Open]:
    """Opens the console with a tenant's key in it. In the end, nothing may have gone wrong in it."""
    contexts, problems = [], []

    def open_(tenant: str = "alice", url: str = "", **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        if tenant:
            key = f"sessionStorage.setItem('llmasos-key', '{gateway.keys[tenant]}')"
            context.add_init_script(key)
        page = context.new_page()
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("console", lambda said: problems.append(said.text) if "Security" in said.text else None)
        page.goto(f"{url or gateway.url}/console")
        return page

    expect.set_options(timeout=PATIENCE_MS)
    yield open_
    for context in contexts:
        context.close()
    with gateway.http() as http:  # a page that is closed so fast may not have ended its conversation
        for found in http.get("/v1/processes").json()["data"]:
            http.delete(f"/v1/processes/{found['pid']}")
    assert not problems


@pytest.fixture
def pid(http: httpx.Client) -> Iterator[int]:
    made = http.post("/v1/processes", json={"model": "slow", "label": "<img src=x onerror=boom()>"}).json()
    yield made["pid"]
    http.delete(f"/v1/processes/{made['pid']}")


def row(page: Page, pid: int) -> sync_api.Locator:
    return page.locator(f"#rows tr[data-pid='{pid}']")


def answer(page: Page) -> sync_api.Locator:
    return page.locator("#said .assistant").last


def say(page: Page, text: str) -> None:
    page.keyboard.press("/")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def talk(page: Page, model: str) -> None:
    expect(page.locator(f"#chat-model option[value='{model}']")).to_be_attached()
    page.select_option("#chat-model", model)
    page.locator("#chat-model").blur()
    page.fill("#temperature", "0")
    page.locator("#temperature").blur()


def test_a_key_is_asked_for_until_it_is_one(opened: Open, gateway: Gateway) -> None:
    page = opened("")
    expect(page.locator("#key")).to_be_visible()
    page.keyboard.type("sk-nonsense")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_contain_text("Incorrect API key")
    page.keyboard.type(gateway.keys["alice"])
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_hidden()
    expect(page.locator("#link")).to_have_text("alice")
    assert page.evaluate("sessionStorage.getItem('llmasos-key')") == gateway.keys["alice"]
    assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_without_keys_nothing_is_asked_for(opened: Open, home: Path) -> None:
    gateways = serve({})
    page = opened("", next(gateways).url)
    expect(page.locator("#link")).to_have_text(re.compile("/http$"))
    expect(page.locator("#key-button")).to_be_hidden()
    # Where nothing runs, a scale from 0 ends with 1.
    running = page.locator("figure", has_text="Running and queued")
    expect(running.locator(".top")).to_have_text("1")
    page.close()
    next(gateways, None)


def test_what_generates_no_text_is_not_offered_for_a_chat(opened: Open) -> None:
    page = opened()
    expect(page.locator("#chat-model option[value='tiny']")).to_be_attached()
    expect(page.locator("#chat-model option[value='encoder']")).not_to_be_attached()


def test_the_routes_are_shown_without_the_internet(browser: Browser, gateway: Gateway) -> None:
    pytest.importorskip("fastapi_offline")
    with browser.new_context() as context:
        page = context.new_page()
        asked, problems = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.goto(f"{gateway.url}/docs")
        route = page.locator(".opblock", has_text="/v1/chat/completions").first
        route.click(timeout=PATIENCE_MS)
        expect(route).to_contain_text("structured_outputs", timeout=PATIENCE_MS)
        assert all(url.startswith((gateway.url, "data:", "blob:")) for url in asked)
    assert not problems


def test_names_are_text_whatever_is_in_them(opened: Open, pid: int) -> None:
    page = opened()
    expect(row(page, pid)).to_contain_text("<img src=x onerror=boom()>")
    assert page.locator("img").count() == 0


def test_processes_are_commanded_by_keys(opened: Open, kernel: Client, pid: int) -> None:
    page = opened()
    expect(row(page, pid)).to_be_visible()
    for _ in range(page.locator("#rows tr").count()):
        page.keyboard.press("j")
    expect(row(page, pid)).to_have_attribute("aria-current", "true")  # the newest is the last
    page.keyboard.press("s")
    expect(row(page, pid)).to_contain_text("stopped")
    page.keyboard.press("s")
    expect(row(page, pid)).to_contain_text("waiting")
    for key, nice in (("+", 1), ("-", 0)):
        page.keyboard.press(key)
        soon(lambda nice=nice: kernel.call(table.StatProcess(pid)).nice == nice)
    page.keyboard.press("-")  # needs a right that she has not
    expect(page.locator("#toast")).to_contain_text("negative nice")
    expect(row(page, pid).locator("td").nth(5)).to_have_text("0")
    assert kernel.call(table.StatProcess(pid)).nice == 0
    page.keyboard.press("x")
    expect(page.locator("#confirm-text")).to_have_text(f"Kill process {pid}, slow of alice?")
    page.keyboard.press("Escape")
    expect(page.locator("#confirm")).to_be_hidden()
    assert kernel.call(table.StatProcess(pid)).pid == pid
    page.keyboard.press("x")
    page.keyboard.press("Enter")
    expect(row(page, pid)).to_have_count(0)


def test_others_processes_are_not_shown(opened: Open, pid: int) -> None:
    page = opened("bob")
    expect(page.locator("#link")).to_have_text("bob")
    expect(page.locator("#devices")).to_contain_text("null")
    expect(row(page, pid)).to_have_count(0)


def test_keys_are_letters_where_one_writes(opened: Open) -> None:
    page = opened()
    expect(page.locator("#link")).to_have_text("alice")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("/")
    page.keyboard.type("x?jk+-/n")
    expect(page.locator("#question")).to_have_value("x?jk+-/n")
    page.keyboard.press("Escape")
    expect(page.locator("#question")).not_to_be_focused()


def test_a_conversation_has_a_process_of_its_own(opened: Open, gateway: Gateway, http: httpx.Client) -> None:
    def mine() -> list[int]:
        rows = http.get("/v1/processes").json()["data"]
        return [found["pid"] for found in rows if found["name"] == "console"]

    page = opened()
    talk(page, "slow")
    say(page, "w1 w2")
    expect(page.locator("#chat-status")).to_contain_text("tokens/s")
    expect(answer(page)).to_contain_text(re.compile(r"w\d+ w\d+ w\d+"))
    [pid] = mine()
    expect(row(page, pid)).to_contain_text("running")
    page.keyboard.press("Escape")
    expect(page.locator("#chat-status")).to_have_text("stopped")
    soon(lambda: http.get(f"/v1/processes/{pid}").json()["state"] == "waiting")
    say(page, "w3")
    expect(page.locator("#said p")).to_have_count(4)
    expect(answer(page)).to_contain_text("w")
    assert mine() == [pid]  # what was said is still there
    page.keyboard.press("Escape")
    page.click("#chat-new")
    expect(page.locator("#said p")).to_have_count(0)
    soon(lambda: mine() == [])
    say(page, "w1")
    expect(answer(page)).to_contain_text("w")
    page.goto(f"{gateway.url}/livez")  # leaving ends it
    soon(lambda: mine() == [])


def test_an_answer_says_what_it_was(opened: Open, http: httpx.Client) -> None:
    page = opened()
    talk(page, "tiny")
    say(page, "w1 w2")
    status = page.locator("#chat-status")
    expect(status).to_contain_text(
        re.compile(r"^\d+ tokens · [\d.]+ tokens/s · first after \d+ ms · 0 of \d+ known")
    )
    expect(page.locator("#send")).to_have_text("Send")


def test_a_conversation_goes_on_when_its_process_was_killed(opened: Open, http: httpx.Client) -> None:
    page = opened()
    talk(page, "slow")
    say(page, "w1 w2")
    expect(answer(page)).to_contain_text("w")
    page.keyboard.press("Escape")
    for found in http.get("/v1/processes").json()["data"]:
        http.delete(f"/v1/processes/{found['pid']}")
    say(page, "w3")
    expect(page.locator("#said .assistant")).to_have_count(2)
    expect(answer(page)).to_contain_text(re.compile(r"w\d+ w\d+"))


def test_a_stopped_conversation_says_so(opened: Open, http: httpx.Client) -> None:
    page = opened()
    talk(page, "slow")
    say(page, "w1 w2")
    expect(answer(page)).to_contain_text("w")
    [pid] = [p["pid"] for p in http.get("/v1/processes").json()["data"] if p["name"] == "console"]
    http.post(f"/v1/processes/{pid}/signal", json={"signal": "STOP"})
    expect(page.locator("#chat-status")).to_contain_text("stopped")
    http.post(f"/v1/processes/{pid}/signal", json={"signal": "CONT"})
    expect(page.locator("#chat-status")).to_contain_text("tokens/s")


def test_who_has_the_right_can_pull(opened: Open) -> None:
    page = opened()
    expect(page.locator("#models")).to_contain_text("tiny")
    expect(page.locator("#pull")).to_be_hidden()
    page = opened("carol")
    page.fill("#pull-name", "no-such-model")
    page.keyboard.press("Enter")
    expect(page.locator("#toast")).to_contain_text("no-such-model")
    expect(page.locator("#pulls > *")).to_have_count(0)


def test_a_run_draws_its_curve(opened: Open, kernel: Client, tmp_path: Path) -> None:
    write_tiny(
        tmp_path,
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
    )
    kernel.call(table.Pull("learner", f"file:{tmp_path}"))
    page = opened("carol")
    expect(page.locator("#link")).to_have_text("carol")
    expect(page.locator("#training")).to_be_hidden()
    rights = (*t.TENANT_RIGHTS, t.Capability.TRAIN)
    with Client(tenant="carol", rights=rights) as carol:
        carol.call(table.Write("/datasets/rows", 0, counting(40).encode(), True))
        recipe = training.Recipe(
            max_steps=8,
            max_length=32,
            eval_steps=4,
            validation_split=0.2,
            bf16=False,
            lora=training.Lora(target_modules=["all-linear"]),
        )
        run = carol.call(table.Train("learner", "rows", "counts", recipe))
        expect(page.locator("#training")).to_be_visible()
        expect(page.locator("#run option")).to_have_text(f"{run.pid} · learner of carol")
        expect(page.locator("#run-facts")).to_contain_text("step 8 of 8", timeout=300_000)
        told = list(carol.stream(table.Follow(run.pid)))
        losses = {event.step: event.loss for event in told if event.phase == "train"}
        expect(page.locator("#curve figcaption")).to_contain_text(f"loss {losses[8]:.3f}")
        drawn = page.locator("#curve path.line:not(.marks)").get_attribute("d")
        assert drawn is not None
        assert len(re.findall("[ML]", drawn)) == len(losses)
        assert carol.wait(run.pid).trained is not None


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_it_fits_on_screens(opened: Open, pid: int, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800})
    expect(row(page, pid)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_is_dark_or_light_as_the_reader_wants(opened: Open) -> None:
    def brightness(scheme: str) -> int:
        page = opened(color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert brightness("dark") < 150 < 600 < brightness("light")


def test_everything_that_is_operated_has_a_name(opened: Open, pid: int) -> None:
    page = opened("carol")
    expect(page.locator("#link")).to_have_text("carol")
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea, [role=img], progress")]
           .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length))
           .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


def test_only_what_changed_is_touched(opened: Open, pid: int) -> None:
    page = opened()
    expect(row(page, pid)).to_be_visible()
    row(page, pid).evaluate(
        """(at) => {
          window.kept = at;
          window.touched = [];
          new MutationObserver((found) => touched.push(...found.map((one) => one.target.cellIndex)))
            .observe(at, { subtree: true, childList: true, attributes: true, characterData: true });
        }"""
    )
    page.wait_for_timeout(2500)  # two or three pictures
    assert set(page.evaluate("touched")) <= {AGE}  # it waits: nothing else of it changes
    assert row(page, pid).evaluate("(at) => at === window.kept")
