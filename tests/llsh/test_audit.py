"""`llsh audit` against a real daemon."""

from __future__ import annotations

from llmasos.syscalls import table


def test_the_log_is_shown_and_proved(llsh, client, tmp_path):
    client.call(table.Link("tiny", "second"))
    client.call(table.Unlink("/models/second"))
    assert "unlink" in llsh("audit", "show")
    assert "model='second:latest'" in llsh("audit", "show")
    proof = llsh.json("audit", "verify")
    assert proof["records"] >= 1
    assert proof["head"] in llsh("audit", "verify")
    copy = tmp_path / "copy.log"
    copy.write_bytes(client.read_audit())
    assert llsh("audit", "verify", str(copy))
    copy.write_bytes(client.read_audit().replace(b"unlink", b"unlynk"))
    llsh("audit", "verify", str(copy))
    assert llsh.code == 1
