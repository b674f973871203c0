"""Every command, its exit code and its JSON, on a real daemon."""

from __future__ import annotations

import json
import time

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.llsh import guide
from llmasos.userland.llsh.main import command_tree

PROCESS = set(t.ProcessInfo.__struct_fields__)
FILE = set(t.FileInfo.__struct_fields__)


@pytest.fixture
def pid(client):
    """A process with a few tokens."""
    made = client.call(table.SpawnModel(model="tiny", label="mine")).pid
    client.stream(table.Infer(made, tokens=t.pack_tokens([1, 2, 3]), max_tokens=5)).result()
    yield made
    try:
        client.kill(made, "KILL")
    except errors.LLMasOSError:
        pass


def state(client, pid: int) -> str:
    return client.call(table.StatProcess(pid)).state


def test_ps_shows_the_processes(llsh, pid):
    header, row = llsh("ps").splitlines()
    assert header.split()[:4] == ["PID", "OWNER", "MODEL", "CLASS"]
    assert row.split()[0] == str(pid)
    assert {"tiny", "interactive", "waiting:owner", "8", "mine"} <= set(row.split())
    (document,) = llsh.json("ps")
    assert set(document) == PROCESS
    assert (document["pid"], document["context"]) == (pid, 8)


def test_ps_hides_the_ended_ones_unless_asked(llsh, client, pid):
    client.kill(pid)
    assert llsh.json("ps") == []
    assert [row["state"] for row in llsh.json("ps", "-a")] == ["zombie"]


@pytest.mark.parametrize(
    "words", [["kill"], ["kill", "-9"], ["kill", "-KILL"], ["kill", "-s", "sigterm"], ["kill", "--signal=15"]]
)
def test_kill_ends_a_process(llsh, client, pid, words):
    llsh(*words, str(pid))
    assert (llsh.code, llsh.out, llsh.err) == (0, "", "")
    assert state(client, pid) == "zombie"


def test_kill_tells_which_pids_it_could_not_reach_and_does_the_others(llsh, client, pid):
    llsh("kill", "99999", str(pid))
    assert llsh.code == 1
    assert llsh.err.startswith("llsh: no process 99999\nhint: ")
    assert state(client, pid) == "zombie"


def test_stop_and_cont(llsh, client, pid):
    assert llsh.json("stop", str(pid)) == [{"pid": pid, "signal": "STOP"}]
    assert state(client, pid) == "stopped"
    llsh("kill", "-CONT", str(pid))
    assert state(client, pid) == "waiting"
    llsh("kill", "-19", str(pid))
    llsh("cont", str(pid))
    assert state(client, pid) == "waiting"


@pytest.mark.parametrize(
    ("words", "nice", "sched_class"),
    [
        (["{}", "7"], 7, "interactive"),
        (["{}", "-5"], -5, "interactive"),
        (["-n", "3", "{}"], 3, "interactive"),
        (["-n", "-3", "{}"], -3, "interactive"),
        (["{}", "--class", "batch"], 0, "batch"),
        (["{}", "19", "--class", "idle"], 19, "idle"),
    ],
)
def test_nice_changes_the_priority(llsh, pid, words, nice, sched_class):
    document = llsh.json("nice", *[word.format(pid) for word in words])
    assert (document["nice"], document["sched_class"]) == (nice, sched_class)


@pytest.mark.parametrize(
    "words", [[], ["x", "5"], ["1"], ["1", "2", "3"], ["1", "2", "-n", "3"], ["1", "much"]]
)
def test_nice_refuses_what_it_does_not_understand(llsh, words):
    llsh("nice", *words)
    assert llsh.code == 2
    assert llsh.err.startswith("llsh: ")
    assert "llsh nice" in llsh.err


def test_forks_stay_until_killed_and_can_be_waited_for(llsh, client, pid):
    pids = llsh.json("fork", str(pid), "-n", "2")["pids"]
    assert len(pids) == 2
    assert {row["pid"] for row in llsh.json("ps")} == {pid, *pids}
    llsh("kill", *map(str, pids))
    out = llsh("wait", *map(str, pids), "--timeout", "5")
    assert llsh.code == 1  # killed is not a good end
    assert out.startswith(f"{pids[0]}: signal TERM")
    assert {row["pid"] for row in llsh.json("ps", "-a")} == {pid}


