"""The file of figures: a run adds what it lacks, so that one file can grow over several runs."""

import json
from pathlib import Path
from typing import Any

from reporting import taken

from triattention_vllm import __version__

Json = dict[str, Any]
FIRST = ("full", "triattention")


class Results:
    """Rows measured so far, in a JSON file or in memory alone.

    A row's ``run`` is the place of its conditions among ``runs``; rows of one method, budget,
    variant, task and length are there once.
    """

    def __init__(self, path: Path | None, conditions: Json) -> None:
        self._path = path
        self.rows: list[Json] = []
        self._runs: list[Json] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.rows, self._runs = found["results"], found["runs"]
        self._refuse_other_settings(conditions)
        self._run = {"version": __version__, **taken(), **conditions}
        self._num_runs_before = len(self._runs)

    def _refuse_other_settings(self, conditions: Json) -> None:
        """Rows of one table are measured with the same settings but for what their name says."""
        for run in self._runs:
            for name, value in conditions.items():
                if run[name] != value:
                    raise SystemExit(
                        f"{self._path} was measured with {name} {run[name]!r}, and this run has "
                        f"{value!r}; name another file."
                    )

    def has(self, how: Json, task: str, length: int, num_problems: int) -> bool:
        """Whether this was measured before, with as many problems or more. Ends the program where
        it was measured under the same name with other settings."""
        asked = _key({**how, "task": task, "length": length})
        known = [row for row in self.rows if _key(row) == asked]
        for row in known:
            if row["settings"] != how["settings"]:
                raise SystemExit(
                    f"{self._path} has {how['method']} {how['variant']!r} with {row['settings']}, "
                    f"and this run has {how['settings']}; give the variant another name."
                )
        return any(row["num_problems"] >= num_problems for row in known)

    def add(self, rows: list[Json]) -> None:
        """Keep rows, in the place of those with fewer problems, sorted, and write the file."""
        keys = {_key(row) for row in rows}
        self.rows = [row for row in self.rows if _key(row) not in keys]
        if len(self._runs) == self._num_runs_before:
            self._runs.append(self._run)
        self.rows += [{**row, "run": self._num_runs_before} for row in rows]
        names = list(dict.fromkeys((row["method"], row["variant"]) for row in self.rows))
        names.sort(key=lambda name: FIRST.index(name[0]) if name[0] in FIRST else len(FIRST))
        self.rows.sort(
            key=lambda row: (names.index((row["method"], row["variant"])), row["budget"] or 0)
        )
        if self._path is not None:
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            runs = ",\n".join(json.dumps(run) for run in self._runs)
            text = f'{{"runs": [\n{runs}],\n"results": [\n{lines}]}}\n'
            self._path.write_text(text, encoding="utf-8")


def _key(row: Json) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "budget", "variant", "task", "length"))
