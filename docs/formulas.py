"""The plain-text formulas of docstrings as TeX:  e = rho T^2 g / ||T g||_2  is  e = \\rho T^{2} g / \\|T g\\|_{2}."""

from __future__ import annotations

import re

GREEK = ("alpha", "beta", "gamma", "delta", "eta", "theta", "kappa", "lambda", "mu", "sigma", "tau", "rho", "Sigma")
NAMES = {name: name for name in (*GREEK, "max", "min", "sum")}
NAMES |= {"eps": "varepsilon", "lmbda": "lambda", "grad": "nabla", "inf": "infty"}
OPERATORS = ("argmax", "cos", "log", "sign", "tr", "Var")
SYMBOLS = {
    "||": r"\|",
    "<=": r"\le ",
    ">=": r"\ge ",
    "!=": r"\ne ",
    "->": r"\to ",
    "<-": r"\leftarrow ",
    "+-": r"\pm ",
    "-+": r"\mp ",
    "...": r"\ldots ",
    "~": r"\sim ",
    "⊗": r"\otimes ",
    "{": r"\{",
    "}": r"\}",
    "*": r"\cdot ",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
}
TOKEN = re.compile(
    r"""`(?P<code>[^`]+)` | (?P<attribute>[a-z]\.[a-z]\w+) | (?P<gap>[ ]{2,}) | (?P<space>[ ])
    | (?P<script>[_^](?:\{[^{}]*\}|\([^()]*\)|-?\w+'*|.))
    | <(?P<inner>[^<>=]+,[ ][^<>=]+)>
    | sqrt\((?P<root>(?:[^()]|\([^()]*\))*)\)
    | (?P<word>[A-Za-z]+)(?P<prime>'*)
    | (?P<symbol>\|\||<=|>=|!=|->|<-|\+-|-\+|\.\.\.|.)""",
    re.VERBOSE,
)
WORDS = re.compile(r"\\text\{ ?\w+ \}(?: \\text\{ \w+ ?\})+")  # in a row: one text


def tex(formula: str) -> str:
    """Words of two letters and more are text; single letters, Greek names and operators are symbols."""
    pieces = "".join(piece(match, formula) for match in TOKEN.finditer(formula))
    return WORDS.sub(lambda words: words[0].replace(r" } \text{ ", " "), pieces)


def piece(match: re.Match, formula: str) -> str:
    if code := match["code"] or match["attribute"]:
        return r"\text{" + code.replace("_", r"\_") + "}"
    if match["gap"]:
        return r"\quad "
    if script := match["script"]:
        inner = script[2:-1] if script[1] in "{(" else script[1:]
        return f"{script[0]}{{{tex(inner)}}}"
    if match["inner"]:
        return rf"\langle {tex(match['inner'])}\rangle "
    if match["root"]:
        return rf"\sqrt{{{tex(match['root'])}}}"
    if match["word"]:
        return word(match["word"], formula[: match.start()], formula[match.end("word") :]) + match["prime"]
    return SYMBOLS.get(match[0], match[0])


def word(text: str, before: str, after: str) -> str:
    """A symbol, or text with the spaces around it; `before` and `after` are the rest of the formula."""
    if text in NAMES:
        return rf"\{NAMES[text]} "
    if text in OPERATORS:
        return rf"\operatorname{{{text}}} "
    follows = re.match(r" ([a-z]{2,})", after)
    article = text == "a" and follows and follows[1] not in {*NAMES, *OPERATORS}
    if not article and (len(text) == 1 or text in ("dw", "dL") or set(text) <= set("ijk")):
        return text
    return rf"\text{{{' ' * before.endswith(' ')}{text}{' ' * after.startswith(' ')}}}"
