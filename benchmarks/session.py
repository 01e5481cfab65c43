"""What the suites of one run share: the device, the providers, the floor, the results."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from . import floor, measure, progress, providers
from .measure import QUICK, Absent, Binder, Bound, Case, Contest, Device, Effort, Loader, Results


class Session:
    """One run of one or more suites."""

    def __init__(
        self,
        device: torch.device,
        topk: int = 2048,
        quick: bool = False,
        seed: int = 0,
        wanted: Sequence[str] | None = None,
        replay: Callable[[Session], None] | None = None,
        loaders: Mapping[str, Loader] | None = None,
        timing: Device | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.device = device
        self.timing = timing or measure.device_of(device)
        self.topk = topk
        self.quick = quick
        self.seed = seed
        self.wanted = wanted  # names of providers, None: all
        self.replay = replay  # of a request trace; the command line knows its options
        self.effort = effort or (QUICK if quick else Effort())
        self.results = Results()
        self.floor_samples = floor.Samples()
        self._loaders = providers.PROVIDERS if loaders is None else loaders
        self._binders: dict[Loader, Binder | None] = {}

    def is_wanted(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def binder(self, name: str, loaders: Mapping[str, Loader] | None = None) -> Binder | None:
        """Load a provider once; None where it is absent, which is recorded.

        ``loaders`` are those of an operation, by name; default: of the seed operation.
        """
        if not self.is_wanted(name):
            return None
        loader = (loaders or self._loaders)[name]
        if loader not in self._binders:
            self._binders[loader] = None
            try:
                if self.quick:
                    reason = providers.left_out_of_quick(name, self.device)
                    if reason is not None:
                        raise Absent(reason)
                self._binders[loader] = loader(self.device)
            except Exception as error:
                self.results.leave_out("loading", name, measure.failure(error))
        return self._binders[loader]

    def bind(
        self,
        names: Sequence[str],
        case: Case,
        where: str,
        loaders: Mapping[str, Loader] | None = None,
    ) -> dict[str, Bound]:
        """Bind the providers that can run to a case."""
        bounds: dict[str, Bound] = {}
        for name in names:
            binder = self.binder(name, loaders)
            if binder is None:
                continue
            try:
                bounds[name] = binder(case)
            except Exception as error:
                self.results.leave_out(where, name, measure.failure(error))
        return bounds

    def contest(
        self,
        suite: str,
        case: Case,
        names: Sequence[str],
        tick: Callable[[], None] = lambda: None,
        effort: Effort | None = None,
        loaders: Mapping[str, Loader] | None = None,
    ) -> Contest:
        return Contest(
            case,
            self.bind(names, case, f"{suite}, {case.name}", loaders),
            self.timing,
            self.results,
            suite,
            effort or self.effort,
            tick,
            providers.cache_info,
        )

    def run_floor(self, suite: str) -> None:
        """One more sample of the floor program, which a suite is compared with.

        A shared machine changes its speed by the minute: before, in and after the suite.
        """
        if self.is_wanted("floor"):
            self.floor_samples.take(self.device, self.quick, suite)

    def release(self) -> None:
        """Give the memory of a finished case back."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a device that fails is noticed by the next call
                torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return 1 << 32

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Callable[[], None]]:
        """A bar; yields a function that is called once per item."""
        done = 0
        with progress.progress_bar(total, label) as update:

            def tick() -> None:
                nonlocal done
                done += 1
                update(min(done, total))

            yield tick
