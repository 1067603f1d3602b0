"""SQLAlchemy's plain `Session` on an asynchronous engine, without `AsyncSession`.

In a job, synchronous ORM code runs as it is, lazy loading included, and the event loop goes
on while the database works.

Expected output::

    Ursula wrote The Dispossessed
    Ursula wrote The Lathe of Heaven
    Stanislaw wrote Solaris
"""

from __future__ import annotations

import asyncio

from sqlalchemy import Engine, ForeignKey, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from aiojob import run_job


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship(order_by="Book.title")


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))


def fill(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        titles = "The Dispossessed", "The Lathe of Heaven"
        session.add(Author(id=1, name="Ursula", books=[Book(title=title) for title in titles]))
        session.add(Author(id=2, name="Stanislaw", books=[Book(title="Solaris")]))


def show(engine: Engine) -> None:
    with Session(engine) as session:
        for author in session.scalars(select(Author).order_by(Author.id)):
            for book in author.books:  # loaded here and now, by a query of its own
                print(f"{author.name} wrote {book.title}")


async def main() -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    try:
        await run_job(fill, engine.sync_engine)
        await run_job(show, engine.sync_engine)
    finally:
        await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
