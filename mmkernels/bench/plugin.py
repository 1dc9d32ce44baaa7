"""The suite as pytest-benchmark tests: one for each contender of each point of each case.

pytest-benchmark times one test after the other. Contenders here take turns, so that a drift of the machine's speed
does not favour one: the first test of a point measures all that were selected, and each test hands its own times over
by `recorded_time`, a clock that shows them. The rest is pytest-benchmark's: statistics, history, comparison, JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from mmkernels.bench.case import Case, Settings, cases_of, contenders, points_of, title
from mmkernels.bench.figures import derived
from mmkernels.bench.group import Result, measured
from mmkernels.bench.machine import machine
from mmkernels.bench.measure import ceilings
from mmkernels.bench.memory import keep_freed_memory
from mmkernels.bench.model_cli import predictions
from mmkernels.bench.prediction import Rates, fitted
from mmkernels.bench.table import tables

# pytest-benchmark's options about how it takes times, which it does not do here.
_NOT_HERE = (
    "calibration-precision",
    "confidence",
    "cprofile",
    "min-time",
    "precision",
    "timer",
    "warmup",
    "warmup-iterations",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkernels", "what the suite measures")
    add = group.addoption
    add("--full", action="store_true", help="sizes of trainers, instead of those that take seconds")
    add("--peers", action="store_true", help="measure other installed packages, too")
    add("--compile", action="store_true", help="measure torch.compile and FlexAttention on a CPU, too")
    add("--filter", default="", help="only tests whose names have all these words, such as 'infonce N=2048'")
    add("--device", default=None, help="where to run (default: cuda if there is one)")
    add("--backend", action="append", default=[], help="only these backends of ours; may be repeated")
    add("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    add("--no-memory", action="store_true", help="do not measure peak memory")


def _given(config: pytest.Config) -> set[str]:
    """Options on the command line."""
    return {str(each).partition("=")[0] for each in config.invocation_params.args}


def settings_of(config: pytest.Config) -> Settings:
    option = config.getoption
    seconds = float(option("benchmark_max_time"))
    if "--benchmark-max-time" not in _given(config):
        seconds = 1.0 if option("full") else 0.3
    return Settings(
        full=option("full"),
        device=option("device") or ("cuda" if torch.cuda.is_available() else "cpu"),
        backends=tuple(option("backend")),
        peers=option("peers"),
        compile=option("compile"),
        memory=not option("no_memory"),
        threads=option("threads"),
        seconds=seconds,
        least=option("benchmark_min_rounds"),
        disable_gc=option("benchmark_disable_gc"),
    )


@dataclass(frozen=True)
class Entry:
    """One contender of one point: what a test is about."""

    module: str
    case: Case
    point: Mapping[str, Any]
    contender: str

    @property
    def family(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def group(self) -> str:
        return f"{self.family}: {title(self.case, self.point)}"

    @property
    def key(self) -> str:
        return json.dumps([self.module, self.case.name, self.point], sort_keys=True)

    def about(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "case": self.case.name,
            "point": dict(self.point),
            "contender": self.contender,
        }


class Suite:
    """The state of a run: what is selected, and what was measured."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.settings = settings_of(config)
        self.selected: dict[str, list[str]] = {}
        self.results: dict[str, dict[str, Result]] = {}
        self.errors: dict[str, Exception] = {}
        self.machine = machine(torch.device(self.settings.device))  # its load is that of others, before the run
        self.figures: dict[str, dict[str, dict[str, Any]]] = {}
        self.not_timed: list[dict[str, Any]] = []
        self.ceilings: dict[str, float] = {}
        self.rates: dict[str, Rates] = {}

    def ceiling(self, point: Mapping[str, Any]) -> dict[str, float]:
        """Of the machine, measured once for each dtype."""
        name = point.get("dtype")
        wanted = {"bytes", *([f"flops:{name}"] if name else [])}
        if not wanted <= set(self.ceilings):
            dtypes = [getattr(torch, name)] if name else []
            found = ceilings(dtypes, torch.device(self.settings.device), min(self.settings.seconds, 1.0))
            self.ceilings = {**found, **self.ceilings}
        return self.ceilings

    def rate(self, entry: Entry) -> Rates | None:
        """What the case's op attains in short calls, measured once, with the backend that is chosen by default."""
        if not entry.case.calibrate or self.settings.backends:
            return None
        name = f"{entry.family}: {entry.case.name}"
        if name not in self.rates:
            self.rates[name] = fitted(entry.case, self.settings)
        return self.rates[name]

    def result(self, entry: Entry, *, timed: bool) -> tuple[Result, dict[str, Any]]:
        """Of an entry; the first one of a point measures all that are selected."""
        if entry.key in self.errors:
            raise self.errors[entry.key]
        if entry.key not in self.results:
            names = self.selected[entry.key]
            try:
                found = measured(entry.module, entry.case, entry.point, names, self.settings, timed=timed)
            except Exception as error:  # the same for every contender: not measured again for each
                self.errors[entry.key] = error
                raise
            self.results[entry.key] = found
            # Processes of a case that takes its own times do not run as this one does.
            ceiling = self.ceiling(entry.point) if timed and entry.case.sample is None else {}
            right = any(result.kind == "timed" and result.role == "ours" for result in found.values())
            rates = self.rate(entry) if right else None
            self.figures[entry.key] = derived(entry.case, entry.point, found, ceiling, rates)
            for name, result in found.items():
                if result.kind not in ("timed", "checked"):
                    about = {"group": entry.group, **entry.about(), "contender": name, "role": result.role}
                    self.not_timed.append({**about, "kind": result.kind, "why": result.why})
        return self.results[entry.key][entry.contender], self.figures[entry.key].get(entry.contender, {})


