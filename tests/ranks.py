"""Run one test body on several ranks: as real gloo processes, or as one process under LocalTensor.

    def body(ctx: RankContext, chunks: list[Tensor]) -> Tensor:
        x = ctx.per_rank(chunks)
        return funcol.all_reduce(x, "sum", ctx.device_mesh((ctx.world_size,), ("ep",)))

    results = run_ranks(body, 4, chunks, mode=mode)  # results[r] is what rank r returned

gloo (spawned, rendezvous by file, no ports) is the real thing. Its workers live as long as the test session
and run one body after another, because a fresh process pays for importing torch and torchtitan. A body is
pickled by reference, so it must be a top-level function of an importable module, and a monkeypatch of the
test process does not reach it. What goes wrong on a rank ends as `RankError` or `RankTimeout`, not as a hang.

local_tensor runs the body once in this process, and every tensor stands for one tensor per rank. It is fast,
and it is a simulation: a body cannot branch on what differs between ranks, sizes included (``n == 0`` is
False when the ranks differ, ``n > 0`` raises), and ``dist.get_rank()`` is 0 (use ctx.rank or the mesh).
"""

import atexit
import contextlib
import copy
import dataclasses
import faulthandler
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode, _LocalDeviceMesh
from torch.distributed._local_tensor._c10d import _local_functional_all_to_all_single
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

Mode = Literal["gloo", "local_tensor"]

_START_TIMEOUT_S = 180.0  # a loaded 2-core machine needs a while to import torchtitan four times
_SYNC_TIMEOUT_S = 20.0
_GRACE_S = 3.0  # after the first failure, the other ranks get this long to answer
_GROUP_TIMEOUT = timedelta(seconds=300)  # a backstop: the parent kills a hanging rank much earlier
_MAX_GROUPS = 200  # per worker; a gloo group holds 7 file descriptors and 3 threads


class RankFailure(NamedTuple):
    """How one rank failed: exception type ("died" or "no answer" where there is none), message, traceback."""

    kind: str
    message: str
    details: str


class RankError(RuntimeError):
    """At least one rank raised or died.

    Attributes:
        failures: By rank, in order of arrival; the first is the likely cause.
    """

    def __init__(self, world_size: int, failures: dict[int, RankFailure]) -> None:
        self.failures = failures
        told: dict[tuple[str, str], int] = {}
        parts = []
        for rank, failure in failures.items():
            first = told.setdefault(failure[:2], rank)
            details = f"\n{failure.details}" if first == rank else f" (as on rank {first})"
            parts.append(f"rank {rank} of {world_size}: {failure.kind}: {failure.message}{details}")
        super().__init__("\n".join(parts))


class RankTimeout(TimeoutError):
    """Some ranks did not answer in time, and none failed.

    Attributes:
        ranks: Those that did not answer.
    """

    def __init__(self, world_size: int, timeout_s: float, stacks: dict[int, str]) -> None:
        self.ranks = tuple(stacks)
        where = "\n".join(f"rank {rank} was at\n{stack}" for rank, stack in stacks.items())
        super().__init__(
            f"ranks {list(stacks)} of {world_size} did not answer within {timeout_s:g} s\n{where}"
        )


