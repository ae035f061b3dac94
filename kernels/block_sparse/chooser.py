"""Which backend "auto" takes on a GPU: of those that compute right there, the one that is fastest.

Asked for the first time with a device, a dtype and a head size, it runs every backend on a small
problem, compares the result with the definition, and times those that passed on a larger one. That
takes some seconds, once: what it finds is kept in the user's cache folder, and belongs to the
device, its driver and the versions of torch, Triton and diffpatch. ``DIFFPATCH_CHOOSER=off`` does
without, and takes what is usual.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import platformdirs
import torch

from diffpatch.kernels.block_sparse.reference import attend_reference
from diffpatch.kernels.block_sparse.trial_blocks import small_blocks, timed_blocks
from diffpatch.kernels.blocks import BlockIndex
from diffpatch.kernels.gpu.device import on_device_of
from diffpatch.kernels.memo import neutral

if TYPE_CHECKING:
    from diffpatch.kernels.block_sparse.backends import Backend

log = logging.getLogger(__name__)

SWITCH = "DIFFPATCH_CHOOSER"
# Relative errors of the output that rounding explains, several times over; a wrong mask, scale or
# head is far above.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WORTH = 0.95  # of the time of what is usual: what gains less is not taken, as timings vary
HEADS, KEY_HEADS, BATCH = 4, 2, 2
REPEATS = 5
DEVICES = ("cuda", "xpu")


class Setting(NamedTuple):
    """What a ranking belongs to.

    Attributes:
        device: where it was measured.
        dtype: of q, k and v.
        size: channels of a head.
        around: everything else: names and versions of device, driver and software.
    """

    device: torch.device
    dtype: torch.dtype
    size: int
    around: tuple[tuple[str, str], ...]

    @property
    def key(self) -> dict[str, str]:
        """What the cache tells rankings apart by; two cards of one kind share theirs."""
        return dict(self.around) | {"dtype": str(self.dtype), "head size": str(self.size)}


class Ranking(NamedTuple):
    """What was found.

    Attributes:
        seconds: of every backend that computes right, the fastest first.
        refused: why the others are not taken.
    """

    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    def order(self, rows: Sequence[Backend]) -> list[Backend]:
        """Backends in the order in which "auto" tries them: what is usual, unless another gains."""
        usual = next((row.name for row in rows if row.name in self.seconds), "")
        found = [row for row in rows if row.name in self.seconds]
        return sorted(
            found, key=lambda row: self.seconds[row.name] * (WORTH if row.name == usual else 1.0)
        )


Check = Callable[["Backend", Setting], str | None]
Clock = Callable[["Backend", Setting], float]


class Chooser:
    """Measures, and remembers in this process and in a folder.

    Args:
        folder: where rankings are kept; one that cannot be written is done without.
        check: why a backend is wrong in a setting, or None.
        clock: the seconds of a call.
    """

    def __init__(
        self, folder: Path, check: Check | None = None, clock: Clock | None = None
    ) -> None:
        self.folder = folder
        self.check, self.clock = check or wrong, clock or seconds
        self._lock = threading.Lock()
        self._known: dict[Setting, Ranking] = {}

    def ranking(self, setting: Setting, rows: Sequence[Backend], *, redo: bool = False) -> Ranking:
        """The ranking of some backends; measured if nobody has yet, or to `redo` it."""
        with self._lock:  # one thread measures, the others wait for it
            if setting not in self._known or redo:
                able = _able(rows, setting)
                found = None if redo else self._read(setting, able)
                self._known[setting] = found or self._measure(setting, able)
            return self._known[setting]

    def known(self, setting: Setting) -> Ranking | None:
        """What has been found or read in this process; None if nothing has."""
        return self._known.get(setting)

    def _measure(self, setting: Setting, rows: Sequence[Backend]) -> Ranking:
        name = dict(setting.around)["device"]
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        lasting = True
        if len(rows) > 1:
            log.info("comparing backends on %s, %s, heads of %d", name, setting.dtype, setting.size)
        for row in rows:
            if len(rows) == 1:  # nothing to compare with
                times[row.name] = 0.0
                break
            try:
                with neutral():
                    reason = self.check(row, setting)
                    if reason is None:
                        times[row.name] = self.clock(row, setting)
            except Exception as error:  # of any kind: of a compiler, of the driver, of memory
                words = " ".join(f"{type(error).__name__}: {error}".split())
                reason = f"it fails here: {words[:200]}"
                lasting &= not isinstance(error, torch.OutOfMemoryError)
            if reason is not None:
                refused[row.name] = reason
                log.warning("backend %r is not taken on %s: %s", row.name, name, reason)
        ranking = Ranking(dict(sorted(times.items(), key=lambda item: item[1])), refused)
        if lasting:
            self._write(setting, rows, ranking)
        return ranking

    def _path(self, setting: Setting, rows: Sequence[Backend]) -> Path:
        key = json.dumps([setting.key, [row.name for row in rows]], sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"

    def _read(self, setting: Setting, rows: Sequence[Backend]) -> Ranking | None:
        """What is kept; None where nothing is, or nothing that makes sense."""
        names = {row.name for row in rows}
        try:
            kept = json.loads(self._path(setting, rows).read_text(encoding="utf-8"))
            times = {str(name): float(x) for name, x in kept["seconds"].items()}
            refused = {str(name): str(x) for name, x in kept["refused"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        whole = kept["setting"] == setting.key and {*times, *refused} == names and times
        return Ranking(times, refused) if whole and all(x >= 0 for x in times.values()) else None

    def _write(self, setting: Setting, rows: Sequence[Backend], ranking: Ranking) -> None:
        """Keep it whole or not at all, whatever other processes write."""
        kept = {"setting": setting.key} | ranking._asdict()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1)
            os.replace(name, self._path(setting, rows))
        except OSError as error:
            log.info("the order of backends is not kept, and measured again next time: %s", error)


@functools.cache
def chooser() -> Chooser:
    """The one of this process."""
    return Chooser(Path(platformdirs.user_cache_dir("diffpatch", appauthor=False)) / "backends")


def is_on() -> bool:
    """Whether backends are measured at all."""
    return os.environ.get(SWITCH, "on").lower() not in ("off", "0", "false", "no")


def ranking_of(q: torch.Tensor, rows: Sequence[Backend]) -> Ranking | None:
    """The ranking of backends for queries (B, S, H, D), measured if it has to be.

    Returns:
        None where nothing is compared: on CPUs, where "auto" has one backend only, where it is
        switched off, and while torch records what is called, if nothing was found before.
    """
    if not comparable(q):
        return None
    setting = setting_of(q)
    found = chooser().known(setting)
    if found is None and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return chooser().ranking(setting, rows)
    return found


def comparable(q: torch.Tensor) -> bool:
    """Whether backends are compared for such queries at all."""
    real = type(q) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return is_on() and real and q.device.type in DEVICES and q.dtype in TOLERANCE


def setting_of(q: torch.Tensor) -> Setting:
    """The setting that a call with these queries (B, S, H, D) belongs to."""
    return Setting(q.device, q.dtype, q.shape[-1], _around(q.device))


@functools.cache
def _around(device: torch.device) -> tuple[tuple[str, str], ...]:
    facts = {"device": device.type, "driver": ""}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        driver: Any = torch._C  # a function of it that builds without CUDA lack
        facts["driver"] = str(driver._cuda_getDriverVersion())
    elif device.type == "xpu":
        found = torch.xpu.get_device_properties(device)
        facts |= {"device": found.name, "driver": str(found.driver_version)}
    versions = {name: _version(name) for name in ("triton", "diffpatch")}
    return tuple((facts | versions | {"torch": torch.__version__}).items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _able(rows: Sequence[Backend], setting: Setting) -> list[Backend]:
    """The backends that do not refuse the setting by themselves."""
    blocks = small_blocks().to(setting.device)
    shape = (1, blocks.num_tokens, HEADS, setting.size)
    q = torch.empty(shape, dtype=setting.dtype, device=setting.device)
    return [row for row in rows if row.reason(q, blocks) is None]


def wrong(row: Backend, setting: Setting) -> str | None:
    """How the results of a backend differ from the definition, or None.

    With edge tiles, masked tiles, queries that see nothing, hidden keys and grouped queries.
    """
    blocks = small_blocks()
    inputs = _inputs(setting, blocks, BATCH)
    hidden = torch.ones(BATCH, blocks.num_tokens, dtype=torch.bool)
    hidden[1, ::3] = False
    scale = setting.size**-0.5
    for key_mask in (None, hidden):
        out, lse = _call(row, inputs, blocks.to(setting.device), scale, key_mask)
        q, k, v = (x.cpu().double() for x in inputs)
        expected, expected_lse = attend_reference(q, k, v, blocks, scale, key_mask, True)
        assert expected_lse is not None
        blind = expected_lse.isneginf()
        if lse is None or not torch.equal(lse.cpu().isneginf(), blind) or out.cpu()[blind].any():
            return "wrong for queries that see nothing"
        error = float((out.cpu().double() - expected).norm() / expected.norm())
        off = float((lse.cpu().double() - expected_lse)[~blind].abs().max())
        if not (error <= TOLERANCE[setting.dtype] and off <= 10 * TOLERANCE[setting.dtype]):
            return f"wrong by {error:.2g} of the output and {off:.2g} of the log-sum-exp"
    return None


def seconds(row: Backend, setting: Setting) -> float:
    """The time of a call over some thousand tokens of which a query sees a quarter."""
    blocks = timed_blocks().to(setting.device)
    inputs = _inputs(setting, blocks, 1)
    times = []
    for _ in range(REPEATS + 2):
        _wait_for(setting.device)
        begun = time.perf_counter()
        _call(row, inputs, blocks, setting.size**-0.5, None)
        _wait_for(setting.device)
        times.append(time.perf_counter() - begun)
    return median(times[2:])


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _inputs(setting: Setting, blocks: BlockIndex, batch: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((batch, blocks.num_tokens, n, setting.size) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    made = [torch.randn(shape, generator=random, dtype=torch.float32) for shape in shapes]
    return [x.to(setting.device, setting.dtype) for x in made]


def _call(
    row: Backend, inputs: list[torch.Tensor], blocks: BlockIndex, scale: float,
    key_mask: torch.Tensor | None,
) -> Any:  # fmt: skip
    mask = None if key_mask is None else key_mask.to(blocks.device)
    with on_device_of(inputs[0]):
        return row.attend(*inputs, blocks, scale, mask, True)
