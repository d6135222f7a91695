"""Costs of tile programs: what is counted, and what time it takes at a device's rates."""

import dataclasses

import pytest

from tests.targets.ascend.chain import limits
from v4c.errors import UnsupportedError
from v4c.targets.ascend.cost import Figure, estimate, product_dtype, rates, total
from v4c.targets.ascend.devices import DEVICES
from v4c.targets.ascend.kernels.norms import rms_norm
from v4c.targets.ascend.kernels.products import linear, linear_fp8

B1, PR = DEVICES["Ascend910B1"], DEVICES["Ascend950PR_9599"]


def test_a_weight_is_counted_once_per_tile_of_rows():
    n, k = 1024, 4096
    one = linear(n, k, limits(), rows=1)
    weight = n * k * 2
    for rows, times in ((1, 1), (16, 1), (17, 2)):
        known = one.launch({"rows": rows})
        activations = known["grid0"] * known["grid1"] * 16 * k * 2
        assert one.reads(known) == times * weight + activations
        assert one.cube(known) == times * 16 * n * k


def test_what_bounds_a_product_follows_rows_and_bandwidth():
    peaks = rates(B1)
    decode = estimate(linear(4096, 4096, limits(), rows=1), {"rows": 1}, B1.limits, peaks)
    assert decode.bound == "memory"
    assert decode.seconds == pytest.approx(decode.bytes / peaks.bandwidth.value)
    # As if the second-level cache served every tile that is read again.
    cached = dataclasses.replace(peaks, bandwidth=Figure(10 * peaks.bandwidth.value, "a test"))
    prompt = estimate(linear(4096, 4096, limits()), {"rows": 8192}, B1.limits, cached)
    assert prompt.bound == "cube"
    assert prompt.cube == 8192 * 4096 * 4096
    assert prompt.seconds >= prompt.cube / peaks.cube["float16"].value


def test_idle_cores_are_not_counted_as_working():
    peaks = dataclasses.replace(rates(B1), bandwidth=Figure(1e18, "beyond all devices"))
    program = linear(256, 4096, limits())
    few, many = (estimate(program, {"rows": rows}, B1.limits, peaks) for rows in (128, 128 * B1.limits.cube_cores))
    assert few.programs < B1.limits.cube_cores
    assert few.bound == "cube"
    assert many.cube / few.cube == B1.limits.cube_cores
    assert many.seconds / few.seconds < B1.limits.cube_cores / 2


def test_rates_follow_cores_and_name_their_sources():
    small = rates(DEVICES["Ascend910B3"])
    assert small.cube["float16"].value / rates(B1).cube["float16"].value == pytest.approx(20 / 24)
    for device in DEVICES.values():
        peaks = rates(device)
        assert set(peaks.cube) == device.limits.dtypes
        for figure in (peaks.bandwidth, peaks.vector, *peaks.cube.values()):
            assert figure.value > 1e11
            assert figure.source


def test_an_element_type_without_a_rate():
    program = linear_fp8(128, 128, PR.limits)
    assert product_dtype(program) == "float8_e4m3fn"
    estimate(program, {"rows": 1}, PR.limits, rates(PR))
    with pytest.raises(UnsupportedError, match="no rate for products of float8_e4m3fn on Ascend950PR_9599"):
        estimate(program, {"rows": 1}, PR.limits, rates(B1))


def test_total():
    one = estimate(linear(4096, 4096, limits(), rows=1), {"rows": 1}, B1.limits, rates(B1))
    other = estimate(rms_norm(4096, 1e-6, limits()), {"rows": 1}, B1.limits, rates(B1))
    both = total([one, other])
    assert both.bytes == one.bytes + other.bytes
    assert both.seconds == one.seconds + other.seconds
    assert both.bound == "memory"
    assert total([]).seconds == 0
