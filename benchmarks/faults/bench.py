"""What the cases share: a Prefect server, a home to copy, and the run that was left alone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.processes import Home, Process, Server, copied, new_template, prefect_server
from benchmarks.faults.verdict import CONFIG, Reference


@dataclass
class Bench:
    """One bench for any number of cases; nothing that it starts outlives it."""

    folder: Path
    template: Path
    prefect: str
    reference: Reference | None = None
    _homes: list[Home] = field(default_factory=list)
    _servers: list[Process] = field(default_factory=list)

    @property
    def run(self) -> tuple[str, ...]:
        """Arguments of the run that things happen to."""
        file = self.folder / "interrupted.yaml"
        file.write_text(CONFIG, encoding="utf-8")
        return "run", "classify", "--config", str(file)

    def home(self, *, store: str = "", prefect: str | None = None, **variables: str) -> Home:
        """A fresh home; `prefect`: the server it reports to, "" for one of its own."""
        address = self.prefect if prefect is None else prefect
        variables = variables | ({"PREFECT_API_URL": address} if address else {})
        place = self.folder / f"home{len(self._homes)}"
        self._homes.append(copied(self.template, place, store=store, variables=variables))
        return self._homes[-1]

    def place(self, name: str) -> Path:
        """A new folder."""
        path = self.folder / f"{name}{len(self._servers)}"
        path.mkdir()
        return path

    def started(self, server: Any) -> Any:
        """A server or worker, started; it ends with the case at the latest."""
        self._servers.append(server)
        return server.start()

    def left_alone(self) -> Reference:
        """The result of the run without workers that nothing happens to."""
        if self.reference is None:
            home = self.home()
            home.done(*self.run, "--set", "cluster.workers=0")
            self.reference = Reference.of(home)
        return self.reference

    def clear(self) -> None:
        """End what the case has started, and remove its homes."""
        for process in [*(run for home in self._homes for run in home.started), *self._servers]:
            process.kill()
        for home in self._homes:
            shutil.rmtree(home.path, ignore_errors=True)


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """A bench below `folder`."""
    server, address = prefect_server(folder)
    template = new_template(folder / "template")
    server.start()
    made = Bench(folder, template, address)
    try:
        yield made
    finally:
        made.clear()
        server.kill()


__all__ = ["Bench", "Server", "bench"]
