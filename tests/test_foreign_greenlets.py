"""Jobs among greenlets that are not aiojob's: SQLAlchemy's, greenback's, and the user's own."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, TypeAlias

import greenback
import pytest
from greenlet import getcurrent, greenlet
from sqlalchemy import ForeignKey, event, insert, select, text
from sqlalchemy.exc import IntegrityError, MissingGreenlet, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import await_only, greenlet_spawn
from support import PATIENCE

from aiojob import (
    CannotPauseError,
    Job,
    JobError,
    JobStatus,
    await_,
    can_pause,
    get_current_job,
    pause_blocked,
    pause_job,
    run_job,
    start_job,
)

Place: TypeAlias = tuple[bool, bool]
IN_JOB: Place = (True, True)
BLOCKED: Place = (True, False)
OUTSIDE: Place = (False, False)


def place() -> Place:
    """Say whether this is in a job, and whether it can pause."""
    return get_current_job() is not None, can_pause()


async def answer(value: str) -> str:
    """Suspend, and return the value."""
    await asyncio.sleep(0)
    return value


async def fail() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship(order_by="Book.title")


class Book(Base):
    __tablename__ = "book"
    title: Mapped[str] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """A database with the tables, and an engine whose connections live in threads."""
    threads = set(threading.enumerate())
    # SQLite's writers wait for each other in no fair order: on a slow disk, some wait for long.
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
        connect_args={"timeout": PATIENCE},
        pool_timeout=PATIENCE,
    )
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()
    for thread in set(threading.enumerate()) - threads:
        thread.join()  # a connection's thread ends after its close() has returned


def add_author(engine: AsyncEngine, name: str, number: int) -> None:
    with engine.sync_engine.begin() as connection:
        connection.execute(insert(Author).values(id=number, name=name))


def author_names(engine: AsyncEngine) -> list[str]:
    with engine.sync_engine.connect() as connection:
        return list(connection.scalars(select(Author.name).order_by(Author.name)))


def pause_in_every_way(engine: AsyncEngine) -> list[object]:
    """Pause in aiojob's ways and in SQLAlchemy's."""
    pause_job()
    add_author(engine, "Ada", 1)
    return [await_(answer("ours")), await_only(answer("theirs")), author_names(engine), place()]


EVERY_WAY: list[object] = ["ours", "theirs", ["Ada"], IN_JOB]


# -- SQLAlchemy on a fibre


async def test_connection_of_an_async_engine_works_in_a_job(engine: AsyncEngine) -> None:
    await run_job(add_author, engine, "Ada", 1)
    assert await run_job(author_names, engine) == ["Ada"]


async def test_orm_session_in_a_job_flushes_and_loads_lazily(engine: AsyncEngine) -> None:
    def write_and_read() -> tuple[list[str], Place]:
        with Session(engine.sync_engine) as session, session.begin():
            session.add(Author(name="Ada", books=[Book(title="Two"), Book(title="One")]))
        with Session(engine.sync_engine) as session:
            author = session.scalars(select(Author)).one()
            return [book.title for book in author.books], place()

    assert await run_job(write_and_read) == (["One", "Two"], IN_JOB)


async def test_rows_are_fetched_between_pauses_of_the_job(engine: AsyncEngine) -> None:
    def stream() -> list[int]:
        query = text("select value from json_each('[1, 2, 3]')")
        with engine.sync_engine.connect() as connection:
            rows = connection.execution_options(stream_results=True, max_row_buffer=1)
            fetched = []
            for value in rows.execute(query).scalars():
                pause_job()
                await_(answer("between"))
                fetched.append(value)
            return fetched

    assert await run_job(stream) == [1, 2, 3]


async def test_error_of_the_database_can_be_handled_in_the_job(engine: AsyncEngine) -> None:
    def insert_twice() -> list[str]:
        with Session(engine.sync_engine) as session:
            session.add(Author(id=1, name="Ada"))
            session.commit()
            session.add(Author(id=2, name="Grace"))
            with pytest.raises(IntegrityError):
                session.execute(insert(Author).values(id=1, name="again"))
            session.rollback()
            session.add(Author(id=3, name="Barbara"))
            session.commit()
        return author_names(engine)

    assert await run_job(insert_twice) == ["Ada", "Barbara"]


async def test_error_of_the_database_leaves_the_job_with_its_frames(engine: AsyncEngine) -> None:
    await run_job(add_author, engine, "Ada", 1)
    with pytest.raises(IntegrityError) as caught:
        await run_job(add_author, engine, "again", 1)
    assert "add_author" in [entry.name for entry in caught.traceback]
    assert await run_job(author_names, engine) == ["Ada"]


async def test_cancel_in_the_middle_of_a_query_gives_the_connection_back(
    engine: AsyncEngine,
) -> None:
    loop = asyncio.get_running_loop()
    entered, gate = asyncio.Event(), threading.Event()

    def wait_at_gate() -> int:  # in the connection's thread
        loop.call_soon_threadsafe(entered.set)
        gate.wait()
        return 1

    def add_gate(connection: Any, record: object) -> None:
        connection.create_function("gate", 0, wait_at_gate)

    places = []

    def query() -> None:
        with engine.sync_engine.begin() as connection:
            connection.execute(insert(Author).values(name="lost"))
            try:
                connection.execute(text("select gate()"))
            except asyncio.CancelledError:
                places.append(place())
                raise

    await engine.dispose()  # the next connection is a new one, with the gate
    event.listen(engine.sync_engine, "connect", add_gate)
    task = asyncio.create_task(run_job(query))
    try:
        await entered.wait()
        task.cancel()
    finally:
        gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert places == [IN_JOB]
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedout() == 0
    assert await run_job(author_names, engine) == []


async def test_concurrent_jobs_keep_their_own_connections(engine: AsyncEngine) -> None:
    jobs = 5  # the size of the engine's pool
    barrier = asyncio.Barrier(jobs)

    def use_own_table(number: int) -> int:
        with engine.sync_engine.connect() as connection:
            connection.execute(text("create temporary table own (number integer)"))
            await_(barrier.wait())
            connection.execute(text("insert into own values (:number)"), {"number": number})
            await_(barrier.wait())
            found = connection.execute(text("select number from own")).scalar_one()
            assert isinstance(found, int)
            return found

    results = await asyncio.gather(*(run_job(use_own_table, number) for number in range(jobs)))
    assert results == list(range(jobs))


async def test_many_jobs_share_the_connections_of_the_pool(engine: AsyncEngine) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(run_job(add_author, engine, f"{number:02}", number))
    assert await run_job(author_names, engine) == [f"{number:02}" for number in range(40)]


# Without aiojob too: a coroutine inside the awaitable that SQLAlchemy then does not await.
@pytest.mark.filterwarnings("ignore:coroutine 'Connection.cursor' was never awaited")
async def test_blocked_pause_makes_sqlalchemy_raise_and_loses_nothing(engine: AsyncEngine) -> None:
    def block_in_the_middle() -> list[Place]:
        places = []
        with engine.sync_engine.begin() as connection:
            connection.execute(insert(Author).values(name="before"))
            with pause_blocked():
                places.append(place())
                with pytest.raises(StatementError) as caught:
                    connection.execute(insert(Author).values(name="blocked"))
                assert isinstance(caught.value.orig, MissingGreenlet)
            places.append(place())
            connection.execute(insert(Author).values(name="after"))
        return places

    assert await run_job(block_in_the_middle) == [BLOCKED, IN_JOB]
    assert await run_job(author_names, engine) == ["after", "before"]


async def test_block_is_over_for_sqlalchemy_only_with_the_outermost() -> None:
    def nest() -> str:
        with pause_blocked():
            with pause_blocked():
                pass
            with pytest.raises(MissingGreenlet):
                await_only(answer("blocked"))
        return await_only(answer("free"))

    assert await run_job(nest) == "free"


def test_sqlalchemy_raises_in_a_job_driven_by_hand(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    with pytest.raises(MissingGreenlet):
        start_job(None, None, engine.sync_engine.connect)


def test_sqlalchemy_raises_in_a_resumed_job_driven_by_hand() -> None:
    def pause_and_await() -> Place:
        pause_job()
        with pytest.raises(MissingGreenlet):
            await_only(answer("never"))
        return place()

    paused = start_job(None, None, pause_and_await)
    assert paused.job is not None
    assert start_job(paused.job, None).ret == IN_JOB


async def test_fibre_of_a_job_driven_by_hand_serves_sqlalchemy_afterwards() -> None:
    fibre = start_job(None, None, getcurrent).ret

    def use_sqlalchemy() -> tuple[str, bool]:
        return await_only(answer("served")), getcurrent() is fibre

    assert await run_job(use_sqlalchemy) == ("served", True)


async def test_sqlalchemy_raises_in_a_job_that_is_being_closed() -> None:
    places = []

    def clean_up() -> None:
        try:
            await_only(answer("never"))
        finally:
            places.append(place())
            with pytest.raises(MissingGreenlet):
                await_only(answer("late"))

    coroutine = run_job(clean_up)
    coroutine.send(None)
    coroutine.close()
    assert places == [BLOCKED]


async def test_error_of_what_sqlalchemy_awaits_is_raised_in_the_job() -> None:
    def survive() -> str:
        with pytest.raises(ZeroDivisionError):
            await_only(fail())
        return await_only(answer("survived"))

    assert await run_job(survive) == "survived"


# -- SQLAlchemy's greenlets and jobs inside one another


async def test_greenlet_that_an_awaited_sqlalchemy_coroutine_uses_is_not_in_the_job() -> None:
    jobs: list[Job | None] = []

    def in_sqlalchemys_greenlet() -> str:
        before = place()
        pause_job()  # no effect
        with pytest.raises(CannotPauseError):
            await_(answer("never"))
        result = await_only(answer("bridge"))
        assert before == place() == OUTSIDE
        return result

    def job() -> str:
        jobs.append(get_current_job())
        result = await_(greenlet_spawn(in_sqlalchemys_greenlet))
        jobs.append(get_current_job())
        return result

    assert await run_job(job) == "bridge"
    assert jobs[0] is jobs[1] is not None


async def test_async_session_awaited_in_a_job_runs_outside_of_it(engine: AsyncEngine) -> None:
    def add(session: Session) -> Place:
        session.add(Author(name="Ada"))
        session.flush()
        return place()

    async def use_async_session() -> list[Place]:
        async with AsyncSession(engine) as session, session.begin():
            return [place(), await session.run_sync(add)]

    def job() -> tuple[list[Place], list[str], Place]:
        return await_(use_async_session()), author_names(engine), place()

    assert await run_job(job) == ([OUTSIDE, OUTSIDE], ["Ada"], IN_JOB)


async def test_job_under_sqlalchemys_greenlet_pauses_in_every_way(engine: AsyncEngine) -> None:
    async def run_it() -> list[object]:
        return [place(), *await run_job(pause_in_every_way, engine), place()]

    def in_sqlalchemys_greenlet() -> list[object]:
        return [place(), *await_only(run_it()), place()]

    assert await greenlet_spawn(in_sqlalchemys_greenlet) == [
        *(OUTSIDE, OUTSIDE),
        *EVERY_WAY,
        *(OUTSIDE, OUTSIDE),
    ]


async def test_jobs_and_sqlalchemys_greenlets_nest_many_levels_deep() -> None:
    levels = 8
    seen = []

    async def descend(level: int) -> None:
        seen.append((level, "coroutine", place()))
        await asyncio.sleep(0)
        if level == levels:
            return
        if level % 2:
            await greenlet_spawn(below, level, "greenlet", await_only)
        else:
            await run_job(below, level, "job", await_)
        seen.append((level, "coroutine", place()))

    def below(level: int, where: str, wait: Callable[[Awaitable[None]], None]) -> None:
        seen.append((level, where, place()))
        wait(descend(level + 1))
        seen.append((level, where, place()))

    await descend(0)
    assert len(seen) == 4 * levels + 1
    for _, where, found in seen:
        assert found == (IN_JOB if where == "job" else OUTSIDE)


async def test_cancel_reaches_a_job_through_sqlalchemys_greenlet() -> None:
    entered = asyncio.Event()
    unwound = []

    def job() -> None:
        entered.set()
        try:
            await_(asyncio.Event().wait())
        except asyncio.CancelledError:
            unwound.append(("job", await_(answer("cleaned up"))))
            raise

    def in_sqlalchemys_greenlet() -> None:
        try:
            await_only(run_job(job))
        except asyncio.CancelledError:
            unwound.append(("greenlet", await_only(answer("cleaned up"))))
            raise

    task = asyncio.create_task(greenlet_spawn(in_sqlalchemys_greenlet))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unwound == [("job", "cleaned up"), ("greenlet", "cleaned up")]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_sqlalchemys_greenlet_in_an_eager_task_begun_in_a_job_spoils_no_other_job() -> None:
    bridged: list[asyncio.Task[None]] = []

    def wait_twice() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(2):
            future = loop.create_future()
            loop.call_soon(future.set_result, None)
            await_only(future)

    def job() -> None:
        # Its first step runs in the job, whose fibre SQLAlchemy then takes for its driver, for
        # good. That breaks the task, and would without aiojob.
        task: Any = asyncio.Task
        loop = asyncio.get_running_loop()
        bridged.append(task(greenlet_spawn(wait_twice), loop=loop, eager_start=True))

    async def main() -> list[Place]:
        await run_job(job)
        await asyncio.wait(bridged)
        bridged[0].exception()
        return [await run_job(place) for _ in range(2)]

    with ThreadPoolExecutor(1) as thread:  # a pool of jobs of its own, for other tests' sake
        assert thread.submit(asyncio.run, main()).result() == [IN_JOB, IN_JOB]


# -- greenback's greenlets


async def test_sqlalchemy_pauses_a_job_whose_driver_has_a_portal(engine: AsyncEngine) -> None:
    async def main() -> None:
        before = getcurrent()
        await greenback.ensure_portal()
        assert getcurrent() is not before
        assert await run_job(pause_in_every_way, engine) == EVERY_WAY
        assert place() == OUTSIDE

    await asyncio.create_task(main())


async def test_portal_can_be_made_around_a_job(engine: AsyncEngine) -> None:
    async def main() -> list[object]:
        return await run_job(pause_in_every_way, engine)

    assert await greenback.with_portal_run(main) == EVERY_WAY


async def test_job_runs_under_the_await_of_greenback(engine: AsyncEngine) -> None:
    def in_portal() -> tuple[Place, list[object], Place]:
        return place(), greenback.await_(run_job(pause_in_every_way, engine)), place()

    found = await greenback.with_portal_run_sync(in_portal)
    assert found == (OUTSIDE, EVERY_WAY, OUTSIDE)


async def test_driver_that_moves_to_a_portal_in_mid_job_is_followed(engine: AsyncEngine) -> None:
    def job() -> tuple[bool, list[object], bool]:
        before = getcurrent().parent
        give_portal_to_current_task()
        await_(asyncio.sleep(0))  # the portal begins with the task's next step
        after = getcurrent().parent
        return before is not after, pause_in_every_way(engine), getcurrent().parent is after

    assert await asyncio.create_task(run_job(job)) == (True, EVERY_WAY, True)
    assert await run_job(author_names, engine) == ["Ada"]  # the fibre is at home again


def give_portal_to_current_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    greenback.bestow_portal(task)


@pytest.mark.parametrize("pause", [pause_job, lambda: await_(asyncio.sleep(0))])
async def test_driver_that_moves_during_any_pause_is_followed(pause: Callable[[], None]) -> None:
    def job() -> list[object]:
        give_portal_to_current_task()
        pause()
        return [await_(answer("ours")), await_only(answer("theirs")), place()]

    assert await asyncio.create_task(run_job(job)) == ["ours", "theirs", IN_JOB]


async def test_driver_that_moves_while_pausing_is_blocked_does_not_unblock() -> None:
    def job() -> list[Place]:
        give_portal_to_current_task()
        await_(asyncio.sleep(0))
        with pause_blocked():
            found = [place()]
            with pytest.raises(MissingGreenlet):
                await_only(answer("blocked"))
        return [*found, place()]

    assert await asyncio.create_task(run_job(job)) == [BLOCKED, IN_JOB]


async def test_driver_that_moves_while_a_child_greenlet_paused_resumes_the_child() -> None:
    def in_child() -> tuple[str, bool]:
        me = getcurrent()
        give_portal_to_current_task()
        await_(asyncio.sleep(0))
        return await_(answer("moved")), getcurrent() is me

    def job() -> tuple[object, Place]:
        return greenlet(in_child).switch(), place()

    assert await asyncio.create_task(run_job(job)) == (("moved", True), IN_JOB)


async def test_cancel_after_the_driver_moved_reaches_the_job() -> None:
    entered = asyncio.Event()

    def job() -> str:
        give_portal_to_current_task()
        await_(asyncio.sleep(0))
        entered.set()
        with pytest.raises(asyncio.CancelledError):
            await_only(asyncio.Event().wait())
        return await_only(answer("swallowed"))

    task = asyncio.create_task(run_job(job))
    await entered.wait()
    task.cancel()
    assert await task == "swallowed"


async def test_greenback_awaits_inside_a_job() -> None:
    def job() -> list[object]:
        found: list[object] = [greenback.await_(answer("greenback")), place()]
        found += [await_(answer("ours")), await_only(answer("theirs"))]
        return [*found, greenback.await_(answer("again")), place()]

    async def main() -> list[object]:
        return await run_job(job)

    expected = ["greenback", IN_JOB, "ours", "theirs", "again", IN_JOB]
    assert await greenback.with_portal_run(main) == expected


async def test_job_that_greenback_resumes_is_still_the_current_one() -> None:
    entered, others_ran = asyncio.Event(), asyncio.Event()

    async def wait_for_others() -> None:
        entered.set()
        await others_ran.wait()

    def job() -> tuple[bool, Place]:
        before = get_current_job()
        greenback.await_(wait_for_others())
        return get_current_job() is before, place()

    async def main() -> tuple[bool, Place]:
        return await run_job(job)

    task = asyncio.create_task(greenback.with_portal_run(main))
    await entered.wait()
    assert await run_job(await_only, answer("another job")) == "another job"
    others_ran.set()
    assert await task == (True, IN_JOB)


async def test_job_that_greenback_resumes_can_still_block_its_pauses() -> None:
    entered, others_ran = asyncio.Event(), asyncio.Event()

    async def wait_for_others() -> None:
        entered.set()
        await others_ran.wait()

    def job() -> Place:
        greenback.await_(wait_for_others())
        with pause_blocked():
            with pytest.raises(CannotPauseError):
                await_(answer("blocked"))
            return place()

    async def main() -> Place:
        return await run_job(job)

    task = asyncio.create_task(greenback.with_portal_run(main))
    await entered.wait()
    await run_job(await_, answer("another job"))
    others_ran.set()
    assert await task == BLOCKED


async def test_greenlet_of_a_job_that_greenback_resumes_is_still_in_the_job() -> None:
    entered, others_ran = asyncio.Event(), asyncio.Event()

    async def wait_for_others() -> None:
        entered.set()
        await others_ran.wait()

    def in_child() -> tuple[Place, str]:
        greenback.await_(wait_for_others())
        return place(), await_(answer("ours"))

    def job() -> tuple[object, Place]:
        return greenlet(in_child).switch(), place()

    async def main() -> tuple[object, Place]:
        return await run_job(job)

    task = asyncio.create_task(greenback.with_portal_run(main))
    await entered.wait()
    await run_job(await_, answer("another job"))
    others_ran.set()
    assert await task == ((IN_JOB, "ours"), IN_JOB)


async def test_job_run_by_greenback_inside_a_job_is_an_error() -> None:
    def job() -> str:
        with pytest.raises(JobError, match="inside a running job"):
            greenback.await_(run_job(place))  # steps the coroutine in the job itself
        return await_(run_job(await_, answer("nested")))

    async def main() -> str:
        return await run_job(job)

    assert await greenback.with_portal_run(main) == "nested"


# -- greenlets that the user makes inside a job


def pause_by_await() -> None:
    assert await_(answer("awaited")) == "awaited"


@pytest.mark.parametrize("pause", [pause_by_await, pause_job])
async def test_greenlet_that_paused_the_job_is_the_one_resumed(pause: Callable[[], None]) -> None:
    log: list[object] = []

    def in_child() -> None:
        me = getcurrent()
        pause()
        log.append(("child", getcurrent() is me, place()))

    def job() -> None:
        me = getcurrent()
        for _ in range(2):
            greenlet(in_child).switch()
            pause()
            log.append(("job", getcurrent() is me, place()))

    await run_job(job)
    assert log == [("child", True, IN_JOB), ("job", True, IN_JOB)] * 2


@pytest.mark.parametrize("pause", [pause_by_await, pause_job])
async def test_greenlets_inside_a_job_pause_by_turns(pause: Callable[[], None]) -> None:
    log = []

    def in_child(name: str, back: greenlet) -> None:
        for step in range(3):
            pause()
            log.append(f"{name}{step}")
            back.switch()

    def job() -> None:
        children = [greenlet(in_child), greenlet(in_child)]
        for child, name in zip(children, "ab", strict=True):
            child.switch(name, getcurrent())
        for _ in range(3):
            pause()
            log.append("job")
            for child in children:
                child.switch()
        assert all(child.dead for child in children)

    await run_job(job)
    assert log == ["a0", "b0", "job", "a1", "b1", "job", "a2", "b2", "job"]


async def test_greenlet_of_a_greenlet_inside_a_job_pauses() -> None:
    def nest(depth: int) -> str:
        if depth == 0:
            pause_job()
            assert place() == IN_JOB
            return await_(answer("deep"))
        return str(greenlet(nest).switch(depth - 1))

    assert await run_job(nest, 5) == "deep"


async def test_greenlet_inside_a_job_shares_the_block_of_pauses() -> None:
    def in_child() -> list[Place]:
        with pause_blocked():
            found = [place()]
            pause_job()  # no effect
            with pytest.raises(CannotPauseError):
                await_(answer("blocked"))
        return [*found, place()]

    def job() -> object:
        return greenlet(in_child).switch()

    assert await run_job(job) == [BLOCKED, IN_JOB]


async def test_plain_greenlet_inside_a_job_is_no_bridge_for_sqlalchemy() -> None:
    def in_child() -> str:
        with pytest.raises(MissingGreenlet):
            await_only(answer("never"))
        bridged: str = await_(greenlet_spawn(await_only, answer("bridged")))
        return bridged

    def job() -> object:
        return greenlet(in_child).switch()

    assert await run_job(job) == "bridged"


async def test_error_of_an_awaitable_is_raised_in_the_greenlet_that_paused() -> None:
    def in_child() -> str:
        with pytest.raises(ZeroDivisionError):
            await_(fail())
        return await_(answer("survived"))

    def job() -> object:
        return greenlet(in_child).switch()

    assert await run_job(job) == "survived"


async def test_cancel_is_raised_in_the_greenlet_that_paused_and_goes_on_to_the_job() -> None:
    entered = asyncio.Event()
    unwound = []

    def in_child() -> None:
        entered.set()
        try:
            await_(asyncio.Event().wait())
        except asyncio.CancelledError:
            unwound.append(("child", await_(answer("cleaned up"))))
            raise

    def job() -> None:
        try:
            greenlet(in_child).switch()
        except asyncio.CancelledError:
            unwound.append(("job", await_(answer("cleaned up"))))
            raise

    task = asyncio.create_task(run_job(job))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unwound == [("child", "cleaned up"), ("job", "cleaned up")]


async def test_closing_the_coroutine_unwinds_the_greenlet_that_paused_and_the_job() -> None:
    unwound = []

    def in_child() -> None:
        try:
            await_(answer("never"))
        finally:
            unwound.append(("child", place()))

    def job() -> None:
        try:
            greenlet(in_child).switch()
        finally:
            unwound.append(("job", place()))

    coroutine = run_job(job)
    coroutine.send(None)
    coroutine.close()
    assert unwound == [("child", BLOCKED), ("job", BLOCKED)]


def test_greenlet_that_paused_a_job_driven_by_hand_is_the_one_resumed() -> None:
    log = []

    def in_child() -> None:
        for step in range(2):
            pause_job()
            log.append((step, place()))

    def job() -> str:
        greenlet(in_child).switch()
        pause_job()
        return "done"

    result = start_job(None, None, job)
    for steps in range(3):
        assert result.job is not None
        assert result.status is result.job.status is JobStatus.PAUSE
        assert log == [(0, IN_JOB), (1, IN_JOB)][:steps]
        assert place() == OUTSIDE
        result = start_job(result.job, None)
    assert result.ret == "done"


def test_job_dropped_while_its_greenlet_paused_is_unwound() -> None:
    unwound = []

    def in_child() -> None:
        try:
            pause_job()
        finally:
            unwound.append("child")

    def job() -> None:
        try:
            greenlet(in_child).switch()
        finally:
            unwound.append("job")

    result = start_job(None, None, job)
    assert unwound == []
    del result
    assert unwound == ["child", "job"]


async def test_greenlet_of_a_paused_job_switched_to_from_outside_is_not_in_the_job() -> None:
    children = []
    paused, go_on = asyncio.Event(), asyncio.Event()

    def in_child(back: greenlet) -> str:
        inside = place()
        outer = back.switch()
        found = [inside, place()]
        pause_job()  # no effect
        with pytest.raises(CannotPauseError):
            await_(answer("never"))
        with pytest.raises(MissingGreenlet):
            await_only(answer("never"))
        outer.switch(found)
        return await_(answer("back in the job"))

    async def wait_outside() -> None:
        paused.set()
        await go_on.wait()

    def job() -> object:
        child = greenlet(in_child)
        child.switch(getcurrent())
        children.append(child)
        await_(wait_outside())
        return child.switch()

    task = asyncio.create_task(run_job(job))
    await paused.wait()
    assert children[0].switch(getcurrent()) == [IN_JOB, OUTSIDE]
    go_on.set()
    assert await task == "back in the job"


async def test_greenlet_of_a_paused_job_switched_to_from_another_job_is_in_neither() -> None:
    children = []
    paused, go_on = asyncio.Event(), asyncio.Event()

    def in_child(back: greenlet) -> None:
        outer = back.switch()
        outer.switch(place())

    async def wait_outside() -> None:
        paused.set()
        await go_on.wait()

    def job() -> None:
        child = greenlet(in_child)
        child.switch(getcurrent())
        children.append(child)
        await_(wait_outside())
        child.switch()

    def other_job() -> tuple[object, Place]:
        return children[0].switch(getcurrent()), place()

    task = asyncio.create_task(run_job(job))
    await paused.wait()
    assert await run_job(other_job) == (OUTSIDE, IN_JOB)
    go_on.set()
    await task


# -- context variables through all that

var: ContextVar[str] = ContextVar("var", default="unset")


async def set_var(value: str) -> str:
    """Set the variable on the far side of a pause, and return what it was."""
    before = var.get()
    await asyncio.sleep(0)
    var.set(value)
    return before


async def test_contextvars_are_shared_with_what_sqlalchemy_awaits() -> None:
    def job() -> list[str]:
        found = [var.get()]
        var.set("in job")
        found += [await_only(set_var("in coroutine")), var.get()]
        var.set("at the end")
        return found

    var.set("before")
    assert await run_job(job) == ["before", "in job", "in coroutine"]
    assert var.get() == "at the end"


async def test_contextvars_go_through_jobs_and_sqlalchemys_greenlets_both_ways() -> None:
    def in_sqlalchemys_greenlet() -> str:
        found = await_only(run_job(innermost))
        return f"{found} {var.get()}"

    def innermost() -> str:
        found = await_(set_var("innermost"))
        return f"{found} {var.get()}"

    def job() -> str:
        var.set("job")
        return await_(greenlet_spawn(in_sqlalchemys_greenlet))

    assert await run_job(job) == "job innermost innermost"
    assert var.get() == "innermost"


async def test_context_entered_around_a_pause_of_sqlalchemy_stays_entered() -> None:
    def inside() -> list[str]:
        var.set("inside")
        before = await_only(set_var("the task's"))  # awaited in the context of the task
        return [before, var.get()]

    def job() -> list[str]:
        found = copy_context().run(inside)
        return [*found, var.get()]

    var.set("outside")
    assert await run_job(job) == ["outside", "inside", "the task's"]


async def test_contextvars_survive_the_move_of_the_driver_to_a_portal() -> None:
    def job() -> list[str]:
        var.set("job")
        give_portal_to_current_task()
        found = [await_(set_var("first")), var.get()]
        found += [await_only(set_var("second")), var.get()]
        var.set("at the end")
        return found

    async def main() -> tuple[list[str], str]:
        var.set("before")
        return await run_job(job), var.get()

    found, after = await asyncio.create_task(main())
    assert found == ["job", "first", "first", "second"]
    assert after == "at the end"


async def test_contextvars_are_shared_with_what_greenback_awaits_in_a_job() -> None:
    def job() -> list[str]:
        var.set("job")
        found = [greenback.await_(set_var("greenback")), var.get()]
        return [*found, await_(set_var("ours")), var.get()]

    async def main() -> list[str]:
        return await run_job(job)

    found = await greenback.with_portal_run(main)
    assert found == ["job", "greenback", "greenback", "ours"]
    assert var.get() == "ours"


async def test_greenlet_inside_a_job_keeps_its_own_context_over_a_pause() -> None:
    def in_child() -> list[str]:
        var.set("child")
        found = await_(set_var("the task's"))  # awaited in the context of the task
        return [found, var.get()]

    def job() -> tuple[object, str]:
        child = greenlet(in_child)
        child.gr_context = copy_context()
        return child.switch(), var.get()

    var.set("job")
    assert await run_job(job) == (["job", "child"], "the task's")


async def test_greenlet_inside_a_job_can_share_the_context_of_the_job() -> None:
    def in_child() -> list[str]:
        found = await_(set_var("the task's"))
        return [found, var.get()]

    def job() -> object:
        child = greenlet(in_child)
        child.gr_context = getcurrent().gr_context
        return child.switch()

    var.set("job")
    assert await run_job(job) == ["job", "the task's"]