_suite = pytest.StashKey[Suite]()


def pytest_configure(config: pytest.Config) -> None:
    for name in _NOT_HERE:
        if f"--benchmark-{name}" in _given(config):
            raise pytest.UsageError(f"--benchmark-{name}: expected not to be given: contenders are timed in turn here")
    suite = Suite(config)
    keep_freed_memory()
    if suite.settings.device.startswith("cuda"):
        torch.cuda.set_device(suite.settings.device)  # events and memory statistics are of the current one
    if suite.settings.threads:
        torch.set_num_threads(suite.settings.threads)
    config.stash[_suite] = suite


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = getattr(metafunc.function, "cases_module", None)
    if module is None:
        return
    settings = metafunc.config.stash[_suite].settings
    entries = [
        Entry(module, case, point, name)
        for case in cases_of(module, settings).values()
        for point in points_of(case, settings)
        for name in contenders(case, settings)
    ]
    ids = [f"{title(entry.case, entry.point)} | {entry.contender}" for entry in entries]
    metafunc.parametrize("entry", entries, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--filter, whose words may have signs that -k does not allow."""
    words = config.getoption("filter").split()
    kept = [item for item in items if all(word in item.name for word in words)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """After -k, -m and --deselect."""
    suite = session.config.stash[_suite]
    for item in session.items:
        entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")  # type: ignore[attr-defined]
        if isinstance(entry, Entry):
            suite.selected.setdefault(entry.key, []).append(entry.contender)


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    return request.config.stash[_suite]


_now = 0.0


def recorded_time() -> float:
    """The clock of the benches: it shows times that were taken before."""
    return _now


def hand_over(benchmark: Any, entry: Entry, result: Result, figures: Mapping[str, Any]) -> None:
    """Give a contender's times to pytest-benchmark."""
    left = iter(result.seconds)

    def start() -> None:
        global _now
        _now = 0.0

    def end() -> None:
        global _now
        _now = next(left)

    benchmark.group = entry.group
    benchmark.extra_info.update({**entry.about(), "role": result.role, **figures})
    benchmark.pedantic(end, setup=start, rounds=len(result.seconds), iterations=1)


# Results


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    suite = config.stash[_suite]
    machine_info["mmkernels"] = suite.machine | {"threads": torch.get_num_threads(), "ceilings": suite.ceilings}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    suite = config.stash[_suite]
    for each in output_json["benchmarks"]:
        each.pop("params", None)  # the point and the contender, which extra_info has
        if "data" in each["stats"]:
            each["stats"]["data"] = [float(f"{seconds:.5g}") for seconds in each["stats"]["data"]]
    size = "full" if suite.settings.full else "quick"
    rates = {name: {key: rate for key, rate in asdict(found).items() if rate} for name, found in suite.rates.items()}
    output_json["mmkernels"] = {"size": size, "not_timed": suite.not_timed, "rates": rates}
    output_json["mmkernels"]["predictions"] = predictions()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    suite = config.stash[_suite]
    entries = [
        {"group": bench.group, "median": bench.stats.median, **bench.extra_info}
        for bench in getattr(config, "_benchmarksession", None).benchmarks  # type: ignore[union-attr]
        if bench and "family" in bench.extra_info
    ]
    for table in tables(entries, suite.not_timed):
        terminalreporter.write_line(table)
