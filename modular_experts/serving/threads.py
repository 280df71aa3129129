"""Compute in threads beside the one in which the model answers."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class SideThreads:
    """Calls functions that compute with torch one after the other, each in a thread that ends with the call.

    OpenMP keeps workers for every thread that has computed. As soon as there are more of them than cores, they sleep
    between two products instead of waiting awake, and each pass of the model takes longer.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a function's result; a caller that is cancelled waits for the end of one that has begun."""
        async with self._turn:
            thread = ThreadPoolExecutor(1)
            running = asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
            try:
                return await asyncio.shield(running)
            finally:
                await asyncio.wait([running])
                thread.shutdown(wait=False)
