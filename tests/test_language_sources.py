"""Records from files of every format and from data sets, and their tokens: the same from any of them, made once."""

import csv
import hashlib
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from filelock import FileLock
from language_runs import make_place, same, weights, words
from tiny_language import build, tokenizer

import effilora_diffusion.language.tokenising as tokenising
from effilora_diffusion import EffiLoRAError
from effilora_diffusion.cli.train_llm import main
from effilora_diffusion.language.batches import pack
from effilora_diffusion.language.config import DataOptions
from effilora_diffusion.language.datasets import Sources, build_datasets
from effilora_diffusion.language.encoding import Encoder
from effilora_diffusion.language.lessons import learn
from effilora_diffusion.language.sources import BLOCK, NamedSource, TextSource, open_file, open_named, read_records
from effilora_diffusion.language.tokenising import tokenise
from effilora_diffusion.language.tokens import Tokens

RECORDS = [{"instruction": f"é{index} \u2028 is", "output": f"n{index}\n" * (index % 3 + 1)} for index in range(5)]


def write(folder, name, records):
    """The records in the format that the file's ending names."""
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(records)
    elif path.suffix == ".json":
        path.write_text("\ufeff" + json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def many(tmp_path):
    """A file of some blocks."""
    records = [{"instruction": f"{index}", "output": "ab" * (index % 4 + 1)} for index in range(2 * BLOCK + 100)]
    return write(tmp_path, "many.jsonl", records)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_record_is_the_same_in_every_format(tmp_path, ending):
    assert read_records(write(tmp_path, f"a.{ending}", RECORDS)) == RECORDS


def test_a_line_of_a_text_file_is_an_example(tmp_path):
    (tmp_path / "a.txt").write_bytes("first\r\n\n  \nsecond \u2028 line\n".encode())
    assert read_records(tmp_path / "a.txt") == [{"text": "first"}, {"text": "second \u2028 line"}]


def test_tables_hold_conversations_and_leave_out_what_is_null(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with_name = [{**turns[0], "name": "me"}, turns[1]]
    path = write(tmp_path, "a.parquet", [{"messages": with_name, "system": None}, {"messages": turns, "system": "s"}])
    assert read_records(path) == [{"messages": with_name}, {"messages": turns, "system": "s"}]
    path = write(tmp_path, "a.csv", [{"messages": json.dumps(turns), "note": "[{not json"}])
    assert read_records(path) == [{"messages": turns, "note": "[{not json"}]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_shard_has_its_blocks_and_no_others(tmp_path, ending):
    records = [{"instruction": str(index), "output": "a"} for index in range(3 * BLOCK + 7)]
    source = open_file(write(tmp_path, f"a.{ending}", records))
    blocks = [list(source.blocks(shard, 3)) for shard in range(3)]
    assert [[block.index for block in shard] for shard in blocks] == [[0, 3], [1], [2]]
    found = sorted((block for shard in blocks for block in shard), key=lambda block: block.index)
    assert [record for block in found for record in block.records] == records
    assert [block.start for block in found] == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", '{"a": "é"}'.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("a.csv", "a,b\n1,é".encode("latin-1"), "line 2 is not UTF-8 text; save it as UTF-8"),
        ("a.json", '[{"a": "é"}]'.encode("latin-1"), "it is not UTF-8 text; save it as UTF-8"),
        ("a.jsonl", b"PAR1....PAR1", "it is a parquet file: name it .parquet"),
        ("a.csv", b"PK\x03\x04 and more", "it is an archive or a spreadsheet"),
        ("a.json", b"\x1f\x8b and more", "it is compressed: unpack it"),
        ("a.parquet", b"hello", "can't be read as parquet"),
        ("a.parquet", b"", "can't be read as parquet"),
        ("a.json", b'[{"a": 1},]', "not a JSON list: record 2: Expecting value"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "'{' stands after record 1"),
        ("a.json", b'[{"a": 1}', "its end is missing"),
        ("a.json", b'[{"a": 1}] more', "something stands after its end"),
        ("a.json", b'[{"a": NaN}]', "NaN is no number of JSON"),
        ("a.csv", b"a,a\n1,2", "names 'a' twice"),
        ("a.csv", b"a,\n1,2", "has a column without a name"),
        ("a.csv", b"a,b\n\n1,2,3", "line 3: it has 3 cells, and the first line 2"),
        ("a.csv", b'a,b\n1,"2', "line 2: it is no CSV"),
        ("a.csv", b"a,b\n", "has no records"),
        ("a.txt", b"\n \n", "has no records"),
    ],
)
def test_a_file_that_can_t_be_read_is_told_in_a_sentence(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EffiLoRAError) as error:
        read_records(tmp_path / name)
    assert told in str(error.value)
    assert str(error.value).startswith(f"--train_file {tmp_path / name}")


