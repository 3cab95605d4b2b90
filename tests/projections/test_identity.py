from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError
from xbt.projections import fit_identity, fit_projection


@pytest.mark.parametrize(("new_dim", "old_dim"), [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1)])
def test_cuts_or_fills_up(new_dim, old_dim):
    new = torch.randn(9, new_dim)
    out = fit_identity(new, torch.randn(9, old_dim))(new)
    if new_dim >= old_dim:
        wanted = normalize(new[:, :old_dim], dim=1)
    else:
        wanted = normalize(torch.cat([new, torch.zeros(9, old_dim - new_dim)], dim=1), dim=1)
    torch.testing.assert_close(out, wanted)


def test_checks_the_vectors_all_the_same():
    new, old = torch.randn(9, 4), torch.randn(9, 3)
    assert fit_identity(new, old).foldable
    with pytest.raises(DataError, match="9 new and 8 old"):
        fit_identity(new, old[:-1])
    old[5] = float("nan")
    with pytest.raises(DataError, match="first in row 5"):
        fit_identity(new, old)
    with pytest.raises(ConfigError, match="'identity' has no option 'scale'; it has none"):
        fit_projection(new, new, "identity", scale=True)
