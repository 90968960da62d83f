"""Which program stored which byte in one launch."""

import numpy as np

from moe_fast.interpreter.errors import StoreRaceError

Program = tuple[int, int, int]


class StoreLog:
    """The last writer of every stored byte, kept per storage, so that overlapping arguments are one."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.programs: list[Program] = []
        self._numbers: dict[Program, int] = {}
        self._writers: dict[int, tuple[int, np.ndarray]] = {}

    def record(self, region: object, offsets: np.ndarray, itemsize: int, program: Program) -> None:
        """Note stores of `program`; raises StoreRaceError if a byte has another writer or two lanes meet."""
        storage = region.tensor.untyped_storage()
        base = storage.data_ptr()
        if base not in self._writers:
            # one int32 per byte of the storage; np.zeros touches memory only where something is stored
            self._writers[base] = (base, np.zeros(storage.nbytes(), np.int32))
        writers = self._writers[base][1]
        number = self._numbers.setdefault(program, len(self._numbers) + 1)
        if number > len(self.programs):
            self.programs.append(program)
        first = offsets.ravel().astype(np.int64) + (region.real - base)
        touched = (first[:, None] + np.arange(itemsize)).ravel()
        self._check_lanes(region.name, touched, program, region.real - base)
        self._check_programs(region.name, writers[touched], touched, number, region.real - base)
        writers[touched] = number

    def _check_lanes(self, name: str, touched: np.ndarray, program: Program, start: int) -> None:
        ordered = np.sort(touched)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.size:
            raise StoreRaceError(f"kernel {self.kernel}, program {program}: two lanes of one store "
                                 f"write byte {int(twice[0]) - start} of argument {name} ({twice.size} bytes "
                                 "in all), but each should have one writer")

    def _check_programs(self, name: str, writers: np.ndarray, touched: np.ndarray, number: int,
                        start: int) -> None:
        foreign = (writers != 0) & (writers != number)
        if foreign.any():
            index = int(np.flatnonzero(foreign)[0])
            raise StoreRaceError(
                f"kernel {self.kernel}: programs {self.programs[writers[index] - 1]} and "
                f"{self.programs[number - 1]} both store byte {int(touched[index]) - start} of argument "
                f"{name} ({int(foreign.sum())} bytes in all), but each should have one writer")
