"""What the knowledge base reads off the words of a fact."""

from __future__ import annotations

import pytest

from agents.facts_text import frame, frame_key, normal, same_claim, text_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The door closes at 19:00.", "the  door CLOSES at 19:00"),
        ('"Otter" is the password!', "otter is the password"),
        ("Ada’s tea", "Ada's tea"),  # noqa: RUF001
        ("ﬁne", "fine"),
    ],
)
def test_texts_that_read_the_same_have_one_normal_form(one: str, other: str) -> None:
    assert normal(one) == normal(other)
    assert text_key("Office", one) == text_key("office ", other)


@pytest.mark.parametrize(("one", "other"), [("3.5", "35"), ("C++", "C"), ("-5", "5"), ("a b", "ab"), ("...", "!!!")])
def test_what_means_something_is_kept(one: str, other: str) -> None:
    assert normal(one) != normal(other)


def test_keys_belong_to_a_topic() -> None:
    assert text_key("a", "x") != text_key("b", "x")
    assert text_key("a b", "c") != text_key("a", "b c")
    assert frame_key("a", "It costs 5 euros") != frame_key("b", "It costs 5 euros")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ben signs off expenses above 500 euros", "Expenses above 500 euros are signed off by Ben"),
        ("The shop is closed on Monday", "On Monday the shop is always closed"),
    ],
)
def test_other_words_may_be_the_same_claim(one: str, other: str) -> None:
    assert same_claim(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The rent is 900 euros", "The rent is 950 euros"),
        ("The meeting is on Monday", "The meeting is on Tuesday"),
        ("Ada likes tea", "Ada does not like tea"),
        ("Gusto ni Ada ang tsaa", "Hindi gusto ni Ada ang tsaa"),
        ("Ada prefers trains to planes", "Ada prefers planes to trains"),
    ],
)
def test_another_number_negation_or_order_is_another_claim(one: str, other: str) -> None:
    assert not same_claim(one, other)
    assert not same_claim(other, one)


REPLACING = [
    ("The rent is 900 euros a month", "The rent is 950 euros a month"),
    ("The wifi password is otter", "The wifi password is badger"),
    ("The meeting is on Monday", "The meeting is on Tuesday"),
    ("The CEO of Acme is Ana Cruz", "The CEO of Acme is Ben Ong"),
    ("Ada's favourite colour is green", "Ada's favourite colour is dark blue."),
    ("The office opens at 8:00", "The office opens at 9:30."),
    ("Our landlord is Mr Rossi", "Our landlord is Mrs Bianchi"),
    ("Ada was born in 1980", "Ada was born in 1981"),
    ("The release is on 3 May", "The release is on 12 June"),
    ("A ticket costs $12", "A ticket costs $15"),
    ("Hotels may cost up to 140 euros a night.", "Hotels may cost up to 160 euros a night."),
    ("Ang password ng wifi ay otter", "Ang password ng wifi ay badger"),
    ("Ang pulong ay sa Lunes", "Ang pulong ay sa Martes"),
]
BESIDE_EACH_OTHER = [
    ("Ada likes tea", "Ada likes coffee"),
    ("Ada is a nurse", "Ada is a mother"),
    ("The office is closed", "The office is large"),
    ("Room 5 has 12 seats", "Room 4 has 12 seats"),
    ("Ada's sister lives in Turin", "Ada's brother lives in Turin"),
    ("The office is in Turin", "The office is on strike"),
    ("Ada visited Rome in 2019", "Ada visited Rome in 2021"),
    ("Carla has two cats", "Carla has a dog"),
    ("Ada is not 30", "Ada is not 31"),
    ("Ada speaks Italian", "Ada speaks English"),
    ("The printer is broken", "The printer is new"),
    ("Ana Reyes leads the data team", "Ben Okafor leads the web team"),
]


@pytest.mark.parametrize(("older", "newer"), REPLACING)
def test_another_value_of_the_same_thing_has_the_same_frame(older: str, newer: str) -> None:
    assert frame(older) is not None
    assert frame(older) == frame(newer)


@pytest.mark.parametrize(("one", "other"), BESIDE_EACH_OTHER)
def test_what_may_both_be_true_has_no_common_frame(one: str, other: str) -> None:
    assert frame(one) is None or frame(one) != frame(other)


@pytest.mark.parametrize("text", ["", "is", "is 5", "900", "...", "the is", "x" * 60_000, "is " * 20_000])
def test_any_text_is_read(text: str) -> None:
    assert isinstance(normal(text), str)
    assert frame(text) is None or isinstance(frame_key("t", text), str)