@dataclasses.dataclass(frozen=True)
class RankContext:
    """What a body knows about where it runs.

    Attributes:
        rank: This rank. Under local_tensor a SymInt with one value per rank: compute with it, do not branch.
        world_size: How many ranks.
        mode: "gloo" or "local_tensor".
    """

    rank: int
    world_size: int
    mode: Mode
    _meshes: dict[Any, DeviceMesh] = dataclasses.field(default_factory=dict, repr=False)

    def per_rank(self, values: Sequence[Any]) -> Any:
        """This rank's element of `values`, one tensor or int per rank; shapes may differ.

        A tensor is copied and is a leaf, with the requires_grad of the first element.
        """
        if len(values) != self.world_size:
            raise ValueError(f"per_rank got {len(values)} values for {self.world_size} ranks")
        if self.mode == "gloo":
            own = values[self.rank]
            if not isinstance(own, torch.Tensor):
                return own
            return own.detach().clone().requires_grad_(values[0].requires_grad)
        if isinstance(values[0], int):
            return _rank_int(values)
        # A tensor made inside the body is itself a LocalTensor: take each rank's part of it.
        parts = {r: _part(t, r).detach().clone() for r, t in enumerate(values)}
        return LocalTensor(parts).requires_grad_(values[0].requires_grad)

    def replicate(self, value: torch.Tensor) -> torch.Tensor:
        """A copy of `value` for each rank: `per_rank` with equal elements."""
        return self.per_rank([value] * self.world_size)

    def device_mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """The CPU mesh of this shape over all ranks; made once per pool and shared by its bodies."""
        key = (shape, names)
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return self._meshes[key]


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    mode: Mode = "gloo",
    timeout_s: float = 60.0,
    in_step: bool = True,
) -> list[Any]:
    """Runs ``fn(ctx, *args)`` on every rank and returns the results in rank order.

    Args:
        fn: The body; its first parameter is a `RankContext`. It starts with the same seed on all ranks.
        world_size: How many ranks.
        *args: The same for every rank; tensors are copied.
        mode: "gloo" or "local_tensor".
        timeout_s: For the body alone; starting the workers is not counted.
        in_step: All ranks run as many collectives in each of their groups; sends and receives count too.

    Returns:
        One result per rank: tensors (detached; a DTensor's local part), numbers, strings, and lists, tuples,
        dicts and dataclasses of them.

    Raises:
        RankError: A rank raised or died, or the ranks ran different numbers of collectives.
        RankTimeout: A rank hangs. The workers are killed; the next call starts new ones.
    """
    if mode == "local_tensor":
        return _run_local(fn, world_size, args, timeout_s)
    if getattr(fn, "__module__", None) == "__main__":
        raise ValueError(
            f"run_ranks: {fn} lives in __main__, which a worker cannot import; move it to a module"
        )
    try:
        payload = pickle.dumps(fn)
    except (pickle.PicklingError, AttributeError) as error:
        raise ValueError(f"run_ranks needs a top-level function, got {fn}: {error}") from error
    if world_size not in _POOLS:
        _POOLS[world_size] = _Pool(world_size)
    return _POOLS[world_size].run(payload, _to_bytes(args), timeout_s, in_step=in_step)


def close_pools() -> None:
    """Kills all workers. Called when the test session ends; harmless when there are none."""
    for pool in list(_POOLS.values()):
        pool.close()


def worker_pids(world_size: int) -> list[int]:
    """Process ids of the living pool of this size, in rank order; empty when there is none."""
    return [process.pid for process in _POOLS[world_size].processes] if world_size in _POOLS else []


class _Answer(NamedTuple):
    """What a worker sends after a body: its result as bytes, or a failure; and its collectives per group."""

    result: bytes | None
    failure: RankFailure | None
    collectives: dict[str, int]


