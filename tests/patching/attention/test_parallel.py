"""Several processes: one sequence over two of them equals one, and many prompts are shared out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import Neighborhood, TokenGrid
from diffpatch.cli import main
from diffpatch.eval.processes import Process
from diffpatch.patching.attention import parallel
from tests.tiny import wan

ROOT = Path(__file__).parents[3]
TEXTLESS = ("wan", "temporal", "uneven heads", "uneven heads, temporal")
JOINT = ("flux", "kontext", "qwen", "flux2", "two kinds of heads", "anything")
ORDERS = ("patch first", "cut first")
NEAR = Neighborhood(window=1, stride=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes write."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What two processes computed."""
    target = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.patching.attention.two_processes", str(target)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("name", TEXTLESS)
def test_a_sequence_in_order_is_equal_to_the_bit(found: dict[str, Any], name: str) -> None:
    for order in ORDERS:
        assert found[name][order] == 0
        assert found[name][f"dense, {order}"] == 0


@pytest.mark.parametrize("name", JOINT)
def test_joined_text_and_image_find_their_places(found: dict[str, Any], name: str) -> None:
    """Dense attention sums in another order of tokens there, which rounds differently."""
    for order in ORDERS:
        assert found[name][order] < 1e-6
        assert found[name][f"dense, {order}"] < 1e-6


@pytest.mark.parametrize("name", TEXTLESS + JOINT)
def test_the_report_is_that_of_one_process(found: dict[str, Any], name: str) -> None:
    for order in ORDERS:
        assert found[name][f"kept, {order}"] == pytest.approx(found[name]["kept"])
        assert set(found[name][f"reasons, {order}"]) <= {"dense first steps"}


def test_compiled_blocks_over_two_processes(found: dict[str, Any]) -> None:
    assert found["compiled"] < 1e-6


def test_two_runs_at_once_over_two_processes(found: dict[str, Any]) -> None:
    assert found["two runs"] < 1e-6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ring", "ulysses_degree"),
        ("fresh processors", "2 of its attention processors (WanAttnProcessor) were not told"),
        ("training", "training under context parallelism"),
    ],
)
def test_what_would_be_wrong_is_refused(found: dict[str, Any], name: str, words: str) -> None:
    assert words in found[name]


def test_processes_share_the_prompts(found: dict[str, Any], folder: Path) -> None:
    assert found["render"] == [0, 0, 2]  # the third asks for --json
    results = sorted((folder / "out").glob("*/render.json"))
    prompts = [json.loads(path.read_text(encoding="utf-8"))["prompt"] for path in results]
    assert prompts == ["a cat", "a dog", "a fox"]
    pictures = [path.read_bytes() for path in sorted((folder / "out").glob("*/window.png"))]
    assert len(set(pictures)) == 3
    assert not list((folder / "out").glob("**/.partial*"))


def test_resuming_renders_what_is_missing(
    found: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(*more: str) -> int:
        words = ["-m", str(folder / "model"), "--prompt-file", str(folder / "prompts.txt")]
        words += ["-o", str(folder / "out"), "--method", "window", "--quiet", "--resume", *more]
        return main(["render", *words, "--height", "16", "--width", "32", "--steps", "2"])

    cat, dog, _ = sorted((folder / "out").iterdir())
    picture, untouched = (cat / "window.png").read_bytes(), (dog / "window.png").stat().st_mtime_ns
    (cat / "window.png").unlink()  # as if the process had been killed between two files
    assert attempt("--set", "window=0.5") == 0
    assert (cat / "window.png").read_bytes() == picture
    assert (dog / "window.png").stat().st_mtime_ns == untouched
    capsys.readouterr()
    for other, what in ((("--seed", "7"), "seed is 0, not 7"), ((), "runs is")):
        assert attempt(*other, *(("--set", "window=0.5") if other else ())) == 2
        assert what in capsys.readouterr().err


def test_every_prompt_is_rendered_by_exactly_one_process() -> None:
    for count in (1, 2, 3, 8):
        shares = [Process(rank, count, rank).mine(range(5)) for rank in range(count)]
        assert sorted(itertools.chain.from_iterable(shares)) == list(range(5))


def test_a_process_is_what_its_launcher_says() -> None:
    assert Process.current({}) == Process(0, 1, 0)
    environment = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    assert Process.current(environment) == Process(9, 16, 1)
    assert Process(9, 16, 1).device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("text", "joined"),
    [
        # text before: 0 1 2, image: 3 … 6, a reference behind: 7
        ("before", [0, 1, 3, 4, 5, 2, 6, 7]),
        ("after", [0, 1, 2, 3, 7, 4, 5, 6]),
        ("none", None),
    ],
)
def test_where_joined_tokens_stand(text: str, joined: list[int] | None) -> None:
    grid = TokenGrid(1, 2, 2, text_before=3, text_after=1)
    places = parallel.order(NEAR.pattern(grid), text, 2, torch.device("cpu"))
    if joined is None:
        assert places is None
        return
    assert places is not None
    to_grid, back = places
    assert back.tolist() == joined
    assert torch.equal(torch.tensor(joined)[to_grid], torch.arange(8))


UNEVEN = Neighborhood(heads=(-1, -1, -1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.3, 0.3))


