"""Patterns find what they were filled with, and never leave their root."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources.path_patterns import Pattern, leaves_root, match_best

words = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(words, words)
def test_a_filled_pattern_matches_with_the_same_fields(scene: str, frame: str) -> None:
    pattern = Pattern("images/{scene}/rgb/{frame}.png")
    path = pattern.fill({"scene": scene, "frame": frame})
    assert pattern.match(path) == (scene, frame)
    assert Pattern("images/*/rgb/{frame}.png").match(path) == (frame,)
    assert Pattern("{all*}.png").match(path) == (path.removesuffix(".png"),)


def test_fields_stay_within_a_name_unless_they_may_go_deeper() -> None:
    assert Pattern("a/{key}.png").match("a/b/c.png") is None
    assert Pattern("a/{key*}.png").match("a/b/c.png") == ("b/c",)
    assert Pattern("a/*.png").match("a/b/c.png") is None
    assert Pattern("a/{key}.*").match("a/b.tar.gz") == ("b.tar",)
    assert Pattern("a/{key}.png").match("a/.png") is None
    assert Pattern("a+b(1)/{key}.png").match("a+b(1)/x.png") == ("x",)


def test_a_repeated_field_is_the_same_everywhere() -> None:
    pattern = Pattern("{scene}/{scene}_{frame}.png")
    assert pattern.fields == ("scene", "frame")
    assert pattern.match("a/a_1.png") == ("a", "1")
    assert pattern.match("a/b_1.png") is None


def test_fields_may_be_called_as_columns_are() -> None:
    pattern = Pattern("{Image Path (left)}/{ß}")
    assert pattern.fields == ("Image Path (left)", "ß")
    assert pattern.match("x/y") == ("x", "y")


def test_the_folder_is_what_comes_before_the_first_field() -> None:
    texts = ("a/b/c{x}.png", "{x}/a.png", "a/b.png", "a/*/b", "./a/{x}")
    assert [Pattern(text).folder for text in texts] == ["a/b", ".", "a", "a", "a"]


def test_a_file_belongs_to_the_pattern_that_says_more() -> None:
    image, depth = Pattern("{key}.png"), Pattern("{key}_depth.png")
    assert match_best([image, depth], "a_depth.png") == (depth, ("a",))
    assert match_best([image, depth], "a.png") == (image, ("a",))
    assert match_best([image, depth], "a.jpg") is None


@pytest.mark.parametrize("text", ["{}", "a{", "}b", "{a", "{a}}", "{a**}", "{a{b}}"])
def test_braces_must_be_fields(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{text}': fields are written {{name}}")):
        Pattern(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("/etc/{x}", "is absolute"), ("//etc/{x}", "is absolute"), ("a/../../{x}", "by '..'"), ("..", "by '..'")],
)
def test_no_pattern_leaves_the_root(text: str, reason: str) -> None:
    assert reason in leaves_root(text)
    with pytest.raises(ValueError, match="set `root` instead"):
        Pattern(text)


def test_dots_in_names_do_not_leave_the_root() -> None:
    assert not any(map(leaves_root, ("a..b/c", "...", "a/..b", ".", "a/./b", "", " /etc")))
