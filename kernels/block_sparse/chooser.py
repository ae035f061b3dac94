"""Which backend "auto" takes on a GPU: of those that compute right there, the one that is fastest.

Asked for the first time with an operator, a device, a dtype and a head size, it runs every backend
on a small problem, compares the result with the definition, and times those that passed on a larger
one. That takes some seconds, once: what it finds is kept in the user's cache folder, and belongs to
the device, its driver and the versions of torch, Triton and diffpatch. ``DIFFPATCH_CHOOSER=off``
does without, and takes what is usual. A kernel that fails in a later call is taken out, too, until
the process ends.
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

from diffpatch.kernels.block_sparse.operators import BLOCK_SPARSE, Inputs, Operator, Results
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
        operator: what is computed.
    """

    device: torch.device
    dtype: torch.dtype
    size: int
    around: tuple[tuple[str, str], ...]
    operator: Operator = BLOCK_SPARSE

    @property
    def key(self) -> dict[str, str]:
        """What the cache tells rankings apart by; two cards of one kind share theirs."""
        own = {
            "dtype": str(self.dtype),
            "head size": str(self.size),
            "operator": self.operator.name,
        }
        return dict(self.around) | own


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
    """What measures, and remembers in this process and in a folder.

    Args:
        folder: where rankings are kept; one that cannot be written is done without.
        check: why a backend is wrong in a setting, or None.
        clock: the seconds of a call.

    Attributes:
        refused: what is not taken in a setting, because it is wrong or has failed, and why.
    """

    def __init__(
        self, folder: Path, check: Check | None = None, clock: Clock | None = None
    ) -> None:
        self.folder = folder
        self.check, self.clock = check or wrong, clock or seconds
        self._lock = threading.Lock()
        self._known: dict[Setting, Ranking] = {}
        self.refused: dict[Setting, dict[str, str]] = {}

    def ranking(self, setting: Setting, rows: Sequence[Backend], *, redo: bool = False) -> Ranking:
        """The ranking of some backends; measured if nobody has yet, or to `redo` it."""
        with self._lock:  # one thread measures, the others wait for it
            if setting not in self._known or redo:
                able = _able(rows, setting)
                found = None if redo else self._read(setting, able)
                self._known[setting] = found or self._measure(setting, able)
                self.refused.pop(setting, None)
                if self._known[setting].refused:
                    self.refused[setting] = dict(self._known[setting].refused)
            return self._known[setting]

    def known(self, setting: Setting) -> Ranking | None:
        """What has been found or read in this process; None if nothing has."""
        return self._known.get(setting)

    def take_out(self, setting: Setting, name: str, reason: str) -> None:
        """Never take a backend again in a setting, unless it is measured anew."""
        with self._lock:
            refused = dict(self.refused.get(setting, {}))
            if name not in refused:
                where = dict(setting.around)["device"]
                log.warning(
                    "backend %r of %s is not taken any more on %s: %s",
                    name, setting.operator.words, where, reason,
                )  # fmt: skip
                self.refused[setting] = refused | {name: reason}

    def _measure(self, setting: Setting, rows: Sequence[Backend]) -> Ranking:
        name = dict(setting.around)["device"]
        times: dict[str, float] = {}
        refused: dict[str, str] = {}
        lasting = True
        if len(rows) > 1:
            words = setting.operator.words
            log.info("comparing backends of %s on %s, %s, heads of %d", words, name, *setting[1:3])
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
                reason = words_of(error)
                lasting &= not isinstance(error, torch.OutOfMemoryError)
            if reason is not None:
                refused[row.name] = reason
                words = setting.operator.words
                log.warning(
                    "backend %r of %s is not taken on %s: %s", row.name, words, name, reason
                )
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


def words_of(error: Exception) -> str:
    """What is said of a backend that fails, on one line."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return f"it fails here: {words[:200]}"


def ranking_of(
    q: torch.Tensor, rows: Sequence[Backend], operator: Operator = BLOCK_SPARSE
) -> Ranking | None:
    """The ranking of backends for queries (B, S, H, D), measured if it has to be.

    Returns:
        None where nothing is compared: on CPUs, where "auto" has one backend only, where it is
        switched off, and while torch records what is called, if nothing was found before.
    """
    if not comparable(q):
        return None
    setting = setting_of(q, operator)
    found = chooser().known(setting)
    if found is None and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return chooser().ranking(setting, rows)
    return found


def comparable(q: torch.Tensor) -> bool:
    """Whether backends are compared for such queries at all."""
    real = type(q) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return is_on() and real and q.device.type in DEVICES and q.dtype in TOLERANCE


def setting_of(q: torch.Tensor, operator: Operator = BLOCK_SPARSE) -> Setting:
    """The setting that a call with these queries (B, S, H, D) belongs to."""
    return Setting(q.device, q.dtype, q.shape[-1], _around(q.device), operator)


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
    q, k, v = _inputs(setting, blocks, BATCH)
    hidden = torch.ones(BATCH, blocks.num_tokens, dtype=torch.bool)
    hidden[1, ::3] = False
    trial, there = setting.operator.tried, blocks.to(setting.device)
    for key_mask in (None, hidden):
        mask = None if key_mask is None else key_mask.to(setting.device)
        with on_device_of(q):
            found = trial(row, Inputs(q, k, v, there, mask))
        x, y, z = (each.cpu().double() for each in (q, k, v))
        expected = trial(None, Inputs(x, y, z, blocks, key_mask))
        reason = _difference(found, expected, setting.dtype)
        if reason:
            return reason
    return None


def _difference(found: Results, expected: Results, dtype: torch.dtype) -> str | None:
    """How results differ by more than rounding; a log-sum-exp follows the output it belongs to."""
    found = tuple(x.cpu().double() for x in found)
    blind = expected[1].isneginf()
    if not torch.equal(found[1].isneginf(), blind) or found[0][blind].any():
        return "wrong for queries that see nothing"
    outs = ((found[n], expected[n]) for n in range(len(found)) if n != 1)
    error = float(torch.stack([(x - y).norm() / y.norm() for x, y in outs]).max())  # or NaN
    off = float((found[1] - expected[1])[~blind].abs().max())
    if not (error <= TOLERANCE[dtype] and off <= 10 * TOLERANCE[dtype]):
        return f"wrong by {error:.2g} of the output and {off:.2g} of the log-sum-exp"
    return None


def seconds(row: Backend, setting: Setting) -> float:
    """The time of a call over some thousand tokens of which a query sees a quarter."""
    blocks = timed_blocks().to(setting.device)
    q, k, v = _inputs(setting, blocks, 1)
    inputs = Inputs(q, k, v, blocks, None)
    times = []
    for _ in range(REPEATS + 2):
        _wait_for(setting.device)
        begun = time.perf_counter()
        with on_device_of(q):
            setting.operator.tried(row, inputs)
        _wait_for(setting.device)
        times.append(time.perf_counter() - begun)
    return median(times[2:])


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _inputs(
    setting: Setting, blocks: BlockIndex, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((batch, blocks.num_tokens, n, setting.size) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    made = [torch.randn(shape, generator=random, dtype=torch.float32) for shape in shapes]
    q, k, v = (x.to(setting.device, setting.dtype) for x in made)
    return q, k, v
