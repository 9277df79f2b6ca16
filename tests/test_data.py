"""The training text: shipped tokenizer, corpora, packing, and a stream that no mesh or resume changes."""

import dataclasses
import itertools
import json
import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from titan_moe.trainer.data import TOKENIZER_DIR, DataError, TextDataLoader, bpe
from titan_moe.trainer.data.__main__ import main
from titan_moe.trainer.data.corpus import Corpus, files_corpus, stdlib_corpus
from titan_moe.trainer.data.packing import PackedStream

BOS, EOS = 256, 257


class ByteTokenizer(BaseTokenizer):
    """One token per UTF-8 byte, so that an expected sequence can be written down."""

    def encode(self, text, add_bos=False, add_eos=False):
        return [BOS] * add_bos + list(text.encode()) + [EOS] * add_eos

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode()

    def get_vocab_size(self):
        return 258


class InOrder(Corpus):
    """A corpus read as it is listed, for examples worked by hand."""

    def order(self, *, seed, epoch):
        return list(range(len(self)))


@pytest.fixture
def jsonl(tmp_path):
    """23 documents of 1 to 40 characters: documents shorter, equal to and longer than a sequence."""
    texts = [chr(ord("a") + i) * (1 + (i * 17) % 40) for i in range(23)]
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return HuggingFaceTokenizer.Config().build(tokenizer_path=str(TOKENIZER_DIR))


def build(path, *, world=1, rank=0, batch=1, seq_len=8, tokenizer=None, **config):
    config = {"source": "files", "paths": [str(path)]} | config if path else config
    return TextDataLoader.Config(**config).build(
        dp_world_size=world,
        dp_rank=rank,
        tokenizer=tokenizer or ByteTokenizer(),
        seq_len=seq_len,
        local_batch_size=batch,
        snapshot_every_n_steps=1,
    )


def rows(batch):
    """A batch as a list of (input, positions, label) rows, comparable with ==."""
    inputs, labels = batch
    return list(zip(inputs["input"].tolist(), inputs["positions"].tolist(), labels.tolist(), strict=True))


def reference_stream(path, *, seq_len=8, seed=0):
    """The endless stream in plain Python, with no code of titan_moe.trainer.data.packing in it."""
    corpus, tokenizer, flat = files_corpus([str(path)]), ByteTokenizer(), []
    for epoch in itertools.count():
        for index in corpus.order(seed=seed, epoch=epoch):
            ids = tokenizer.encode(corpus.read(index), add_bos=True, add_eos=True)
            for place, (token, label) in enumerate(itertools.pairwise(ids)):
                flat.append((token, place, label))
                if len(flat) == seq_len:
                    position, positions = -1, []
                    for _, place_in_document, _ in flat:
                        position = 0 if place_in_document == 0 else position + 1
                        positions.append(position)
                    yield [t for t, _, _ in flat], positions, [label for _, _, label in flat]
                    flat = []


def reference(path, count, **kwargs):
    return list(itertools.islice(reference_stream(path, **kwargs), count))


def global_batches(loaders, *, accumulation, steps):
    """Per optimizer step, the rows of all ranks and accumulation steps in stream order."""
    iterators = [iter(loader) for loader in loaders]
    return [
        [row for _ in range(accumulation) for it in iterators for row in rows(next(it))] for _ in range(steps)
    ]


# The shipped tokenizer


def test_shipped_tokenizer_has_2048_entries_and_loads_in_torchtitan(tokenizer):
    assert tokenizer.get_vocab_size() == bpe.VOCAB_SIZE == 2048
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert sorted(tokenizer.get_vocab().values()) == list(range(2048))
    assert tokenizer.encode("x", add_bos=True, add_eos=True)[:: len("x") + 1] == [0, 1]


