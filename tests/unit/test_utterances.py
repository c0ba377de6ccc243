"""How important an utterance is, in English and Filipino, and the word lists behind it."""

from __future__ import annotations

import pytest

from agents import utterances
from agents.phrases import Phrases, sentences_of, words_of
from agents.utterances import BASE, QUESTION, REMEMBER, SMALL_TALK
from memory_system.errors import ConfigError
from memory_system.settings import load_settings


def judge(**lists: str) -> utterances.Judge:
    environ = {f"MEMORY__AGENTS__UTTERANCES__{name.upper()}": value for name, value in lists.items()}
    return utterances.load(load_settings(environ={**environ, "MEMORY_CONFIG": "/dev/null"}))


JUDGE = judge()


@pytest.mark.parametrize(
    "text",
    [
        "Please remember that my passport expires in March 2027.",
        "Remember the milk!",
        "Hey, don't forget to water the plants.".removeprefix("Hey, ").capitalize(),
        "Can you remind me to call Ana tomorrow?",
        "Keep in mind that Ben cannot eat nuts.",
        "Note that the key is under the mat.",
        "Tandaan mo na allergic ako sa hipon.",
        "Huwag mong kalimutan ang kaarawan ni Nanay.",
        "Pakitandaan ang numero ng bahay.",
        "Paalalahanan mo ako bukas.",
    ],
)
def test_a_request_to_remember_comes_first(text: str) -> None:
    judged = JUDGE.judge(text)
    assert judged.importance >= REMEMBER
    assert judged.reasons[0] == "remember"


@pytest.mark.parametrize(
    "text",
    [
        "I don't remember what we did.",
        "I remember my childhood well.",
        "These figurines remind me of family.",
        "It was a memorable evening.",
        "Natatandaan ko pa ang lahat ng iyon.",
    ],
)
def test_remembering_is_no_request_to_remember(text: str) -> None:
    assert "remember" not in JUDGE.judge(text).reasons


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("I love hiking in the mountains.", ("preference",)),
        ("I\u2019d rather take the train.", ("preference",)),
        ("She is allergic to cats.", ("preference",)),
        ("Mas gusto kong uminom ng kape kaysa tsaa.", ("preference",)),
        ("Ayaw ko ng maanghang na pagkain.", ("preference",)),
        ("Mahilig ako sa musika.", ("preference",)),
        ("My name is Ana and I live in Cebu.", ("about_self", "name")),
        ("Ako si Juan at nakatira ako sa Davao.", ("about_self", "name")),
        ("May asawa ako at dalawang anak.", ("about_self",)),
        ("Taga-Iloilo ako.", ("about_self",)),
        ("We met Caroline at the museum.", ("name",)),
        ("Nakita namin si Maria sa palengke.", ("name",)),
        ("The rent is 9500 a month.", ("number",)),
        ("The meeting is on Friday at 3 pm.", ("date", "number")),
        ("We moved here two years ago.", ("date",)),
        ("Pupunta kami doon sa susunod na linggo.", ("date",)),
        ("Dumating siya noong Hunyo 12.", ("date", "number")),
        ("Ipinanganak ako noong ika-5 ng Mayo.", ("about_self", "date")),
    ],
)
def test_what_an_utterance_tells(text: str, reasons: tuple[str, ...]) -> None:
    judged = JUDGE.judge(text)
    assert judged.reasons == reasons
    assert judged.importance == pytest.approx(BASE + sum(utterances.WEIGHTS[name] for name in reasons))


@pytest.mark.parametrize(
    "text",
    [
        "What did you do yesterday?",
        "Do you know that I'm allergic to nuts?",
        "Ano ang ginawa mo kahapon?",
        "Saan ka nakatira?",
        "Magkano ang pamasahe papuntang Baguio",
        "Hey Mel! How have you been?",
    ],
)
def test_a_question_tells_nothing(text: str) -> None:
    judged = JUDGE.judge(text)
    assert judged.reasons == ("question",)
    assert judged.importance == pytest.approx(BASE - QUESTION)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n ",
        "ok",
        "Thanks a lot, Mel!",
        "Good morning!",
        "Salamat po!",
        "Sige, ingat!",
        "Wow, cool.",
        "...",
        "👍",
    ],
)
def test_small_talk_is_worth_least(text: str) -> None:
    judged = JUDGE.judge(text)
    assert judged.reasons == ("small_talk",)
    assert judged.importance == pytest.approx(BASE - SMALL_TALK)


@pytest.mark.parametrize(
    "text",
    [
        "It was a quiet evening and nothing happened at all.",
        "I may go there, who knows.",
        "That looks great, Caroline!",
    ],
)
def test_what_tells_nothing_in_particular_is_in_between(text: str) -> None:
    assert JUDGE.judge(text) == utterances.Judgement(BASE, ())


def test_a_question_beside_a_statement_takes_nothing_from_it() -> None:
    told = JUDGE.judge("My son Tim was born on May 5.")
    assert JUDGE.judge("Hey Mel! My son Tim was born on May 5. Did I say so?") == told
    assert told.reasons == ("about_self", "date", "number", "name")


def test_the_beginning_of_a_sentence_is_no_name_and_neither_is_a_shout() -> None:
    for text in (
        "Trains are slow there, they say.",
        "HELLO EVERYBODY OVER THERE",
        "And then I said I'd go.",
        "On Monday we rest.",
    ):
        assert "name" not in JUDGE.judge(text).reasons, text


def test_importance_stays_between_0_and_1() -> None:
    everything = "Remember that I love my name, my name is Ana, I was born on May 5 1990 with Ben in Rome. " * 3
    assert JUDGE.importance(everything) <= 1.0
    assert JUDGE.importance("?") >= 0.0


def test_the_word_lists_can_be_replaced() -> None:
    german = judge(remember='["^merk dir", "vergiss nicht*"]', preference='["ich mag"]')
    assert german.judge("Merk dir das.").reasons == ("remember",)
    assert german.judge("Bitte vergiss nichts davon.").reasons == ("remember",)
    assert german.judge("Dann merk dir das eben.").reasons == ()
    assert german.judge("ich mag es sehr gern so").reasons == ("preference",)
    assert german.judge("Please remember that.").reasons == ()
    assert judge(remember="[]", preference="[]").judge("I love it here a lot.").reasons == ()


@pytest.mark.parametrize("phrases", ['[""]', '["*"]', '["a*b c"]', '["^"]', "[5]"])
def test_what_is_no_phrase_is_refused(phrases: str) -> None:
    with pytest.raises(ConfigError, match=r"agents\.utterances\.remember"):
        judge(remember=phrases)


def test_phrases() -> None:
    phrases = Phrases(["may #", "gusto ko*", "# days ago", "^may"])
    assert phrases.at(["may", "5th"]) == 2
    assert phrases.at(["may", "go"]) == 1
    assert phrases.at(["i", "may", "go"], 1) == 0
    assert phrases.at(["gusto", "kong", "kumain"]) == 2
    assert phrases.at(["gusto"]) == phrases.at([]) == phrases.at(["x"], 5) == 0
    assert phrases.places(["it", "was", "3", "days", "ago"]) == {2, 3, 4}
    assert not Phrases([]).any(["may"])


def test_words_and_sentences() -> None:
    assert words_of("It\u2019s Ana, taga-Cebu; 3.5 km!") == ["It's", "Ana", "taga-Cebu", "3", "5", "km"]
    assert sentences_of(" One. Two!\n\nThree? ") == ["One.", "Two!", "Three?"]
    assert sentences_of("") == []