def test_spawn_prints_a_pid_that_run_goes_on_with(llsh):
    pid = llsh("spawn", "tiny", "--class", "batch", "--nice", "5", "--name", "nightly").strip()
    (row,) = llsh.json("ps")
    assert (str(row["pid"]), row["sched_class"], row["nice"], row["name"]) == (pid, "batch", 5, "nightly")
    first = llsh.json("run", pid, "hello", "--max-tokens", "4")
    second = llsh.json("run", pid, "again", "--max-tokens", "4")
    assert first["pid"] == second["pid"] == int(pid)
    assert second["context"] > first["context"]
    llsh("kill", pid)
    llsh("wait", pid)
    assert llsh.json("ps", "-a") == []


def test_wait_gives_up_after_its_timeout(llsh, pid):
    llsh("wait", str(pid), "--timeout", "0.05")
    assert llsh.code == 1


def test_top_prints_one_screen_without_a_terminal(llsh, pid):
    assert llsh("top", "--once", tty=True).splitlines()[0].startswith("llmasos ")
    out = llsh("top")
    assert "1 process," in out
    assert "null  ready" in out
    assert f"{pid}" in out
    assert set(llsh.json("top")) == {"devices", "processes"}


def test_models_are_listed_shown_copied_and_removed(llsh):
    assert llsh("list").splitlines()[0].split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert {entry["path"] for entry in llsh.json("list")} >= {
        "/models/plain:latest",
        "/models/slow:latest",
        "/models/tiny:latest",
    }
    shown = llsh("show", "tiny")
    assert "135M" in shown
    assert "apache-2.0" in shown
    assert "tokenizer.json" in shown
    assert set(llsh.json("show", "tiny")) == {"model", "files", "resident"}
    assert "<|im_start|>" in llsh("show", "tiny", "--template")
    assert set(llsh.json("cp", "tiny", "mine:old")) == FILE
    assert "mine:old" in llsh("list")
    llsh("cp", "tiny", "mine:old")
    assert llsh.code == 0  # it is that already
    llsh("cp", "plain", "mine:old")
    assert (llsh.code, llsh.err) == (1, "llsh: there is a model mine:old\nhint: --force replaces it\n")
    assert (
        llsh.json("cp", "plain", "mine:old", "--force")["digest"]
        == llsh.json("show", "plain")["model"]["digest"]
    )
    assert llsh.json("rm", "mine:old") == ["mine:old"]
    assert "mine" not in llsh("list")
    llsh("rm", "mine:old", "nosuch")
    assert llsh.code == 1
    assert llsh.err.count("llsh: ") == 2


def test_pull_streams_lines_with_json_and_says_the_name_without(llsh, tmp_path):
    llsh("pull", "nosuch")
    assert llsh.code == 1
    assert llsh.err.startswith("llsh: ")
    llsh("pull", "mine", str(tmp_path))
    assert llsh.code == 1  # an empty folder is no model
    assert llsh.out == ""


def test_files(llsh):
    assert {"models/", "proc/"} <= set(llsh("ls").split())
    assert all(set(entry) == FILE for entry in llsh.json("ls", "/models/tiny:latest"))
    assert json.loads(llsh("cat", "/models/tiny:latest/config.json"))["model_type"] == "null"
    document = llsh.json("cat", "models/tiny:latest/config.json")
    assert set(document) == {"path", "text"}
    llsh("cat", "/models/nosuch/config.json")
    assert llsh.code == 1
    assert {"home", "pools"} <= set(llsh.json("df"))
    assert "DISK FREE" in llsh("df")


def test_machine(llsh):
    assert [device["name"] for device in llsh.json("lsdev")] == ["null"]
    assert "null" in llsh("lsdev")
    llsh("run", "tiny", "hello", "--max-tokens", "1")
    [pool] = [one for one in llsh.json("lsdev")[0]["pools"] if one["model"] == "tiny:latest"]
    assert (pool["kv_dtype"], pool["engine"]) == ("float32", "hashes of the history")
    for shown in (llsh("lsdev"), llsh("show", "tiny"), llsh("dmesg")):
        assert "hashes of the history" in shown
    [resident] = llsh.json("show", "tiny")["resident"]
    assert resident == {"device": "null", "pool": pool}
    known = {family["name"] for family in llsh.json("stats")["families"]}
    assert {"requests", "first_token_seconds", "kv_blocks", "tenant_generated_tokens"} <= known
    shown = llsh("stats").splitlines()
    assert shown[0].split()[:5] == ["MODEL", "CLASS", "RUN", "WAIT", "DONE"]
    assert any(line.startswith("tiny:latest") and " ms" in line for line in shown)
    assert set(llsh.json("whoami")) == {"subject", "uid", "pid", "admin"}
    assert llsh("whoami").split()[0] == llsh.json("whoami")["subject"]
    lines = llsh("dmesg", "--json").splitlines()
    assert all({"seq", "time", "level", "text"} == set(json.loads(line)) for line in lines)
    assert "llmasosd boots" in llsh("dmesg")
    assert llsh("dmesg", "-l", "err") == ""
    assert "llmasosd boots" in llsh("dmesg", "-l", "warn,info")
    first = llsh("dmesg", "-T").splitlines()[0]
    stamp = time.mktime(time.strptime(first[1 : first.index("]")], "%a %b %d %H:%M:%S %Y"))
    assert abs(time.time() - stamp) < 600
    llsh("dmesg", "-l", "loud")
    assert llsh.code == 2