class _Pool:
    """Workers of one world size, alive until closed."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix="titan_moe_ranks_"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.collectives: dict[int, dict[str, int]] = {rank: {} for rank in range(world_size)}  # so far
        try:
            for rank in range(world_size):
                self._spawn(rank)
            self._raise_failures(self._collect(_START_TIMEOUT_S), _START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def run(self, fn: bytes, args: bytes, timeout_s: float, *, in_step: bool) -> list[Any]:
        """Runs one body; keeps the pool only if every rank answered and all are still in step."""
        keep = False
        try:
            self._send(("run", _absolute_path(), fn, args))
            answers = self._collect(timeout_s)
            problem = "" if len(answers) < self.world_size else self._sync(answers, in_step=in_step)
            keep = len(answers) == self.world_size and not problem
            self._raise_failures(answers, timeout_s)
            if problem:
                raise RankError(self.world_size, {0: RankFailure("out of step", problem, "")})
            keep = max(len(answer.collectives) for answer in answers.values()) <= _MAX_GROUPS
            return [_from_bytes(answers[rank].result) for rank in range(self.world_size)]
        finally:
            if not keep:
                self.close()

    def _sync(self, answers: dict[int, _Answer], *, in_step: bool) -> str:
        """Why the ranks are no longer in step after a body; empty when they are."""
        counts: dict[str, dict[int, int]] = {}
        for rank, answer in sorted(answers.items()):
            before, self.collectives[rank] = self.collectives[rank], answer.collectives
            for group, count in answer.collectives.items():
                counts.setdefault(group, {})[rank] = count - before.get(group, 0)
        uneven = {group: by_rank for group, by_rank in counts.items() if len(set(by_rank.values())) > 1}
        if uneven and in_step:
            return f"the ranks ran different numbers of collectives; by group and rank: {uneven}"
        self._send(("sync",))
        synced = self._collect(_SYNC_TIMEOUT_S)
        done = [rank for rank, answer in synced.items() if answer.failure is None]
        return "" if len(done) == self.world_size else f"only ranks {done} passed a barrier after the body"

    def close(self) -> None:
        """Kills the workers and forgets the pool."""
        _POOLS.pop(self.world_size, None)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _spawn(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ, OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank))
        environment["WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"] = str(self.world_size)
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve in a container
        code = (
            f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import _work; _work()"
        )
        channel = [str(theirs.fileno()), str(self.folder), str(os.getpid())]
        with theirs, open(self.folder / f"{rank}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", code, json.dumps(_absolute_path()), *channel],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent only, which then kills the workers
            )
        self.processes.append(process)
        self.connections.append(Connection(ours.detach()))

    def _send(self, message: tuple[Any, ...]) -> None:
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead rank shows in _collect
                connection.send(message)

    def _collect(self, timeout_s: float) -> dict[int, _Answer]:
        """Answers by rank in order of arrival; ranks that do not answer in time are missing."""
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            waiting = {c: r for r, c in enumerate(self.connections) if r not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]
                try:
                    answers[rank] = connection.recv()
                except (EOFError, OSError):
                    answers[rank] = _Answer(None, self._death(rank), {})
                if answers[rank].failure is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return answers

    def _death(self, rank: int) -> RankFailure:
        code = self.processes[rank].wait()
        how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        return RankFailure("died", how, self._log_tail(rank))

    def _log_tail(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text(errors="replace")[-4000:]

    def _raise_failures(self, answers: dict[int, _Answer], timeout_s: float) -> None:
        """Raises if an answer is a failure or missing."""
        failures = {rank: answer.failure for rank, answer in answers.items() if answer.failure is not None}
        stacks = self._stacks([rank for rank in range(self.world_size) if rank not in answers])
        if failures:
            # A death comes first: its neighbours' "connection closed" may have arrived before it.
            ordered = dict(sorted(failures.items(), key=lambda item: item[1].kind != "died"))
            missing = {rank: RankFailure("no answer", "it was at", stack) for rank, stack in stacks.items()}
            raise RankError(self.world_size, ordered | missing)
        if stacks:
            raise RankTimeout(self.world_size, timeout_s, stacks)

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Where these workers are now, all threads, by their own faulthandler."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        if ranks:
            time.sleep(0.3)
        files = {rank: self.folder / f"{rank}.stack" for rank in ranks}
        return {
            rank: file.read_text(errors="replace") if file.exists() else self._log_tail(rank)
            for rank, file in files.items()
        }


_POOLS: dict[int, _Pool] = {}
atexit.register(close_pools)


def _absolute_path() -> list[str]:
    return [entry or os.getcwd() for entry in sys.path]


def _to_bytes(value: Any) -> bytes:
    # torch.save copies tensors into the bytes; pickle alone would send file descriptors of shared memory.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(value: bytes | None) -> Any:
    return torch.load(io.BytesIO(value or b""), weights_only=False)


def _work() -> None:
    """A worker's life: join the group, then run bodies until the parent is gone."""
    connection, folder = Connection(int(sys.argv[2])), sys.argv[3]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    threading.Thread(target=_die_with, args=(int(sys.argv[4]), folder), daemon=True).start()
    stack_file = open(f"{folder}/{rank}.stack", "w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    torch.set_num_threads(1)
    import titan_moe.trainer  # noqa: F401  (sets the device type, which torchtitan reads at import)

    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timeout=_GROUP_TIMEOUT, rank=rank, world_size=world_size)
    ctx = RankContext(rank, world_size, "gloo")
    connection.send(_Answer(None, None, {}))
    while True:
        try:
            command, *message = connection.recv()
        except EOFError:  # the parent is gone
            shutil.rmtree(folder, ignore_errors=True)
            return
        if command == "sync":
            connection.send(_answer(dist.barrier))
        else:
            connection.send(_answer(lambda message=message: _run_body(ctx, *message)))


