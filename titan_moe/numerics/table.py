"""``python -m titan_moe numerics table``: what we hold, measured line by line; docs/numerics.md shows it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_moe.layer import dispatch
from titan_moe.numerics.compare import Comparison, compare
from titan_moe.numerics.load import Captured
from titan_moe.numerics.runs import STOCK, RunError, Runs, Side

_CONFIGS = Path(__file__).parent.parent.parent / "train_configs"
_TP4 = "--parallelism.tensor_parallel_degree=4 --training.local_batch_size=12"
_EP4, _EP2 = (f"--parallelism.expert_parallel_degree={degree}" for degree in (4, 2))
_HSDP = "--parallelism.data_parallel_replicate_degree=2"

BASES = {"1 rank": "debug_local.toml@1", "FSDP2 x TP2": "debug_fsdp_tp.toml@4"}
WITHOUT_EP = {
    "FSDP4": "debug_local.toml@4 --training.local_batch_size=3",
    "FSDP2 x TP2": BASES["FSDP2 x TP2"],
    "TP4": f"debug_fsdp_tp.toml@4 {_TP4}",
}
WITH_EP = {
    "FSDP4 x EP2": f"debug_fsdp_ep.toml@4 {_EP2}",
    "FSDP4 x EP4": "debug_fsdp_ep.toml@4",
    "HSDP2x2 x EP2": f"debug_fsdp_ep.toml@4 {_EP2} {_HSDP}",
    "FSDP2 x TP2 x EP2": "debug_fsdp_tp_ep.toml@4",
    "FSDP2 x TP2 x EP2, no SP": "debug_fsdp_tp_ep.toml@4 --parallelism.no-enable-sequence-parallel",
    "FSDP2 x TP2 x EP4": f"debug_fsdp_tp_ep.toml@4 {_EP4}",
    "TP4 x EP4": f"debug_fsdp_tp_ep.toml@4 {_TP4} {_EP4}",
}
# Every mesh of WITH_EP runs each dispatcher that serves EP in its first variant, the others run on MAIN.
MAIN, REFERENCE = "FSDP2 x TP2 x EP2", "all_to_all"
DISPATCHERS = {name: variant for name, variant in dispatch.variants().items() if variant.build().serves_ep}
FIRST = [
    name
    for name, variant in DISPATCHERS.items()
    if variant.options == dispatch.load(variant.dispatcher).variants[0]
]
OTHERS = [name for name in DISPATCHERS if name not in FIRST]
PRECISION = {"fp32": "--training.mixed_precision_param=float32", "bf16": ""}
STEPS, STEPS_OF_SHAPES = 5, 20


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A line of the first table. Its dispatcher is "local" without EP."""

    mesh: str
    dispatcher: str

    @property
    def text(self) -> str:
        """As Side reads it."""
        if self.dispatcher == "local":
            return WITHOUT_EP[self.mesh]
        return f"{WITH_EP[self.mesh]} {' '.join(DISPATCHERS[self.dispatcher].flags)}"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A line of the second table: B sequences per data-parallel rank, of L tokens, FSDP2 x TP2 (x EP2)."""

    dispatcher: str
    B: int
    L: int

    def text(self, mesh: str, dispatcher: str) -> str:
        """As Side reads it."""
        shape = f"--training.local_batch_size={self.B} --training.seq_len={self.L}"
        config = (WITHOUT_EP | WITH_EP)[mesh]
        flags = DISPATCHERS[dispatcher].flags if dispatcher in DISPATCHERS else []
        return " ".join([config, *flags, shape, PRECISION["fp32"]])


MESHES = [
    *(Mesh(mesh=mesh, dispatcher="local") for mesh in WITHOUT_EP),
    *(Mesh(mesh=mesh, dispatcher=name) for mesh in WITH_EP for name in FIRST),
    *(Mesh(mesh=MAIN, dispatcher=name) for name in OTHERS),
]
SHAPES = [Shape(dispatcher=name, B=B, L=L) for B in (2, 3) for L in (128, 127) for name in FIRST]


def numbered() -> dict[int, Mesh | Shape]:
    """Every line there is, by the number that the tables show."""
    return dict(enumerate([*MESHES, *SHAPES], start=1))


def write(runs: Runs, wanted: set[int]) -> Iterator[str]:
    """The tables as markdown, line by line as they are measured, then what is beyond tolerance."""
    beyond: list[str] = []
    lines = [(number, line) for number, line in numbered().items() if number in wanted]
    meshes = [(number, line) for number, line in lines if isinstance(line, Mesh)]
    shapes = [(number, line) for number, line in lines if isinstance(line, Shape)]
    if meshes:
        columns = [f"{what}, against {base}" for what in (*PRECISION, "stock bf16") for base in BASES]
        yield _row("", "mesh", "dispatcher", *columns)
        yield _row(*["---"] * (3 + len(columns)))
        for number, mesh in meshes:
            yield _row(str(number), mesh.mesh, mesh.dispatcher, *_mesh_cells(runs, mesh, beyond))
        yield ""
    if shapes:
        yield _row("", "B", "L", "dispatcher", "fp32", "on the baseline's routes", f"{REFERENCE}'s bits")
        yield _row(*["---"] * 7)
        for number, shape in shapes:
            what = (str(number), str(shape.B), str(shape.L), shape.dispatcher)
            yield _row(*what, *_shape_cells(runs, shape, beyond))
        yield ""
    yield f"beyond tolerance: {'; '.join(beyond) or 'nothing'}"


def _mesh_cells(runs: Runs, line: Mesh, beyond: list[str]) -> Iterator[str]:
    for precision, override in PRECISION.items():
        for base, base_text in BASES.items():
            first = _run(runs, f"{base} {precision}", f"{base_text} {override}")
            if line.text == base_text:
                yield ""
                continue
            name = f"{line.mesh} {line.dispatcher} {precision}"
            found = compare(first, _run(runs, name, f"{line.text} {override}"))
            beyond += [f"{name} against {base}: {found.verdict}"] if found.problems else []
            yield _cell(found)
    for base, base_text in BASES.items():
        if line.text == base_text or line.dispatcher not in ("local", REFERENCE):
            yield ""
            continue
        first = _run(runs, f"{base} stock", f"{base_text} {STOCK}")
        try:
            yield _cell(compare(first, _run(runs, f"{line.mesh} stock", f"{line.text} {STOCK}")))
        except RunError:
            yield "does not run"


def _shape_cells(runs: Runs, line: Shape, beyond: list[str]) -> Iterator[str]:
    steps, shape = f"--training.steps={STEPS_OF_SHAPES}", f"B{line.B} L{line.L}"
    trace = f"--routing_replay.path={(runs.folder / f'trace {shape}').resolve()}"

    def run(name: str, mesh: str, dispatcher: str, *further: str) -> Captured:
        return runs.captured(f"{name} {shape}", _side(line.text(mesh, dispatcher)).but(steps), *further)

    base = run("base", "FSDP2 x TP2", "local", "--routing_replay.mode=record", trace)
    free = run(line.dispatcher, MAIN, line.dispatcher)
    replay = ("--routing_replay.mode=replay", trace)
    fixed = run(f"replayed {line.dispatcher}", MAIN, line.dispatcher, *replay)
    for name, found in (("free", compare(base, free)), ("replayed", compare(base, fixed))):
        beyond += [f"{shape} {line.dispatcher} {name}: {found.verdict}"] if found.problems else []
        yield _cell(found)
    said = []
    for name in DISPATCHERS if line.dispatcher == REFERENCE else ():
        if name != REFERENCE and DISPATCHERS[name].build().bitwise_equal_to == "local":
            same = compare(free, run(name, MAIN, name))
            beyond += [] if same.bitwise else [f"{shape} {name} against {REFERENCE}: {same.verdict}"]
            said.append(f"{name}: {'yes' if same.bitwise else 'no'}")
    yield ", ".join(said)


def _run(runs: Runs, name: str, text: str) -> Captured:
    return runs.captured(name, _side(text))


def _side(text: str) -> Side:
    return Side.of(text, folder=_CONFIGS)


def _cell(found: Comparison) -> str:
    """First loss / worst loss / worst gradient."""
    if found.bitwise:
        return "bitwise"
    _, base, candidate = found.losses[0]
    gradient = max(off for off, _ in found.gradients.values())
    first = abs(base - candidate) / abs(base)
    return " / ".join(f"{number:.0e}" if number else "0" for number in (first, found.worst_loss, gradient))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
