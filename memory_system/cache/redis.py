"""The connection to Redis (or Valkey). Every call is short, and a failure is an answer, never an exception."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

from memory_system.breaker import CircuitBreaker
from memory_system.errors import ConfigError
from memory_system.log import get_logger
from memory_system.settings import RedisSettings

if TYPE_CHECKING:
    from redis.asyncio import Redis

State = Literal["off", "ready", "unavailable"]
T = TypeVar("T")

POOL_CONNECTIONS: Final = 8

_log = get_logger("cache.redis")


class RedisConnection:
    """A pool of connections behind one timeout and one circuit breaker.

    Each call takes at most `timeout_ms`, connecting included, and returns None when it failed or was not tried. After
    `failure_threshold` failures in a row calls are not tried for `reset_timeout_s`. A connection whose call did not
    complete is closed: its late reply would answer the next call. `clock` gives monotonic seconds.

    Raises ConfigError at construction when the URL cannot be used. Nothing is connected before the first call.
    """

    def __init__(self, settings: RedisSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = settings.timeout_ms / 1000.0
        self._clock = clock
        self._breaker = CircuitBreaker(settings.failure_threshold, settings.reset_timeout_s)
        self._off = not settings.url
        self._client: Redis | None = None
        self._address = ""
        if settings.url:
            self._client, self._address = _make_client(settings.url, self._timeout_s)
        self._listeners: list[Callable[[State], None]] = []
        self._up: bool | None = None  # None: not asked yet
        self.failures = 0

    @property
    def state(self) -> State:
        """off: no URL; ready: it answered and has not gone away since; unavailable: anything else."""
        if self._off:
            return "off"
        return "ready" if self._up else "unavailable"

    @property
    def breaker(self) -> str:
        """closed: calls are made; open: they are not; half_open: one is, to see."""
        return self._breaker.state

    def on_state(self, callback: Callable[[State], None]) -> None:
        """Call `callback(state)` when the server goes away and when it answers again. It must not raise."""
        self._listeners.append(callback)

    async def ping(self) -> bool:
        """Ask whether the server answers; this is what brings the state back to ready."""
        return await self._call(lambda client: client.ping()) is not None

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """Return the value of each key, None where there is none; None altogether if Redis did not answer."""
        values = await self._call(lambda client: client.mget(keys))
        return None if values is None else [value if isinstance(value, bytes) else None for value in values]

    async def set_many(self, values: Mapping[str, tuple[bytes, int]]) -> bool:
        """Store {key: (value, time to live in ms)}; True if all were stored."""

        async def send(client: Redis) -> Any:
            async with client.pipeline(transaction=False) as pipeline:
                for key, (value, ttl_ms) in values.items():
                    pipeline.set(key, value, px=ttl_ms)
                return await pipeline.execute()

        return await self._call(send) is not None

    async def delete_many(self, keys: Sequence[str]) -> bool:
        """Delete the keys; True if the server confirmed it."""
        return await self._call(lambda client: client.delete(*keys)) is not None

    async def close(self) -> None:
        """Close all connections, within twice the timeout; further calls fail at once. May be called twice."""
        client, self._client = self._client, None
        self._up = False
        if client is None:
            return
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                await client.aclose()
        except Exception as error:  # noqa: BLE001 - a peer that is gone or frozen must not spoil the shutdown
            _log.debug("redis_close_failed", address=self._address, error=type(error).__name__)

    async def _call(self, command: Callable[[Redis], Awaitable[T]]) -> T | None:
        client = self._client
        if client is None or not self._breaker.allow(self._clock()):
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await command(client)
        except asyncio.CancelledError:
            self._breaker.abandon()
            raise
        except Exception as error:  # noqa: BLE001 - a reply out of order can raise anything; for a cache it is a miss
            self._failed(error)
            return None
        self._succeeded()
        return result

    def _succeeded(self) -> None:
        self._breaker.success(self._clock())
        if not self._up and self._client is not None:
            self._up = True
            _log.info("redis_ready", address=self._address)
            self._tell("ready")

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._breaker.failure(self._clock())
        if self._up is None or (self._up and self._breaker.state != "closed"):
            self._up = False
            # The type alone: old servers quote a refused login, password and all, in the error's text.
            reason = "searches are slower until it answers again"
            _log.warning("redis_unavailable", reason=reason, address=self._address, error=type(error).__name__)
            self._tell("unavailable")

    def _tell(self, state: State) -> None:
        for callback in self._listeners:
            callback(state)

    def __repr__(self) -> str:
        return f"<RedisConnection {self._address} {self.state}>"


def _make_client(url: str, timeout_s: float) -> tuple[Redis, str]:
    """Return a client that has not connected yet, and the URL's address for logs."""
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.connection import parse_url
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise ConfigError("redis.url is set but the package redis is not installed") from error
    fixed: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "decode_responses": False,
        # RESP2 without a client name: no round trips at connecting but the login.
        "protocol": 2,
        "driver_info": None,
        "max_connections": POOL_CONNECTIONS,
        "timeout": None,  # for a free connection; the call's own timeout covers it
    }
    try:
        address = _address(url)
        pool = BlockingConnectionPool(**{**parse_url(url), **fixed})
        # Connects nothing, but refuses options that it does not know.
        pool.connection_class(**pool.connection_kwargs)
    except (ValueError, TypeError):
        # Not chained: what is wrong with the URL may be its password, and the error would quote it.
        raise ConfigError("redis.url is not a redis://, rediss:// or unix:// URL that can be used") from None
    return Redis.from_pool(pool), address


def _address(url: str) -> str:
    """The URL without user, password and options."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
