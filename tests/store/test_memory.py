"""Reading a store that is larger than what reading may take."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

ROWS, DIM = 1_000_000, 768
CHILD = """
    import sys
    import numpy as np
    from xbt.store import EmbeddingStore

    def peak():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

    store = EmbeddingStore.open(sys.argv[1])
    assert len(store) == 1_000_000
    store.rows([0])
    before, generator = peak(), np.random.default_rng(0)
    for _ in range(10):
        assert not store.rows(generator.integers(0, len(store), 1024)).any()
    for number, batch in enumerate(store.batches(4096)):
        if number == 40:
            break
    print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_reading_takes_the_memory_of_what_is_read(tmp_path):
    (tmp_path / "img_emb").mkdir()
    with (tmp_path / "img_emb" / "img_emb_0.npy").open("wb") as file:
        described = {"descr": "<f2", "fortran_order": False, "shape": (ROWS, DIM)}
        np.lib.format.write_array_header_1_0(file, described)
        file.truncate(file.tell() + ROWS * DIM * 2)  # 1.5 GB of zeros that take no space on disk
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # MiB
