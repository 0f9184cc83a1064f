"""Answers brought to the forms in which metrics compare them: one function a published convention. No torch."""

import re

SENTENCE_PUNCTUATION = ".,;:!?\u2026\u3002\uff0c\uff1b\uff1a\uff01\uff1f"
"""Marks that ``folded`` takes off an answer's end. Others stay: ``C`` is not ``C++`` and ``5`` is not ``5%``."""

_ARTICLES = frozenset(("a", "an", "the"))

_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)")

_ASCII_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")

_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VQA_NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_VQA_DIGITS)}}
_VQA_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905  a table of words, not of code


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:index] + word[index + 1 :] for index, letter in enumerate(word) if letter == "'"]


_FULL_CONTRACTIONS = {short: word for word in _VQA_CONTRACTIONS for short in _without_one_apostrophe(word)}


def folded(text: str) -> str:
    """Folds case, spacing and final punctuation; a text of punctuation alone keeps it, or any two would be equal.

    >>> folded(" Band  Marching. ")
    'band marching'
    """
    one_spaced = " ".join(text.split()).casefold()
    return one_spaced.rstrip(SENTENCE_PUNCTUATION + " ") or one_spaced


def vqa_form(text: str) -> str:
    """Brings an answer to the form in which VQA compares: no articles, no punctuation, digits, whole contractions.

    A mark goes away where it stands beside a space or where the text holds digits parted by a comma (``1,000``); else
    it becomes a space. A full stop goes away unless a digit follows it.

    Source: the evaluation code published with VQA v2 (https://visualqa.org/evaluation.html). It leaves questions alone
    on which all annotators agree; here every answer is brought to this form.

    >>> vqa_form("The two dogs, arent they?")
    "2 dogs aren't they"
    """
    line = text.replace("\n", " ").replace("\t", " ").strip()
    has_digit_commas = re.search(r"\d,\d", line) is not None
    spaced = line
    for mark in _VQA_MARKS:
        is_removed = has_digit_commas or f"{mark} " in line or f" {mark}" in line
        spaced = spaced.replace(mark, "" if is_removed else " ")
    words = re.sub(r"\.(?!\d)", "", spaced).lower().split()
    numbered = [_VQA_NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(_FULL_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def squad_tokens(text: str) -> list[str]:
    """Splits an answer into the words that SQuAD's F1 counts: lower case, without ASCII punctuation and articles.

    Source: Rajpurkar et al. 2016, SQuAD, section 6.1, and its published evaluation code.

    >>> squad_tokens("The Denver Broncos' 24-10 win")
    ['denver', 'broncos', '2410', 'win']
    """
    return [word for word in _ASCII_PUNCTUATION.sub("", text.lower()).split() if word not in _ARTICLES]


def number_in(text: str) -> float | None:
    """Reads a text that is one number: thousands separators are passed over, a percentage is its hundredth.

    >>> number_in("1,234.5"), number_in("12 %"), number_in("12 apples")
    (1234.5, 0.12, None)
    """
    stripped = text.strip()
    digits = stripped.removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(digits):
        return None
    number = float(digits.replace(",", ""))
    return number / 100 if stripped.endswith("%") else number
