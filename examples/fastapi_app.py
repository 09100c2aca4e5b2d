"""A shop that sells music: an order and its generation are stored in one transaction.

    pip install '.[web]'
    uvicorn examples.fastapi_app:app
    dgx-music worker
    curl -s localhost:8000/orders -H 'X-Key: key-of-ada' -H 'Content-Type: application/json' \
        -d '{"title": "For the rain", "prompt": "lofi rain, vinyl crackle"}'

The shop has a table of its own beside those of the queue, in the same database. It also mounts the
API and the page of the queue under ``/music``, where each customer sees their own generations only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.security import APIKeyHeader
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dgx_music import InvalidRequestError, QueueFullError, enqueue, get_generation, get_session
from dgx_music.storage import get_database
from dgx_music.web import Access, music_lifespan, music_router

CUSTOMERS = {"key-of-ada": "ada", "key-of-bob": "bob", "key-of-the-shop": "shop"}
"""Who has which key; an application has its own log-in in this place."""


class Base(DeclarativeBase):
    """The base of the shop's own tables."""


class Order(Base):
    """What a customer ordered, and the generation that is made for it."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    title: Mapped[str]
    generation_id: Mapped[str]


def customer_of(key: Annotated[str, Depends(APIKeyHeader(name="X-Key"))]) -> str:
    """Return who asks; refuse an unknown key."""
    if key not in CUSTOMERS:
        raise HTTPException(401, "The key is unknown.")
    return CUSTOMERS[key]


Customer = Annotated[str, Depends(customer_of)]
Text = Annotated[str, Body()]


def authorize(customer: Customer) -> Access:
    """Let the shop see and do everything, and each customer see and enqueue their own music."""
    return Access("operate") if customer == "shop" else Access("enqueue", tenant=customer)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the database with the tables of the queue, and add those of the shop."""
    async with music_lifespan(app):
        async with get_database().engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield


app = FastAPI(title="A shop that sells music", lifespan=lifespan)
app.include_router(music_router(authorize), prefix="/music")


@app.post("/orders", status_code=201)
async def place_order(title: Text, prompt: Text, customer: Customer) -> dict[str, Any]:
    """Store the order and enqueue its music: both, or neither if anything fails."""
    try:
        async with get_session() as session:
            music = await enqueue(prompt, title=title, tenant=customer, session=session)
            order = Order(customer=customer, title=title, generation_id=music.id)
            session.add(order)
    except InvalidRequestError as error:
        raise HTTPException(422, str(error)) from None
    except QueueFullError as error:
        raise HTTPException(429, str(error), {"Retry-After": "60"}) from None
    return {"id": order.id, "music": f"/music/v1/generations/{music.id}"}


@app.get("/orders/{order_id}")
async def get_order(order_id: int, customer: Customer) -> dict[str, Any]:
    """Return an order of the customer, and how far its music is."""
    async with get_session(read_only=True) as session:
        order = await session.get(Order, order_id)
        if order is None or order.customer != customer:
            raise HTTPException(404, "There is no such order.")
        music = await get_generation(session, order.generation_id)
    return {"title": order.title, "status": music.status if music else "deleted"}
