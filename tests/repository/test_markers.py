"""Which tests a command selects."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(("long", "expected"), [(False, ["short"]), (True, ["short", "slow"])])
def test_long_tests_run_only_where_they_are_asked_for(long, expected, pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    marks = {"short": [], "slow": ["long"]}
    fixtures = SimpleNamespace(name2fixturedefs={})
    items = [
        SimpleNamespace(name=name, get_closest_marker=marks[name].__contains__, _fixtureinfo=fixtures) for name in marks
    ]
    deselected = []
    config = SimpleNamespace(
        getoption={"--long": long}.get,
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(item.name for item in items)),
    )
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == expected
    assert deselected == [name for name in marks if name not in expected]


@pytest.fixture(scope="module")
def shared():
    return "made once"


def test_tests_that_share_a_modules_fixture_share_a_process(shared, request):
    group = request.node.nodeid.partition("::")[0]
    assert request.node.get_closest_marker("xdist_group").args == (group,)
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith(f"@{group}"), "pytest-xdist sends tests of a group to any process"


def test_others_go_where_there_is_room(request):
    assert request.node.get_closest_marker("xdist_group") is None


def test_settings_select_nothing_by_marker(pytestconfig):
    """An -m among them would be lost wherever a command has an -m as well, as `pytest -m gpu` does."""
    assert "-m" not in pytestconfig.getini("addopts")
