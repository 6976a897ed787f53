r"""One way of writing for what models write in a `\boxed{}`, and what math-verify is too lenient about.

math-verify reads LaTeX. `comparable` brings an answer into it: other scripts and symbols, Markdown, currencies, thousands
separators, mixed numbers, words around a number. `same_words`, `same_kind` and `same_size` are the questions that
math-verify does not ask: words are not products of variables, a pair is not a set, and a difference that rounds to 0 may be
large beside the numbers themselves. Runs in the worker process, inside its time limit.
"""

# ruff: noqa: RUF001 - symbols that look like others are what this module is about.
from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

_WRAPPERS = (
    re.compile(r"(?:\$\$|\$)(?P<content>[^$]*)(?:\$\$|\$)"),
    re.compile(r"\\\((?P<content>(?:(?!\\\)).)*)\\\)", re.DOTALL),
    re.compile(r"\\\[(?P<content>(?:(?!\\\]).)*)\\\]", re.DOTALL),
    re.compile(r"(?P<mark>\*{1,3}|__?|`+)(?P<content>[^*_`]*)(?P=mark)"),
    re.compile(
        r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol|bf|rm)\s*\{(?P<content>[^{}]*)\}"
    ),
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_SYMBOLS = str.maketrans(
    {
        "∞": r"\infty ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "−": "-", "–": "-",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "°": r"^\circ ", "∪": r"\cup ",
        "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "√": r"\sqrt ", "θ": r"\theta ", "α": r"\alpha ",
        "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "∛": r"\sqrt[3]",
        "。": ".", "、": ",", "⁄": "/", "’": "'", "～": "~",
    }
)  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_CURRENCY = re.compile(
    r"(?:\b(?:USD|US|EUR|GBP|Rs\.?)\s*)?(?:\\?\$|[€£¥₹₽₩₫฿]|\\(?:euro|pounds|yen)\b(?:\{\})?)"
)
_SPACE = re.compile(r"\\[,;:! ]|~|\\q?quad\b")
_THOUSANDS = re.compile(
    r"(?<=\d)(?:\{,\}\s*|,\s+(?=\d{3},\d{3}(?!\d))|[ \u2009]+)(?=\d{3}(?!\d|/|\s*\\frac))"
)
_LEAD = re.compile(
    r"(?:=|\\(?:approx|simeq|sim|thickapprox)(?![A-Za-z])|(?:about|around|approximately|approx|roughly|exactly)\b\.?"
    r"|[A-Za-z][A-Za-z' ]{2,}(?:=|:|\bis\b)(?!=))\s*",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}|(?<![\\A-Za-z])(?:not|yes)(?![A-Za-z])")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\operatorname\s*\{[^{}]*\}")
_FUNCTIONS = frozenset(
    [
        "sqrt", "frac", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "infinity", "matrix", "pmatrix",
        "bmatrix", "vmatrix", "cases", "array",
    ]
)  # fmt: skip
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
_BASE_WORDS = {word: number for number, word in enumerate(_NUMBERS) if number >= 2} | {"sixteen": 16}

# Units of one or two letters; longer words count as units anyway, if they are not among those that change the number.
_SHORT_UNITS = frozenset(
    [
        "km", "m", "cm", "mm", "ft", "in", "yd", "mi", "kg", "g", "mg", "lb", "lbs", "oz", "s", "sec", "min",
        "h", "hr", "hrs", "l", "L", "ml", "mL", "mph", "kph", "kmh", "kmph", "am", "pm", "C", "F", "K", "Hz",
        "N", "J", "W", "V", "A", "Pa", "sq", "cu", "gal", "pt", "qt", "th", "st", "nd", "rd",
    ]
)  # fmt: skip
_FILLERS = frozenset(["of", "per", "a", "an", "the", "and", "in", "for", "each", "on"])
_NO_UNITS = frozenset(
    [
        "squared", "cubed", "factorial", "times", "plus", "minus", "divided", "over", "choose", "half",
        "halves", "third", "thirds", "fourth", "fourths", "quarter", "quarters", "fifth", "fifths", "sixth",
        "sixths", "eighth", "eighths", "tenth", "tenths", "hundredth", "hundredths", "percent", "percentage",
        "pct", "pi", "not", "less", "more", "than", "least", "most", "none", "no", "or", "mod", "sqrt", "log",
        "ln", "sin", "cos", "tan", "sec", "csc", "cot", "infinity", "dozen", "pair", "pairs", "frac",
    ]
) | frozenset(_SCALES)  # fmt: skip
_ALIASES = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "mile": "mi",
    "yard": "yd", "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s", "pound": "lb", "ounce": "oz",
    "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l",
}  # fmt: skip
_KNOWN_UNITS = frozenset(_ALIASES.values()) | {"dollar", "cent", "day", "week", "year", "month"}


