"""The metrics of RULER and LongBench, each of one answer: 0 to 1.

ROUGE-L, the ratio of code lines and the words of Chinese are computed by the packages `rouge`, `rapidfuzz` and `jieba`, of
the extra `eval`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from socket_trt.cli.extras import needs

# Of one answer, one reference and the classes that there are (none for most tasks).
Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """RULER: share of the references that occur in the answer, whatever their case."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """RULER: whether any of the references occurs in the answer."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def qa_f1(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles."""
    return _f1(_english_words(answer), _english_words(reference))


def qa_f1_zh(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    return _f1(*([word for word in map(_bare, _chinese_words(text)) if word] for text in (answer, reference)))


def rouge_l(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L; 0 where either has no words."""
    with needs("eval", "ROUGE-L"):
        from rouge import Rouge
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]["f"])
    except ValueError:  # one of them is empty, or has nothing but full stops
        return 0.0


def rouge_l_zh(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    return rouge_l(" ".join(_chinese_words(answer)), " ".join(_chinese_words(reference)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, where the right one is among them.

    A class whose name is part of the right one's does not count.
    """
    named = [name for name in classes if name in answer and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the answer's numbers that are the reference's (a paragraph's)."""
    return count(answer, _numbers(reference)[0])


def count(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the answer's numbers that are the reference."""
    numbers = _numbers(answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Ratio, in hundredths, of the answer's first line of code: one without comment or fence."""
    with needs("eval", "comparing code"):
        from rapidfuzz import fuzz
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, reference)) / 100


def first_line(answer: str) -> str:
    return answer.lstrip("\n").split("\n")[0]


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    same = sum((Counter(answer) & Counter(reference)).values())
    return 2 * same / (len(answer) + len(reference)) if same else 0.0


def _english_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    with needs("eval", "Chinese words"):
        import jieba
    return list(jieba.cut(text))


def _bare(word: str) -> str:
    """Letters and digits of a word, in lower case."""
    return "".join(character for character in word.lower() if character.isalnum())


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)