@pytest.mark.parametrize("heads", [12, 24])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_heads_are_dealt_so_that_no_process_waits_long(heads: int, ranks: int) -> None:
    grid = TokenGrid(9, 16, 24)
    pattern = UNEVEN.pattern(grid).for_heads(heads)
    dealt = parallel.deal(pattern, ranks)
    assert dealt is not None and sorted(dealt) == list(range(heads))
    places = [parallel.share_of(heads, rank, ranks) for rank in range(ranks)]
    assert [i for place in places for i in range(heads)[place]] == list(range(heads))
    each = pattern.blocks.head_pattern
    assert each is not None
    pairs = [UNEVEN._with(UNEVEN.heads[i]).pattern(grid).kept for i in each.tolist()]
    work = [sum(pairs[head] for head in dealt[place]) for place in places]
    assert parallel.load(pattern, ranks, dealt) == pytest.approx(max(work) / sum(work) * ranks)
    most = -(-heads // ranks) * ranks / heads  # what places that do not come out even cost
    biggest = max(pairs) / sum(pairs) * ranks  # no deal can split a head
    assert parallel.load(pattern, ranks, dealt) <= max(1.25 * most, biggest)
    assert parallel.load(pattern, ranks, dealt) < parallel.load(pattern, ranks)


def test_the_figures_that_the_module_tells() -> None:
    pattern = UNEVEN.pattern(TokenGrid(9, 16, 24)).for_heads(12)
    said = [
        f"{parallel.load(pattern, n, dealt):.2f}"
        for n in (2, 4)
        for dealt in (None, parallel.deal(pattern, n))
    ]
    assert said == ["1.81", "1.00", "2.31", "1.09"]
    assert all(figure in (parallel.__doc__ or "") for figure in said)


def test_a_process_gets_the_patterns_of_the_heads_that_it_is_dealt() -> None:
    pattern = UNEVEN.pattern(TokenGrid(3, 5, 7, text_after=2)).for_heads(12)
    dealt, whole = parallel.deal(pattern, 3), pattern.blocks.head_pattern
    assert dealt is not None and whole is not None
    mine = parallel.of_heads(pattern, 4, 1, 3, dealt)
    assert mine.blocks.head_pattern is not None
    assert mine.blocks.head_pattern.tolist() == [int(whole[head]) for head in dealt[4:8]]
    dense = pattern.dense()
    kept = [float(dense[int(whole[head])].double().mean()) for head in dealt[4:8]]
    assert mine.kept == pytest.approx(sum(kept) / 4)


@pytest.mark.parametrize(
    ("heads", "ranks", "shares"),
    [(5, 2, [[0, 1, 2], [3, 4]]), (5, 3, [[0, 1], [2, 3], [4]]), (4, 2, [[0, 1], [2, 3]])],
)
def test_heads_that_do_not_divide_keep_their_own_patterns(
    heads: int, ranks: int, shares: list[list[int]]
) -> None:
    windows = tuple((1, 1, i + 1) for i in range(heads))
    pattern = Neighborhood(heads=windows, stride=1).pattern(TokenGrid(3, 4, 7)).for_heads(heads)
    whole, dense = pattern.blocks.head_pattern, pattern.dense()
    assert whole is not None and len(set(whole.tolist())) == heads
    for rank, share in enumerate(shares):
        mine = parallel.of_heads(pattern, len(share), rank, ranks)
        assert mine.blocks.head_pattern is not None
        assert mine.blocks.head_pattern.tolist() == [int(whole[head]) for head in share]
        kept = [float(dense[int(whole[head])].double().mean()) for head in share]
        assert mine.kept == pytest.approx(sum(kept) / len(kept))


def test_heads_that_do_not_differ_stay_where_they_are() -> None:
    grid = TokenGrid(3, 4, 4)
    assert parallel.deal(NEAR.pattern(grid), 2) is None
    alike = Neighborhood(heads=((1, 1, 3), (1, 3, 1)), stride=1).pattern(grid).for_heads(4)
    assert parallel.deal(alike, 2) is None
    assert parallel.deal(UNEVEN.pattern(grid).for_heads(12), 1) is None


def test_heads_are_dealt_where_all_processes_can_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of grouped heads, under a mask of each head, in dense layers and steps, or outside."""
    tiny = wan(layers=2)
    uneven = Neighborhood(heads=((1, 1, 1), -1), stride=1)
    diffpatch.patch(tiny.pipe, uneven, dense_steps=1, dense_layers=[0])
    owner = tiny.pipe.transformer._diffpatch
    q, single = torch.zeros(1, 24, 2, 12), torch.zeros(1, 24, 1, 12)
    for_all, for_each = torch.zeros(1, 1, 24, 24), torch.zeros(1, 2, 24, 24)
    asked: dict[str, tuple[Any, ...]] = {
        "alike": (q, q, None, 1), "masked": (q, q, for_all, 1), "grouped": (q, single, None, 1),
        "each head masked": (q, q, for_each, 1), "a dense layer": (q, q, None, 0),
    }  # fmt: skip
    seen: list[dict[str, Any]] = []

    def look(*_: Any) -> None:
        seen.append({})
        with monkeypatch.context() as patched:
            patched.setattr(parallel, "share", lambda _: (0, 2))
            for name, arguments in asked.items():
                with owner.dealing(*arguments) as dealt:
                    seen[-1][name] = dealt

    tiny.pipe.transformer.blocks[0].attn1.register_forward_pre_hook(look)
    tiny.run(num_inference_steps=2)
    (first, *_, last), nothing = seen, dict.fromkeys(asked)
    assert first == nothing, "the first step is dense"
    assert last == nothing | {"alike": (1, 0), "masked": (1, 0)}
    with owner.dealing(q, q, None, 1) as dealt:
        assert dealt is None, "no forward is under way"


def test_tensor_parallel_processes_know_their_heads() -> None:
    mesh = SimpleNamespace(get_local_rank=lambda: 1, size=lambda: 4)
    config = SimpleNamespace(tensor_parallel_config=SimpleNamespace(_mesh=mesh))
    assert parallel.share(SimpleNamespace(_parallel_config=config)) == (1, 4)
    assert parallel.share(SimpleNamespace()) == (0, 1)