def unwrapped(text: str) -> str:
    r"""Content without what surrounds the whole of it: dollar signs, Markdown's emphasis, `\text{}` and the like."""
    while True:
        text = text.strip()
        found = next((match for wrapper in _WRAPPERS if (match := wrapper.fullmatch(text))), None)
        if found is None:
            return text
        text = found["content"]


def comparable(text: str) -> str:
    """An answer as LaTeX with ASCII letters and digits, without what does not change its value; units stay."""
    text = _ascii(text)
    text = _SPACE.sub(" ", re.sub(r"(?:(?<=\d),)?\\!\s*", "", text))
    text = _TEXT.sub(r" \1 ", text)
    text = unwrapped(_CURRENCY.sub(" ", text))
    text = text.strip().rstrip(".,;:").rstrip()
    for _ in range(3):
        text = unwrapped(_LEAD.sub("", text, count=1) if _LEAD.match(text) else text)
    text = re.sub(r"\\approx(?![A-Za-z])", "=", text)
    text = re.sub(r"\\sqrt\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?:\\|(?<![\w\\]))sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\\frac{\1}{\2}", text)
    text = _THOUSANDS.sub("", text)
    text = re.sub(r"(?<=[\d}])\s*(?:\\?degrees?\b|\\degree\b)(?!\s*[CF]\b)", r"^\\circ ", text)
    text = re.sub(r"(?<=\d)\s*\^?\{?(?:st|nd|rd|th)\}?$", "", text)
    text = re.sub(
        r"(?<=\d)\s+(hundred|thousand|million|billion|trillion)\b",
        lambda match: rf"\cdot 10^{{{_SCALES[match[1].lower()]}}} ",
        text,
        flags=re.IGNORECASE,
    )
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    # A base is a part of the number: as a symbol beside it, it has to be the same on both sides.
    text = re.sub(r"(?<=\d)_\s*\{?\s*\(?\s*(\w+)\s*\)?\s*\}?", _base, text)
    text = re.split(r"\s(?:where|for all|for any|for every)\s", text, maxsplit=1)[0]
    text = " ".join(text.split()).rstrip(".,;:").rstrip()
    if text.lower() in _NUMBERS:
        return str(_NUMBERS.index(text.lower()))
    return text


def _base(match: re.Match[str]) -> str:
    base = _BASE_WORDS.get(match[1].lower(), match[1])
    return "" if str(base) == "10" else rf" b_{{{base}}}"


def _ascii(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉]+", lambda match: f"_{{{match[0].translate(_LOWERED)}}}", text)
    text = re.sub("[¼½¾⅐-⅞]", lambda match: f" {unicodedata.normalize('NFKC', match[0])}", text).translate(
        _SYMBOLS
    )
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def without_units(text: str) -> tuple[str, str]:
    """The number and the words behind it (`50`, `miles per hour`); no words if something else is behind the number."""
    for word in re.finditer(r"(?<![\\A-Za-z])[A-Za-z]+", text):
        head, tail = text[: word.start()].rstrip(" (-/"), text[word.start() :]
        if not _is_unit(word[0]) or not re.search(r"[\d})%!]$|\\(?:pi|infty|circ)$", head):
            continue
        tokens = re.split(r"[\s/.,()'-]+|\^\s*\{?-?\d\}?", tail)
        if all(_is_unit(token) or token in _FILLERS for token in tokens if token):
            return head, tail
    return text, ""


def _is_unit(word: str) -> bool:
    return word in _SHORT_UNITS or (
        len(word) >= 3 and word.lower() not in _NO_UNITS and bool(re.search("[aeiouy]", word, re.IGNORECASE))
    )


def units_differ(first: str, second: str) -> bool:
    """Whether both are known units and not the same; units that are not known may be names of the same thing."""
    one, other = _unit(first), _unit(second)
    known = one[0] in _KNOWN_UNITS and other[0] in _KNOWN_UNITS
    return known and one != other


