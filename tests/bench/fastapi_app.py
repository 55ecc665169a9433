"""The measured routes in FastAPI, SQLAlchemy 2 and asyncpg, for comparison in the benchmark.

They are written in the usual way for these libraries, and much like the system that this service
has replaced. The program creates its tables when it starts:

    uvicorn fastapi_app:app --loop uvloop --http httptools --no-access-log --workers 1
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import DateTime, Index, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# ── Tables ────────────────────────────────────────────────────────────────────────────────────────


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012


class Incident(Base):
    """An incident."""

    __tablename__ = "incidents"
    __table_args__ = (Index("incidents_status_created_at_idx", "status", "created_at", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    description: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="open")
    source: Mapped[str]
    version: Mapped[int] = mapped_column(server_default="1")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class TimelineEntry(Base):
    """One thing that happened to an incident."""

    __tablename__ = "timeline"

    id: Mapped[int] = mapped_column(primary_key=True)
    incident_id: Mapped[int] = mapped_column(index=True)
    kind: Mapped[str]
    from_value: Mapped[str | None]
    to_value: Mapped[str | None]
    actor: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


# ── Schemas ───────────────────────────────────────────────────────────────────────────────────────

Status = Literal["open", "in_progress", "resolved", "closed"]
Source = Literal["operator", "monitoring", "partner"]


def check_text(text: str) -> str:
    """Refuse blank texts, and NUL characters, which PostgreSQL cannot store."""
    if "\x00" in text or not text.strip():
        raise ValueError("write some text, without NUL characters")
    return text


class NewIncident(BaseModel):
    """An incident to report."""

    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(min_length=1, max_length=5000), AfterValidator(check_text)]
    source: Source


class StatusChange(BaseModel):
    """The new status."""

    model_config = ConfigDict(extra="forbid")

    status: Status


class ListQuery(BaseModel):
    """Which incidents to list."""

    model_config = ConfigDict(extra="forbid")

    status: Status | None = None
    limit: Annotated[int | None, Field(ge=1, le=1000)] = None


class IncidentOut(BaseModel):
    """An incident, as it is sent to clients."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    description: str
    status: Status
    source: Source
    created_at: datetime
    updated_at: datetime
    version: int


# ── Application ───────────────────────────────────────────────────────────────────────────────────

engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=10, max_overflow=0)
new_session = async_sessionmaker(engine, expire_on_commit=False)


async def open_session() -> AsyncIterator[AsyncSession]:
    """Open a database session for one request."""
    async with new_session() as session:
        yield session


Session = Annotated[AsyncSession, Depends(open_session)]
IncidentId = Annotated[int, Path(ge=0, le=2**31 - 1)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Create the tables at the start, and close the pool at the end."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/incidents/", status_code=201, response_model=IncidentOut)
async def create_incident(new: NewIncident, session: Session) -> Incident:
    incident = Incident(description=new.description, source=new.source)
    session.add(incident)
    await session.flush()
    session.add(TimelineEntry(incident_id=incident.id, kind="created", actor="anonymous"))
    await session.commit()
    return incident


@app.get("/incidents/", response_model=list[IncidentOut])
async def list_incidents(
    query: Annotated[ListQuery, Query()], session: Session
) -> Sequence[Incident]:
    statement = select(Incident).order_by(Incident.created_at.desc(), Incident.id.desc())
    if query.status:
        statement = statement.where(Incident.status == query.status)
    if query.limit:
        statement = statement.limit(query.limit)
    return (await session.scalars(statement)).all()


@app.get("/incidents/{incident_id}", response_model=IncidentOut)
async def get_incident(incident_id: IncidentId, session: Session) -> Incident:
    incident = await session.get(Incident, incident_id)
    if incident is None:
        raise HTTPException(404, "There is no such incident")
    return incident


@app.patch("/incidents/{incident_id}/status", response_model=IncidentOut)
async def change_status(
    incident_id: IncidentId, change: StatusChange, session: Session
) -> Incident:
    incident = await session.get(Incident, incident_id, with_for_update=True)
    if incident is None:
        raise HTTPException(404, "There is no such incident")
    if incident.status != change.status:
        entry = TimelineEntry(incident_id=incident.id, kind="status", actor="anonymous")
        entry.from_value, entry.to_value = incident.status, change.status
        session.add(entry)
        incident.status = change.status
        incident.version += 1
        incident.updated_at = datetime.now(UTC)
        await session.commit()
    return incident


@app.get("/health/live")
async def check_liveness() -> dict[str, str]:
    return {"status": "ok"}
