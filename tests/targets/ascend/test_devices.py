"""The device table against what the installed compiler itself says."""

import re
import subprocess

import pytest

from tests.targets.ascend.requirements import DEVICES as ONE_OF_EACH
from tests.targets.ascend.requirements import needs_compiler
from v4c.errors import UnsupportedError
from v4c.targets.ascend.devices import DEFAULT, DEVICES, find_device, read_dtypes, read_limits
from v4c.targets.ascend.toolchain import find

DISTINCT = {(d.architecture, d.limits.cube_cores): name for name, d in DEVICES.items()}


@needs_compiler
@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_limits_are_the_compilers(name):
    assert read_limits(name) == DEVICES[name].limits


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", sorted(DEVICES))
def test_limits_of_every_device_are_the_compilers(name):
    assert read_limits(name) == DEVICES[name].limits


@needs_compiler
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_cube_multiplies_the_types_of_the_table(name):
    assert read_dtypes(name) == DEVICES[name].limits.dtypes


@needs_compiler
def test_table_has_every_device_of_the_compiler():
    text = subprocess.run([find().programs / "bishengir-compile-a5", "--help"], capture_output=True, text=True).stdout
    named = set(re.findall(r"=(Ascend\w+) ", text))
    assert named - set(DEVICES) == {f"Ascend310B{i}" for i in (1, 2, 3, 4)}  # inference cards without this split
    assert set(DEVICES) <= named


def test_two_vector_cores_per_cube_core():
    assert all(d.limits.vector_cores == 2 * d.limits.cube_cores for d in DEVICES.values())


def test_fp8_is_for_the_950():
    assert "float8_e4m3fn" in DEVICES["Ascend950PR_9599"].limits.dtypes
    assert "float8_e4m3fn" not in DEVICES["Ascend910B1"].limits.dtypes


def test_default_device():
    assert find_device() is DEVICES[DEFAULT]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ascend910b1", "did you mean Ascend910B1"),
        ("950PR_9599", "did you mean Ascend950PR_9599"),
        ("Ascend310B1", "expected Ascend910B1 to B4"),
        ("H100", "device 'H100': expected Ascend910B1 to B4"),
    ],
)
def test_unknown_device(name, message):
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        find_device(name)
