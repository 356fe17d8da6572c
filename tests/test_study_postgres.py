"""A study in a real PostgreSQL: a private server for the test, two workers, one of them killed in the middle."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from sam_optim.core.errors import InputError

pytest.importorskip("optuna", reason="needs Optuna: pip install 'sam_optim[study]'")
pytest.importorskip("psycopg", reason="needs psycopg: pip install 'sam_optim[study]'")

from limits import PATIENCE
from test_study import TINY, claim_all, ended, wait_for, worker

from benchmarks.study import config, storage
from benchmarks.study.queue import Queue

SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
FOUND = shutil.which("pg_ctl") or (str(SERVERS[-1]) if SERVERS else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="no PostgreSQL server here: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def server():
    """The URL of a database in a server of our own, on a socket in its own folder; it refuses to run as root."""
    programs = Path(FOUND).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="study-postgres-"))
    user = {}
    if os.getuid() == 0:
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}

    def call(program, *options):
        subprocess.run(
            [programs / program, *options], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=PATIENCE, **user
        )

    data, log = str(folder / "data"), str(folder / "log")
    call("initdb", "-D", data, "-A", "trust", "-U", "study", "--no-sync")
    call("pg_ctl", "-D", data, "-l", log, "-w", "-o", f"-k {folder} -c listen_addresses='' -c fsync=off", "start")
    try:
        call("createdb", "-h", str(folder), "-U", "study", "study")
        yield f"postgresql://study@/study?host={folder}"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_one_killed_nothing_lost_nothing_twice(server, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY.replace("epochs = 2", "epochs = 12").replace("128", "400"))
    options = ("--storage", server, "--grace", "10")  # beside other work a heartbeat comes late
    survivor, victim = worker(tmp_path, *options), worker(tmp_path, *options)
    result = config.load(tmp_path / "tiny.toml")
    url = storage.url_of(server, tmp_path)
    queue = Queue(result, url, heartbeat=1, grace=10)

    def of(process):
        trials = queue.study.get_trials()
        return [t for t in trials if t.user_attrs.get("worker", {}).get("pid") == process.pid]

    wait_for(lambda: any(t.state.name == "RUNNING" for t in of(victim)) and of(survivor))
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    out, error = ended(survivor)
    assert "finished: 8 of 8 done, 0 running, 0 failed" in out, error
    trials = queue.study.get_trials()
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    assert len({str(t.params) for t in complete}) == len(complete) == 8
    lost = [t for t in trials if t.state.name != "COMPLETE"]
    assert [t.state.name for t in lost] == ["FAIL"]
    assert lost[0].user_attrs["worker"]["pid"] == victim.pid
    records = queue.records()
    assert len(records) == 8
    assert all(r["measures"]["worst"] is not None for r in records)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_that_start_at_the_same_time_run_nothing_twice(server, tmp_path):
    context = multiprocessing.get_context("fork")
    numbers = context.Queue()
    url = storage.url_of(server, tmp_path)
    processes = [context.Process(target=claim_all, args=(url, numbers)) for _ in range(4)]
    for p in processes:
        p.start()
    result = [numbers.get(timeout=PATIENCE) for _ in range(20)]
    for p in processes:
        p.join(PATIENCE)
    assert [p.exitcode for p in processes] == [0] * 4
    assert sorted(result) == [i / 100 for i in range(1, 21)]


def test_a_lock_is_for_one_and_waits(server, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 1)
    url = storage.url_of(server, tmp_path)
    others = storage.locked(url, "a"), storage.locked(url, "b")
    with others[0], others[1], pytest.raises(InputError, match="locked by another worker"), storage.locked(url, "a"):
        pass
    with storage.locked(url, "a"):
        pass


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be opened") as caught:
        storage.open_storage(f"postgresql+psycopg://me:secret@/none?host={tmp_path}")
    assert "secret" not in str(caught.value)
