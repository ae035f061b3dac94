"""A sweep's folder, written down in place of rendered: results, clips, circumstances."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from diffpatch.eval.sweep.report.summary import Summary, summarize
from diffpatch.files import write_json

HOSTILE = '<script>alert("x")</script> & a "cat" | dog'


ENVIRONMENT = {
    "device": "a processor", "threads": 2, "commit": "abc",
    "versions": {"torch": "2.13", "diffusers": "0.42", "diffpatch": "0.1"},
}  # fmt: skip


PROMPTS = ("a cat", HOSTILE, "a bird", "a tree")


DENSE = 20.0  # seconds, as timed beside every run


def clock(seconds: float, cpu: float = 1.0) -> dict[str, Any]:
    """The times of a run."""
    return {
        "total": seconds, "denoising": seconds, "step_median": seconds / 4, "peak_gib": None,
        "load": {"cpu": cpu},
    }  # fmt: skip


def made(
    kind: str, label: str, prompt: str, seconds: float = DENSE, psnr: float | None = None,
    steps: int = 1, setting: str = "toy, 64×64", dense: float = DENSE, cpu: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """A run.json."""
    number = PROMPTS.index(prompt)
    result: dict[str, Any] = {
        "name": f"{len(setting)}-{kind}-{label[:8]}-{number}".replace("/", "-"), "kind": kind,
        "label": label, "setting": setting, "model": "toy",
        "pipeline": "Toy", "dtype": "float32", "offload": "none", "vae_tiling": False,
        "prompt": prompt, "seed": 0, "settings": {}, "parameters": {}, "options": {},
        "method": label if kind == "method" else None, "wanted": None,
        "seconds": clock(seconds, cpu), "clip": {"frames": 8, "fps": 8.0},
        "shared": False, "kept": 0.25 if psnr else 1.0, "quality": {"caption_accuracy": 1.0},
        "environment": ENVIRONMENT,
    }  # fmt: skip
    if psnr is not None:
        beside = {"name": f"{len(setting)}-dense-dense-{number}", "seconds": clock(dense)}
        gains = {"total": dense / seconds, "denoising": dense / seconds}
        result |= {"dense": beside, "speedup": gains, "patch": {"kept": 0.25, "dense_steps": 2}}
        result["quality"] |= {"psnr": psnr, "ssim": psnr / 40, "lpips": 0.1}
        layers = {f"transformer.{number}": 0.25 for number in range(30)}
        by_step = [1.0] * steps + [0.25] * (4 - steps)
        result["report"] = {
            "kept_per_layer": layers, "kept_per_step": by_step,
            "kept_map": [[kept] * 30 for kept in by_step],
        }  # fmt: skip
    return result


def write(root: Path, found: list[dict[str, Any]], bar: dict[str, float]) -> Summary:
    """A folder of a sweep from its results, and what it comes to."""
    for result in found:
        (root / "runs" / result["name"]).mkdir(parents=True, exist_ok=True)
        write_json(root / "runs" / result["name"] / "run.json", result)
    about = {"title": "A & <b>B</b>", "bar": bar, "networks": {}}
    write_json(root / "sweep.json", about | {"runs": [result["name"] for result in found]})
    return summarize(root)


# Seconds, PSNR, dense first steps by prompt: first, median, mean and least are all different.
METHODS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]] = {
    "radial": ((8.0, 10.0, 12.5, 10.0), (29.0, 31.0, 28.0, 32.0), (2, 1, 2, 2)),
    "window": ((4.0, 5.0, 6.25, 5.0), (21.0, 19.0, 18.0, 22.0), (2, 1, 2, 2)),
    "linear": ((2.5, 4.0, 8.0, 4.0), (25.5, 26.5, 25.2, 26.8), (2, 1, 3, 2)),
}


class Reader(HTMLParser):
    """Collects addresses and text, and checks that tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