def test_without_the_extra_a_sentence_names_it(tmp_path, monkeypatch):
    path = write(tmp_path, "a.parquet", RECORDS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for read in (lambda: read_records(path), lambda: open_named(str(tmp_path), None, "train")):
        with pytest.raises(EffiLoRAError, match=r"needs .*pip install 'effilora-diffusion\[data\]'"):
            read()
    assert read_records(write(tmp_path, "a.csv", RECORDS)) == RECORDS


# -------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_every_record(tmp_path):
    encoder = Encoder(tokenizer())
    tokens = tokenise(open_file(write(tmp_path, "a.jsonl", RECORDS)), encoder)
    expected = [example for record in RECORDS for example in learn(encoder, record).examples]
    assert [(item.ids, item.labels) for item in tokens] == [(item.ids, item.labels) for item in expected]
    assert tokens.lengths.tolist() == [len(item.ids) for item in expected]
    assert tokens[-1].ids == expected[-1].ids
    assert (tokens.tokens.dtype, tokens.records) == (np.uint32, len(RECORDS))
    with pytest.raises(IndexError):
        tokens[len(tokens)]


def test_processes_make_the_same_tokens(many, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "HF_HOME", str(tmp_path / "home"))
    encoder = Encoder(tokenizer())
    one = tokenise(open_file(many), encoder, 1)
    two = tokenise(open_file(many), encoder, 2, anew=True)
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(one.ends, two.ends)
    assert (one.digest, one.counts, one.records) == (two.digest, two.counts, two.records)


def test_tokens_are_made_anew_by_one_of_several_processes(many, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "HF_HOME", str(tmp_path / "home"))
    made, locks = [], []
    encode_block = tokenising.encode_block
    monkeypatch.setattr(tokenising, "encode_block", lambda *args: made.append(args[1].index) or encode_block(*args))

    def start():
        return tokenise(open_file(many), Encoder(tokenizer()), 1, anew=True)

    class Second(FileLock):
        """A process that waits for another one, which is as far."""

        def __enter__(self):
            locks.append(self)
            if len(locks) == 1:
                start()
            return super().__enter__()

    start()
    start()
    assert made == [0, 1, 2] * 2
    monkeypatch.setattr(tokenising, "FileLock", Second)
    start()
    assert (made, len(locks)) == ([0, 1, 2] * 3, 2)


def first_mistake(source, encoder, workers, folder):
    """What so many workers find, the last one first."""
    team, worker = tokenising._Team(folder, source.where), SimpleNamespace(kill=lambda: None)
    for shard in reversed(range(workers)):
        say = lambda **facts: team.hear(facts, worker)
        tokenising._work(source, encoder, shard, workers, folder / f"{shard}.bin", say)
    return team.errors[min(team.errors)]


def test_the_first_mistake_is_found_by_any_number_of_processes(many, tmp_path):
    lines = many.read_text().splitlines()
    for place, bad in ((BLOCK + 50, {"instruction": "a"}), (2 * BLOCK + 1, {"output": "b"}), (BLOCK + 60, [1])):
        lines[place] = json.dumps(bad)
    many.write_text("\n".join(lines))
    source, encoder = open_file(many), Encoder(tokenizer())
    said = [first_mistake(source, encoder, workers, tmp_path) for workers in (1, 2, 3)]
    with pytest.raises(EffiLoRAError) as error:
        tokenise(source, encoder)
    assert said == [str(error.value)] * 3
    assert f"line {BLOCK + 61}: it must be a JSON object" in said[0]  # a block is read before it is encoded


def test_a_file_is_hashed_once(many, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "HF_HOME", str(tmp_path / "home"))
    hashed = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(args) or file_digest(*args))
    found = build_datasets(DataOptions(), Sources(open_file(many), None), build("llama"), tokenizer())
    assert found.digests["data"] == hashlib.sha256(many.read_bytes()).hexdigest()
    assert len(hashed) == 1