@pytest.mark.parametrize(
    "text",
    ["", " ", "def f(x):\n\treturn x  # tail \n\n", "naïve Ωmega 漢字 🙂\u200b\x00\x7f", "\r\n \u2028\ufeff"],
    ids=["empty", "space", "code", "unicode", "separators"],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_every_kind_of_code_point(tokenizer):
    text = "".join(chr(c) for c in range(0, 0x110000, 61) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rebuild_is_identical_byte_for_byte():
    code, line = bpe.check_tokenizer()  # trains anew and compares the files' bytes
    if code == bpe.OTHER_CORPUS:
        pytest.skip(line)
    assert (code, line.split(":")[0]) == (0, "identical"), line


def test_check_tells_another_tokenizer_from_another_library(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(TOKENIZER_DIR, tmp_path / "copy")
    command = ["build-tokenizer", "--check", "--out", str(folder)]
    manifest = json.loads((folder / "manifest.json").read_text())
    shipped = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(bpe, "build_assets", lambda corpus: shipped)  # the training itself is tested above
    monkeypatch.setattr(bpe, "training_digest", lambda corpus: manifest["training_sha256"])
    assert main(command) == 0
    (folder / "tokenizer.json").write_bytes(shipped["tokenizer.json"].replace(b"self", b"slef", 1))
    assert main(command) == 1
    assert "different: tokenizer.json" in capsys.readouterr().err
    monkeypatch.setattr(bpe, "training_digest", lambda corpus: "0" * 64)
    assert main(command) == 3
    assert f"recorded Python {manifest['python']}" in capsys.readouterr().err
    assert main(["build-tokenizer"]) == 3, "the shipped folder is never rewritten from another text"
    assert main(["build-tokenizer", "--out", str(tmp_path / "new")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == shipped
    (folder / "manifest.json").unlink()
    assert main(command) == 1


# Packing


def test_packing_worked_by_hand(tmp_path):
    # "abc" -> B a b c E and "d" -> B d E: pairs (B,a)(a,b)(b,c)(c,E) (B,d)(d,E). L = 3: an epoch is two rows.
    (tmp_path / "1.txt").write_text("abc")
    (tmp_path / "2.txt").write_text("d")
    corpus = InOrder(files_corpus([str(tmp_path / "*.txt")]).files, label="hand")
    stream = PackedStream(
        corpus,
        ByteTokenizer(),
        seq_len=3,
        local_batch_size=2,
        dp_rank=0,
        dp_world_size=1,
        seed=0,
        infinite=True,
    )
    a, b, c, d = b"abcd"
    for batch in itertools.islice(stream, 2):  # the second epoch starts without a gap
        assert batch.inputs["input"].tolist() == [[BOS, a, b], [c, BOS, d]]
        assert batch.inputs["positions"].tolist() == [[0, 1, 2], [0, 0, 1]]
        assert batch.labels_BL.tolist() == [[a, b, c], [EOS, d, EOS]]
        assert {batch.labels_BL.dtype, *(t.dtype for t in batch.inputs.values())} == {torch.int64}
    assert batch.cursor == {"epoch": 1, "document": 1, "token": 2, "sequence": 4}


def test_stream_equals_the_reference_over_epochs(jsonl):
    loader = iter(build(jsonl, batch=3))
    got = [row for _ in range(60) for row in rows(next(loader))]
    assert got == reference(jsonl, 180)
    assert all(max(positions) < 8 for _, positions, _ in got)


def test_stdlib_needs_nothing_and_reads_passages(tokenizer):
    loader = build(None, tokenizer=tokenizer, seq_len=64)
    corpus = stdlib_corpus()
    text = corpus.read(corpus.order(seed=0, epoch=0)[0])
    argparse = next(file for file in corpus.files if file.name == "argparse.py")
    assert len(argparse) > 10
    assert "".join(map(argparse.read, range(len(argparse)))) == argparse.path.read_text()
    inputs, labels = next(iter(loader))
    assert inputs["input"][0].tolist() == tokenizer.encode(text, add_bos=True)[:64]
    assert text.startswith(tokenizer.decode(labels[0].tolist()))
    assert inputs["positions"][0].tolist() == list(range(64))
    names = {file.name for file in corpus.files}
    assert {"argparse.py", "unittest/case.py"} <= names
    assert not any(name.startswith(("test/", "_sysconfigdata", "site-packages/")) for name in names)


# Mesh invariance


@pytest.mark.parametrize(
    ("world", "batch", "accumulation"),
    [(1, 12, 1), (1, 1, 12), (2, 6, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1), (6, 1, 2), (12, 1, 1)],
)
def test_global_batch_is_the_same_on_every_mesh(jsonl, world, batch, accumulation):
    loaders = [build(jsonl, world=world, rank=rank, batch=batch) for rank in range(world)]
    got = global_batches(loaders, accumulation=accumulation, steps=8)
    assert [row for step in got for row in step] == reference(jsonl, 96)
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1


def test_invariance_check_sees_a_loader_in_rank_local_order(jsonl):
    class RankLocal(Corpus):  # what sharding the documents over ranks does
        def order(self, *, seed, epoch):
            return super().order(seed=seed, epoch=epoch)[self.rank :: 2]

    loaders = [build(jsonl, world=2, rank=rank, batch=3) for rank in range(2)]
    for rank, loader in enumerate(loaders):
        loader.dataset.corpus.__class__, loader.dataset.corpus.rank = RankLocal, rank
        loader.dataset.dp_world_size, loader.dataset.dp_rank = 1, 0
    got = global_batches(loaders, accumulation=2, steps=2)
    assert [row for step in got for row in step] != reference(jsonl, 24)


# State and resume


@pytest.mark.parametrize("stop", [0, 1, 5, 13, 14, 40], ids=lambda n: f"after{n}")
@pytest.mark.parametrize(
    "new_mesh", [(2, 2), (1, 1), (4, 1), (3, 2), (1, 5)], ids=lambda m: f"W{m[0]}B{m[1]}"
)
def test_resume_continues_the_stream_on_any_mesh(jsonl, stop, new_mesh):
    saving = build(jsonl, world=2, rank=1, batch=2)
    batches = iter(saving)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(saving.state_dict()))  # plain ints and strings survive any storage
    assert state["sequence"] == 4 * stop
    world, batch = new_mesh
    loaders = [build(jsonl, world=world, rank=rank, batch=batch) for rank in range(world)]
    for loader in loaders:
        loader.load_state_dict(state)
        assert loader.state_dict() == state
    got = global_batches(loaders, accumulation=1, steps=10)
    want = reference(jsonl, 4 * stop + 10 * world * batch)[4 * stop :]
    assert [row for step in got for row in step] == want


def test_resume_test_sees_a_position_that_is_one_token_off(jsonl):
    loader = build(jsonl, batch=2)
    state = loader.state_dict()
    loader.load_state_dict(state | {"token": state["token"] + 1})
    assert rows(next(iter(loader))) != reference(jsonl, 2)


def test_resume_inside_a_document_of_the_standard_library(tokenizer):
    first = build(None, tokenizer=tokenizer, seq_len=32, batch=2)
    batches = iter(first)
    for _ in range(11):
        next(batches)
    state = first.state_dict()
    assert state["token"] > 0
    second = build(None, tokenizer=tokenizer, seq_len=32, batch=2)
    second.load_state_dict(state)
    for (inputs, labels), (inputs2, labels2) in itertools.islice(zip(batches, second, strict=False), 5):
        assert torch.equal(labels, labels2)
        assert all(torch.equal(inputs[key], inputs2[key]) for key in ("input", "positions"))
    assert first.state_dict() == second.state_dict()


def test_state_survives_a_distributed_checkpoint(jsonl, tmp_path):
    saving = build(jsonl, batch=2)
    batches = iter(saving)
    for _ in range(7):
        next(batches)
    dcp.save({"dataloader": saving}, checkpoint_id=tmp_path / "step-7", no_dist=True)
    resumed = build(jsonl, batch=7)
    dcp.load({"dataloader": resumed}, checkpoint_id=tmp_path / "step-7", no_dist=True)
    assert resumed.state_dict() == saving.state_dict()
    assert rows(next(iter(resumed))) == reference(jsonl, 21)[14:]


def test_iter_continues_where_the_state_stands(jsonl):
    loader = build(jsonl)
    got = [rows(next(iter(loader)))[0] for _ in range(5)]
    assert got == reference(jsonl, 5)


def test_epochs_are_reshuffled_as_a_function_of_seed_and_epoch(jsonl):
    corpus = files_corpus([str(jsonl)])
    orders = {
        (seed, epoch): tuple(corpus.order(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(23)) for order in orders.values())
    assert orders[0, 1] == tuple(files_corpus([str(jsonl)]).order(seed=0, epoch=1))
    assert orders[0, 0][:6] == (22, 11, 3, 14, 0, 17), "a new order would silently change every resumed run"
    assert reference(jsonl, 9) != reference(jsonl, 9, seed=1)
    assert rows(next(iter(build(jsonl, batch=9, seed=1)))) == reference(jsonl, 9, seed=1)


@pytest.mark.parametrize(("world", "batch"), [(1, 1), (2, 3), (3, 2), (5, 1)])
def test_finite_loader_ends_at_the_same_batch_on_all_ranks(jsonl, world, batch):
    corpus = files_corpus([str(jsonl)])
    num_rows = sum(len(corpus.read(i)) + 1 for i in range(len(corpus))) // 8
    loaders = [build(jsonl, world=world, rank=r, batch=batch, infinite=False) for r in range(world)]
    got = [[rows(b) for b in loader] for loader in loaders]
    assert {len(g) for g in got} == {num_rows // (world * batch)}
    in_order = [row for step in zip(*got, strict=True) for part in step for row in part]
    assert in_order == reference(jsonl, len(in_order))
    assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1
    resumed = build(jsonl, world=world, batch=batch, infinite=False)
    resumed.load_state_dict(loaders[0].state_dict())
    assert list(resumed) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(jsonl, workers):
    first = build(jsonl, world=2, rank=1, batch=2, num_workers=workers)
    batches = iter(first)
    want = reference(jsonl, 60)
    for step in range(5):
        assert rows(next(batches)) == want[4 * step + 2 : 4 * step + 4]
    assert first.state_dict()["sequence"] == 20, "what workers prepared ahead is not part of the state"
    del batches
    second = build(jsonl, world=1, batch=4, num_workers=3 - workers, persistent_workers=True)
    second.load_state_dict(first.state_dict())
    assert [row for b in itertools.islice(second, 3) for row in rows(b)] == want[20:32]
    finite = [rows(b) for b in build(jsonl, batch=4, num_workers=workers, infinite=False)]
    assert finite == [rows(b) for b in build(jsonl, batch=4, infinite=False)]


# Sources and errors


def test_files_are_read_once_in_the_order_given(tmp_path):
    (tmp_path / "b.md").write_bytes(b"caf\xe9")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"body": "x"}\r\n\n  \n{"body": "\\u00e9y", "n": 1}')
    corpus = files_corpus([str(tmp_path / "b.md"), str(tmp_path / "*")], text_key="body")
    assert [corpus.read(i) for i in range(len(corpus))] == ["caf\ufffd", "first", "x", "éy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnot json\n', r"d\.jsonl:2: not a line of UTF-8 JSON"),
        (
            '{"text": "a"}\n\n{"txt": "b"}\n',
            r"d\.jsonl:3: .*text_key 'text' must hold a string, found only \['txt'\]",
        ),
        ('{"text": 3}', r"d\.jsonl:1: .* found int"),
        ('["a"]', r"d\.jsonl:1: expected a JSON object, found list"),
        ('{"text": "\\ud800"}', r"d\.jsonl:1: 'text' is not valid Unicode"),
        ("\n\n", r"holds no document"),
    ],
    ids=["not-json", "no-key", "not-text", "not-object", "surrogate", "empty"],
)
def test_bad_jsonl_is_refused_at_once(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / "d.jsonl")
    assert "\n" not in str(caught.value)


def test_unusable_paths(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(DataError, match=r"paths: '.*none\*\.txt' matches no file under "):
        build(tmp_path / "none*.txt")
    with pytest.raises(DataError, match="it is a folder"):
        build(tmp_path)
    with pytest.raises(DataError, match=r"x\.gz is binary"):
        build(tmp_path / "x.gz")


def test_corpus_that_gives_no_batch(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(
        DataError, match=r"2 ranks x 3 sequences x 8 tokens, and dataloader.infinite is false"
    ):
        next(iter(build(tmp_path / "short.txt", world=2, batch=3, infinite=False)))
    assert len(rows(next(iter(build(tmp_path / "short.txt", world=2, batch=3))))) == 3, (
        "infinite loops over it"
    )
    silent = ByteTokenizer()
    silent.encode = lambda text, add_bos, add_eos: []
    with pytest.raises(DataError, match="no document of the corpus gives a pair"):
        next(iter(build(tmp_path / "short.txt", tokenizer=silent)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "files"}, 'source = "files" needs dataloader.paths'),
        ({"paths": ["a"]}, 'read only with dataloader.source = "files"'),
        ({"source": "web"}, r"dataloader.source \('web'\) must be"),
        ({"dataset": "c4"}, r"dataset \('c4'\) .* Hugging Face"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(DataError, match=message):
        TextDataLoader.Config(**fields)


def test_validator_can_replace_infinite():
    assert dataclasses.replace(TextDataLoader.Config(), infinite=False).infinite is False


def test_foreign_and_truncated_states_are_refused(jsonl, tmp_path, tokenizer):
    loader = build(jsonl)
    state = loader.state_dict()
    with pytest.raises(DataError, match="has no epoch, token: it is truncated"):
        loader.load_state_dict({key: v for key, v in state.items() if key not in ("epoch", "token")})
    with pytest.raises(DataError, match=r"another loader wrote it \(it has dp_rank_0, world_size\)"):
        loader.load_state_dict({"dp_rank_0": b"", "world_size": 2})
    with pytest.raises(DataError, match=r"has no .* nothing"):
        loader.load_state_dict({})
    with pytest.raises(DataError, match="is no place"):
        loader.load_state_dict(state | {"document": 23})
    shutil.copy(jsonl, tmp_path / "other.jsonl")
    others = {
        "seq_len is 8 in the checkpoint, 16 here": build(jsonl, seq_len=16),
        "seed is 0 in the checkpoint, 5 here": build(jsonl, seed=5),
        "corpus is 'files:": build(tmp_path / "other.jsonl"),
        "tokenizer is '": build(jsonl, tokenizer=tokenizer),
        "source is 'files' in the checkpoint, 'stdlib' here; corpus": build(None),
    }
    for message, other in others.items():
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            other.load_state_dict(state)
        assert "\n" not in str(caught.value)
        assert other.state_dict()["sequence"] == 0


def test_a_file_changed_since_the_checkpoint_is_seen(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff" * 40)  # 40 times U+FFFD, three tokens each
    saving = build(path, batch=10)
    next(iter(saving))
    path.write_text("x" * 40)  # the same name and size, which is all that the fingerprint knows
    resumed = build(path)
    resumed.load_state_dict(saving.state_dict())
    with pytest.raises(DataError, match=r"token \(80\) .* past the end of its document \(41\)"):
        next(iter(resumed))
