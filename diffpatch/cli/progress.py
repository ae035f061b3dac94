"""What the user sees on stderr while a command works."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str, quiet: bool = False) -> None:
    """A line on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def hush_libraries() -> None:
    """Keep the notices and loading bars of diffusers and transformers out of the output."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


@contextmanager
def steps(
    label: str, total: int | None, kept: Callable[[], float] | None, quiet: bool
) -> Iterator[Callable[[int, float], None]]:
    """A bar over denoising steps; the yielded function advances it by one step.

    Args:
        label: in front of the bar.
        total: number of steps, None if unknown.
        kept: returns the fraction of pairs computed so far; None for dense runs.
        quiet: show nothing.
    """
    from tqdm import tqdm

    # Without a terminal every refresh is a line of a log, so there are few of them.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar_format = "{l_bar}{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    with tqdm(
        total=total,
        desc=f"{label:>12}",
        bar_format=bar_format,
        mininterval=interval,
        disable=quiet,
        file=sys.stderr,
    ) as bar:

        def advance(step: int, seconds: float) -> None:
            note = f"{seconds:.2f} s/step"
            if kept is not None:
                note += f", kept {kept():.0%}"
            bar.set_postfix_str(note, refresh=False)
            bar.update()

        yield advance


def span(seconds: float) -> str:
    """A time to wait, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
