"""Every mesh equals one rank: tests/matrix.py, cell by cell; and the judge finds what is planted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from tests.faults import FAULTS
from tests.matrix import MARKS, main, refusal, table_line
from tests.matrix_cell_run import Matrix
from tests.matrix_cells import CELLS, REFUSED, ROOT, Cell
from tests.ranks import close_pools
from titan_moe.trainer.device import norms_keep_short_shards, stages_leave_buffers


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Its seed and references are shared by all cells."""
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=c.name, marks=[] if c.in_ci else [pytest.mark.slow]) for c in CELLS],
)
def test_cell(matrix: Matrix, cell: Cell) -> None:
    if cell.seq_len < cell.tp and not norms_keep_short_shards():
        pytest.skip("refused on this torch: config/rules/mesh.py, sequence_reaches_tp_ranks")
    held = matrix.run(cell)
    assert not held.problems, held


def _flat_offset(moes: list[Any]) -> None:
    for moe in moes:
        FAULTS["flat_offset"](moe)


def _count_made_up_tokens(_: list[Any]) -> None:
    """As torch runs a stage to learn its shapes, without titan_moe.trainer.device's care for its buffers."""
    PipelineStage._compute_outputs = PipelineStage._compute_outputs.__wrapped__  # type: ignore[method-assign]


def _push(moe: Any, _: Any) -> None:
    moe.expert_bias_E += 1.0


def _push_the_bias_of_rank_0(moes: list[Any]) -> None:
    """All by as much, so that its routes stay."""
    if dist.get_rank() == 0:
        moes[0].register_forward_pre_hook(_push)


@pytest.fixture
def _own_workers() -> Iterator[None]:
    """What a fault patched is gone with the workers."""
    yield
    close_pools()


class TestPlanted:
    """The judge is not blind."""

    @pytest.mark.slow  # test_numerics plants it too
    def test_a_flat_offset_is_red(self, matrix: Matrix) -> None:
        held = matrix.run(Cell(tp=2, ep=2, seq_len=127), _flat_offset)
        assert any(problem.startswith("gradients ") for problem in held.problems)

    @pytest.mark.slow
    def test_one_rank_alone_is_red(self, matrix: Matrix) -> None:
        held = matrix.run(Cell(tp=2, ep=2, seq_len=127), _push_the_bias_of_rank_0)
        assert held.problems == ("first_bias of layers.1.moe", "expert_bias of layers.1.moe")

    @pytest.mark.skipif(stages_leave_buffers(), reason="this torch needs no care")
    @pytest.mark.usefixtures("_own_workers")
    def test_tokens_that_a_pipeline_makes_up_are_red(self, matrix: Matrix) -> None:
        held = matrix.run(Cell(ranks=2, pp=2, seq_len=127), _count_made_up_tokens)
        assert "first_load of layers.1.moe" in held.problems
        assert not any(problem.startswith("gradients ") for problem in held.problems)


def test_the_page_has_every_cell_and_every_refusal() -> None:
    """docs/meshes.md is what the command prints; a cell or a message that changed makes it stale."""
    page = (ROOT / "docs" / "meshes.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    lines = [line for line in page.splitlines() if line.endswith("  held")]
    assert len(lines) == len(CELLS)
    for cell, line in zip(CELLS, lines, strict=True):
        assert line.startswith(table_line(cell, None, "").rstrip())
    for arguments in REFUSED:
        assert f"  {arguments}\n      {refusal(arguments)}\n" in page
    assert f"| {len(CELLS)} cells of " in (ROOT / "docs" / "proof.md").read_text()


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_combinations_say_why(arguments: str) -> None:
    assert len(refusal(arguments).splitlines()) == 1


def test_what_runs_is_not_refused() -> None:
    assert refusal("--training.steps 1") == ""


class TestCommand:
    def test_a_name_that_fits_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["no-such-cell"])
        assert "no cell holds no-such-cell" in capsys.readouterr().err

    def test_a_part_is_not_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["PP4", "--write", str(tmp_path / "x.md")])
        assert "--write wants all cells" in capsys.readouterr().err
