"""A file is cut while somebody appends to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from oz_worker.backends.output import OutputFiles, tail

FLOOD = 'n=0; while [ $n -lt 40000 ]; do n=$((n+1)); echo "line $n"; done'
WRITER = f'exec >> "$1"; {FLOOD}; sleep 0.3; echo line 40001; echo the last line'


def test_a_file_that_grows_while_it_is_cut_keeps_its_order_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.touch()
    files = OutputFiles(20_000)
    files.add(path)
    writer = subprocess.Popen(["/bin/sh", "-c", WRITER, "sh", str(path)])
    while writer.poll() is None:
        files.sweep()
    files.sweep()
    notice, *lines = path.read_text().splitlines()
    assert notice == "[oz_worker: output over 20000 bytes; what came before is gone]"
    assert lines[-1] == "the last line"
    numbers = [int(line.split()[1]) for line in lines[:-1] if line.startswith("line ")]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 40001
    assert path.stat().st_size <= 20_000
    assert tail(path, 14) == b"the last line\n"


def test_a_limit_below_its_own_notice_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "output.log"
    path.write_text("twenty bytes of text")
    files = OutputFiles(10)
    files.add(path)
    files.sweep()
    assert path.read_text() == "twenty bytes of text"