def test_a_second_start_tokenises_nothing(many, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "HF_HOME", str(tmp_path / "home"))
    made = []
    encode_block = tokenising.encode_block
    monkeypatch.setattr(tokenising, "encode_block", lambda *args: made.append(args[1].index) or encode_block(*args))

    def start(reader=None, path=many, **settings):
        made.clear()
        tokens = tokenise(open_file(path), Encoder(reader or tokenizer(), **settings), 1)
        return tokens, len(made)

    first, count = start()
    assert count == 3
    second, count = start()
    assert count == 0
    assert isinstance(second.tokens, np.memmap)
    assert np.array_equal(first.tokens, second.tokens)
    assert pickle.loads(pickle.dumps(second)).folder == second.folder
    assert len(pickle.dumps(second)) < 1000  # the folder's name, for processes that load data
    (many.parent / "copy.jsonl").write_bytes(many.read_bytes())
    assert start(path=many.parent / "copy.jsonl")[1] == 0  # its content counts, and not its name
    other = tokenizer()
    other.chat_template = other.chat_template.replace("</s>", ":</s>")
    for changed in ({"reader": other}, {"max_length": 40}, {"template": "plain"}):
        assert start(**changed)[1] == 3
    used = tokenizer()
    used.backend_tokenizer.enable_truncation(9)  # as in some tokenizers' files; a call without it takes it off
    assert start(used)[1] == 0
    many.write_text(many.read_text() + "\n" + json.dumps(RECORDS[0]))
    assert start()[1] == 3
    (first.folder / "tokens.bin").write_bytes(b"1234")
    assert start(path=many.parent / "copy.jsonl")[1] == 3  # what is damaged is made anew
    assert np.array_equal(start(path=many.parent / "copy.jsonl")[0].tokens, Tokens.open(first.folder).tokens)


def test_rows_of_packed_examples_are_full_and_whole():
    lengths = np.random.default_rng(0).integers(1, 60, 3000)
    order, ends = pack(lengths, 64)
    assert sorted(order.tolist()) == list(range(3000))
    sizes = [int(lengths[row].sum()) for row in np.split(order, ends[:-1])]
    assert max(sizes) <= 64
    assert lengths.sum() / (64 * len(sizes)) > 0.97


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_on_a_data_set_is_one_on_its_file(tmp_path, capsys):
    place = make_place(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    for split, name in (("train", "train"), ("test", "held")):
        write(folder, f"{split}.parquet", read_records(place / f"{name}.jsonl"))
    assert main(words(place, tmp_path / "file", max_steps=2, validation_file=place / "held.jsonl")) == 0
    evaluated = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval_loss")]
    named = {"dataset_name": folder, "eval_split_name": "test", "max_steps": 2}
    given = [word for word in words(place, tmp_path / "named", **named) if "train_file" not in word]
    cache = str(tmp_path / "cache")
    datasets.config.HF_DATASETS_CACHE, kept = cache, datasets.config.HF_DATASETS_CACHE
    try:
        assert main(given) == 0
        assert evaluated == [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval_loss")]
        for more, told in (
            (["--train_split_name=dev"], 'Unknown split "dev"'),
            (["--train_file=a.jsonl"], "give one of them"),
            (["--validation_file=a.jsonl"], "--validation_file and --eval_split_name"),
        ):
            assert main([*given, f"--output_dir={tmp_path / 'refused'}", *more]) == 2
            assert told in capsys.readouterr().err
    finally:
        datasets.config.HF_DATASETS_CACHE = kept
    assert same(weights(tmp_path / "file"), weights(tmp_path / "named"))
    assert main(words(place, tmp_path / "out", eval_split_name="test")) == 2
    assert "--eval_split_name has no effect without --dataset_name" in capsys.readouterr().err


def test_a_hash_of_rows_is_of_their_content(tmp_path):
    digests = []
    for name, kept in (("one", RECORDS), ("two", RECORDS), ("three", RECORDS[:-1])):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, "train.jsonl", kept)
        rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        source = NamedSource("rows", rows)
        assert list(source.records()) == kept
        digests.append(source.digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the file that can be opened and not read is Linux's")
def test_a_disk_that_fails_while_it_is_read_is_told_as_the_data_s(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "SMALL", 0)
    monkeypatch.setattr(tokenising, "HF_HOME", str(tmp_path))
    source = TextSource("--train_file t.txt", Path("/proc/self/mem"))
    monkeypatch.setattr(TextSource, "digest", "0")
    with pytest.raises(EffiLoRAError, match=r"^--train_file t\.txt can't be read: Input/output error$"):
        tokenise(source, Encoder(tokenizer(), "plain"), workers=1)
