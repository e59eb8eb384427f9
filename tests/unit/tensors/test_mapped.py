"""Pages of a mapped file leave the process; memory that is no file's is left alone."""

from __future__ import annotations

from pathlib import Path

import torch

from apt_trainer.tensors.mapped import let_go_of_pages

SIZE = 1 << 24


def of_files() -> int:
    """Resident bytes of files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile:"))


def test_pages_of_a_file_leave_and_come_back(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(range(256)) * (SIZE // 256))
    mapped = torch.from_file(str(tmp_path / "weights"), size=SIZE, dtype=torch.uint8)
    middle = mapped[1000:-1000]  # begins and ends within a page
    total, read = int(middle.sum()), of_files()
    let_go_of_pages(middle)
    assert of_files() < read - SIZE // 2
    assert int(middle.sum()) == total
    let_go_of_pages(mapped[:100])  # no whole page


def test_other_memory_keeps_its_values() -> None:
    for value in (torch.arange(1 << 16), torch.zeros(0), torch.empty(4, device="meta")):
        kept = value.clone()
        let_go_of_pages(value)
        assert value.is_meta or torch.equal(value, kept)


def test_what_was_written_to_a_mapping_stays(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(SIZE))
    mapped = torch.from_file(str(tmp_path / "weights"), size=SIZE, dtype=torch.uint8)
    mapped[SIZE // 2] = 7
    let_go_of_pages(mapped)
    assert int(mapped[SIZE // 2]) == 7 and int(mapped.sum()) == 7
