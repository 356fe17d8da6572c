"""The storage of a study: Optuna's tables in SQLite or PostgreSQL, and a lock, so that nothing runs twice.

Whatever changes the queue (filling it, taking a trial, giving one back, taking one from a dead worker) happens under
one lock of the study, which the operating system or the database gives up by itself when its holder dies. Without it,
two workers that start together both find an empty queue and fill it, and in SQLite both may take the same trial:
Optuna reads a trial's state and sets it in two steps, and SQLite has no row locks.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam_optim.core import files
from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import PATIENCE

ENVIRONMENT = "SAM_OPTIM_STUDY_STORAGE"  # a URL with a password does not belong on a command line


def url_of(given: str | None, out: Path) -> str:
    """The storage URL: what was given, else the environment's, else SQLite under `out`; PostgreSQL by psycopg 3."""
    url = given or os.environ.get(ENVIRONMENT) or f"sqlite:///{(out / 'study.db').absolute()}"
    if "://" not in url:
        raise InputError(f"--storage {url!r} is not a URL; give sqlite:///FILE or postgresql://USER@HOST/DATABASE")
    scheme, rest = url.split("://", 1)
    if not url.isascii() and any("\ud800" <= c <= "\udfff" for c in url):
        raise InputError(f"--storage {url!r} has bytes that are not UTF-8, which no database takes; choose another")
    if scheme in ("postgres", "postgresql"):
        return f"postgresql+psycopg://{rest}"
    if scheme not in ("sqlite", "postgresql+psycopg"):
        raise InputError(f"--storage is of kind {scheme!r}; it must be sqlite or postgresql")
    return url


def shown(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna calls its heartbeat experimental at every use, and means `ask` to be for studies without one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="optuna")
        warnings.filterwarnings("ignore", message=".*experimental.*")
        warnings.filterwarnings("ignore", message=".*Heartbeat of storage.*")
        yield


def open_storage(url: str, *, heartbeat: int = 60, grace: int | None = None) -> Any:
    """Optuna's storage at `url`, its tables made if they are missing.

    heartbeat: seconds between the signs of life of a worker. grace: without one for so long a worker counts as dead.

    Raises:
        InputError: it cannot be opened, or `grace` is so short that live workers would count as dead.
    """
    grace = 3 * heartbeat if grace is None else grace
    if grace < 2 * heartbeat:
        raise InputError(
            f"--grace {grace} is less than two heartbeats (--heartbeat {heartbeat}), and workers that live would count "
            f"as dead: give --grace {2 * heartbeat} or more, or a shorter --heartbeat"
        )
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
        from sqlalchemy.pool import NullPool
    except ImportError:
        raise InputError("a study needs Optuna: pip install 'sam_optim[study]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if sqlite := url.startswith("sqlite"):
        if not (path := _file(url)):
            raise InputError(f"--storage {url} is in memory, where no worker finds it: give sqlite:///FILE")
        path.parent.mkdir(parents=True, exist_ok=True)
    # no pool: connections live for one statement, so that processes forked by data loaders inherit none
    engine = {"poolclass": NullPool, "connect_args": {"timeout": 60} if sqlite else {}}
    try:
        with quiet(), locked(url, "tables"):
            return optuna.storages.RDBStorage(
                url, engine_kwargs=engine, heartbeat_interval=heartbeat, grace_period=grace
            )
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise InputError(f"--storage {shown(url)} cannot be opened: {_reason(error)}") from None


@contextmanager
def readable(source: Path | str) -> Iterator[None]:
    """Makes an `InputError` of what a database says that is full, locked or damaged."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("sqlalchemy.", "optuna.", "sqlite3", "psycopg")):
            raise
        said = f"{source}: the database cannot be used ({_reason(error)}); mend it, or choose another"
        raise InputError(said) from None


def _reason(error: Exception) -> str:
    """What the database says; SQLAlchemy adds the statement and the address of a page."""
    return one_line(error.__cause__ or error).splitlines()[0][:200]


def has_study(url: str, name: str) -> bool:
    """Whether the storage at `url` has a study of this name; no file is made."""
    if url.startswith("sqlite") and (path := _file(url)) and not path.exists():
        return False
    storage = open_storage(url)
    return any(study.study_name == name for study in storage.get_all_studies())


@contextmanager
def locked(url: str, name: str) -> Iterator[None]:
    """One process at a time for this database and name; free again when the process that has it dies.

    Raises:
        InputError: another process has it for more than two minutes (it may be suspended).
    """
    if url.startswith("postgresql"):
        with _advisory(url, name):
            yield
        return
    path = _file(url)
    if path is None:
        yield  # in memory: no other process can see it
        return
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    with files.locked(path.with_name(f"{path.name}.{digest}"), "--storage", patience=PATIENCE):
        yield


@contextmanager
def _advisory(url: str, name: str) -> Iterator[None]:
    """PostgreSQL's advisory lock, held by a connection of its own: it ends with the connection."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.pool import NullPool

    digest = hashlib.blake2b(f"sam_optim study {name}".encode(), digest_size=8).digest()
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"SET lock_timeout = '{PATIENCE:.0f}s'"))
        try:
            key = int.from_bytes(digest, "big", signed=True)
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        except OperationalError as error:
            raise InputError(f"the study is locked by another worker: {one_line(error)}; is one suspended?") from None
        yield


def _file(url: str) -> Path | None:
    from sqlalchemy.engine import make_url

    database = make_url(url).database
    return None if database in (None, "", ":memory:") else Path(database)
