"""Names of the ways to cut a grid."""

import pytest

from autoregressive.models.regions import canonical_layout


def test_names_of_layouts():
    assert canonical_layout("2x2", (8, 8), 4) == canonical_layout("region", (8, 8), 4) == "region"
    assert canonical_layout("1x4", (8, 8), 4) == "1x4"
    assert canonical_layout("raster", (8, 8), 4) == "raster"
    assert canonical_layout("raster", (8, 8), 1) == "region"
    for layout, message in {
        "diagonal": "--order diagonal: expected region, raster, or rows x columns of regions",
        "1x2": "--order 1x2 does not cut a 8x8 grid into n = 4 equal regions",
        "1x99999": "expected region",
    }.items():
        with pytest.raises(ValueError, match=message):
            canonical_layout(layout, (8, 8), 4)
    with pytest.raises(ValueError, match="does not cut a 6x6 grid into n = 4"):
        canonical_layout("1x4", (6, 6), 4)
