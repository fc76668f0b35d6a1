from collections.abc import Callable
from typing import Any

from torch import Tensor

class Plan:
    def climb(self, optimizer: Any, reduce: Callable[[Tensor, list[int]], None] | None, /) -> bool: ...
    def descend(
        self,
        optimizer: Any,
        method: str,
        create: Callable[[Tensor, tuple[str, ...]], dict[str, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
        share: Callable[[Tensor], None] | None,
        /,
    ) -> bool: ...
    def restore(self, backups: list[tuple[Tensor, Tensor]], /) -> None: ...
    def finite(self) -> bool: ...
    def skipped(self) -> int: ...
    def memory(self) -> list[Tensor]: ...
    def norms(self) -> tuple[float, list[float]]: ...

def walk(sizes: list[int], chunks: list[int], /) -> list[tuple[int, int, int]]: ...

chunk: int
tensors_per_launch: dict[str, int]
instruction_set: str
cuda: bool
