"""What commands share: options, length files, JSON output."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshloom._errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

    from meshloom._plan import Layout, SampleInfo

LayoutOption = Annotated[
    str | None,
    typer.Option("--layout", help="Sizes of the mesh, e.g. hdp=8 or hdp=4,tp=2.", show_default=False),
]
HdpOption = Annotated[
    int | None, typer.Option("--hdp", help="Short for --layout hdp=N.", show_default=False)
]
CapacityOption = Annotated[
    int,
    typer.Option(
        "--capacity-tokens", "--capacity", help="Most tokens that a rank may hold of one unit."
    ),
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy", help="static, naive_hdp, balanced, ..., or MODULE:CLASS for one of your own."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def resolve_layout(layout: str | None, hdp: int | None) -> Layout:
    """The mesh that --layout and --hdp together ask for."""
    from meshloom._plan import Layout

    if layout is not None and hdp is not None:
        raise typer.BadParameter("--hdp is short for --layout hdp=N: give one of the two")
    if layout is None and hdp is None:
        raise typer.BadParameter("how many ranks? give --hdp N or --layout hdp=N,...")
    return Layout.parse(layout if layout is not None else f"hdp={hdp}")


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _lines(path: str) -> list[str]:
    if path == "-":
        return sys.stdin.read().splitlines()
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"[cli.lengths] {path} is not UTF-8 text: {error}") from None


def _whole(value: Any, name: str) -> int:
    """A JSON number as an integer; 3.5, true and "7" are none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name} is {json.dumps(value)}, expected a whole number")


def _field(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"{text} is no whole number")
    return int(text)


def _sample_of(text: str) -> tuple[int, int]:
    """Tokens and loss tokens of one line; every token after the first is a target by default."""
    if text.startswith("{"):
        entry = json.loads(text)
        tokens = entry["tokens"]
        if isinstance(tokens, list):
            mask = entry.get("loss_mask")
            if mask is not None:
                if len(mask) != len(tokens):
                    raise ValueError(f"{len(mask)} loss_mask entries for {len(tokens)} tokens")
                return len(tokens), sum(1 for target in mask[1:] if target)
            tokens = len(tokens)
        tokens = _whole(tokens, "tokens")
        loss_tokens = _whole(entry.get("loss_tokens", max(tokens - 1, 0)), "loss_tokens")
    else:
        numbers = [_field(field) for field in text.replace(",", " ").split()]
        if len(numbers) > 2:
            raise ValueError(f"{len(numbers)} numbers")
        tokens = numbers[0]
        loss_tokens = numbers[1] if len(numbers) == 2 else max(tokens - 1, 0)
    if tokens < 1 or not 0 <= loss_tokens <= tokens:
        raise ValueError(f"{tokens} tokens with {loss_tokens} loss tokens")
    return tokens, loss_tokens


def read_samples(path: str) -> list[SampleInfo]:
    """Samples of a lengths file; ids are zero-based line numbers, empty lines are left out."""
    from meshloom._plan import SampleInfo

    samples = []
    for number, line in enumerate(_lines(path)):
        text = line.strip()
        if not text:
            continue
        try:
            tokens, loss_tokens = _sample_of(text)
        except (ValueError, KeyError, TypeError) as error:
            shown = text if len(text) <= 40 else text[:37] + "..."
            raise DataError(
                f"[cli.lengths] {path}:{number + 1}: {shown!r} is no sample ({error}), expected"
                ' `tokens`, `tokens loss_tokens`, or {"tokens": N or [...]}'
            ) from None
        samples.append(SampleInfo(id=number, tokens=tokens, loss_tokens=loss_tokens))
    if not samples:
        raise InvalidArgument(f"[cli.lengths] {path} holds no samples, expected a length a line")
    return samples


def short(number: float) -> str:
    """12345678 -> 12.3M; for tables."""
    for factor, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{suffix}" if abs(number) < 999.5 * factor else f"{number / factor:.0f}{suffix}"
    return f"{number:g}"
