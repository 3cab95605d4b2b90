"""Arrays that a report is made of: .npy files and the keys of .npz files, damaged or hostile."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from fuzzing import damaged, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.errors import ConfigError, DataError
from xbt.report.config import VectorSource
from xbt.report.sample import _array

ROWS = np.random.default_rng(5).standard_normal((7, 3)).astype(np.float32)


def saved(packed=False, **arrays):
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **arrays)
    return file.getvalue()


def npy(rows):
    file = io.BytesIO()
    np.save(file, rows)
    return file.getvalue()


def read(path, value=None):
    source = VectorSource("a", "b", "c", file=None if value is None else str(path))
    return _array(source, str(path) if value is None else value, "--vectors.old_images")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [ROWS, ROWS.T, ROWS[:0], np.arange(5), ROWS.astype(">f8"), np.float32(3)])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, rows, packed):
    (tmp_path / "x.npz").write_bytes(saved(packed, rows=rows, other=ROWS))
    (tmp_path / "x.npy").write_bytes(npy(rows))
    for found in (read(tmp_path / "x.npz", "rows"), read(tmp_path / "x.npy")):
        np.testing.assert_array_equal(found, rows)
        assert found.dtype == np.asarray(rows).dtype


def test_what_is_not_there_is_named(tmp_path):
    (tmp_path / "x.npz").write_bytes(saved(rows=ROWS))
    with pytest.raises(ConfigError, match=r"neither a key .* has rows"):
        read(tmp_path / "x.npz", "raws")
    with pytest.raises(ConfigError, match="there is no file"):
        read(tmp_path / "y.npz", "rows")
    with pytest.raises(DataError, match="instead of a file"):
        read(tmp_path, "rows")


def test_bombs_and_pickles_are_refused_before_they_are_unpacked(tmp_path):
    header = npy(np.zeros(0, np.uint8))[:-1]
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("rows.npy", "w", force_zip64=True) as member,
    ):
        member.write(header)
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(DataError, match=r"rows.npy has 3\d+ bytes packed into \d+"):
        read(tmp_path / "bomb.npz", "rows")
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 512)}
    )
    (tmp_path / "huge.npy").write_bytes(file.getvalue() + bytes(64))
    with pytest.raises(DataError, match="its header promises"):
        read(tmp_path / "huge.npy")
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "pickled.npy").write_bytes(file.getvalue())
    with pytest.raises(DataError, match="never loaded"):
        read(tmp_path / "pickled.npy")


WHOLE = {
    ".npz": [saved(packed, rows=ROWS, image=np.arange(9)) for packed in (False, True)],
    ".npy": [npy(ROWS), npy(np.asfortranarray(ROWS))],
}


@fuzzed
@given(data=st.data(), ending=st.sampled_from([".npz", ".npy"]), number=st.sampled_from([0, 1]))
@pytest.mark.filterwarnings("ignore")
def test_fuzz_arrays(data, ending, number, tmp_path_factory):
    whole = WHOLE[ending][number]
    path = tmp_path_factory.mktemp("arrays") / f"x{ending}"
    path.write_bytes(data.draw(damaged(whole)))
    loads_or_refuses(lambda: read(path, "rows" if ending == ".npz" else None), len(whole))
