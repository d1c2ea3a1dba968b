"""The text side of configs: what YAML may say, how plain layers merge, how an override is read."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodel.config.recipes import dump_yaml, load_yaml, merge, parse_override
from worldmodel.errors import ConfigError


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_numbers_and_words_are_read_as_they_look():
    read = load_yaml("a: [1e-4, 1E5, 1_000, .5, 3., -2, true, null, .inf]")["a"]
    expected = [1e-4, 1e5, 1000, 0.5, 3.0, -2, True, None, math.inf]
    assert read == expected and [type(v) for v in read] == [type(v) for v in expected]
    assert load_yaml("a: [no, '1', 010, 1:30, 2020-01-01, 1e, e3]")["a"] == ["no", "1", "010", "1:30", "2020-01-01", "1e", "e3"]


def test_an_empty_file_holds_nothing():
    assert load_yaml("") == load_yaml("# nothing\n") == {}


def bomb(levels: int) -> str:
    """Ten to the number of levels, in nine lines and fewer than 100 aliases."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice, first on line 1"),
        ("a:\n  b: 1\n  'b': 2", "line 3: 'b' is given twice, first on line 2"),
        ("a: 1\nb: [{c: 1, c: 2}]", "line 2: 'c' is given twice"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "line 2: the tag"),
        ("a: 1\nb: !!float 3", "line 2: the tag"),
        ("a: ! 3", "line 1: the tag"),
        ("a: 1\n!!str b: 3", "line 2: the tag"),
        (bomb(9), "expand to more than"),
        ("a: &a 1\nb:\n" + "- *a\n" * 101, "line 103: more than 100 aliases"),
        ("a: &a [*a]", "contains itself"),
        ("a: " + "[" * 10_000, "nested deeper"),
        ("a: 1\n3: 4", "line 2: a key must be a word"),
        ("a: 1\n[b]: 4", "line 2: a key must be a word"),
        ("a: 1\nb: [1", "line 2"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: b: c", "line 1"),
        ("a: *unknown", "line 1"),
        ("a: " + "9" * 5000, "thousands of digits"),
        ("a: \x07", "character"),
        ("- 1", "expected keys with values"),
        ("word", "expected keys with values"),
        ("a: '" + "x" * 1_000_000 + "'", "characters"),
    ],
)
def test_what_a_config_file_must_not_hold_is_refused_with_its_line(text, said):
    answer = complaint(load_yaml, text, "my.yaml")
    assert answer.startswith("my.yaml") and said in answer


def test_a_hundred_aliases_are_read_and_share_nothing():
    read = load_yaml("a: &a [1]\nb: [" + ", ".join(["*a"] * 100) + "]")
    assert read["b"] == [[1]] * 100
    read["b"][0].append(2)
    assert read["a"] == [1] and read["b"][1] == [1]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.floats(allow_nan=False) | st.integers(-(10**30), 10**30)
lookalikes = st.sampled_from(["1e-3", "no", "~", "010", "2020-01-01", "=", "<<", "1:30", ".5"])
leaves = st.none() | st.booleans() | numbers | words | lookalikes
plain = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(words, plain, max_size=4))
def test_what_is_written_is_read_back_the_same(data):
    read = load_yaml(dump_yaml(data))
    assert read == data and repr(read) == repr(data)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("ab:[]{}&*!,-#|>?%@`'\"\n 01.e~"), max_size=40))
def test_no_text_does_anything_but_be_read_or_refused(text):
    try:
        assert isinstance(load_yaml(text), dict)
    except ConfigError:
        pass


def test_merging_is_deep_and_shares_nothing():
    below, above = {"a": {"b": [1], "c": 2}}, {"a": {"c": {"d": [3]}}}
    out = merge(below, above)
    assert out == {"a": {"b": [1], "c": {"d": [3]}}}
    out["a"]["b"].append(9)
    out["a"]["c"]["d"].append(9)
    assert below == {"a": {"b": [1], "c": 2}} and above == {"a": {"c": {"d": [3]}}}


@pytest.mark.parametrize(
    ("below", "above", "out"),
    [
        ({"kind": "a", "x": 1}, {"kind": "b", "y": 2}, {"kind": "b", "y": 2}),
        ({"kind": "a", "x": 1}, {"kind": "a", "y": 2}, {"kind": "a", "x": 1, "y": 2}),
        ({"kind": "a", "x": 1}, {"y": 2}, {"kind": "a", "x": 1, "y": 2}),
        ({"kind": "a", "x": 1}, "b", {"kind": "b"}),
        ({"kind": "a", "x": 1}, "a", {"kind": "a", "x": 1}),
        ("a", {"x": 1}, {"kind": "a", "x": 1}),
        ("a", {"kind": "b"}, {"kind": "b"}),
        ({"kind": "a"}, None, None),
    ],
)
def test_a_changed_kind_drops_the_options_of_the_part_below(below, above, out):
    assert merge({"part": below}, {"part": above}) == {"part": out}


def test_an_override_is_a_dotted_key_and_a_yaml_value():
    assert parse_override("model.dynamics.deter=128") == {"model": {"dynamics": {"deter": 128}}}
    assert parse_override("train.lr=1e-3") == {"train": {"lr": 0.001}}
    assert parse_override("env.id=toys.envs:Catch-v0") == {"env": {"id": "toys.envs:Catch-v0"}}
    assert parse_override("a=[1, {b: c}]") == {"a": [1, {"b": "c"}]}
    assert parse_override("a=b=c") == {"a": "b=c"}
    assert parse_override("a=") == {"a": None}


@pytest.mark.parametrize(
    "text", ["train.ratio", "=3", "a..b=3", ".a=3", "a b=3", "a=[1", "a=!!python/name:os.system", "3=4", "a={b: 1, b: 2}"]
)
def test_a_malformed_override_is_refused_and_quoted(text):
    assert text.split("=")[0] in complaint(parse_override, text)