def _die_with(parent: int, folder: str) -> None:
    # The main thread may be inside a collective when the parent is killed, so it cannot be the one to notice.
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _run_body(ctx: RankContext, path: list[str], fn: bytes, args: bytes) -> bytes:
    sys.path[:] = path
    environment, default_dtype = dict(os.environ), torch.get_default_dtype()
    try:
        torch.manual_seed(0)
        return _to_bytes(_of_rank(pickle.loads(fn)(ctx, *_from_bytes(args)), ctx.rank))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(default_dtype)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        _clear_sharding_prop_cache()  # its entries name the meshes of this body


def _answer(action: Callable[[], bytes | None]) -> _Answer:
    result, failure = None, None
    try:
        result = action()
    except BaseException as error:  # pytest's own Failed and Skipped are no Exception
        failure = RankFailure(type(error).__name__, str(error), traceback.format_exc())
    groups = dist.distributed_c10d._world.pg_names
    # A mesh axis of size 1 has a fake group, which counts nothing.
    real = {name: group for group, name in groups.items() if dist.get_backend(group) == "gloo"}
    collectives = {name: group._get_sequence_number_for_group() for name, group in real.items()}
    return _Answer(result, failure, collectives)


def _of_rank(value: Any, rank: int) -> Any:
    """The part of a result that belongs to one rank, detached."""
    if isinstance(value, torch.Tensor):
        return _part(value, rank).detach().clone()
    if isinstance(value, torch.SymInt):
        return value.node._local_ints[rank] if isinstance(value.node, LocalIntNode) else int(value)
    if isinstance(value, dict):
        return {key: _of_rank(item, rank) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_of_rank(item, rank) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_of_rank(item, rank) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        clone = copy.copy(value)
        for item in dataclasses.fields(value):
            object.__setattr__(clone, item.name, _of_rank(getattr(value, item.name), rank))
        return clone
    return value


def _part(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    return tensor._local_tensors[rank] if isinstance(tensor, LocalTensor) else tensor


def _run_local(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout_s: float) -> list[Any]:
    if dist.is_initialized():
        raise RuntimeError("run_ranks: this process already has a process group; a test left it behind")
    ranks = range(world_size)
    own_args = _from_bytes(_to_bytes(args))
    with _alarm(world_size, timeout_s), _local_tensor_gaps(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            with _StrictMode(world_size):
                ctx = RankContext(_rank_int(ranks), world_size, "local_tensor")
                result = fn(ctx, *own_args)
                return [_of_rank(result, rank) for rank in ranks]
        except RankTimeout:
            raise
        except Exception as error:
            failure = RankFailure(type(error).__name__, str(error), traceback.format_exc())
            raise RankError(world_size, dict.fromkeys(ranks, failure)) from error
        finally:
            dist.destroy_process_group()
            _clear_sharding_prop_cache()


def _rank_int(values: Sequence[int]) -> Any:
    """An int with one value per rank."""
    return values[0] if len(set(values)) == 1 else torch.SymInt(LocalIntNode(dict(enumerate(values))))


@contextlib.contextmanager
def _alarm(world_size: int, timeout_s: float) -> Iterator[None]:
    """Raises RankTimeout in the main thread after timeout_s; there is no process to kill here."""

    def ring(_signal: int, frame: FrameType | None) -> None:
        stack = "".join(traceback.format_stack(frame))
        raise RankTimeout(world_size, timeout_s, dict.fromkeys(range(world_size), stack))

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, ring)
    others_left_s, _ = signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
        if others_left_s:  # pytest-timeout's, which uses the same timer
            signal.setitimer(signal.ITIMER_REAL, max(0.01, others_left_s - (time.monotonic() - started)))


class _AlwaysEmpty(dict[int, Any]):
    """A cache that never answers."""

    def __contains__(self, key: object) -> bool:
        return False


class _StrictMode(LocalTensorMode):
    """LocalTensorMode that refuses what it would get wrong without a word.

    It takes a bool on which the ranks disagree for true, and carries out an all-to-all by its input splits
    alone, whatever the output splits say. It keys a mesh's coordinates by its id(), which the next mesh may
    have: `mesh["tp"]` lives for one expression, and `mesh["dp"]` gets its address now and then.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self._coordinate_cache = _AlwaysEmpty()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            _check_splits(*args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        node = getattr(result, "node", None)
        if isinstance(node, LocalIntNode) and isinstance(next(iter(node._local_ints.values())), bool):
            if func is torch.ops.aten.sym_is_contiguous.default:
                return False  # one rank with a single row is contiguous whatever its strides are
            raise RuntimeError(
                f"ranks disagree on {func}: {node._local_ints}; branching on it needs mode='gloo'"
            )
        return result


def _check_splits(x: LocalTensor, output_splits: list[Any], input_splits: list[Any], group: Any) -> None:
    """Raises unless each rank expects from each peer what that peer sends."""
    ones = [1] * len(input_splits)
    sent = {r: torch.tensor([_of_rank(size, r) for size in input_splits]) for r in x._local_tensors}
    arriving = _local_functional_all_to_all_single(LocalTensor(sent), ones, ones, group)
    for rank, sizes in arriving._local_tensors.items():
        expected = [_of_rank(size, rank) for size in output_splits]
        if sizes.tolist() != expected:
            raise RuntimeError(
                f"all_to_all_single: rank {rank} has output splits {expected}, "
                f"its peers send {sizes.tolist()}"
            )


@contextlib.contextmanager
def _local_tensor_gaps() -> Iterator[None]:
    """Fills three holes of torch 2.13's LocalTensor.

    Where ranks have different shapes, ``x[:, 0]`` asks a comparison of sizes whether it is statically known,
    which its constant does not answer (python_variable_indexing.cpp), and DTensor hashes the strides of
    uneven shards, which a SymInt refuses. A mesh's coordinates, which _StrictMode does not let it keep by
    id(), are kept by what the mesh is, as torch 2.14 does: made anew each time they take most of a test.
    """
    plain_hash, plain_coordinate = torch.SymInt.__hash__, _LocalDeviceMesh.get_coordinate
    coordinates: dict[Any, Any] = {}

    def hash_per_rank(size: torch.SymInt) -> int:
        node = size.node
        return hash(tuple(node._local_ints.items())) if isinstance(node, LocalIntNode) else plain_hash(size)

    def coordinate_by_value(mesh: DeviceMesh) -> Any:
        key = (mesh._layout, mesh._flatten_rank_map)
        if key not in coordinates:
            coordinates[key] = plain_coordinate(mesh)
        return coordinates[key]

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, _LocalDeviceMesh, "get_coordinate", staticmethod(plain_coordinate))
        _LocalDeviceMesh.get_coordinate = staticmethod(coordinate_by_value)  # type: ignore[method-assign]
        stack.callback(setattr, torch.SymInt, "__hash__", plain_hash)
        torch.SymInt.__hash__ = hash_per_rank  # type: ignore[method-assign]
        if not hasattr(torch._C._SymNode, "statically_known_true"):
            stack.callback(delattr, torch._C._SymNode, "statically_known_true")
            torch._C._SymNode.statically_known_true = torch._C._SymNode.guard_bool
        yield