def _unit(text: str) -> tuple[str, int]:
    words = re.findall(r"[A-Za-z]+", text)
    power = re.search(r"\^\s*\{?(\d)\}?", text)
    words_power = 2 if {"square", "sq"} & set(words) else 3 if {"cubic", "cu"} & set(words) else 1
    names = [word for word in words if word not in ("square", "sq", "cubic", "cu")]
    name = names[0] if len(names) == 1 else ""
    name = name if name in _KNOWN_UNITS else name.lower().removesuffix("s")
    return _ALIASES.get(name, name), int(power[1]) if power else words_power


def has_words(text: str) -> bool:
    """Whether there are words outside of commands, which are not mathematics."""
    bare = _ENVIRONMENT.sub(" ", text)
    return any(word.lower() not in _FUNCTIONS for word in _WORD.findall(bare))


def is_number(text: str) -> bool:
    """Whether there are no letters but those of commands, so that words behind it can only be units."""
    return not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))


def words(text: str) -> str | None:
    """Text that is nothing but words, in lower case and without punctuation and article; None for anything else."""
    if not re.fullmatch(r"[A-Za-z()\s',.-]+", text) or not re.search(r"[A-Za-z]{3}|^\(?[A-Z]\)?$", text):
        return None
    plain = " ".join(re.findall("[a-z]+", text.lower()))
    return re.sub("^(?:the|an|a) (?=.)", "", plain)


def decimal(text: str) -> Fraction | None:
    """The value of a plain decimal number, with or without thousands separators; None for anything else."""
    if not re.fullmatch(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?", text) or not re.search(r"\d", text):
        return None
    return Fraction(text.replace(",", "").rstrip("."))


def close(first: Any, second: Any) -> bool:
    """Whether decimals agree to six decimal places and five digits."""
    difference, size = abs(first - second), max(abs(first), abs(second))
    return bool(difference <= Fraction(1, 10**6) and difference * 10**5 <= size)


def same_kind(first: str, second: str) -> bool:
    r"""False for a pair `(1,2)` beside a set `\{1,2\}`; a list without brackets is either."""
    return {_brackets(first), _brackets(second)} != {"(", "{"}


def _brackets(text: str) -> str:
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])\s*", "", text).strip()
    for opening, closing in ((r"\{", r"\}"), ("(", ")")):
        if text.startswith(opening) and text.endswith(closing) and "," in text:
            inside, depth = text[len(opening) : -len(closing)], 0
            for match in re.finditer(re.escape(opening) + "|" + re.escape(closing), inside):
                depth += 1 if match[0] == opening else -1
                if depth < 0:
                    return ""
            return opening[-1]
    return ""


def same_size(gold: Any, answer: Any) -> bool:
    """False if two SymPy expressions differ in relation to their own size.

    math-verify takes a difference below 1e-15 for 0, and 1/2004! and 1/2006! are both smaller than that. Expressions with
    variables are compared at one point; what has no numeric value counts as the same.
    """
    from sympy import Basic, Eq, Expr, FiniteSet, Float, Rational, Tuple, UnevaluatedExpr

    if isinstance(gold, Eq):
        gold = gold.rhs
    if isinstance(answer, Eq):
        answer = answer.rhs
    if isinstance(gold, (FiniteSet, Tuple)) and isinstance(answer, (FiniteSet, Tuple)):
        pairs = zip(_by_value(gold.args), _by_value(answer.args), strict=False)
        return all(same_size(one, other) for one, other in pairs)
    if not (isinstance(gold, Expr) and isinstance(answer, Expr) and gold.free_symbols == answer.free_symbols):
        return True
    point = {
        symbol: Rational(2 * number + 3, 7)
        for number, symbol in enumerate(sorted(gold.free_symbols, key=lambda symbol: str(symbol)))
    }
    per_cent = UnevaluatedExpr(Rational(1, 100))

    def value(expression: Basic, times: int) -> Any:
        # 20 % is 0.2, and 20 where the reference leaves the sign out.
        return expression.subs(per_cent, per_cent.args[0] * times).subs(point).doit().evalf(30)

    floats = bool(gold.atoms(Float) or answer.atoms(Float))
    for times in (1, 100):
        one, other = value(gold, times), value(answer, times)
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            return True
        size = max(abs(one), abs(other))
        # A value that is 0 without being simplified comes with no exact digit.
        if one == other or size.is_zero or all(number == 0 or number._prec == 1 for number in (one, other)):
            return True
        if abs(one - other) <= size * (Float("1e-5") if floats else Float("1e-12")):
            return True
    return False


def _by_value(items: Any) -> list[Any]:
    try:
        return sorted(items, key=lambda item: item.evalf())
    except (TypeError, AttributeError):
        return []