def test_the_flight_recorder_is_shown(llsh):
    llsh("run", "tiny", "w1 w2", "--max-tokens", "3")
    last = llsh("flight").splitlines()
    assert last[0].split()[:4] == ["TIME", "DEVICE", "TICKET", "QUEUE"]
    assert "done" in last[-1]
    decisions = [json.loads(line) for line in llsh("flight", "--json").splitlines()]
    assert decisions[-1]["outcome"] == "done"
    assert decisions[-1]["work"]


def test_jobs_of_one_command_are_none(llsh):
    assert llsh.json("jobs") == []
    llsh("fg")
    assert llsh.code == 2
    llsh("wait")
    assert llsh.code == 0


def test_run_answers_and_json_holds_the_account(llsh):
    document = llsh.json("run", "tiny", "hello", "there", "--max-tokens", "6")
    assert document["generated_tokens"] == 6
    assert document["finish"] == "length"
    assert document["model"] == "tiny:latest"
    assert document["text"] == llsh("run", "tiny", "hello there", "--max-tokens", "6").rstrip("\n")
    assert llsh.err == ""
    assert llsh.json("ps", "-a") == []


def test_an_answer_ends_when_its_time_is_up(llsh):
    assert llsh.json("run", "tiny", "hello", "--max-time", "0.001")["finish"] == "deadline"
    assert llsh.json("run", "tiny", "hello", "--max-time", "60", "--max-tokens", "1")["finish"] == "length"


def test_run_joins_prompt_and_stdin(llsh):
    def asked(*words: str, stdin: str = "") -> int:
        return llsh.json("run", "tiny", *words, "--max-tokens", "1", stdin=stdin)["prompt_tokens"]

    assert asked("w1 w2 w3") == asked("w1", stdin="w2 w3\n") == asked(stdin="w1 w2 w3")
    assert asked("w1 w2 w3") == asked("w1", "w2", "w3")


def test_run_uses_the_template_unless_raw_or_without_one(llsh):
    def tokens(model: str, *options: str) -> int:
        return llsh.json("run", model, "w1 w2", "--max-tokens", "1", *options)["prompt_tokens"]

    assert tokens("tiny") == 7
    assert tokens("tiny", "--raw") == 2
    assert tokens("plain") == 2


def test_a_seed_repeats_an_answer(llsh):
    def answer(*options: str) -> str:
        return llsh("run", "tiny", "hello", "--max-tokens", "8", *options)

    assert answer("--seed", "1") == answer("--seed", "1") != answer("--seed", "2")
    assert answer("--temperature", "0") == answer()


def test_an_answer_is_never_longer_than_the_context(llsh):
    document = llsh.json("run", "tiny", "hello", "--max-tokens", "100000")
    assert document["context"] == 512


def test_verbose_tells_the_timings_on_stderr(llsh):
    llsh("run", "tiny", "hello", "--max-tokens", "4", "--verbose")
    assert "tokens/s" in llsh.err
    assert "first token" in llsh.err
    assert "tokens/s" not in llsh.out


def test_a_killed_answer_is_a_failure(llsh, client):
    from threading import Thread

    def killer() -> None:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if rows := [row for row in client.ps() if row.generated > 2]:
                client.kill(rows[0].pid)
                return
            time.sleep(0.02)

    thread = Thread(target=killer)
    thread.start()
    llsh("run", "slow", "hello", "--max-tokens", "400")
    thread.join()
    assert llsh.code == 1
    assert llsh.out.split()
    assert "was killed" in llsh.err


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "tiny"],
        ["run", "tiny", "hi", "--nonsense"],
        ["run", "tiny", "hi", "--temperature", "hot"],
        ["run", "tiny", "hi", "--nice", "99"],
        ["run", "tiny", "hi", "--class", "noble"],
        ["kill"],
        ["kill", "abc"],
        ["kill", "-HUP", "1"],
        ["kill", "%3"],
        ["fork", "1", "-n", "0"],
        ["help", "nosuch"],
        ["nosuch"],
    ],
)
def test_wrong_usage_is_2_with_a_message_and_a_hint(llsh, words):
    llsh(*words)
    assert llsh.code == 2
    assert llsh.out == ""
    first, *rest = llsh.err.splitlines()
    assert first.startswith("llsh: ")
    assert rest[0].startswith("hint: ")


