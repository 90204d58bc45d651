"""The blocklist: every kind of entry, every spelling of a URL, and lines that are none."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from retrieve_or_generate.blocklist import Blocklist, add_to_blocklist, default_blocklist, spelled
from retrieve_or_generate.errors import UsageError

MD5, SHA256 = "d41d8cd98f00b204e9800998ecf8427e", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))


def test_every_kind_of_entry_blocks_its_own_kind() -> None:
    blocklist = Blocklist.of(["http://a.example/1.jpg", MD5.upper(), SHA256, "-5", "7"])
    assert len(blocklist) == 5
    assert blocklist.blocks(url="http://a.example/1.jpg")
    assert blocklist.blocks(md5=MD5)
    assert blocklist.blocks(sha256=SHA256.upper())
    assert blocklist.blocks(id=-5)
    assert blocklist.blocks(id=2**64 - 5)
    assert blocklist.blocks(id="7")
    assert blocklist.blocks(url="http://b.example/", md5=MD5)
    assert not blocklist.blocks(url="http://a.example/2.jpg", md5="0" * 32, sha256="0" * 64, id=8)
    assert not blocklist.blocks()
    assert not blocklist.blocks(url=None, md5="", sha256=None, id="no number")


def test_an_id_may_be_a_hash() -> None:
    assert Blocklist.of([MD5]).blocks(id=MD5)


def test_bytes_are_blocked_by_either_hash() -> None:
    assert Blocklist.of([MD5]).blocks_bytes(b"")
    assert Blocklist.of([SHA256]).blocks_bytes(b"")
    assert not Blocklist.of([MD5, SHA256]).blocks_bytes(b"x")
    assert not Blocklist.of(["7"]).blocks_bytes(b"")


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a%20b/c.jpg?x=1&y=%C3%BC",
        "https://pictures.example/a%20b/c.jpg?x=1&y=%C3%BC",
        "HTTP://Pictures.EXAMPLE:80/a%20b/c.jpg?x=1&y=%C3%BC",
        "https://pictures.example:443/a%20b/c.jpg?x=1&y=%C3%BC",
        "http://pictures.example./a%20b/c.jpg?x=1&y=%C3%BC#top",
        "http://user@pictures.example/a b/%63.jpg?x=1&y=ü",
        "  http://pictures.example/a%20b/c.jpg?x=1&y=%c3%bc\n",
    ],
)
def test_no_spelling_of_a_url_slips_through(url: str) -> None:
    assert Blocklist.of(["http://pictures.example/a%20b/c.jpg?x=1&y=%C3%BC"]).blocks(url=url)


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a%20b/C.jpg?x=1",
        "http://pictures.example:8080/a%20b/c.jpg?x=1",
        "http://pictures.example/a%20b/c.jpg",
        "http://pictures.example/a%2520b/c.jpg?x=1",
        "http://[",
    ],
)
def test_other_urls_are_others(url: str) -> None:
    assert not Blocklist.of(["http://pictures.example/a%20b/c.jpg?x=1"]).blocks(url=url)


def test_what_cannot_be_parsed_is_itself() -> None:
    assert spelled("http://[") == "http://["
    assert Blocklist.of(["http://x:99999/"]).blocks(url="http://x:99999/")


def test_the_default_list_always_counts(tmp_path: Path) -> None:
    assert len(Blocklist.load()) == 0
    assert add_to_blocklist([MD5]) == [MD5]
    mine = tmp_path / "mine.txt"
    mine.write_text(f"# taken down in May\n\n  {SHA256}  \n17")
    blocklist = Blocklist.load(mine)
    assert (blocklist.blocks(md5=MD5), blocklist.blocks(sha256=SHA256), blocklist.blocks(id=17)) == (True,) * 3
    assert Blocklist.load().blocks(sha256=SHA256) is False


def test_adding_keeps_what_is_there_and_adds_nothing_twice() -> None:
    default_blocklist().parent.mkdir()
    default_blocklist().write_text(f"# mine\n{MD5}")
    assert add_to_blocklist([MD5.upper(), "http://a.example/1.jpg", "https://A.example/1.jpg", "4"]) == [
        "https://A.example/1.jpg",
        "4",
    ]
    assert default_blocklist().read_text() == f"# mine\n{MD5}\nhttps://A.example/1.jpg\n4\n"
    assert add_to_blocklist(["4"]) == []


@pytest.mark.parametrize(
    "entry", ["", "a.jpg", "ftp://x/a.jpg", "http://a b", "abc123", MD5[1:], "1.5", str(2**64), "-" + str(2**63 + 1)]
)
def test_what_is_no_entry_is_told(entry: str) -> None:
    with pytest.raises(UsageError, match="neither a URL nor an md5"):
        add_to_blocklist([MD5, entry])
    assert not default_blocklist().exists()


def test_a_bad_file_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"{MD5}\n# fine\nnonsense\n")
    with pytest.raises(UsageError, match=r"list.txt, line 3: blocklist entry 'nonsense'"):
        Blocklist.load(path)
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(UsageError, match="not readable as a blocklist"):
        Blocklist.load(path)
    with pytest.raises(UsageError, match="no such blocklist"):
        Blocklist.load(tmp_path / "none.txt")


def test_it_pickles_and_its_fingerprint_follows_from_its_entries() -> None:
    one, other = Blocklist.of([MD5, "5", "-1"]), Blocklist.of([str(2**64 - 1), "5", MD5.upper(), "5"])
    assert pickle.loads(pickle.dumps(one)) == one == other
    assert one.fingerprint == other.fingerprint != Blocklist().fingerprint
