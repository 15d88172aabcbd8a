"""`data.validation` is a list of corpora, or a mapping of names to corpora."""

from pathlib import Path

import pytest

from megagrow.config.load import load_run, to_yaml
from megagrow.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "sets"),
    [
        ("[]", {}),
        ("{}", {}),
        ("web.bin", {"validation": ["web"]}),
        ("[a, {path: b, weight: 2}]", {"validation": ["a", "b"]}),
        ("{web: data/web, code: [a, {path: b}]}", {"web": ["data/web"], "code": ["a", "b"]}),
    ],
)
def test_a_list_and_names(load, tmp_path: Path, written: str, sets: dict[str, list[str]]) -> None:
    run = load(f"data.validation={written}")
    found = {name: [str(c.path) for c in corpora] for name, corpora in run.data.validation.items()}
    assert found == sets and list(found) == list(sets)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(run))
    assert load_run(again) == run
    dumped = run.model_dump(mode="json")["data"]["validation"]
    assert isinstance(dumped, list) == ("{web" not in written)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[{path: a, weights: 2}]", "unknown key 'data.validation.0.weights'; did you mean"),
        ("{web: [{path: a, weights: 2}]}", "unknown key 'data.validation.web.0.weights'"),
        ("[{weight: 2}]", "'data.validation.0.path' is missing"),
        ("{web: [{weight: 2}]}", "'data.validation.web.0.path' is missing"),
        ("{web: []}", "'data.validation.web' = []: value should have at least 1 item"),
        ("{path: a}", "should be a list of corpora, or a mapping of names to lists of corpora"),
        ("{a.b: c}", "'a.b' is not a valid name of a set; use letters, digits, _ and -"),
        ("{0: c}", "0 is not a valid name of a set"),
        ("7", "'data.validation' = 7: "),
    ],
)
def test_other_values_are_one_error(load, written: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(f"data.validation={written}")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_single_set_is_set_by_its_name(load) -> None:
    run = load("data.validation.web=a", "data.validation.web=b")
    assert [str(corpus.path) for corpus in run.data.validation["web"]] == ["b"]