@pytest.mark.parametrize(
    ("typo", "meant"), [("pz", "ps"), ("klil", "kill"), ("lst", "list"), ("chta", "chat")]
)
def test_near_misses_are_recognised(llsh, typo, meant):
    llsh(typo)
    assert f"did you mean {meant}" in llsh.err or f" {meant}" in llsh.err.split("did you mean")[1]


def test_help_teaches_every_command_with_examples(llsh, capsys):
    everything = llsh("help")
    assert {name for names in guide.SECTIONS.values() for name in names} == set(command_tree())
    for name in command_tree():
        assert f"\n  {name} " in everything
        text = llsh("help", name)
        assert llsh.code == 0
        assert "Examples:" in text
        llsh(name, "--help")
        assert capsys.readouterr().out == text


@pytest.mark.parametrize("words", [["key"], ["key", "api"], ["audit"]])
def test_a_group_alone_teaches_and_is_wrong_usage(llsh, words):
    llsh(*words)
    assert (llsh.code, llsh.out) == (2, "")
    assert llsh.err == llsh("help", *words)
    llsh(*words, "nosuch")
    assert llsh.code == 2
    assert f"`llsh help {' '.join(words)}` explains" in llsh.err
    llsh("help", *words, "nosuch")
    assert (llsh.code, "no command" in llsh.err) == (2, True)


def test_lines_of_commands(llsh, pid):
    out = llsh("-c", "whoami; nosuch && whoami; # a comment\nps --json")
    assert llsh.code == 0
    assert len(out.splitlines()) == 2
    assert json.loads(out.splitlines()[1])[0]["pid"] == pid
    llsh("-c", "whoami; nosuch")
    assert llsh.code == 2
    llsh("-c", "run 'tiny")
    assert llsh.code == 2
    assert "no closing '" in llsh.err


def test_a_line_can_come_from_stdin(llsh):
    assert llsh(stdin="whoami\nwhoami\n").count("\n") == 2


def test_jobs_run_beside_and_are_waited_for(llsh):
    line = "run tiny hello --max-tokens 3 & run tiny hello --max-tokens 3 & jobs --json; wait; jobs --json"
    out = llsh("-c", line)
    assert llsh.code == 0, llsh.err
    jobs, *answers, left = out.splitlines()
    assert [job["job"] for job in json.loads(jobs)] == [1, 2]
    assert answers[0] == answers[1]
    assert left == "[]"
    llsh("-c", "run nosuch hello & wait && whoami")
    assert llsh.code == 1


def test_a_bug_is_two_lines_and_a_file(llsh, monkeypatch, client):
    def broken(self, *args, **kwargs):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(type(client), "ps", broken)
    llsh("ps")
    assert llsh.code == 1
    assert llsh.err.startswith("llsh: ZeroDivisionError: oh\nhint: this is a bug")
    assert "Traceback" not in llsh.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["run", "tiny", "x", "--seed", str(2**63)],
            "seed: must be a whole number from 0 to 9223372036854775807",
        ),
        (
            ["run", "tiny", "x", "--max-time", "inf"],
            "max_time: must be seconds, above 0 and below 2147483 (24 days)",
        ),
        (["nice", "1", "88"], "setpriority: nice must be a whole number from -20 to 19"),
        (["wait", "1", "--timeout", "inf"], "wait: timeout_s must be a number from 0 to 31536000"),
        (["kill", str(2**64)], "kill: a number does not fit into 64 bits"),
        (
            ["spawn", "tiny", "--name", "x" * 300],
            "spawn_model: label is wrong: expected `str` of length <= 64",
        ),
    ],
)
def test_what_is_out_of_range_is_told_with_the_range(llsh, words, says):
    llsh(*words)
    assert (llsh.code, llsh.out, llsh.err) == (1, "", f"llsh: {says}\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "tiny", "x", "--max-tokens", "0"], "--max-tokens: must be a whole number, at least 1"),
        (["run", "tiny", "x", "--temperature", "hot"], "--temperature: must be a number from 0 to 100"),
        (["run", "tiny", "x", "--top-p", "2"], "--top-p: must be a number from 0.0001 to 1"),
        (["run", "tiny", "--nice", "20"], "--nice: must be a whole number from -20 to 19"),
        (["chat", "tiny", "--class", "top"], "--class: must be one of realtime, interactive, batch, idle"),
        (["fork", "1", "-n", "0"], "--count: must be a whole number from 1 to 256"),
        (["run", "tiny", "--schema", "/no"], "Invalid value for '--schema': path '/no' does not exist."),
    ],
)
def test_options_are_told_as_other_ranges_are(llsh, words, says):
    llsh(*words)
    assert (llsh.code, llsh.out) == (2, "")
    told, hint = llsh.err.splitlines()
    assert told == f"llsh: {says}"
    assert f"`llsh help {words[0]}` explains" in hint


