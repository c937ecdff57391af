"""`python -m benchmarks.workers_in_one ADDRESS NUMBER`: so many Dask workers of one thread each, in one process.

For measuring what the scheduler spends on workers, which does not depend on where they run.
"""

import asyncio
import sys

from distributed import Worker


async def main(address: str, number: int) -> None:
    workers = [Worker(address, nthreads=1, dashboard=False, memory_limit=0) for _ in range(number)]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