def test_a_chat_refuses_at_once_what_the_next_turn_could_not_use(llsh):
    wrong = {
        "seed -1": "seed: must be a whole number from 0 to 9223372036854775807",
        "max_tokens 0": "max_tokens: must be a whole number, at least 1",
        "temperature hot": "temperature: must be a number from 0 to 100",
        "top_p 0": "top_p: must be a number, above 0 and at most 1",
        "class top": "class: must be one of realtime, interactive, batch, idle",
        "verbose so": "verbose: must be true or false",
    }
    typed = "".join(f"/set {words}\n" for words in wrong)
    out = llsh("chat", "tiny", "--max-tokens", "2", stdin=f"{typed}w1\n")
    assert (llsh.code, len(out.split())) == (0, 2)
    assert llsh.err.splitlines() == [f"llsh: {told}" for told in wrong.values()]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit", "show", "/etc"], "/etc: Is a directory"),
        (["audit", "verify", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["run", "tiny", "hi", "--schema", "/etc"], "/etc: Is a directory"),
        (["run", "tiny", "hi", "--schema", "{binary}"], "{binary} is not text in UTF-8"),
        (["key", "authorize", "{binary}", "--as", "bob"], "{binary} is not text in UTF-8"),
        (["key", "new"], "/proc/nowhere: No such file or directory"),
        (["key", "api", "new", "ci", "--as", "bob"], "/proc/nowhere: No such file or directory"),
    ],
)
def test_what_files_refuse_is_no_bug(llsh, tmp_path, monkeypatch, words, says):
    (binary := tmp_path / "binary").write_bytes(b"\xff\x00")
    monkeypatch.setenv("LLMASOS_HOME", "/proc/nowhere")
    llsh(*[word.format(binary=binary) for word in words])
    assert (llsh.code, llsh.out) == (1, "")
    assert llsh.err.splitlines()[0] == "llsh: " + says.format(binary=binary)
    assert "bug" not in llsh.err
    assert ("LLMASOS_HOME" in llsh.err) == ("/proc/" in says)


@pytest.mark.parametrize(
    ("words", "rights"),
    [
        ([], ["see", "infer", "process"]),
        (["--right", "train", "--right", "see"], ["see", "infer", "process", "train"]),
        (["--only", "--right", "audit"], ["audit"]),
    ],
)
def test_a_right_of_a_key_adds_to_the_usual_ones(llsh, tmp_path, monkeypatch, words, rights):
    monkeypatch.setenv("LLMASOS_HOME", str(tmp_path))
    llsh("key", "api", "new", "lab", "--as", "bob", *words)
    assert llsh.json("key", "api", "list")[0]["rights"] == rights


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--right", "admin"], "'admin' is not one of see, infer, process, train"),
        (["--right", "connect"], "'connect' is not one of"),
        (["--only"], "--only needs a --right"),
    ],
)
def test_a_right_that_no_key_has_is_wrong_usage(llsh, words, told):
    llsh("key", "api", "new", "lab", "--as", "bob", *words)
    assert llsh.code == 2
    assert told in llsh.err


def test_quotas_are_set_shown_and_taken_away(llsh):
    assert llsh("quota", "somebody", "weight=3", "processes=2").splitlines()[-1].split()[:2] == [
        "somebody",
        "3",
    ]
    (row,) = llsh.json("quota", "somebody", "weight=", "tokens_out=600")
    assert (row["limit"]["weight"], row["limit"]["processes"], row["tokens_out"]) == (1.0, 2, 600)
    for words, told in (
        ("speed=3", "one of weight, kv_min,"),
        ("weigth=3", "did you mean weight?"),
        ("weight=-1", "weight must be a number from 0.001 to 1000"),
    ):
        llsh("quota", "somebody", words)
        assert llsh.code == 1
        assert told in llsh.err
    assert llsh.json("quota", "somebody", "none") == []
    llsh("quota", "somebody", "queue=3")
    assert llsh.json("quota", "somebody", "queue=") == [], "the last limit was taken away"
